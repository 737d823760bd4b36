// Dropout of a row of 64-aligned positions: the vector form of philox.h.
#pragma once

#include "../../philox.h"
#include "vec.h"

namespace tformer::TFORMER_ISA {
namespace {

// high and low 32 bits of a * b, every lane.
TFORMER_INLINE void multiply_wide(U32 a, uint32_t b, U32& high, U32& low) {
  const U64 even = multiply_even(a, b);
  const U64 odd = multiply_even((U32)((U64)a >> 32), b);
  const U64 upper = U64{} + 0xffffffff00000000ull;
  high = (U32)((even >> 32) | (odd & upper));
  low = (U32)((even & ~upper) | (odd << 32));
}

struct Philox {
  U32 word[4];

  TFORMER_INLINE Philox(U32 c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
    U32 c[4] = {c0, U32{} + c1, U32{} + c2, U32{} + c3};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < kPhiloxRounds; ++round) {
      U32 high0, low0, high1, low1;
      multiply_wide(c[0], kPhiloxM0, high0, low0);
      multiply_wide(c[2], kPhiloxM1, high1, low1);
      c[0] = high1 ^ c[1] ^ k0;
      c[1] = low1;
      c[2] = high0 ^ c[3] ^ k1;
      c[3] = low0;
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    for (int i = 0; i < 4; ++i) word[i] = c[i];
  }
};

// What stands for (row, head, batch) of attention or (row, row >> 32, stream) of a norm in the counter.
struct DropoutRow {
  uint32_t c1, c2, c3;
};

struct Dropout {
  uint64_t seed;
  uint32_t threshold;
  double scale;  // of what is kept

  TFORMER_INLINE Dropout(double p, const int64_t* seed_)
      : seed(seed_ ? static_cast<uint64_t>(*seed_) : 0), threshold(dropout_threshold(p)), scale(dropout_scale(p)) {}

  // The random words of the 64 positions from `first`, a multiple of 64.
  TFORMER_INLINE void words(const DropoutRow& row, int64_t first, uint32_t* out) const {
    const uint32_t base = static_cast<uint32_t>(first / kPhiloxBlock * 16);
    for (int c = 0; c < 16; c += kLanes<uint32_t>) {
      const Philox random(lane_index<uint32_t>() + (base + c), row.c1, row.c2, row.c3, seed);
      for (int w = 0; w < 4; ++w) store(out + 16 * w + c, random.word[w]);
    }
  }

  // factor[j] = scale where position first + j is kept, 0 where it is dropped, for n positions (n <= 64).
  template <class Real>
  TFORMER_INLINE void factors(const DropoutRow& row, int64_t first, int64_t n, Real* factor) const {
    alignas(64) uint32_t word[kPhiloxBlock];
    words(row, first, word);
    const Real kept = static_cast<Real>(scale);
    for (int64_t j = 0; j < n; ++j) factor[j] = word[j] < threshold ? Real(0) : kept;
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
