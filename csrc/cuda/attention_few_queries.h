// Few queries for many keys, as in decoding: how forward shares the keys among blocks. For host files.
#pragma once

#include <algorithm>

#include "../key_range.h"
#include "attention_launch.h"

namespace tformer {

constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : dtype == DType::boolean ? 1 : 2;
}

// Whether a mask, if there is one, says the same to all queries of a head: a mask by keys.
inline bool rows_share_mask(const AttentionParams& p) { return !p.mask.data || p.mask.stride[2] == 0 || p.Sq == 1; }

// Heads in groups of `group`, of which the heads become the rows.
inline void heads_to_rows(int64_t (&stride)[3], int64_t group) { stride[2] = stride[1], stride[1] *= group; }
inline void heads_to_rows(ScoreOperand& t, int64_t group) { t.stride[2] = t.stride[1], t.stride[1] *= group; }

inline void skip_keys(Rows& t, int64_t count, DType dtype) {
  t.data = static_cast<char*>(t.data) + count * t.stride[2] * bytes_of(dtype);
}
inline void skip_keys(ScoreOperand& t, int64_t count) {
  if (t.data) t.data = static_cast<const char*>(t.data) + count * t.stride[3] * bytes_of(t.dtype);
}

// One query of each head: the query heads that share a head of keys become its queries, by strides alone, so that one
// pass over the keys serves them all; as heads, each would make its own. Rows of a head must then see the same keys, so
// the keys are cut down to what one query sees. False, and nothing is changed, where more than operands and sinks
// depends on the head, or the device alone knows where a window begins.
inline bool heads_as_queries(AttentionParams& p) {
  if (p.cu_seqlens_q || p.Sq != 1 || p.Hq == p.Hk || p.alibi_slopes || p.dropout_p > 0) return false;
  const KeyRange range(p, Sequence{0, 0, p.Sq, p.Sk});
  const int64_t first = range.begin(0), end = range.end(0);
  if (p.key_lengths && first > 0) return false;  // shorter keys end earlier; then the window begins earlier, too
  p.causal = kNotCausal, p.window_left = p.window_right = -1;
  p.Sk = end - first;
  skip_keys(p.k, first, p.dtype), skip_keys(p.v, first, p.dtype);
  skip_keys(p.bias, first), skip_keys(p.mask, first);

  const int64_t group = p.Hq / p.Hk;
  p.Hq = p.Hk, p.Sq = group;
  heads_to_rows(p.q.stride, group), heads_to_rows(p.o.stride, group);
  heads_to_rows(p.bias, group), heads_to_rows(p.mask, group);
  p.lse_stride[1] *= group;  // rows are 1 apart, as heads of one query were
  return true;
}

// Whether the kernel of attention_forward_few.h takes a call that does not go to those for sm_90a. Wider heads would
// want more shared memory than some GPUs have.
constexpr int kMostWidthOfFew = 128;
inline bool has_few_queries(const AttentionCall& call) {
  constexpr int64_t kRows = 16;
  const AttentionParams& p = call.p;
  return call.plain && call.aligned && !call.packed && p.dropout_p == 0 && p.Sq <= kRows && bytes_of(p.dtype) == 2 &&
         std::max(p.D, p.Dv) <= kMostWidthOfFew;
}

// Few blocks would keep a part of the GPU only: the keys are split, and the parts merged in their order. Sizes and
// operands alone decide, so the bits are the same on every GPU. The rows of one warp take as long as their keys take to
// be read: the largest GPUs want two blocks on each of 132 multiprocessors, three where has_few_queries, and that twice
// over, so that the last ones to run are short. Longer ones have products to do, which the kernels for sm_90a do
// faster, unsplit.
inline void choose_splits(AttentionCall& call, int64_t least_splits) {
  constexpr int64_t kRows = 128, kWarpRows = 32, kLongKeys = 512, kUnit = 64;
  const AttentionParams& p = call.p;
  const bool few = p.Sq <= kWarpRows;
  const int64_t enough_blocks = few ? 512 : 128, least_keys = few ? 128 : 256;
  const int64_t wanted_blocks = has_few_queries(call) ? 768 : few ? 512 : 256;
  const int64_t blocks = p.B * p.Hq * ((p.Sq + kRows - 1) / kRows);
  if (call.packed || blocks == 0 || p.Sk < kLongKeys) return;
  const int64_t wanted = blocks < enough_blocks ? (wanted_blocks + blocks - 1) / blocks : 1;
  const int64_t splits = std::min(std::max(wanted, least_splits), p.Sk / least_keys);
  if (splits == 1) return;
  call.split_keys = ((p.Sk + splits - 1) / splits + kUnit - 1) / kUnit * kUnit;
  call.splits = (p.Sk + call.split_keys - 1) / call.split_keys;
}

// The call as forward launches it. What it leaves in splits is merged with the heads as they are given.
inline AttentionCall forward_launch(const AttentionCall& given) {
  AttentionCall call = given;
  if (heads_as_queries(call.p)) {
    call.plain_but_bias = call.plain_but_bias && rows_share_mask(call.p);
    call.plain = call.plain && call.plain_but_bias;
    choose_splits(call, call.p.sinks ? 2 : 1);  // a head's sink can only be added by the merge
    if (!call.p.sinks || call.splits > 1) return call;
    call = given;
  }
  choose_splits(call, 1);
  return call;
}

}  // namespace tformer
