// How many keys attention_forward.h packs at a time, and of how many scores are made at a time.
#pragma once

#include "product.h"
#include "scores.h"

namespace tformer::TFORMER_ISA {
namespace {

constexpr int64_t kScoreBytes = 24 * 1024;

// Keys of one range: packed keys and values within half of L2, 1 MB or 2 MB where there are tile registers; and of one
// stretch of it: scores of a row tile within 24 KB of L1. A row tile of vectors takes a range as one stretch. In tile
// registers a stretch has a key block for each strip of values, which is computed beside it, but at most four.
template <class P>
struct ForwardKeys {
  int64_t range, stretch;

  explicit ForwardKeys(const AttentionParams& p) {
    const int64_t size = sizeof(typename P::Real), strip = P::kTileColumns * kLanes<typename P::Real>;
    constexpr int64_t kPackedBytes = (P::kTiles ? 1024 : 512) * 1024;
    const int64_t all = round_up(p.Sk > 0 ? p.Sk : 1, kKeyBlock), strips = (p.Dv + strip - 1) / strip;
    range = blocks(kPackedBytes * P::kStep / ((p.D + p.Dv) * size * P::kSlices), all);
    stretch = blocks(P::kTiles ? kKeyBlock * (strips < 4 ? strips : 4) : kScoreBytes / (P::kTileRows * size), range);
    if (!P::kTiles) range = stretch;
  }

 private:
  static int64_t blocks(int64_t keys, int64_t most) {
    keys = keys / kKeyBlock * kKeyBlock;
    return keys < kKeyBlock ? kKeyBlock : (keys < most ? keys : most);
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
