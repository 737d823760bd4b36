// The rows of a block of attention_backward.h: scores become weights, gradients of weights those of scores.
#pragma once

#include "scores.h"
#include "scratch.h"
#include "upcoming.h"

namespace tformer::TFORMER_ISA {
namespace {

template <class T>
struct AttentionGradientRows {
  using P = Pack<T>;
  using Real = typename P::Real;
  using Group = typename P::Group;
  static constexpr int L = kLanes<Real>, kTileRows = P::kTileRows;
  // Queries and keys of one block. In vectors, its scores and their gradients stay in cache between the five products;
  // tile registers would wait for the sums of smaller blocks, and take scores from the caches a row tile at a time.
  static constexpr int64_t kQueries = P::kTiles ? 192 : 96, kKeys = P::kTiles ? 2 * kKeyBlock : kKeyBlock;
  static constexpr int64_t kRowsAtATime = P::kTiles ? kTileRows : kQueries;

  const AttentionParams& p;
  // By the letters of the formulas; _down: summed down the rows.
  Real *s, *dp, *cap, *lse, *delta;
  Group *p_down, *ds_down, *ds_along;
  Group *p_t, *ds_t;  // operands of dv and dk
  uint8_t* hidden;

  AttentionGradientRows(const AttentionParams& params, Scratch& scratch, int64_t q_count) : p(params) {
    constexpr int64_t kAtATime = kRowsAtATime * kKeys, kBlock = kQueries * kKeys;
    s = scratch.take<Real>(kAtATime);
    dp = scratch.take<Real>(kAtATime);
    cap = scratch.take<Real>(kKeys);
    p_down = P::kStep == 1 ? reinterpret_cast<Group*>(s) : scratch.take<Group>(kAtATime / P::kStep);
    ds_down = P::kStep == 1 ? reinterpret_cast<Group*>(dp) : scratch.take<Group>(kAtATime / P::kStep);
    ds_along = P::kStep == 1 ? reinterpret_cast<Group*>(dp) : scratch.take<Group>(kBlock / P::kStep);
    p_t = P::kTiles ? scratch.take<Group>(kBlock / P::kStep) : p_down;
    ds_t = P::kTiles ? scratch.take<Group>(kBlock / P::kStep) : ds_down;
    lse = scratch.take<Real>(q_count);
    delta = scratch.take<Real>(q_count);
    hidden = scratch.take<uint8_t>(kBlock);
  }

  // Queries [i, i + rows) of a head and keys [key0, key0 + keys), padded to `width`; at: the first row in the task.
  struct BlockRows {
    int64_t b, h, i, rows, at, key0, keys, width;
    bool finite;
  };

  // Rows [first, end) of a block, for which there are s and dp; those past block.rows are padding. seen: the keys of
  // each row tile that there are products for.
  void differentiate(const AttentionTask& t, const Scores<Real>& scores, const BlockRows& block, int64_t first,
                     int64_t end, const Steps* seen, Upcoming<T>& next) {
    const bool plain = scores.plain && block.finite && p.dropout_p == 0;
    for (int64_t r = first; r < end; ++r) {
      next.fetch();
      const Row row{s + (r - first) * kKeys, dp + (r - first) * kKeys, hidden + r * kKeys};
      if constexpr (P::kTiles) {
        if (plain && r % 2 == 0 && r + 1 < block.rows) {
          differentiate_two(scores, block, r, first, seen[r / kTileRows]);
          next.fetch(), ++r;
          continue;
        }
      }
      if (r < block.rows) {
        differentiate_row(t, scores, block, r, row, seen[r / kTileRows]);
      } else {
        zero(row.s, kKeys), zero(row.dp, kKeys);
        for (int64_t j = 0; j < kKeys; ++j) row.hidden[j] = 1;
      }
      if (r % P::kStep == P::kStep - 1) narrow(r - (P::kStep - 1), first, block.width);
    }
    if (P::kTiles && t.want_dkv) {
      for (int64_t j = 0; j < block.width; j += L) {
        transpose_to<Group>(p_down + j, kKeys, p_t + (j * kQueries + first) / P::kStep, kQueries / P::kStep);
        transpose_to<Group>(ds_down + j, kKeys, ds_t + (j * kQueries + first) / P::kStep, kQueries / P::kStep);
      }
    }
  }

