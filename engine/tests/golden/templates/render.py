#!/usr/bin/env python3
"""Writes expected.json: the conversations of cases.json through each template, rendered by Jinja2.

Jinja2 runs with the settings and functions of transformers' apply_chat_template
(transformers/utils/chat_template_utils.py), so that the files are an independent reference for the worker's
renderer. Needs jinja2; run it after a change of templates or cases.
"""
import datetime
import json
import pathlib

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

CREATED = 1_795_428_123
HERE = pathlib.Path(__file__).parent


class Generation(jinja2.ext.Extension):
    """The tag marks what the assistant wrote; outside of training it renders its content."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(form):
    return datetime.datetime.fromtimestamp(CREATED, datetime.timezone.utc).strftime(form)


def environment():
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def with_names(message):
    """The assistant's reasoning goes by each of its names, as transformers 5.24 has it."""
    reasoning = message.get("reasoning_content")
    return message if reasoning is None else {"thinking": reasoning, **message}


def render(template, case):
    variables = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None}
    variables |= case.get("variables", {})
    try:
        return {"text": template.render(
            messages=[with_names(message) for message in case["messages"]],
            add_generation_prompt=case.get("add_generation_prompt", True), **variables)}
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}


def main():
    cases = json.loads((HERE / "cases.json").read_text())
    env = environment()
    expected = {}
    for path in sorted(HERE.glob("*.jinja")):
        template = env.from_string(path.read_text())
        expected[path.stem] = {name: render(template, case) for name, case in cases.items()}
    (HERE / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n")


main()
