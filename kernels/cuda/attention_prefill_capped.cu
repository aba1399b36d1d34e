//! Paged attention with capped scores (Gemma 2) for spans of any number of rows. One form for all chips: that for blocks of
//! 99 KiB of shared memory.

#define MILLRACE_SCORES_CAPPED 1

#include "attention_prefill_mma.cuh"

MILLRACE_PREFILL(attention_prefill_capped_h, 64, Bf16, false)
MILLRACE_PREFILL(attention_prefill_capped_h, 96, Bf16, true)
MILLRACE_PREFILL(attention_prefill_capped_h, 128, Bf16, true)
MILLRACE_PREFILL(attention_prefill_capped_h, 256, Bf16, true)
MILLRACE_PREFILL(attention_prefill_capped_fp8_h, 64, Fp8, false)
MILLRACE_PREFILL(attention_prefill_capped_fp8_h, 96, Fp8, true)
MILLRACE_PREFILL(attention_prefill_capped_fp8_h, 128, Fp8, true)
MILLRACE_PREFILL(attention_prefill_capped_fp8_h, 256, Fp8, true)
