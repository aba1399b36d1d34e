"""Writes a matrix in each quantised format with the package that owns the format, and what that package makes of it.

One file for each case: the tensors of the module `model.layers.0.mlp.down_proj` under their own names, and the weights
that the package dequantises as `expected`, in f32. `cases.json` has the quantization_config of each.
"""

import importlib.util
import json
import pathlib
import sys
import types
import warnings

warnings.filterwarnings("ignore")
import torch
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent
MODULE = "model.layers.0.mlp.down_proj"
ROWS, COLUMNS = 64, 96
cases = {}


def weight(seed, rows=ROWS, columns=COLUMNS):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(torch.bfloat16)


def write(name, config, tensors, expected):
    tensors = {f"{MODULE}.{part}": tensor.detach().contiguous() for part, tensor in tensors.items()}
    tensors["expected"] = expected.detach().float().contiguous()
    save_file(tensors, OUT / f"{name}.safetensors")
    cases[name] = {"config": config, "dtype": str(expected.dtype)[6:], "shape": list(expected.shape)}


def compressed():
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    def run(name, format, seed, order=None, shape=(ROWS, COLUMNS), **args):
        args = QuantizationArgs(**args)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        x = weight(seed, *shape)
        rows, columns = shape
        strategy = getattr(args.strategy, "value", args.strategy)
        if strategy == "tensor":
            groups = x.reshape(1, -1)
        elif strategy == "channel":
            groups = x
        elif strategy == "block":
            high, wide = args.block_structure
            down, across = -(-rows // high), -(-columns // wide)
            padded = torch.zeros(down * high, across * wide, dtype=x.dtype)
            padded[:rows, :columns] = x
            groups = padded.reshape(down, high, across, wide).permute(0, 2, 1, 3).reshape(down * across, -1)
        else:
            columns_of = x if order is None else x[:, torch.argsort(order, stable=True)]
            groups = columns_of.reshape(-1, args.group_size)
        low, high_value = groups.amin(1), groups.amax(1)
        state = {"weight": x}
        if format == "nvfp4-pack-quantized":
            whole = (448.0 * 6.0 / x.abs().max().float()).reshape(1)
            scale, zero = calculate_qparams(low, high_value, args, global_scale=whole)
            state["weight_global_scale"] = whole
        else:
            scale, zero = calculate_qparams(low, high_value, args)
        shape_of = {
            "tensor": (1,),
            "channel": (rows, 1),
            "block": (-(-rows // args.block_structure[0]), -(-columns // args.block_structure[1]))
            if strategy == "block"
            else None,
        }.get(strategy) or (rows, columns // args.group_size)
        state["weight_scale"] = scale.reshape(shape_of)
        state["weight_zero_point"] = zero.reshape(shape_of)
        if order is not None:
            state["weight_g_idx"] = order
        compressor = BaseCompressor.get_value_from_registry(format)
        stored = compressor.compress(state, scheme)
        back = compressor.decompress(dict(stored), scheme)["weight"]
        group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "format": format}
        config = {
            "quant_method": "compressed-tensors",
            "format": format,
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }
        write(name, config, stored, back)

    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    run("ct-w4a16", "pack-quantized", 1, symmetric=True, **int4)
    run("ct-w4a16-asym", "pack-quantized", 2, symmetric=False, **int4)
    run("ct-w4a16-channel", "pack-quantized", 3, num_bits=4, type="int", strategy="channel", symmetric=True)
    run("ct-w8a16", "pack-quantized", 4, num_bits=8, type="int", strategy="channel", symmetric=True)
    run("ct-w8a16-asym", "pack-quantized", 13, num_bits=8, type="int", strategy="group", group_size=32, symmetric=False)
    run("ct-w8a8", "int-quantized", 5, num_bits=8, type="int", strategy="channel", symmetric=True)
    run("ct-w8a8-asym", "int-quantized", 6, num_bits=8, type="int", strategy="channel", symmetric=False)
    run("ct-fp8", "float-quantized", 7, num_bits=8, type="float", strategy="tensor", symmetric=True)
    run("ct-fp8-dynamic", "float-quantized", 8, num_bits=8, type="float", strategy="channel", symmetric=True)
    blocks = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True}
    run("ct-fp8-block", "float-quantized", 9, shape=(160, 192), **blocks)
    fp4 = {"num_bits": 4, "type": "float", "symmetric": True}
    run("ct-nvfp4", "nvfp4-pack-quantized", 10, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn", **fp4)
    run("ct-mxfp4", "mxfp4-pack-quantized", 11, strategy="group", group_size=32, scale_dtype="torch.uint8", **fp4)


def gptq():
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module

    def run(name, seed, bits, group, symmetric, ordered, version):
        x = weight(seed).to(torch.float16)
        size = COLUMNS if group == -1 else group
        groups = COLUMNS // size
        index = torch.arange(COLUMNS, dtype=torch.int32) // size
        if ordered:
            index = index[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(seed))]
        top = 2**bits - 1
        scales, zeros = torch.zeros(ROWS, groups), torch.zeros(ROWS, groups)
        for g in range(groups):
            part = x[:, index == g].float()
            if symmetric:
                scales[:, g] = part.abs().amax(1) * 2 / top
                zeros[:, g] = 2 ** (bits - 1)
            else:
                low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
                scales[:, g] = (high - low) / top
                zeros[:, g] = torch.round(-low / scales[:, g])
        if not symmetric:
            # A zero of 0 beside one of 5: the first version borrows.
            zeros[0, 0], zeros[1, 0] = 0, 5
        linear = torch.nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float16)
        linear.weight.data = x
        module = TorchLinear(
            bits=bits, group_size=size, sym=symmetric, desc_act=ordered, in_features=COLUMNS, out_features=ROWS,
            bias=False, pack_dtype=torch.int32, register_buffers=True,
        )
        module.pack_original(linear, scales.to(torch.float16), zeros, index)
        expected = dequantised(module, bits)
        parts = {part: getattr(module, part).clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
        if version == 1:
            # As the package itself turns one into the other, over whole words.
            step = sum(1 << (at * bits) for at in range(32 // bits))
            parts["qzeros"] = (parts["qzeros"].to(torch.int64) - step).to(torch.int32)
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": ordered,
                  "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
        write(name, config, parts, expected)
        return parts

    def dequantised(module, bits):
        module.post_init() if hasattr(module, "post_init") else None
        return module.dequantize_weight().T

    run("gptq-v2", 21, 4, 32, True, False, 2)
    run("gptq-v1", 22, 4, 32, True, False, 1)
    run("gptq-v1-asym", 23, 4, 32, False, False, 1)
    run("gptq-v2-asym", 24, 4, 32, False, False, 2)
    run("gptq-v1-act-order", 25, 4, 32, True, True, 1)
    run("gptq-8-bits", 26, 8, 32, True, False, 1)
    run("gptq-column", 27, 4, -1, True, False, 2)


def awq():
    # The package's own module imports trainers and data sets; its layers need none of them.
    package = types.ModuleType("awq")
    package.__path__ = list(importlib.util.find_spec("awq").submodule_search_locations)
    sys.modules["awq"] = package
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    x = weight(31).to(torch.float16)
    groups = x.float().reshape(ROWS, -1, 32)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).to(torch.float16)
    zeros = torch.round(-low / scales.float()).clamp(0, 15)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False, dtype=torch.float16)
    each = scales.float().repeat_interleave(32, 1)
    linear.weight.data = ((torch.round(x.float() / each) + zeros.repeat_interleave(32, 1)).clamp(0, 15)
                          - zeros.repeat_interleave(32, 1)).mul(each).to(torch.float16)
    module = WQLinear_GEMM.from_linear(linear, 4, 32, False, scales.T.contiguous(), zeros.T.contiguous())
    expected = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, 32).T
    parts = {part: getattr(module, part) for part in ("qweight", "qzeros", "scales")}
    write("awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}, parts, expected)


def floats():
    """`quant_method: fp8` and ModelOpt: the layouts of compressed-tensors under other names, dequantised by torch."""
    x = weight(41, 160, 192).float()
    high, wide = 2, 2
    scales = torch.zeros(high, wide)
    codes = torch.zeros(160, 192, dtype=torch.float8_e4m3fn)
    expected = torch.zeros(160, 192)
    for i in range(high):
        for j in range(wide):
            part = x[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scales[i, j] = part.abs().max() / 448
            found = (part / scales[i, j]).to(torch.float8_e4m3fn)
            codes[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = found
            expected[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = found.float() * scales[i, j]
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    write("fp8-block", config, {"weight": codes, "weight_scale_inv": scales}, expected)
    x = weight(42).float()
    scale = x.abs().max() / 448
    codes = (x / scale).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    write("fp8-tensor", {"quant_method": "fp8", "activation_scheme": "static"}, parts, codes.float() * scale)
    modelopt = {"quant_method": "modelopt", "quant_algo": "FP8"}
    write("modelopt-fp8", modelopt, {k: v.clone() for k, v in parts.items()}, codes.float() * scale)


compressed()
floats()
awq()
gptq()
(OUT / "cases.json").write_text(json.dumps(cases, indent=1, sort_keys=True) + "\n")