 private:
  static void zero(Real* x, int64_t n) {
    for (int64_t i = 0; i < n; i += L) store(x + i, Vec<Real>{});
  }

  // A row of a block.
  struct Row {
    Real *s, *dp;
    uint8_t* hidden;
  };

  // s becomes p (with dropout), dp becomes scale * ds. `seen`: the keys there are products for.
  void differentiate_row(const AttentionTask& t, const Scores<Real>& scores, const BlockRows& block, int64_t r,
                         const Row& row, const Steps& seen) {
    Real *x = row.s, *g = row.dp;
    const int64_t b = block.b, h = block.h, i = block.i + r, at = block.at + r;
    const int64_t key0 = block.key0, keys = block.keys, width = block.width;
    scores.finish_row(x, i, key0, width, p.softcap != 0 ? cap : nullptr);
    alignas(64) Real keep[kKeys];
    if (p.dropout_p > 0) {
      const DropoutRow counter{static_cast<uint32_t>(i), static_cast<uint32_t>(h), static_cast<uint32_t>(b)};
      const Dropout dropout(p.dropout_p, p.dropout_seed);
      for (int64_t j = 0; j < kKeys; j += kKeyBlock) dropout.factors(counter, key0 + j, kKeyBlock, keep + j);
    }
    if (!block.finite) {
      for (int64_t j = 0; j < width; ++j) row.hidden[j] = x[j] == -kInfinity<Real>;
    }
    const Real scale = static_cast<Real>(p.scale);
    const Vec<Real> none = splat(-kInfinity<Real>);
    const Real pending = scores.pending_scale(), shift = lse[at], row_delta = delta[at];
    Real* bias = t.want_dbias ? grad_bias_row(b, h, i, key0) : nullptr;
    alignas(64) Real unscaled[kKeys];  // ds, the gradient of the bias, where its row is no vector
    const bool apart = bias && p.grad_bias_stride[3] != 1;
    for (int64_t j = 0; j < width; j += L) {
      if (j == seen.begin && j < seen.end) j = seen.end;
      if (j == width) break;
      store(x + j, Vec<Real>{});
      store(g + j, Vec<Real>{});
      if (apart) store(unscaled + j, Vec<Real>{});
    }
    const auto differentiate = [&](auto plain) TFORMER_LAMBDA {  // nothing but p and ds
      for (int64_t j = seen.begin; j < seen.end; j += L) {
        const Vec<Real> score = load(x + j);
        const Vec<Real> weight = exp2_vec<Real, T>((score * pending - shift) * kLog2e<Real>);
        Vec<Real> dweight = load(g + j), dropped = weight;
        if (!plain && p.dropout_p > 0) {
          dweight *= load(keep + j);
          dropped *= load(keep + j);
        }
        const Vec<Real> all = weight * (dweight - row_delta), ds = (score == none) ? Vec<Real>{} : all;
        store(x + j, (score == none) ? Vec<Real>{} : dropped);
        if (!plain && apart) {
          store(unscaled + j, ds);
        } else if (!plain && bias && keys - j >= L) {
          store(bias + j, load(bias + j) + ds);
        } else if (!plain && bias && j < keys) {
          store_as<Real>(bias + j, load_as<Real>(bias + j, keys - j) + ds, keys - j);
        }
        if (!plain && p.softcap != 0) {  // 0 where hidden: the cap's slope may be NaN there
          store(g + j, (ds == 0) ? ds : ds * load(cap + j) * scale);
        } else {
          store(g + j, ds * scale);
        }
      }
    };
    if (bias || p.softcap != 0 || p.dropout_p > 0) {
      differentiate(std::false_type{});
    } else {
      differentiate(std::true_type{});
    }
    if (!apart) return;
    for (int64_t j = 0; j < keys; ++j) bias[j * p.grad_bias_stride[3]] += unscaled[j];
  }

#if TFORMER_HAS_TILES
  // differentiate_row and narrow at once for the rows r and r + 1 of a block, with nothing but the scale and positions.
  void differentiate_two(const Scores<Real>& scores, const BlockRows& block, int64_t r, int64_t first,
                         const Steps& seen) const {
    const int64_t i = block.i + r, at = block.at + r, width = block.width;
    const int64_t row = (r - first) * kKeys, pair = row / 2;
    const F scale = splat(scores.scale), to_exp2 = scale * kLog2e<float>, none = splat(-kInfinity<float>);
    const KeyRange range = scores.range.from_key(block.key0);
    const bool edge = range.begin(i + 1) > 0 || range.end(i) < width;
    F shift[2], row_delta[2];
    for (int n = 0; n < 2; ++n) {
      shift[n] = splat(-lse[at + n] * kLog2e<float>), row_delta[n] = scale * -delta[at + n];
    }
    for (int64_t j = 0; j < width; j += 2 * L) {
      if (j == seen.begin && j < seen.end) j = seen.end;
      if (j == width) break;
      for (int64_t v = j; v < j + 2 * L; v += L) {
        store(p_down + pair + v, U32{}), store(ds_down + pair + v, U32{});
      }
      for (int n = 0; n < 2; ++n) store(ds_along + ((r + n) * kKeys + j) / 2, U32{});
    }
    for (int64_t j = seen.begin; j < seen.end; j += 2 * L) {
      F weight[2][2], ds[2][2];
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int64_t key = j + v * L;
          F score = load(s + row + n * kKeys + key);
          if (__builtin_expect(edge, 0)) {
            const F lane = lane_index<float>() + static_cast<float>(key);
            score = lane < static_cast<float>(range.begin(i + n)) ? none : score;
            score = lane < static_cast<float>(range.end(i + n)) ? score : none;
          }
          weight[n][v] = exp2_of_fraction(score * to_exp2 + shift[n]);
          const F all = weight[n][v] * (load(dp + row + n * kKeys + key) * scale + row_delta[n]);
          ds[n][v] = score == none ? F{} : all;
        }
        P::store_two_along(ds_along + ((r + n) * kKeys + j) / 2, ds[n][0], ds[n][1]);
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        store(p_down + pair + j + v * L, P::pair(weight[0][v], weight[1][v]));
        store(ds_down + pair + j + v * L, P::pair(ds[0][v], ds[1][v]));
      }
    }
  }
#endif

  // Where the bias's gradient for row i is summed, from key0 on; the stride of a broadcast dimension is 0.
  Real* grad_bias_row(int64_t b, int64_t h, int64_t i, int64_t key0) const {
    const int64_t* stride = p.grad_bias_stride;
    return static_cast<Real*>(p.grad_bias) + b * stride[0] + h * stride[1] + i * stride[2] + key0 * stride[3];
  }

  // The kStep rows from r, as operands of the last three products; first: that of the scores in memory.
  TFORMER_INLINE void narrow(int64_t r, int64_t first, int64_t width) const {
    if constexpr (P::kStep == 2) {
      const int64_t at = (r - first) * kKeys, pair = at / 2, along = r * kKeys / 2;
      narrow_down_rows<P>(s + at, s + at + kKeys, width, p_down + pair);
      narrow_down_rows<P>(dp + at, dp + at + kKeys, width, ds_down + pair);
      narrow_along_row<P>(dp + at, width, ds_along + along);
      narrow_along_row<P>(dp + at + kKeys, width, ds_along + along + kKeys / 2);
    }
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
