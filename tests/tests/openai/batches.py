#!/usr/bin/env python3
"""Drives files, uploads and batches of a gateway with the unmodified `openai` package; `http_batches.rs` starts both.

Environment: DOOR, the base URL; KEY and OTHER: keys of two tenants; LISTER: a key that may only list models. A file may
have 3,000,000 bytes. Ends with an exception if anything is not as it should be.
"""

import hashlib
import http.server
import io
import json
import os
import threading
import time

import openai
from openai import OpenAI

assert openai.__version__ == "3.57.0", openai.__version__


def client(key="KEY", **options):
    return OpenAI(base_url=os.environ["DOOR"], api_key=os.environ[key], **{"timeout": 60, **options})


def raises(kind, ask, **expected):
    try:
        answer = ask()
    except openai.OpenAIError as error:
        assert type(error) is kind, f"{type(error)}, not {kind}: {error}"
        for name, value in expected.items():
            assert getattr(error, name) == value, f"{name} is {getattr(error, name)!r}, not {value!r}: {error}"
        return error
    raise AssertionError(f"no {kind.__name__} but {answer!r}")


def line(number, script, **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": script}]}
    return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body, **fields}


def jsonl(lines):
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def ended(batch, door=None):
    began = time.monotonic()
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() - began < 60, batch
        time.sleep(0.05)
        batch = (door or client()).batches.retrieve(batch.id)
    return batch


def files():
    door, content = client(), os.urandom(1_000_000) + "ü\r\n--\r\n".encode()
    made = door.files.create(file=("dütä \"x\".bin", content), purpose="user_data")
    assert (made.object, made.bytes, made.purpose, made.status) == ("file", len(content), "user_data", "processed")
    assert made.filename == "dütä \"x\".bin" and made.expires_at is None and made.id.startswith("file-")
    assert door.files.retrieve(made.id) == made
    assert door.files.content(made.id).read() == content
    short = door.files.create(file=io.BytesIO(b""), purpose="vision",
                              expires_after={"anchor": "created_at", "seconds": 3600})
    assert short.filename == "upload" and short.expires_at == short.created_at + 3600 and short.bytes == 0
    assert door.files.content(short.id).read() == b""
    gone = door.files.delete(made.id)
    assert gone.deleted and gone.id == made.id
    raises(openai.NotFoundError, lambda: door.files.content(made.id), code="file_not_found")
    door.files.delete(short.id)


def refusals():
    door = client(max_retries=0)
    raises(openai.BadRequestError, lambda: door.files.create(file=b"x", purpose="fun"), code="invalid_parameter",
           param="purpose")
    raises(openai.BadRequestError, lambda: door.files.create(
        file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 5}),
        param="expires_after.seconds")
    raises(openai.APIStatusError, lambda: door.files.create(file=b"x" * 3_000_001, purpose="batch"),
           code="request_too_large", status_code=413, param="file")
    raises(openai.PermissionDeniedError, lambda: client("LISTER").files.list(), code="insufficient_permissions")
    raises(openai.PermissionDeniedError, lambda: client("LISTER").batches.list(), code="insufficient_permissions")
    create = door.batches.create
    good = {"completion_window": "24h", "endpoint": "/v1/chat/completions"}
    raises(openai.NotFoundError, lambda: create(**good, input_file_id="file-none"), code="file_not_found",
           param="input_file_id")
    other = door.files.create(file=b"x", purpose="user_data").id
    raises(openai.BadRequestError, lambda: create(**good, input_file_id=other), param="input_file_id")
    raises(openai.BadRequestError, lambda: create(**{**good, "endpoint": "/v1/embeddings"}, input_file_id=other),
           param="endpoint")
    raises(openai.BadRequestError, lambda: create(**{**good, "completion_window": "1s"}, input_file_id=other),
           param="completion_window")
    raises(openai.NotFoundError, lambda: door.batches.retrieve("batch_none"), code="batch_not_found")
    raises(openai.NotFoundError, lambda: door.uploads.cancel("upload_none"), code="upload_not_found")
    assert list(door.files.list()) == [door.files.retrieve(other)], "what was refused left nothing"
    door.files.delete(other)


