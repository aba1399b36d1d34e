#!/usr/bin/env python3
"""Drives the unmodified `openai` package against a gateway; `http_openai.rs` starts both.

Environment: DOOR, the base URL; MILLRACE, the command line; BROKER, its address; KEY, LISTER, REVOKED: keys that may
do all, that may only list, that was revoked; FULL, a model whose queue is full; CLOSED, a URL where nobody listens.
Ends with an exception if anything is not as it should be.
"""

import os
import subprocess
import threading
import time

import openai
from openai import OpenAI

assert openai.__version__ == "3.57.0", openai.__version__
DOOR = os.environ["DOOR"]
MODEL = "m"


def client(**options):
    options = {"base_url": DOOR, "api_key": os.environ["KEY"], "timeout": 30, **options}
    return OpenAI(**options)


def user(text):
    return [{"role": "user", "content": text}]


def raises(kind, ask, **expected):
    try:
        answer = ask()
    except openai.OpenAIError as error:
        assert type(error) is kind, f"{type(error)}, not {kind}: {error}"
        for name, value in expected.items():
            assert getattr(error, name) == value, f"{name} is {getattr(error, name)!r}, not {value!r}"
        return error
    raise AssertionError(f"no {kind.__name__} but {answer!r}")


def models():
    found = list(client().models.list())
    assert MODEL in [model.id for model in found], found
    assert client().models.retrieve(MODEL).owned_by == "default"
    assert client().models.retrieve("default/m").id == MODEL
    raises(openai.NotFoundError, lambda: client().models.retrieve("org/mo del"), code="model_not_found", param="model")


