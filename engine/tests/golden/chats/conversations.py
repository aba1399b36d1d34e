"""Conversations with what requests bring along. `all_of_them()` gives them by name, as the fields of a request."""


def said(*turns, **rest):
    roles = {"s": "system", "u": "user", "a": "assistant", "d": "developer"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns], **rest}


def call(name, arguments, number="abc123def"):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, properties, required=(), **rest):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters, **rest}}


WEATHER = tool("weather", {"city": {"type": "string", "description": "Where"}, "days": {"type": "integer", "default": 3}}, ["city"])
NESTED = tool("store", {
    "tags": {"type": "array", "items": {"type": "string"}, "description": "Marks"},
    "grid": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
    "rows": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": ["string", "null"]}}, "required": ["a"]}},
    "any": {"type": "array"}, "mode": {"type": "string", "enum": ["fast", "slow"]}})
FLOATS = tool("limits", {
    "low": {"type": "number", "minimum": 1e-7, "maximum": 1e16, "default": 0.1}, "exact": {"type": "number", "default": 1.0},
    "big": {"type": "integer", "maximum": 18446744073709551616, "minimum": -9223372036854775808},
    "tiny": {"type": "number", "multipleOf": 1e-05, "default": 123456789012345678.0}, "half": {"type": "number", "default": -0.0}})
EMPTY = tool("nothing", {}, strict=False)
FOREIGN = tool("übersetze", {"größe": {"type": "string", "description": "日本語 <b>&</b> \u2028 \"quoted\" 'single'\n"}, "e": {"type": "array", "items": {}, "examples": []}})
HISTORY = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [call("weather", {"city": "Paris", "days": 2, "scale": 1.50, "deep": {"a": [1, None, True, "é"]}})]},
    {"role": "tool", "tool_call_id": "abc123def", "name": "weather", "content": "{\"t\": 21.5}"},
    {"role": "assistant", "content": "It is 21.5."},
    {"role": "user", "content": "And Rome?"},
]


def all_of_them():
    return {
        "hello": said("u:Hi"),
        "hello-closed": said("u:Hi", add_generation_prompt=False),
        "system": said("s:Be brief.", "u:Hi"),
        "turns": said("u:One", "a:Two", "u:Three"),
        "turns-system": said("s:S", "u:One", "a:Two", "u:Three", "a:Four", "u:Five"),
        "two-systems": said("s:S", "s:T", "u:One"),
        "ends-with-assistant": said("u:One", "a:Two"),
        "assistant-first": said("a:Hello!", "u:Hi"),
        "two-users": said("u:One", "u:Two"),
        "developer": said("d:Obey.", "u:Hi"),
        "empty-content": said("u:", "a:", "u:x"),
        "blanks": said("u:  spaced \n\n", "a:\tx\n", "u: y "),
        "line-ends": said("u:a\r\nb\rc\n", "a:x\u2028y", "u:z"),
        "many-scripts": said("s:Ünï", "u:日本語 ñ ß 😀 \u200b\u00a0|", "a:ΑΣ \u0301e", "u:עברית"),
        "quotes": said("u:it's \"quoted\" \\ `back`", "a:'single'", "u:\"double\""),
        "markup": said("u:<b>&amp;</b> {{ x }} {% if %} {# c #}", "a:<|im_end|></s>", "u:%s {} %d"),
        "thought": said("u:Q", "a:<think>\nhm\n</think>\n\nA", "u:Q2"),
        "reasoning": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "because"}, {"role": "user", "content": "Q2"}]},
        "reasoning-new-name": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning": "since"}, {"role": "user", "content": "Q2"}]},
        "as-servers-return": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": [], "reasoning_content": None}, {"role": "user", "content": "z"}]},
        "names": {"messages": [{"role": "user", "name": "ann", "content": "Hi"}, {"role": "assistant", "content": "Hello", "name": "bot"}, {"role": "user", "content": "x", "name": None}]},
        "one-part": {"messages": [{"role": "user", "content": [{"type": "text", "text": "only"}]}]},
        "parts": {"messages": [{"role": "system", "content": [{"type": "text", "text": "S"}]}, {"role": "user", "content": [{"type": "text", "text": "first"}, {"type": "text", "text": "second "}]}]},
        "tool-weather": {**said("u:Weather?"), "tools": [WEATHER]},
        "tool-system": {**said("s:Help.", "u:Weather?"), "tools": [WEATHER, EMPTY]},
        "tool-nested": {**said("u:Store"), "tools": [NESTED]},
        "tool-floats": {**said("u:Limits"), "tools": [FLOATS]},
        "tool-foreign": {**said("u:ü"), "tools": [FOREIGN, NESTED]},
        "tool-history": {"messages": HISTORY, "tools": [WEATHER]},
        "tool-history-alone": {"messages": HISTORY},
        "tool-text-arguments": {"messages": [HISTORY[0], {"role": "assistant", "tool_calls": [call("weather", "{\"city\": \"Paris\", \"x\": 1e-7}")]}, {**HISTORY[2], "name": None}], "tools": [WEATHER]},
        "tool-two-calls": {"messages": [HISTORY[0], {"role": "assistant", "content": "Looking.", "tool_calls": [call("weather", {"city": "Paris"}), call("weather", {}, "zzz999zzz")]}, HISTORY[2], {**HISTORY[2], "tool_call_id": "zzz999zzz"}], "tools": [WEATHER]},
        "empty-tools": {**said("u:Hi"), "tools": []},
        "documents": {**said("u:Hi"), "documents": [{"title": "T", "text": "Body"}, {"name": "N", "text": "é"}]},
        "thinking-off": {**said("u:Hi"), "chat_template_kwargs": {"enable_thinking": False, "thinking": True}},
        "numbers": {**said("u:Hi"), "chat_template_kwargs": {"number": 1e-05, "flag": True, "name": None, "bag": {"b": 1e22, "a": [1.0, 2**64, -0.5, 1e16, 123456789012345678.0]}}},
        "more-numbers": {**said("u:Hi"), "chat_template_kwargs": {"number": 18446744073709551616, "flag": False, "name": "n", "bag": {"x": 0.30000000000000004, "y": 5e-324, "z": 1.7976931348623157e308}}},
        "continued": {**said("u:Count", "a:1, 2,"), "continue_final_message": True},
        "continued-blank": {**said("u:Count", "a:1, 2, "), "continue_final_message": True},
    }
