//! Paged attention with capped scores (Gemma 2) for spans of one row (decode). One form for all chips: the ring is for blocks
//! of 99 KiB of shared memory.

#define MILLRACE_SCORES_CAPPED 1

#include "attention_decode_consumers.cuh"

MILLRACE_DECODES(attention_decode_capped_h, Bf16, SMALL_RING_BYTES)
MILLRACE_DECODES(attention_decode_capped_fp8_h, Fp8, SMALL_RING_BYTES)
