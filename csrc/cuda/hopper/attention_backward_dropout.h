// Which weights of a tile of transposed scores are dropped. A counter of philox.h serves eight keys of a query, that
// lie with four warps: a warpgroup draws together for its 64 keys, a block of philox.h's, and finds bits in shared
// memory.
#pragma once

#include <gpu/hopper.h>

#include "../dropout.h"

namespace tformer::gpu {

// Of each warp, of each query: a bit for each of the warp's 16 keys.
template <int kQueries>
struct GroupDropBits {
  static constexpr int kBytes = 4 * kQueries * 2;
  char* data;

  // By all threads of the warpgroup, which meet at `barrier` then. A thread takes four counters of a query: of each
  // warp a byte.
  TFORMER_DEVICE void draw(const DropoutParams& dropout, int b, int h, int first_query, int first_key,
                           int barrier) const {
    const auto seed = static_cast<uint64_t>(*dropout.seed);
    const auto first = static_cast<uint32_t>(first_key / static_cast<int>(kPhiloxBlock)) * kPhiloxCounters;
#pragma unroll 1
    for (int n = thread_index() % kWarpgroup; n < 2 * kQueries; n += kWarpgroup) {
      const int query = n / 2, half = n % 2;
      uint32_t bits = 0;  // a byte for each warp
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const PhiloxWords random =
            philox(first + static_cast<uint32_t>(4 * half + c), static_cast<uint32_t>(first_query + query),
                   static_cast<uint32_t>(h), static_cast<uint32_t>(b), seed);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const bool dropped = !random.is_kept(e / 2, e % 2, dropout.drop_below);
          bits |= static_cast<uint32_t>(dropped) << (e / 2 * 8 + e % 2) << 2 * c;
        }
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) data[w * kQueries * 2 + n] = static_cast<char>(bits >> 8 * w);
    }
    sync_threads_of(barrier, kWarpgroup);
  }

  // What marked() wants, of the lane's two rows of keys and queries `column`, which is even, and column + 1.
  TFORMER_DEVICE uint32_t word(int column) const {
    return *reinterpret_cast<const uint32_t*>(data + (warp() % 4 * kQueries + column) * 2) << (7 - lane() / 4);
  }
  // x, which is not negative, with a minus where it is dropped.
  static TFORMER_DEVICE float marked(float x, uint32_t word, int row, int odd) {
    return float_of_bits(bits_of(x) | (word << (24 - 16 * odd - 8 * row) & 0x80000000));
  }
};

}  // namespace tformer::gpu
