// Matrix products of one warp, mma.sync.m16n8k16 on 16-bit elements with f32 sums, and the loads of its operands from shared memory.
//
// Fragments of lane l, with r = l / 4 and c = 2·(l mod 4):
//   A [16, 16]: a0 = (r, c..c+1), a1 = (r + 8, c..), a2 = (r, c + 8..), a3 = (r + 8, c + 8..)
//   B [16, 8]:  b0 = (c..c+1, r), b1 = (c + 8.., r)
//   C [16, 8]:  c0, c1 = (r, c..c+1), c2, c3 = (r + 8, c..c+1): two C tiles side by side, packed to 16 bits, are an A fragment.
#pragma once

#include "prelude.cuh"

template <int DT>
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    static_assert(DT == BF16 || DT == F16, "16-bit elements");
    if constexpr (DT == BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8×8 matrices; lane l names row l mod 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix4(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void ldmatrix4_transposed(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Where lane l reads, in elements from a tile's first one, so that one ldmatrix4 gives:
// an A fragment of rows 0 … 15, columns 0 … 15;
__device__ __forceinline__ int lane_offset_a(int lane, int pitch) { return (lane % 16) * pitch + (lane / 16) * 8; }
// the B fragments of 16 rows n, columns k 0 … 15 (the tile holds Bᵀ, as K does): r0, r1 for n 0 … 7 and r2, r3 for n 8 … 15;
__device__ __forceinline__ int lane_offset_b(int lane, int pitch) { return (lane % 8 + (lane / 16) * 8) * pitch + (lane / 8 % 2) * 8; }
// through ldmatrix4_transposed the B fragments of rows k 0 … 15, 16 columns n (the tile holds B, as V does): r0, r1 for n 0 … 7, r2, r3 for the rest.
__device__ __forceinline__ int lane_offset_b_transposed(int lane, int pitch) { return (lane % 16) * pitch + (lane / 16) * 8; }
