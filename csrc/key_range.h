// Which keys a query may attend to by position: a pure function of positions and lengths. No tile size may enter it.
#pragma once

#include "params.h"

namespace tformer {

struct KeyRange {
  int64_t Sk;           // keys of this sequence
  int64_t offset;       // query i stands at diagonal i + offset among the keys
  int64_t left, right;  // reach from the diagonal; -1 = unbounded

  constexpr KeyRange(const AttentionParams& p, const Sequence& s)
      : Sk(s.Sk), offset(p.causal == kUpperLeft ? 0 : s.Sk - s.Sq), left(p.window_left), right(p.window_right) {
    if (p.causal != kNotCausal) right = 0;  // a window can only narrow what causality leaves
  }

  constexpr int64_t diagonal(int64_t i) const { return i + offset; }
  constexpr int64_t clip(int64_t j) const { return j < 0 ? 0 : (j > Sk ? Sk : j); }

  // Query i sees keys begin(i) <= j < end(i). Both grow with i, so a block of rows sees begin(first) .. end(last).
  constexpr int64_t begin(int64_t i) const { return left < 0 ? 0 : clip(diagonal(i) - left); }
  constexpr int64_t end(int64_t i) const { return right < 0 ? Sk : clip(diagonal(i) + right + 1); }

  // Key j is seen by queries query_begin(j) <= i < query_end(j, Sq). Both grow with j.
  constexpr int64_t query_begin(int64_t j) const {
    return right < 0 || j - right < offset ? 0 : j - right - offset;
  }
  constexpr int64_t query_end(int64_t j, int64_t Sq) const {
    const int64_t end = j + left + 1 - offset;
    return left < 0 || end > Sq ? Sq : (end < 0 ? 0 : end);
  }
};

}  // namespace tformer
