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

// What stands for (row, head, batch) of attention or (row, row >> 32, stream) of a norm in the counter.
struct DropoutRow {
  uint32_t c1, c2, c3;
};

// The words of as many counters as U64 has lanes, in kRows consecutive rows: words[r][n] has word 2 n of each counter
// and, in the next lane, word 2 n + 1. They are worked on in the lower halves of 64-bit lanes: a product leaves its
// lower word in place and its upper word one shift away, and what lies in the upper halves is ignored by the next
// product. A row is a chain of dependent operations; several fill the units.
template <int kRows>
struct Philox {
  U32 words[kRows][2];

  TFORMER_INLINE Philox(U64 c0, const DropoutRow& row, const PhiloxKeys& keys) {
    U64 x[kRows][4];
    for (int r = 0; r < kRows; ++r) {
      x[r][0] = c0, x[r][1] = U64{} + (row.c1 + static_cast<uint32_t>(r));
      x[r][2] = U64{} + row.c2, x[r][3] = U64{} + row.c3;
    }
#pragma GCC unroll 7
    for (const uint64_t (&k)[2] : keys.k) {
#pragma GCC unroll 2
      for (U64(&c)[4] : x) {
        const U64 product0 = multiply_even((U32)c[0], kPhiloxM0), product1 = multiply_even((U32)c[2], kPhiloxM1);
        c[0] = (product1 >> 32) ^ c[1] ^ k[0];
        c[1] = product1;
        c[2] = (product0 >> 32) ^ c[3] ^ k[1];
        c[3] = product0;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < 2; ++n) words[r][n] = interleave_even((U32)x[r][2 * n], (U32)x[r][2 * n + 1]);
    }
  }
};

struct Dropout {
  PhiloxKeys keys;
  uint32_t least;  // of what is kept, a number in the upper half of a lane
  double scale;    // of what is kept

  TFORMER_INLINE Dropout(double p, const int64_t* seed_)
      : keys(seed_ ? static_cast<uint64_t>(*seed_) : 0), least(dropout_threshold(p) << 16), scale(dropout_scale(p)) {}

  // take(r, at, numbers): the random numbers, in the upper halves of lanes, of the positions from first + at in row
  // + r, for all 64 from `first`, a multiple of 64.
  template <int kRows, class Take>
  TFORMER_INLINE void numbers(const DropoutRow& row, int64_t first, Take&& take) const {
    const auto base = static_cast<uint64_t>(first / kPhiloxBlock) * kPhiloxCounters;
    for (int c = 0; c < static_cast<int>(kPhiloxCounters); c += kLanes<uint64_t>) {
      const Philox<kRows> random(lane_index<uint64_t>() + (base + c), row, keys);
      for (int r = 0; r < kRows; ++r) {
        for (int n = 0; n < 2; ++n) {
          take(r, 32 * n + 2 * c, random.words[r][n] << 16);
          take(r, 32 * n + 16 + 2 * c, random.words[r][n]);
        }
      }
    }
  }

  // The factors of all 64 positions from `first` in so many rows, in vectors of float.
  static constexpr int kVectors = static_cast<int>(kPhiloxBlock) / kLanes<float>;
  template <int kRows>
  TFORMER_INLINE void factor_vectors(const DropoutRow& row, int64_t first, F (&factor)[kRows][kVectors]) const {
    const auto kept = static_cast<float>(scale);
    numbers<kRows>(row, first, [&](int r, int at, U32 number) TFORMER_LAMBDA {
      factor[r][at / kLanes<float>] = where_at_least(number, least, kept);
    });
  }

  // factor[j] = scale where position first + j is kept, 0 where it is dropped, for 64 positions.
  template <class Real>
  TFORMER_INLINE void factors(const DropoutRow& row, int64_t first, Real* factor) const {
    const Real kept = static_cast<Real>(scale);
    if constexpr (sizeof(Real) == sizeof(uint32_t)) {
      numbers<1>(row, first, [&](int, int at, U32 number) TFORMER_LAMBDA {
        store(factor + at, where_at_least(number, least, kept));
      });
    } else {
      alignas(64) uint32_t number[kPhiloxBlock];
      numbers<1>(row, first, [&](int, int at, U32 some) TFORMER_LAMBDA { store(number + at, some); });
      for (int64_t j = 0; j < kPhiloxBlock; ++j) factor[j] = number[j] < least ? Real(0) : kept;
    }
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