def paging():
    door = client()
    ids = [door.files.create(file=str(number).encode(), purpose="evals").id for number in range(5)]
    assert [file.id for file in door.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in door.files.list(limit=2, order="asc")] == ids
    page = door.files.list(limit=3, purpose="evals")
    assert page.has_more and len(page.data) == 3 and len(page.get_next_page().data) == 2
    assert list(door.files.list(purpose="vision")) == []
    assert list(client("OTHER").files.list()) == []
    for name in (lambda file: client("OTHER").files.retrieve(file), lambda file: client("OTHER").files.delete(file),
                 lambda file: client("OTHER").files.content(file)):
        raises(openai.NotFoundError, lambda: name(ids[0]), code="file_not_found")
    [door.files.delete(file) for file in ids]


def uploads():
    door, content = client(), os.urandom(700_000)
    made = door.uploads.upload_file_chunked(
        file=content, filename="parts.bin", bytes=len(content), mime_type="application/octet-stream",
        purpose="user_data", part_size=200_000, md5=hashlib.md5(content).hexdigest())
    assert made.status == "completed" and made.file.bytes == len(content), made
    assert door.files.content(made.file.id).read() == content
    again = door.uploads.complete(made.id, part_ids=[])
    assert again.file == made.file, "a repetition changes nothing"
    door.files.delete(made.file.id)
    upload = door.uploads.create(bytes=4, filename="x", mime_type="text/plain", purpose="batch")
    assert upload.status == "pending" and upload.expires_at == upload.created_at + 3600
    first, second = [door.uploads.parts.create(upload.id, data=data).id for data in (b"ab", b"cd")]
    raises(openai.BadRequestError, lambda: door.uploads.complete(upload.id, part_ids=[first]), param="part_ids")
    raises(openai.BadRequestError, lambda: door.uploads.complete(upload.id, part_ids=[first, second], md5="00"),
           param="md5")
    raises(openai.NotFoundError, lambda: client("OTHER").uploads.parts.create(upload.id, data=b"x"),
           code="upload_not_found")
    made = door.uploads.complete(upload.id, part_ids=[second, first])
    assert door.files.content(made.file.id).read() == b"cdab"
    upload = door.uploads.create(bytes=4, filename="x", mime_type="text/plain", purpose="batch")
    assert door.uploads.cancel(upload.id).status == "cancelled"
    raises(openai.ConflictError, lambda: door.uploads.parts.create(upload.id, data=b"x"), code="invalid_state")
    door.files.delete(made.file.id)


def batches():
    door = client()
    scripts = [f"say {number}" for number in range(20)]
    scripts[7] = "refuse"
    file = door.files.create(file=jsonl(line(*entry) for entry in enumerate(scripts)), purpose="batch")
    assert file.expires_at == file.created_at + 30 * 86400
    made = door.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h",
                               metadata={"a": "b"}, output_expires_after={"anchor": "created_at", "seconds": 7200})
    assert made.status == "validating" and made.metadata == {"a": "b"} and made.expires_at == made.created_at + 86400
    raises(openai.NotFoundError, lambda: client("OTHER").batches.retrieve(made.id), code="batch_not_found")
    raises(openai.NotFoundError, lambda: client("OTHER").batches.cancel(made.id), code="batch_not_found")
    raises(openai.NotFoundError, lambda: client("OTHER").batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"), code="file_not_found")
    done = ended(made)
    assert done.status == "completed" and done.errors is None and done.model == "m", done
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (20, 19, 1), counts
    assert done.usage.input_tokens == 19 and done.usage.total_tokens == done.usage.output_tokens + 19
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    output = [json.loads(text) for text in door.files.content(done.output_file_id).text.splitlines()]
    assert [entry["custom_id"] for entry in output] == [f"c{number}" for number in range(20) if number != 7]
    for entry in output:
        answer = openai.types.chat.ChatCompletion.model_validate(entry["response"]["body"])
        assert "c" + answer.choices[0].message.content == entry["custom_id"] and entry["error"] is None
    [error] = [json.loads(text) for text in door.files.content(done.error_file_id).text.splitlines()]
    assert error["custom_id"] == "c7" and error["response"]["status_code"] == 400
    assert error["response"]["body"]["error"]["code"] == "invalid_request"
    made = door.files.retrieve(done.output_file_id)
    assert made.purpose == "batch_output" and made.expires_at == made.created_at + 7200
    raises(openai.ConflictError, lambda: door.batches.cancel(done.id), code="invalid_state")
    ids = [done.id] + [ended(door.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions",
                                                 completion_window="1h")).id for _ in range(3)]
    assert [batch.id for batch in door.batches.list(limit=2)] == ids[::-1]
    assert list(client("OTHER").batches.list()) == []


