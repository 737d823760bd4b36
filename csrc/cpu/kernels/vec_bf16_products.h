// Products of bf16 pairs where the CPU makes them, and its own narrowing to their operands. A pair fills a 32-bit lane.
#pragma once

#include "vec.h"

namespace tformer::TFORMER_ISA {
namespace {

#if TFORMER_HAS_BF16_PRODUCTS
// In each lane c + a0 b0 + a1 b1. vdpbf16ps (Intel SDM); BFDOT (Arm ARM, C7.2).
TFORMER_INLINE F multiply_add_pairs(U32 a, U32 b, F c) {
#if defined(__ARM_NEON)
  return (F)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
  return (F)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
}

// Good for weights, not for results: where AVX-512 narrows, it takes and gives 0 for subnormal numbers.
// One vector; two, one behind the other; two of which each lane becomes a pair.
TFORMER_INLINE HalfBits narrow_weights(F x) {
#if defined(__ARM_NEON)
  return (HalfBits)vcvt_bf16_f32((float32x4_t)x);
#else
  return (HalfBits)_mm512_cvtneps_pbh((__m512)x);
#endif
}
TFORMER_INLINE U32 narrow_two_weights(F first, F second) {
#if defined(__ARM_NEON)
  return (U32)narrow_two_bf16(first, second);
#else
  return (U32)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#endif
}
TFORMER_INLINE U32 pair_weights(F low, F high) {
#if defined(__ARM_NEON)
  const auto both = (uint16x8_t)narrow_two_bf16(low, high);
  return (U32)vzip1q_u16(both, vextq_u16(both, both, 4));
#else
  alignas(64) static constexpr uint16_t kInterleave[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (U32)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), (__m512i)narrow_two_weights(low, high));
#endif
}
#endif

#if TFORMER_HAS_BF16_BLOCKS
// c + a bT of 2 rows x 4 elements each, into 2 x 2 sums: twice the products of BFDOT. BFMMLA (Arm ARM, C7.2).
TFORMER_INLINE F multiply_add_blocks(U32 a, U32 b, F c) {
  return (F)vbfmmlaq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
}

// The pairs (row, k), (row, k + 1), (row + 1, k), (row + 1, k + 1) of an operand whose pairs lie one behind the other
// along its rows (kAlong) or down its columns; they may have any alignment. Without a next row the first stands for it.
template <bool kAlong, bool kTwoRows>
TFORMER_INLINE U32 pairs_of_block(const uint32_t* a, int64_t a_row, int64_t a_step) {
  using Two = VecN<uint32_t, 2>;
  if constexpr (kAlong) {
    const Two row = load_bytes<Two>(a), next = kTwoRows ? load_bytes<Two>(a + a_row) : row;
    return __builtin_shufflevector(row, next, 0, 1, 2, 3);
  } else if constexpr (kTwoRows) {
    const Two step = load_bytes<Two>(a), next = load_bytes<Two>(a + a_step);
    return __builtin_shufflevector(step, next, 0, 2, 1, 3);
  } else {
    const auto step = load_bytes<uint32_t>(a), next = load_bytes<uint32_t>(a + a_step);
    return U32{step, next, step, next};
  }
}

// A register tile of sums, as multiply_tile makes it, from blocks of 2 rows x 2 columns x 2 pairs, of a second operand
// whose steps are zipped two by two.
template <bool kAlong, int kRows, int kColumns>
TFORMER_INLINE void multiply_blocks(const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_step,
                                    int64_t steps, F (&acc)[kRows][kColumns]) {
  constexpr int kBlockRows = (kRows + 1) / 2, L = kLanes<float>;
  F block[kBlockRows][2 * kColumns];
#pragma GCC unroll 3
  for (int i = 0; i < kBlockRows; ++i) {
#pragma GCC unroll 8
    for (int n = 0; n < 2 * kColumns; ++n) block[i][n] = F{};
  }
  for (int64_t k = 0; k < steps; k += 2, a += 2 * a_step, b += 2 * b_step) {
    U32 x[kBlockRows];
#pragma GCC unroll 3
    for (int i = 0; i < kBlockRows; ++i) {
      const uint32_t* row = a + 2 * i * a_row;
      x[i] = 2 * i + 1 < kRows ? pairs_of_block<kAlong, true>(row, a_row, a_step)
                               : pairs_of_block<kAlong, false>(row, a_row, a_step);
    }
#pragma GCC unroll 8
    for (int n = 0; n < 2 * kColumns; ++n) {
      const U32 columns = load(b + n * L);
#pragma GCC unroll 3
      for (int i = 0; i < kBlockRows; ++i) block[i][n] = multiply_add_blocks(x[i], columns, block[i][n]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) {
      const F left = block[r / 2][2 * n], right = block[r / 2][2 * n + 1];
      acc[r][n] = r % 2 == 0 ? __builtin_shufflevector(left, right, 0, 1, 4, 5)
                             : __builtin_shufflevector(left, right, 2, 3, 6, 7);
    }
  }
}
#endif

}  // namespace
}  // namespace tformer::TFORMER_ISA
