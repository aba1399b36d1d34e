"""Writes expected.json: shapes of tokenizer folders, and the ids that transformers' AutoTokenizer gives on each.

The vocabularies are tiny and our own; the shapes are those of public folders: where special tokens, added tokens, the
beginning of sequence and templates stand. Run by `scripts/oracle`.
"""
import copy
import json
import pathlib
import tempfile

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).parent
TEXTS = ["hi", " hi there", "a<s>b", "x</s> <|user|>hi<|end|>", "<extra> y", "héllo 12345", "<lone> z<lone>", "", "\n\n  two"]
MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi <s> there"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ image_token }}"


def images():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, following = {byte: chr(byte) for byte in printable}, 256
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(following)
            following += 1
    return table


def byte_level(special=("<s>", "</s>"), begin=False, end=False, nfc=False, regex=True):
    table = images()
    vocab = {table[byte]: byte for byte in range(256)}
    merges = [("h", "i"), ("Ġ", "hi"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2"), ("l", "l")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.normalizer = normalizers.NFC() if nfc else None
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    made.decoder = decoders.ByteLevel()
    return finished(made, special, begin, end)


def finished(made, special, begin, end):
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if begin or end:
        single = ("<s> " if begin else "") + "$A" + (" </s>" if end else "")
        made.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(text, made.token_to_id(text)) for text in ("<s>", "</s>")])
    return json.loads(made.to_str())


def sentencepiece(begin=True, metaspace=False, scheme="first", kind="bpe"):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "h", "i", "t", "e", "r", "a", "b", "x", "y", "z", "l", "o", "hi", "▁hi", "th", "▁th", "the", "▁the", "ll"]
    vocab = {text: number for number, text in enumerate(pieces + words)}
    merges = [("h", "i"), ("▁", "hi"), ("t", "h"), ("▁", "th"), ("th", "e"), ("▁th", "e"), ("l", "l")]
    if kind == "bpe":
        made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    else:
        made = Tokenizer(models.Unigram([(text, -float(number)) for text, number in vocab.items()], unk_id=0, byte_fallback=True))
    if metaspace:
        made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=kind == "unigram")
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return finished(made, ("<unk>", "<s>", "</s>"), begin, False)


def qwen2():
    """As Qwen2's class makes it."""
    made = byte_level(special=(), nfc=True)
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, {**made["pre_tokenizer"], "use_regex": False}]}
    return made


def gemma():
    """As Gemma's class makes it."""
    made = sentencepiece(begin=False)
    made["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    made["pre_tokenizer"] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    made["decoder"]["decoders"].pop()
    return made


def token(text, **marks):
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True, **marks}


QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def shapes():
    """Tokenizer, tokenizer_config.json and further files by name."""
    plain, begun = byte_level(), byte_level(begin=True)
    saved = copy.deepcopy(begun)
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    decoder = {"263": token("<s>"), "264": token("</s>"), "265": token("<extra>"), "266": token("<lone>", special=False, normalized=True)}
    return {
        "plain": (plain, FAST, {}),
        "begun": (begun, {**FAST, **NAMES}, {}),
        "begun-ended": (byte_level(begin=True, end=True), {**FAST, **NAMES}, {}),
        "ended": (byte_level(end=True), {**FAST, **NAMES}, {}),
        "add-bos-true": (plain, {**FAST, **NAMES, "add_bos_token": True}, {}),
        "add-bos-false": (begun, {**FAST, **NAMES, "add_bos_token": False}, {}),
        "add-eos-true": (plain, {**FAST, **NAMES, "add_eos_token": True}, {}),
        "composed": (byte_level(nfc=True), {**FAST, **NAMES}, {}),
        "no-regex": (byte_level(regex=False), {**FAST, **NAMES}, {}),
        "saved-truncation": (saved, {**FAST, **NAMES}, {}),
        "map-alone": (plain, {**FAST, "chat_template": TEMPLATE}, {"special_tokens_map.json": {**NAMES, "pad_token": "</s>"}}),
        "map-of-objects": (plain, {**FAST, "chat_template": TEMPLATE}, {"special_tokens_map.json": {"bos_token": token("<s>"), "eos_token": token("<|end|>"), "unk_token": None}}),
        "map-above-config": (plain, {**FAST, "bos_token": "<x>", "eos_token": "</s>", "chat_template": TEMPLATE}, {"special_tokens_map.json": {"bos_token": "<s>"}}),
        "decoder-above-map": (plain, {**FAST, **NAMES, "added_tokens_decoder": decoder, "chat_template": TEMPLATE}, {"special_tokens_map.json": {"bos_token": "<|user|>", "pad_token": "</s>"}}),
        "decoder-adds": (plain, {**FAST, **NAMES, "added_tokens_decoder": decoder}, {}),
        "decoder-strips": (plain, {**FAST, **NAMES, "added_tokens_decoder": {"263": token("<s>", lstrip=True), "264": token("</s>", rstrip=True), "265": token("<|user|>", rstrip=True, special=False)}}, {}),
        "decoder-normalizes": (byte_level(nfc=True), {**FAST, **NAMES, "added_tokens_decoder": {"263": token("<s>", normalized=True), "265": token("<lone>", single_word=True)}}, {}),
        "added-file": (plain, {**FAST, **NAMES}, {"added_tokens.json": {"<extra>": 265, "<|user|>": 266}}),
        "added-file-special": (plain, {**FAST, **NAMES, "pad_token": "<extra>", "chat_template": TEMPLATE}, {"added_tokens.json": {"<extra>": 265}}),
        "additional": (plain, {**FAST, **NAMES, "additional_special_tokens": ["<|user|>", "<|end|>"], "chat_template": TEMPLATE}, {}),
        "additional-objects": (plain, {**FAST, **NAMES, "additional_special_tokens": [{"__type": "AddedToken", **token("<|user|>", rstrip=True)}]}, {}),
        "extra-list": (plain, {**FAST, **NAMES, "extra_special_tokens": ["<|user|>", "<lone>"]}, {}),
        "extra-names": (plain, {**FAST, **NAMES, "extra_special_tokens": {"image_token": "<extra>"}, "chat_template": TEMPLATE}, {}),
        "own-name": (plain, {**FAST, **NAMES, "image_token": "<extra>", "chat_template": TEMPLATE}, {}),
        "extra-in-map": (plain, {**FAST, **NAMES}, {"special_tokens_map.json": {"additional_special_tokens": ["<|user|>", "<|end|>"]}}),
        "typed-token": (plain, {**FAST, "bos_token": {"__type": "AddedToken", **token("<s>")}, "eos_token": {"__type": "AddedToken", **token("<|end|>")}, "chat_template": TEMPLATE}, {}),
        "new-eos": (plain, {**FAST, "eos_token": "<|end|>", "pad_token": "<extra>", "chat_template": TEMPLATE}, {}),
        "split": (begun, {**FAST, **NAMES, "split_special_tokens": True, "chat_template": TEMPLATE}, {}),
        "template-file": (begun, {**FAST, **NAMES, "chat_template": "config"}, {"chat_template.jinja": "\n" + TEMPLATE + "\n"}),
        "template-list": (begun, {**FAST, **NAMES, "chat_template": [{"name": "tool_use", "template": "tools " + TEMPLATE}, {"name": "default", "template": TEMPLATE}]}, {}),
        "template-folder": (begun, {**FAST, **NAMES, "chat_template": "config"}, {"chat_template.jinja": TEMPLATE, "additional_chat_templates/tool_use.jinja": "tools " + TEMPLATE, "additional_chat_templates/rag.jinja": "rag"}),
        "template-crlf": (begun, {**FAST, **NAMES}, {"chat_template.jinja": "{% for m in messages %}\r\n{{ m.content }}\r\n{% endfor %}\r\n"}),
        "backend-class": (begun, {"tokenizer_class": "TokenizersBackend", **NAMES, "chat_template": TEMPLATE}, {}),
        "llama-class-bytes": (begun, {"tokenizer_class": "LlamaTokenizerFast", **NAMES, "chat_template": TEMPLATE}, {}),
        "class-llama": (sentencepiece(metaspace=True), {"tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATE}, {}),
        "class-llama-null": (sentencepiece(metaspace=True), {"tokenizer_class": "LlamaTokenizerFast", "bos_token": None, "chat_template": TEMPLATE}, {}),
        "class-qwen2": (qwen2(), {"tokenizer_class": "Qwen2TokenizerFast", "chat_template": TEMPLATE}, {}),
        "class-by-model": (qwen2(), {"chat_template": TEMPLATE}, {"config.json": {"model_type": "qwen2"}}),
        "class-gemma": (gemma(), {"tokenizer_class": "GemmaTokenizer", "chat_template": TEMPLATE}, {}),
        "class-gpt2": (plain, {"tokenizer_class": "GPT2Tokenizer", "chat_template": TEMPLATE}, {}),
        "class-of-config": (plain, {"chat_template": TEMPLATE}, {"config.json": {"model_type": "llama", "tokenizer_class": "GPT2TokenizerFast"}}),
        "no-config": (begun, {}, {"chat_template.jinja": TEMPLATE}),
        "unknown-unk": (begun, {**FAST, **NAMES, "unk_token": "<nope>", "chat_template": TEMPLATE}, {}),
        "named-word": (begun, {**FAST, **NAMES, "extra_special_tokens": {"a_token": "hi"}, "chat_template": TEMPLATE + "{{ a_token }}"}, {}),
        "additional-word": (begun, {**FAST, **NAMES, "additional_special_tokens": ["hi"], "chat_template": TEMPLATE}, {}),
        "additional-and-extra": (begun, {**FAST, **NAMES, "additional_special_tokens": ["hi"], "extra_special_tokens": ["the"], "chat_template": TEMPLATE}, {}),
        "own-word": (begun, {**FAST, **NAMES, "image_token": "hi", "chat_template": TEMPLATE}, {}),
        "model-specific": (begun, {**FAST, **NAMES, "model_specific_special_tokens": {"boi_token": "<|user|>", "image_token": "<extra>"}, "chat_template": TEMPLATE + "{{ boi_token }}"}, {}),
        "neutral-keys": (begun, {**FAST, **NAMES, "add_prefix_space": True, "legacy": True, "do_lower_case": True, "model_max_length": 3, "max_length": 2, "clean_up_tokenization_spaces": True, "truncation_side": "left", "chat_template": TEMPLATE}, {}),
        "pieces-word": (sentencepiece(), {**FAST, **NAMES, "additional_special_tokens": ["hi"], "unk_token": "<nope>", "chat_template": TEMPLATE}, {}),
        "pieces": (sentencepiece(), {**FAST, **NAMES, "unk_token": "<unk>", "chat_template": TEMPLATE}, {}),
        "pieces-not-begun": (sentencepiece(begin=False), {**FAST, **NAMES}, {}),
        "pieces-added": (sentencepiece(), {**FAST, **NAMES, "additional_special_tokens": ["<|user|>", "<|end|>"], "chat_template": TEMPLATE}, {}),
        "pieces-metaspace": (sentencepiece(metaspace=True), {**FAST, **NAMES, "chat_template": TEMPLATE}, {}),
        "pieces-always": (sentencepiece(metaspace=True, scheme="always"), {**FAST, **NAMES}, {}),
        "pieces-never": (sentencepiece(metaspace=True, scheme="never"), {**FAST, **NAMES}, {}),
        "unigram": (sentencepiece(metaspace=True, kind="unigram"), {**FAST, **NAMES, "unk_token": "<unk>", "chat_template": TEMPLATE}, {}),
    }


def written(folder, tokenizer, config, files):
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())


def ids_of(shape):
    with tempfile.TemporaryDirectory() as folder:
        written(pathlib.Path(folder), *shape)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        chats = []
        for tools in (None, TOOLS):
            try:
                chats.append(tokenizer.apply_chat_template(MESSAGES, tools=tools, add_generation_prompt=True, return_dict=False))
            except ValueError:
                chats.append(None)
        encode = lambda text, special: tokenizer(text, add_special_tokens=special)["input_ids"]
        decoded = [tokenizer.decode(encode(text, True), skip_special_tokens=True) for text in TEXTS]
        return {"special": [encode(text, True) for text in TEXTS], "bare": [encode(text, False) for text in TEXTS],
                "chats": chats, "decoded": decoded}


expected, tokenizers, kept = {}, [], {}
for name, shape in shapes().items():
    if shape[0] not in tokenizers:
        tokenizers.append(shape[0])
    kept[name] = {"tokenizer": tokenizers.index(shape[0]), "config": shape[1], "files": shape[2], **ids_of(shape)}
golden = {"texts": TEXTS, "messages": MESSAGES, "tools": TOOLS, "tokenizers": tokenizers, "shapes": kept}
(HERE / "expected.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n")
print(f"{len(kept)} folders, {sum(map(len, (shape['special'] for shape in kept.values())))} texts each with and without special tokens")
