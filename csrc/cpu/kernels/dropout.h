// Dropout of a row of 64-aligned positions: the vector form of philox.h.
#pragma once

#include "../../philox.h"
#include "vec.h"

namespace tformer::TFORMER_ISA {
namespace {

// The keys of all rounds, each in a 64-bit number, to be read into all lanes from memory: from a general register that
// takes an instruction of the units that shift, which are the busiest.
struct PhiloxKeys {
  uint64_t k[kPhiloxRounds][2];

  TFORMER_INLINE explicit PhiloxKeys(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (uint64_t (&pair)[2] : k) {
      pair[0] = k0, pair[1] = k1;
      k0 += kPhiloxW0, k1 += kPhiloxW1;
    }
  }
};

// The words of as many counters as U32 has lanes. They are worked on in the lower halves of 64-bit lanes, even and odd
// counters apart: a product leaves its lower word in place and its upper word one shift away, and what lies in the
// upper halves is ignored by the next product.
struct Philox {
  U32 word[4];

  TFORMER_INLINE Philox(U32 c0, uint32_t c1, uint32_t c2, uint32_t c3, const PhiloxKeys& keys) {
    U64 c[2][4];
    for (int odd = 0; odd < 2; ++odd) {
      c[odd][0] = odd ? (U64)c0 >> 32 : (U64)c0;
      c[odd][1] = U64{} + c1, c[odd][2] = U64{} + c2, c[odd][3] = U64{} + c3;
    }
#pragma GCC unroll 7
    for (const uint64_t (&k)[2] : keys.k) {
#pragma GCC unroll 2
      for (U64(&x)[4] : c) {
        const U64 product0 = multiply_even((U32)x[0], kPhiloxM0), product1 = multiply_even((U32)x[2], kPhiloxM1);
        x[0] = (product1 >> 32) ^ x[1] ^ k[0];
        x[1] = product1;
        x[2] = (product0 >> 32) ^ x[3] ^ k[1];
        x[3] = product0;
      }
    }
    for (int i = 0; i < 4; ++i) word[i] = interleave_even((U32)c[0][i], (U32)c[1][i]);
  }
};

// What stands for (row, head, batch) of attention or (row, row >> 32, stream) of a norm in the counter.
struct DropoutRow {
  uint32_t c1, c2, c3;
};

struct Dropout {
  PhiloxKeys keys;
  uint32_t threshold;
  double scale;  // of what is kept

  TFORMER_INLINE Dropout(double p, const int64_t* seed_)
      : keys(seed_ ? static_cast<uint64_t>(*seed_) : 0), threshold(dropout_threshold(p)), scale(dropout_scale(p)) {}

  // take(at, words): the random words of the positions from first + at, for all 64 from `first`, a multiple of 64.
  template <class Take>
  TFORMER_INLINE void words(const DropoutRow& row, int64_t first, Take&& take) const {
    const uint32_t base = static_cast<uint32_t>(first / kPhiloxBlock * 16);
    for (int c = 0; c < 16; c += kLanes<uint32_t>) {
      const Philox random(lane_index<uint32_t>() + (base + c), row.c1, row.c2, row.c3, keys);
      for (int w = 0; w < 4; ++w) take(16 * w + c, random.word[w]);
    }
  }

  // factor[j] = scale where position first + j is kept, 0 where it is dropped, for n positions (n <= 64).
  template <class Real>
  TFORMER_INLINE void factors(const DropoutRow& row, int64_t first, int64_t n, Real* factor) const {
    const Real kept = static_cast<Real>(scale);
    if constexpr (sizeof(Real) == sizeof(uint32_t)) {
      if (n == kPhiloxBlock) {
        words(row, first,
              [&](int at, U32 word) TFORMER_LAMBDA { store(factor + at, where_at_least(word, threshold, kept)); });
        return;
      }
    }
    alignas(64) uint32_t word[kPhiloxBlock];
    words(row, first, [&](int at, U32 some) TFORMER_LAMBDA { store(word + at, some); });
    for (int64_t j = 0; j < n; ++j) factor[j] = word[j] < threshold ? Real(0) : kept;
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