def chats():
    answer = client().chat.completions.create(model=MODEL, messages=user("say hello world"), n=2, presence_penalty=None)
    assert [choice.message.content for choice in answer.choices] == ["hello world"] * 2
    assert answer._request_id.startswith("req-") and answer.id == f"chatcmpl-{answer._request_id}"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    # With the helper, which looks at every field that it needs.
    parsed = client().chat.completions.parse(model=MODEL, messages=user("say hello"))
    assert parsed.choices[0].message.content == "hello"
    # Without background a client that is gone leaves nothing; sent from an own thread, two at once do not mix.
    seen = []
    ask = lambda text: seen.append(client().chat.completions.create(model=MODEL, messages=user(f"slow {text}")))
    threads = [threading.Thread(target=ask, args=(f"a{number} b c",)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(answer.choices[0].message.content for answer in seen) == [f"a{number} b c" for number in range(8)]


def completions():
    answer = client().completions.create(model=f"default/{MODEL}", prompt="say more")
    assert (answer.object, answer.choices[0].text) == ("text_completion", "more")
    chunks = list(client().completions.create(model=MODEL, prompt="say one two three", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two three"


def streams():
    text = "begin " + " ".join(f"w{number}" for number in range(300))
    for script in ["say", "lose", "mute", "slow"]:
        wanted = text if script != "slow" else "a b c d"
        asked = {"model": MODEL, "messages": user(f"{script} {wanted}"), "stream_options": {"include_usage": True}}
        chunks = list(client().chat.completions.create(**asked, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == wanted, script
        assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > 0
        # The helper asserts on each chunk's form.
        with client().chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion()
        assert final.choices[0].message.content == wanted and final.choices[0].finish_reason == "stop"


def responses():
    api = client().responses
    answer = api.create(model=MODEL, input="say hello world", instructions=None, metadata={"order": "66"})
    assert (answer.status, answer.output_text, answer.error) == ("completed", "hello world", None)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert api.retrieve(answer.id).metadata == {"order": "66"}
    # What a client sends back of an earlier turn, and a turn that the gateway remembers.
    again = api.create(model=MODEL, input=[*answer.output, {"role": "user", "content": "say more"}])
    assert again.output_text == "more"
    more = api.create(model=MODEL, previous_response_id=answer.id, input=[
        {"role": "user", "content": [{"type": "input_text", "text": "say even more"}]}])
    assert (more.output_text, more.previous_response_id) == ("even more", answer.id)
    assert [item.content[0].text for item in api.input_items.list(more.id)] == ["say even more"]
    later = api.create(model=MODEL, input="slow a b c", background=True)
    assert later.status == "queued" and later.output_text == ""
    while later.status in ("queued", "in_progress"):
        time.sleep(0.05)
        later = api.retrieve(later.id)
    assert (later.status, later.output_text) == ("completed", "a b c")
    assert api.cancel(api.create(model=MODEL, input="hang", background=True).id).status == "cancelled"
    api.delete(answer.id)
    raises(openai.NotFoundError, lambda: api.retrieve(answer.id), code="job_not_found")
    raises(openai.BadRequestError, lambda: api.create(model=MODEL, input="say x", tools=[{"type": "web_search"}]),
           code="invalid_parameter", param="tools")
    raises(openai.BadRequestError, lambda: api.create(model=MODEL, input="nonsense"), code="invalid_request")


def response_streams():
    api = client().responses
    wanted = "begin " + " ".join(f"w{number}" for number in range(100))
    for script in ["say", "lose", "mute"]:
        # The helper puts the response together from the events, and asserts on their order.
        with api.stream(model=MODEL, input=f"{script} {wanted}") as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            assert text == wanted == stream.get_final_response().output_text, script
    # Cut off in the middle, it goes on after the last event that came.
    stream = api.create(model=MODEL, input=f"slow {wanted[:60]}", background=True, stream=True)
    seen = []
    for event in stream:
        seen.append(event)
        if len(seen) == 6:
            stream.close()
            break
    seen += list(api.retrieve(seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number))
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert text == wanted[:60] == seen[-1].response.output_text, text
    numbers = [event.sequence_number for event in seen]
    assert numbers == sorted(set(numbers)), numbers


def pings():
    # Silence is longer than the client bears, and pings break it.
    chunks = client(timeout=4, max_retries=0).chat.completions.create(
        model=MODEL, messages=user("hang"), stream=True, extra_headers={"millrace-deadline": "8s"})
    raises(openai.APIError, lambda: list(chunks), code="deadline_exceeded", type="server_error")


def errors():
    chat = lambda text, **options: client(**options).chat.completions.create(model=MODEL, messages=user(text))
    once = {"max_retries": 0}
    raises(openai.BadRequestError, lambda: chat("nonsense"), code="invalid_request", param="messages[0].content",
           type="invalid_request_error", status_code=400)
    raises(openai.AuthenticationError, lambda: chat("say x", api_key="wrong"), code="invalid_api_key")
    raises(openai.AuthenticationError, lambda: chat("say x", api_key=os.environ["REVOKED"]), code="invalid_api_key")
    raises(openai.PermissionDeniedError, lambda: chat("say x", api_key=os.environ["LISTER"]),
           code="insufficient_permissions")
    assert MODEL in [model.id for model in client(api_key=os.environ["LISTER"]).models.list()]
    # Somebody else cancels the job: a conflict, and not tried again.
    cancel = [os.environ["MILLRACE"], "--server", os.environ["BROKER"], "-m", MODEL, "cancel", "--all-pending"]
    timer = threading.Timer(1, subprocess.run, [cancel], {"check": True, "capture_output": True})
    timer.start()
    error = raises(openai.ConflictError, lambda: chat("hang"), code="cancelled")
    assert error.response.request.headers["x-stainless-retry-count"] == "0"
    timer.join()
    raises(openai.NotFoundError, lambda: client().embeddings.create(model=MODEL, input="x"), code="unknown_url")
    raises(openai.APIStatusError, lambda: chat("say " + "x" * (1 << 20)), code="request_too_large", status_code=413)
    raises(openai.APIConnectionError, lambda: chat("say x", base_url=os.environ["CLOSED"], **once))
    raises(openai.APITimeoutError, lambda: chat("hang", timeout=0.5, **once))
    late = {"max_retries": 2, "default_headers": {"millrace-deadline": "1s"}}
    raises(openai.InternalServerError, lambda: chat("hang", **late), code="deadline_exceeded", status_code=504)


def retries():
    raw = client().chat.completions.with_raw_response
    # What trying again cannot help is not tried again.
    for script, kind in [("fail", openai.InternalServerError), ("nonsense", openai.BadRequestError)]:
        began = time.monotonic()
        error = raises(kind, lambda: raw.create(model=MODEL, messages=user(script)))
        assert error.response.request.headers["x-stainless-retry-count"] == "0", script
        assert time.monotonic() - began < 5
    # A full queue is tried again, after as long as it says.
    short = client(max_retries=1)
    began = time.monotonic()
    error = raises(openai.InternalServerError, lambda: short.chat.completions.create(
        model=os.environ["FULL"], messages=user("say x")), code="queue_full", status_code=503)
    assert error.response.request.headers["x-stainless-retry-count"] == "1"
    assert time.monotonic() - began >= 10


for test in [models, chats, completions, streams, responses, response_streams, pings, errors, retries]:
    test()
    print(f"{test.__name__}: as it should be", flush=True)
