"""Writes a model folder of a config's true shape, for timing a start: small random weights in bf16.

usage: checkpoint.py CONFIG FOLDER      FOLDER should lie in memory (/dev/shm), so that reading it is like reading the page cache
"""

import json
import os
import shutil
import sys
from pathlib import Path

# Bytes of one pattern of weights; it repeats.
PATTERN_BYTES = 64 << 20
# Layers in one file.
SHARD_LAYERS = 8


def layer(config: dict, index: int) -> dict[str, list[int]]:
    hidden, middle, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = config.get("head_dim", hidden // heads)
    queries, keys = heads * width, config["num_key_value_heads"] * width
    shapes = {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [queries, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, queries],
        "mlp.gate_proj": [middle, hidden],
        "mlp.up_proj": [middle, hidden],
        "mlp.down_proj": [hidden, middle],
    }
    if config["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm": [width], "self_attn.k_norm": [width]}
    return {f"model.layers.{index}.{name}.weight": shape for name, shape in shapes.items()}


def shards(config: dict) -> list[dict[str, list[int]]]:
    table = [config["vocab_size"], config["hidden_size"]]
    ends = {"model.embed_tokens.weight": table, "model.norm.weight": [config["hidden_size"]]}
    if not config["tie_word_embeddings"]:
        ends["lm_head.weight"] = table
    layers = [layer(config, index) for index in range(config["num_hidden_layers"])]
    groups = [layers[first : first + SHARD_LAYERS] for first in range(0, len(layers), SHARD_LAYERS)]
    return [ends] + [{name: shape for one in group for name, shape in one.items()} for group in groups]


def pattern() -> bytes:
    """bf16 numbers of either sign between 2^-8 and 2^-6: the upper byte is 3b, 3c, bb or bc."""
    low, high = os.urandom(PATTERN_BYTES // 2), os.urandom(PATTERN_BYTES // 2)
    numbers = bytearray(PATTERN_BYTES)
    numbers[0::2] = low
    numbers[1::2] = high.translate(bytes([0x3B, 0x3C, 0xBB, 0xBC][byte % 4] for byte in range(256)))
    return bytes(numbers)


def write(path: Path, shapes: dict[str, list[int]], numbers: bytes) -> None:
    entries, end = {}, 0
    for name, shape in shapes.items():
        count = 2
        for size in shape:
            count *= size
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + count]}
        end += count
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        while end > 0:
            end -= file.write(numbers[: min(end, len(numbers))])


def main() -> None:
    config, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    folder.mkdir()
    shutil.copy(sys.argv[1], folder / "config.json")
    numbers, files = pattern(), shards(config)
    index = {}
    for number, shapes in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        write(folder / name, shapes, numbers)
        index |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    main()
