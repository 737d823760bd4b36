// What one thread's arithmetic units can do, for benchmarks to compare the kernels with: multiply-adds that touch no
// memory, in the form in which products of type T use them, and exp of numbers in the first-level cache.
#pragma once

#include "product.h"
#include "vec_math.h"

namespace tformer::TFORMER_ISA {
namespace {

#if TFORMER_HAS_TILES
// The four sums of a register tile, of zeros: the CPU does not look at what it multiplies.
inline double tile_operations(int64_t rounds) {
  constexpr int kSteps = 256;
  const TilesInForce tiles;
  tile_zero<4>(), tile_zero<5>(), tile_zero<6>(), tile_zero<7>();
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t n = 0; n < rounds * kSteps; ++n) {
    tile_multiply_add<0, 4, 6>(), tile_multiply_add<1, 4, 7>();
    tile_multiply_add<2, 5, 6>(), tile_multiply_add<3, 5, 7>();
  }
  return 4.0 * 2 * 2 * kTileSide * kTileSide * kTileSide * kSteps * static_cast<double>(rounds);
}
#endif

// Each of the independent chains is updated once per step; as many as a register tile has accumulators, which is more
// than the latency times the number of units of any CPU so far.
template <class T>
double fma_operations(int64_t rounds) {
  using P = Pack<T>;
#if TFORMER_HAS_TILES
  if constexpr (P::kTiles) return tile_operations(rounds);
#endif
  using Real = typename P::Real;
  using Group = typename P::Group;
  constexpr int kChains = P::kTileRows * P::kTileColumns, kSteps = 1024;
  // Volatile: a chain that the compiler can work out beforehand is not executed.
  volatile Group half = P::kStep == 1 ? static_cast<Group>(0.5f) : static_cast<Group>(0x3f003f00u);  // 1/2, or a pair
  const Group factor = half;
  Vec<Real> chain[kChains];
  Vec<Group> addend[1] = {Vec<Group>{} + factor};
#pragma GCC unroll 32
  for (int i = 0; i < kChains; ++i) chain[i] = splat(static_cast<Real>(i));
  for (int64_t n = 0; n < rounds * kSteps; ++n) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) {
      // A product of two constants would be hoisted out of the loop, except from an instruction for pairs.
      if constexpr (P::kStep == 1) chain[i] = chain[i] * addend[0] + addend[0];
#if TFORMER_HAS_BF16_BLOCKS
      if constexpr (P::kStep == 2) chain[i] = multiply_add_blocks(addend[0], addend[0], chain[i]);
#else
      if constexpr (P::kStep == 2) chain[i] = P::multiply_add(factor, addend[0], chain[i]);
#endif
    }
  }
  Vec<Real> total = chain[0];
#pragma GCC unroll 32
  for (int i = 1; i < kChains; ++i) total += chain[i];
  volatile Real keep = sum_lanes<Real>(total);
  (void)keep;
  constexpr int kProducts = TFORMER_HAS_BF16_BLOCKS && P::kStep == 2 ? 4 : P::kStep;  // of each sum in an instruction
  return 2.0 * kProducts * kLanes<Real> * kChains * kSteps * static_cast<double>(rounds);
}

template <class T>
double exp_operations(int64_t rounds) {
  using Real = typename Pack<T>::Real;
  constexpr int kCount = 8192 / sizeof(Real);
  alignas(64) Real from[kCount], to[kCount];
  for (int i = 0; i < kCount; ++i) from[i] = static_cast<Real>(-i) / 64;
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; i += kLanes<Real>) store(to + i, exp_vec<Real>(load(from + i)));
    from[n % kCount] = to[n % kCount];  // the next round is not the same computation
  }
  volatile Real keep = to[0];
  (void)keep;
  return static_cast<double>(kCount) * static_cast<double>(rounds);
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
