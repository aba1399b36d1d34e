"""Writes expected.json: each conversation through each template as transformers renders it, shortened to a digest.

A request's conversation is first put into the form that transformers takes: what it leaves to its callers (arguments of
calls as JSON text, texts in parts for templates that take none, the role `developer`) is done here as the engine
documents it. Run by `scripts/oracle`; `render.py NAME CONVERSATION` prints one text.
"""
import datetime
import hashlib
import json
import pathlib
import sys

from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import _normalize_chat_messages, render_jinja_template

import conversations
import templates

HERE = pathlib.Path(__file__).parent
CREATED = 1_795_428_123
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
BOOKKEEPING = {"refusal", "annotations", "audio", "function_call"}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(CREATED, datetime.timezone.utc).replace(tzinfo=None)


chat_template_utils.datetime = Clock


def run(source, messages, **rest):
    rest = {"add_generation_prompt": True, **rest}
    texts, _ = render_jinja_template([messages], chat_template=source, **SPECIAL, **rest)
    return texts[0]


def takes_parts(source):
    parts = [{"type": "text", "text": "FIRST PART"}, {"type": "text", "text": "SECOND PART"}]
    try:
        text = run(source, [{"role": "user", "content": parts}])
    except Exception:
        return False
    return "FIRST PART" in text and "SECOND PART" in text and "'text'" not in text and '"text"' not in text


def prepared(messages, source, parts):
    made = []
    for message in _normalize_chat_messages(messages):
        message = {name: value for name, value in message.items() if name not in BOOKKEEPING}
        if message["role"] == "developer" and "developer" not in source:
            message["role"] = "system"
        if isinstance(message.get("content"), list) and not parts:
            message["content"] = "\n".join(part["text"] for part in message["content"])
        if not message.get("tool_calls", True):
            del message["tool_calls"]
        calls = []
        for call in message.get("tool_calls", []):
            function = dict(call["function"])
            if isinstance(function["arguments"], str):
                function["arguments"] = json.loads(function["arguments"] or "{}")
            calls.append({**call, "function": function})
        if calls:
            message["tool_calls"] = calls
        elif message["role"] == "assistant":
            message.setdefault("content", "")
        made.append(message)
    return made


def render(source, request):
    request = dict(request)
    messages = prepared(request.pop("messages"), source, takes_parts(source))
    rest = request.pop("chat_template_kwargs", {})
    if request.get("continue_final_message"):
        request["add_generation_prompt"] = False
    if not request.get("tools"):
        request.pop("tools", None)
    try:
        return run(source, messages, **request, **rest)
    except Exception as error:
        return error


def digest(text):
    return "error" if isinstance(text, Exception) else hashlib.sha256(text.encode()).hexdigest()[:16]


shapes, talks = templates.shapes(), conversations.all_of_them()
if len(sys.argv) == 3:
    print(repr(render(shapes[sys.argv[1]], talks[sys.argv[2]])))
    sys.exit()
expected = {name: {talk: digest(render(source, request)) for talk, request in talks.items()} for name, source in shapes.items()}
for name, texts in expected.items():
    assert set(texts.values()) != {"error"}, name
golden = {"templates": shapes, "conversations": talks, "expected": expected}
(HERE / "expected.json").write_text(json.dumps(golden, indent=0, ensure_ascii=False) + "\n")
pairs = [text for texts in expected.values() for text in texts.values()]
print(f"{len(shapes)} templates, {len(talks)} conversations, {len(pairs)} texts, {pairs.count('error')} of them errors")
