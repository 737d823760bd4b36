// How attention_backward.h and attention_backward_wide.h leave sums of dq, for ../attention_dq_sums.h.
#pragma once

#include "../attention_dq_sums.h"
#include "attention_backward_work.h"

namespace tformer::gpu {

template <int kWidth>
struct HopperDqSums {
  static constexpr int kQueries = HopperBackwardShape<kWidth>::kQueries;
  static constexpr int kFloats = kTileFloats;  // of a slot

  static TFORMER_DEVICE int slot_of(const HopperBackwardCall& given, int q_begin, int b, int h, int i0) {
    return gpu::slot_of(given.call, q_begin, b, h, i0);
  }
  // As send left them.
  static TFORMER_DEVICE void load(float (&dq)[2][kWidth / 4], const float* sums) {
    constexpr int kSlots = hopper_slots_of_tile(kWidth);
    sums += thread_index() / kWarpgroup * kSumFloats + thread_index() % kWarpgroup * 4;
#pragma unroll
    for (int part = 0; part < kWidth / 64; ++part) {
#pragma unroll
      for (int m = 0; m < kSumChunks; ++m) {
        const float* from = sums + part % kSlots * kTileFloats + part / kSlots * kSumFloats;
        const Bits16Bytes chunk = load_16(from + m * kWarpgroup * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) dq[m / 4][16 * part + m % 4 * 4 + e] = float_of_bits(chunk.word[e]);
      }
    }
  }
};

}  // namespace tformer::gpu
