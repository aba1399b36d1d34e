//! Paged attention for spans of one row (decode), with a ring for blocks of 160 KiB of shared memory or more.

#include "attention_decode_consumers.cuh"

MILLRACE_DECODES(attention_decode_h, Bf16, RING_BYTES)
MILLRACE_DECODES(attention_decode_fp8_h, Fp8, RING_BYTES)
