// One call of attention for many new tokens: what its kernels take, `kernels::attention::PrefillParams` on the host.
#pragma once

#include "cache.cuh"

struct PrefillCall {
    const unsigned short* q;    // token t, head h at t·q_stride + h·head_dim
    unsigned short* out;        // the same with out_stride
    float* lse;                 // [T, H], natural logarithm, sinks included; null: not wanted; only with SCORE_FEATURES
    const int* starts;          // [B + 1], first token of each sequence
    const int* past;            // [B], rows of the cache before the new tokens, which stand at rows past … past + S − 1
    const float* sinks;         // [H] or null
    const float* alibi_slopes;  // [H] or null
    const unsigned char* mask;  // nonzero = visible, at b·mask_sequence_stride + h·mask_head_stride + i·mask_row_stride + j, or null
    long long q_stride, out_stride;  // elements
    long long mask_sequence_stride, mask_head_stride, mask_row_stride;
    Cache cache;
    float scale;    // finite, not 0; negative only with SCORE_FEATURES
    float softcap;  // 0: none
    int batch;      // B
    int heads;      // H
    int kv_heads;   // G
    int head_dim;   // D ≤ HEAD_DIM_PADDED
    int causal;     // 0 or 1
    int window;     // 0: none; else a query at position i sees keys from i − window + 1 on
    int section;    // pairs (b, g) that run side by side, at least 1
    int tiles;      // of rows, of each pair
};
