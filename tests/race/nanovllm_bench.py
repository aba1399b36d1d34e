"""Output tokens per second of nano-vLLM on a request list, with random weights of a given Qwen3 shape.

usage: nanovllm_bench.py [--repeat N] CONFIG.json REQUESTS.jsonl RESULT.json

Where the package `flash_attn` is missing, FlashAttention 3 of an installed vLLM takes its place, without vLLM's own
code. nano-vLLM always reuses prefixes; each run starts every prompt with a token of its own, so that none is there to
reuse.
"""

import functools
import importlib.util
import json
import pathlib
import shutil
import sys
import tempfile
import time
import types

import torch

import peer


def flash_attention_3() -> types.ModuleType:
    """The two functions of `flash_attn` that nano-vLLM calls, on top of the library in vLLM's wheel."""
    found = importlib.util.find_spec("vllm")
    if found is None:
        raise SystemExit("neither the package flash_attn nor vllm is installed")
    torch.ops.load_library(str(pathlib.Path(found.origin).parent / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"))

    def forward(q, k, v, *, cu_q, cu_k, used_k, max_q, max_k, pages, scale):
        """`q`: (tokens, heads, size). `k` and `v`: (tokens, heads, size), or pages of them where `pages` is given."""
        return torch.ops._vllm_fa3_C.fwd(
            q, k, v, None, None, None, None,
            cu_q, cu_k, None, None, used_k, max_q, max_k, pages,
            None, None, None, None, None, None, None, None,
            scale, True, -1, -1, 0.0, True, None, 0, None, 0, None, 1, 0, None,
        )[0]

    @functools.cache
    def one_row_each(batch, device):
        return torch.arange(batch + 1, dtype=torch.int32, device=device)

    def flash_attn_varlen_func(q, k, v, *, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k,
                               softmax_scale, causal, block_table):
        assert causal
        used = None if block_table is None else cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        return forward(q, k, v, cu_q=cu_seqlens_q, cu_k=cu_seqlens_k if used is None else None, used_k=used,
                       max_q=max_seqlen_q, max_k=max_seqlen_k, pages=block_table, scale=softmax_scale)

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal):
        assert causal and q.size(1) == 1
        return forward(q.squeeze(1), k_cache, v_cache, cu_q=one_row_each(q.size(0), q.device), cu_k=None,
                       used_k=cache_seqlens, max_q=1, max_k=block_table.size(1) * k_cache.size(1),
                       pages=block_table, scale=softmax_scale).unsqueeze(1)

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    return module


class NoTokenizer:
    """Requests are token ids and ignore the end of sequence; answers are not turned into text."""

    eos_token_id = -1

    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()

    def decode(self, _):
        return ""


def random_weights(model: torch.nn.Module, _: str) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)


def main() -> None:
    arguments = peer.arguments()
    items = peer.requests(arguments.requests)
    kind = json.loads(arguments.config.read_text())["model_type"]
    if kind != "qwen3":
        raise SystemExit(f"model_type is {kind}; nano-vLLM has qwen3 alone")
    if importlib.util.find_spec("flash_attn") is None:
        sys.modules["flash_attn"] = flash_attention_3()
    import nanovllm.engine.llm_engine as llm_engine
    import nanovllm.engine.model_runner as model_runner
    from nanovllm import LLM, SamplingParams

    llm_engine.AutoTokenizer = NoTokenizer
    model_runner.load_model = random_weights
    numbers = iter(range(1000))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(arguments.config, pathlib.Path(folder) / "config.json")
        begun = time.perf_counter()
        engine = LLM(folder, enforce_eager=False, max_model_len=4096, gpu_memory_utilization=0.9)
        up_s = time.perf_counter() - begun

        def run(items: list[dict]) -> float:
            first = next(numbers)
            prompts = [[first, *item["prompt_token_ids"][1:]] for item in items]
            sampling = [
                SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=item["max_tokens"]) for item in items
            ]
            begun = time.perf_counter()
            answers = engine.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - begun
            return peer.speed(items, [len(answer["token_ids"]) for answer in answers], seconds)

        peer.measure(run, items, arguments, up_s)


if __name__ == "__main__":
    main()
