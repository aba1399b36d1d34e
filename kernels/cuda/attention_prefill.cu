//! Paged attention for spans of any number of rows, for blocks of 160 KiB of shared memory; of 80 for heads of 64 elements.

#include "attention_prefill_mma.cuh"

MILLRACE_PREFILL(attention_prefill_h, 64, Bf16, false)
MILLRACE_PREFILL(attention_prefill_h, 96, Bf16, false)
MILLRACE_PREFILL(attention_prefill_h, 128, Bf16, false)
MILLRACE_PREFILL(attention_prefill_h, 256, Bf16, false)
MILLRACE_PREFILL(attention_prefill_fp8_h, 64, Fp8, false)
MILLRACE_PREFILL(attention_prefill_fp8_h, 96, Fp8, false)
MILLRACE_PREFILL(attention_prefill_fp8_h, 128, Fp8, false)
MILLRACE_PREFILL(attention_prefill_fp8_h, 256, Fp8, false)
