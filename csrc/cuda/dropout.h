// Dropout in kernels: the random words of philox.h, drawn where they are used.
#pragma once

#include <gpu/device.h>

#include "dropout_params.h"

namespace tformer {

// c0 is counter c of philox.h, in the row that the other counter words stand for: a thread that holds pairs of
// positions 16 apart uses all of it.
struct PhiloxWords {
  uint32_t word[4];

  // The number of position 16 group + odd, counted from the first that the counter serves.
  TFORMER_DEVICE uint32_t number(int group, int odd) const {
    return word[group / 2 * 2 + odd] >> group % 2 * 16 & 0xFFFF;
  }
  // Whether it is not below `drop_below`. Both are shifted up: then the upper halves need no other instruction.
  TFORMER_DEVICE bool is_kept(int group, int odd, uint32_t drop_below) const {
    const uint32_t two = word[group / 2 * 2 + odd];
    return (group % 2 ? two : two << 16) >= drop_below << 16;
  }
};

// Counter words: DESIGN.md, Dropout. The key is the seed.
TFORMER_DEVICE PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t a = static_cast<uint64_t>(c0) * kPhiloxM0, b = static_cast<uint64_t>(c2) * kPhiloxM1;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace tformer
