// Which keys a query may attend to by position: a pure function of positions and lengths. No tile size may enter it.
#pragma once

#include "params.h"

namespace tformer {

template <class Int>
struct KeyRangeOf {
  Int Sk;           // keys of this sequence
  Int offset;       // query i stands at diagonal i + offset among the keys
  Int left, right;  // reach from the diagonal; -1 = unbounded

  constexpr KeyRangeOf(const AttentionParams& p, const Sequence& s)
      : Sk(static_cast<Int>(s.Sk)),
        offset(static_cast<Int>(p.causal == kUpperLeft ? 0 : s.Sk - s.Sq)),
        left(reach(p.window_left)),
        right(reach(p.window_right)) {
    if (p.causal != kNotCausal) right = 0;  // a window can only narrow what causality leaves
  }

  constexpr Int diagonal(Int i) const { return i + offset; }
  constexpr Int clip(Int j) const { return j < 0 ? 0 : (j > Sk ? Sk : j); }

  // Query i sees keys begin(i) <= j < end(i). Both grow with i, so a block of rows sees begin(first) .. end(last).
  constexpr Int begin(Int i) const { return left < 0 ? 0 : clip(diagonal(i) - left); }
  constexpr Int end(Int i) const { return right < 0 ? Sk : clip(diagonal(i) + right + 1); }

  // The same, with keys counted from key j.
  constexpr KeyRangeOf from_key(Int j) const {
    KeyRangeOf range = *this;
    range.Sk -= j;
    range.offset -= j;
    return range;
  }

  // Key j is seen by queries query_begin(j) <= i < query_end(j, Sq). Both grow with j.
  constexpr Int query_begin(Int j) const { return right < 0 || j - right < offset ? 0 : j - right - offset; }
  constexpr Int query_end(Int j, Int Sq) const {
    const Int end = j + left + 1 - offset;
    return left < 0 || end > Sq ? Sq : (end < 0 ? 0 : end);
  }

 private:
  // Beyond all positions is far enough, and does not overflow: positions stay below a quarter of Int.
  static constexpr Int reach(int64_t window) {
    constexpr int64_t kFar = int64_t{1} << (sizeof(Int) * 8 - 3);
    return static_cast<Int>(window < kFar ? window : kFar);
  }
};

using KeyRange = KeyRangeOf<int64_t>;

}  // namespace tformer