def validation():
    door = client()
    lines = jsonl([line(0, "say a"), line(0, "say b"), line(2, "say c", method="GET"), line(3, "say d", url="/v1/x")])
    lines = b"\n" + lines + b"{\n" + jsonl([line(4, "x", body={"model": "n", "messages": []})])
    file = door.files.create(file=lines, purpose="batch")
    failed = ended(door.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions",
                                       completion_window="24h"))
    assert failed.status == "failed" and failed.failed_at and failed.request_counts.total == 0
    found = [(error.line, error.code, error.param) for error in failed.errors.data]
    assert found == [(3, "duplicate_custom_id", "custom_id"), (4, "invalid_method", "method"),
                     (5, "invalid_url", "url"), (6, "invalid_json_line", None),
                     (7, "mismatched_model", "body.model")], found
    for content, code in [(b"\n\n", "empty_file"), (jsonl([line(0, "x", body={"model": "no", "messages": []})]),
                                                   "model_not_found")]:
        file = door.files.create(file=content, purpose="batch")
        failed = ended(door.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions",
                                           completion_window="24h"))
        assert [error.code for error in failed.errors.data] == [code], failed


def webhooks():
    heard = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append((self.rfile.read(int(self.headers["content-length"])), dict(self.headers)))
            # The first try fails, and is made again.
            self.send_response(500 if len(heard) == 1 else 204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    door, secret = client(), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    file = door.files.create(file=jsonl([line(0, "say a")]), purpose="batch")
    url = f"http://127.0.0.1:{server.server_port}/hook"
    asked = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    done = ended(door.batches.create(**asked, extra_body={"webhook": {"url": url, "secret": secret}}))
    assert "secret" not in done.to_json()
    began = time.monotonic()
    while len(heard) < 2:
        assert time.monotonic() - began < 30, heard
        time.sleep(0.05)
    for body, headers in heard:
        event = door.webhooks.unwrap(body, headers, secret=secret)
        assert event.type == "batch.completed" and event.data.id == done.id, event
    assert heard[0][1]["webhook-id"] == heard[1][1]["webhook-id"]
    raises(openai.BadRequestError, lambda: door.batches.create(
        **asked, extra_body={"webhook": {"url": url, "secret": "x"}}), param="webhook.secret")


def crowds():
    # More at once than the gateway takes at once: the others wait for their turn.
    door, seen = client(), []
    one = lambda number: seen.append(door.files.create(file=str(number).encode() * 100_000, purpose="evals").id)
    threads = [threading.Thread(target=one, args=(number,)) for number in range(24)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(seen) == sorted(file.id for file in door.files.list(purpose="evals"))
    assert len(seen) == 24


for test in [files, refusals, paging, uploads, batches, validation, webhooks, crowds]:
    test()
    print(f"{test.__name__}: as it should be", flush=True)
