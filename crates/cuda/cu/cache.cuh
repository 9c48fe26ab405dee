// The key/value cache as kernels see it: rows of D elements of KV_DTYPE, contiguous or in pages, addressed by (sequence b, head g, row r).
#pragma once

// k, v: first element of the keys and of the values; both have the same strides (in elements).
// Contiguous (table null): row r of sequence b, head g is at b·sequence_stride + g·head_stride + r·row_stride.
// Paged: row r lies in physical page p = table[b·table_stride + r / page], at
//   p·sequence_stride + g·head_stride + (r mod page)·row_stride; page, a power of two, is the number of rows of a page; of a contiguous cache those of each head.
struct Cache {
    void* k;
    void* v;
    const int* table;
    long long sequence_stride, head_stride, row_stride;
    int table_stride, page;
};

// Offset, in elements, of row r of sequence b and head g from `k` or `v`. The row must have a page.
template <int IS_PAGED> __device__ __forceinline__ long long cache_row(const Cache& c, int b, int g, int r) {
    if constexpr (IS_PAGED) {
        const int shift = 31 - __clz(c.page);
        const int p = __ldg(c.table + (long long)b * c.table_stride + (r >> shift));
        return p * c.sequence_stride + g * c.head_stride + (r & (c.page - 1)) * c.row_stride;
    } else {
        return b * c.sequence_stride + g * c.head_stride + r * c.row_stride;
    }
}

// The sequence that token t belongs to: the b with starts[b] <= t < starts[b + 1]; sequences without new tokens are passed over.
// starts [B + 1] ascends, starts[0] = 0. Needs 0 <= t < starts[B].
__device__ __forceinline__ int sequence_of(const int* starts, int sequences, int t) {
    int lo = 0, hi = sequences - 1;
    while (lo < hi) {
        const int mid = (lo + hi + 1) >> 1;
        if (__ldg(starts + mid) <= t) lo = mid;
        else hi = mid - 1;
    }
    return lo;
}
