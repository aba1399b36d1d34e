"""Writes expected.json: each line of snippets.txt (`\\n` at its end goes on) as Jinja2 renders it.

Jinja2 runs as transformers runs it, through `transformers.utils.chat_template_utils`, with the clock of CREATED. Run by
`scripts/oracle`.
"""
import datetime
import json
import pathlib

from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
CREATED = 1_795_428_123


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.fromtimestamp(CREATED, datetime.timezone.utc).replace(tzinfo=None)


chat_template_utils.datetime = Clock
CONTEXT = {
    "d": {"k": "v", "n": 1},
    "schema": {"type": "array", "items": {"type": "string"}, "get": 1},
    "big": 2**70,
    "small": 1.5e-9,
    "tools": None,
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "bye"}],
}


def snippets():
    """Templates of several lines are parted by lines that begin a new one: `---` between them."""
    return [part.strip("\n") for part in (HERE / "snippets.txt").read_text().split("\n---\n")]


def render(source):
    try:
        template = chat_template_utils._compile_jinja_template(source)
    except Exception as error:
        return {"refused": type(error).__name__}
    try:
        return template.render(**CONTEXT)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


expected = [[source, render(source)] for source in snippets()]
(HERE / "expected.json").write_text(json.dumps({"context": CONTEXT, "snippets": expected}, indent=0, ensure_ascii=False) + "\n")
