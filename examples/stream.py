#!/usr/bin/env python3
"""Many chats on one WebSocket, each printed when it is done: stream.py ws://HOST:PORT MODEL TEXT... (package `websockets`).

A connection that breaks is made again, and each chat goes on behind the last character that came.
"""

import asyncio
import json
import os
import sys

import websockets


async def talk(url, model, texts):
    key = os.environ.get("MILLRACE_API_KEY", "none")
    chats = {str(number): {"text": text, "job": None, "seen": ""} for number, text in enumerate(texts)}
    async for socket in websockets.connect(f"{url}/v1/stream", additional_headers={"Authorization": f"Bearer {key}"}):
        try:
            for number, chat in chats.items():
                if chat["job"]:
                    again = {"type": "resume", "id": number, "job": chat["job"], "after": [len(chat["seen"])]}
                else:
                    body = {"model": model, "messages": [{"role": "user", "content": chat["text"]}], "max_tokens": 200}
                    again = {"type": "generate", "id": number, "body": body, "background": True}
                await socket.send(json.dumps(again))
            while chats:
                said = json.loads(await socket.recv())
                if said["type"] == "accepted":
                    chats[said["id"]]["job"] = said["job"]
                elif said["type"] == "delta":
                    chats[said["id"]]["seen"] += said["text"]
                elif said["type"] == "done":
                    chat = chats.pop(said["id"])
                    print(f"{chat['text']}\n{chat['seen']}\n", flush=True)
                else:
                    sys.exit(f"{said['id']}: {said['error']['message']}")
            return
        except websockets.ConnectionClosed:
            print("the connection broke; once more", file=sys.stderr)


asyncio.run(talk(sys.argv[1], sys.argv[2], sys.argv[3:]))
