//! Paged attention for spans of any number of rows, for blocks of 99 KiB of shared memory; those for heads of 64 elements
//! in `attention_prefill.cu` are small enough.

#include "attention_prefill_mma.cuh"

MILLRACE_PREFILL(attention_prefill_small_h, 96, Bf16, true)
MILLRACE_PREFILL(attention_prefill_small_h, 128, Bf16, true)
MILLRACE_PREFILL(attention_prefill_small_h, 256, Bf16, true)
MILLRACE_PREFILL(attention_prefill_small_fp8_h, 96, Fp8, true)
MILLRACE_PREFILL(attention_prefill_small_fp8_h, 128, Fp8, true)
MILLRACE_PREFILL(attention_prefill_small_fp8_h, 256, Fp8, true)
