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

// Positions come in blocks of 64: word w of counter c serves position 64 * (c / 16) + 16 * w + c % 16.
constexpr int64_t kPhiloxBlock = 64;

// An element is dropped where its random word lies below this.
constexpr uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0 + 0.5;
  return scaled >= 4294967295.0 ? 4294967295u : static_cast<uint32_t>(scaled);
}

constexpr double dropout_scale(double p) { return p < 1.0 ? 1.0 / (1.0 - p) : 0.0; }

}  // namespace tformer
