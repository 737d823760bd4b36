// Counter-based random numbers for dropout: Philox 4x32 with 7 rounds
// (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).
// The mask is a pure function of (seed, position); DESIGN.md gives the map from positions to counters.
#pragma once

#include <cstdint>

namespace tformer {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

// The last word of a norm's counter, so that a norm and an attention with one seed draw different numbers.
constexpr uint32_t kPhiloxNormStream = 0x4E4F524D;

// Positions come in blocks of 64, with 8 counters a block; each half of each word serves one: the lower half of word w
// of counter c position 64 * (c / 8) + 32 * (w / 2) + 2 * (c % 8) + w % 2, the upper half the one 16 further on.
constexpr int64_t kPhiloxBlock = 64;
constexpr uint32_t kPhiloxCounters = 8;

// An element is dropped where its 16-bit number lies below this.
constexpr uint32_t dropout_threshold(double p) {
  const double scaled = p * 65536.0 + 0.5;
  return scaled >= 65535.0 ? 65535u : static_cast<uint32_t>(scaled);
}

// 1 / (1 - p) for p as dropout_threshold rounds it.
constexpr double dropout_scale(double p) { return p < 1.0 ? 65536.0 / (65536.0 - dropout_threshold(p)) : 0.0; }

}  // namespace tformer
