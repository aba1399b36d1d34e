//! Paged attention for spans of one row (decode), with a ring for blocks of 99 KiB of shared memory.

#include "attention_decode_consumers.cuh"

MILLRACE_DECODES(attention_decode_small_h, Bf16, SMALL_RING_BYTES)
MILLRACE_DECODES(attention_decode_small_fp8_h, Fp8, SMALL_RING_BYTES)
