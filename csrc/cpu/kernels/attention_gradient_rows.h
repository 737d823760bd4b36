// The rows of a block of attention_backward.h: scores become weights, gradients of weights those of scores.
#pragma once

#include "scores.h"
#include "scratch.h"

namespace tformer::TFORMER_ISA {
namespace {

template <class T, class P>
struct AttentionGradientRows {
  using Real = typename P::Real;
  using Group = typename P::Group;
  static constexpr int L = kLanes<Real>, kTileRows = P::kTileRows, kSlices = P::kSlices;
  // Queries and keys of one block. In vectors, its scores and their gradients stay in cache between the five products;
  // tile registers would wait for the sums of smaller blocks, and take scores from the caches a row tile at a time.
  static constexpr int64_t kQueries = P::kTiles ? 192 : 96, kKeys = P::kTiles ? 2 * kKeyBlock : kKeyBlock;
  static constexpr int64_t kRowsAtATime = P::kTiles ? kTileRows : kQueries;
  // Their scores: in tile registers those of two row tiles, in turn.
  static constexpr int64_t kAtATime = kRowsAtATime * kKeys, kInTurn = P::kTiles ? 2 : 1;
  static int64_t scores_place(int64_t r) { return r / kRowsAtATime % kInTurn * kAtATime + r % kRowsAtATime * kKeys; }
  // Groups of a row of what is summed along it, steps of what is summed down the rows.
  static constexpr int64_t kAlong = kKeys / P::kStep, kDown = kQueries / P::kStep;

  const AttentionParams& p;
  // By the letters of the formulas; _down: summed down the rows.
  Real *s, *dp, *cap, *lse, *delta;
  Group *p_down, *ds_down, *ds_along;
  uint8_t* hidden;
  const Dropout dropout;

  AttentionGradientRows(const AttentionParams& params, Scratch& scratch, int64_t q_count)
      : p(params), dropout(p.dropout_p, p.dropout_seed) {
    constexpr int64_t kBlock = kQueries * kKeys;
    s = scratch.take<Real>(kInTurn * kAtATime);
    dp = scratch.take<Real>(kInTurn * kAtATime);
    cap = scratch.take<Real>(kKeys);
    constexpr int64_t kBlockGroups = kBlock / P::kStep * kSlices;
    p_down = P::kStep == 1 ? reinterpret_cast<Group*>(s) : scratch.take<Group>(kBlockGroups);
    ds_down = P::kStep == 1 ? reinterpret_cast<Group*>(dp) : scratch.take<Group>(kBlockGroups);
    ds_along = P::kStep == 1 ? reinterpret_cast<Group*>(dp) : scratch.take<Group>(kBlockGroups);
    lse = scratch.take<Real>(q_count);
    delta = scratch.take<Real>(q_count);
    hidden = scratch.take<uint8_t>(kBlock);
  }

  // Queries [i, i + rows) of a head and keys [key0, key0 + keys), padded to `width`; at: the first row in the task.
  struct BlockRows {
    int64_t b, h, i, rows, at, key0, keys, width;
    bool finite;
  };

  static DropoutRow counter_of(const BlockRows& block, int64_t r) {
    const auto i = static_cast<uint32_t>(block.i + r);
    return {i, static_cast<uint32_t>(block.h), static_cast<uint32_t>(block.b)};
  }

  // Rows [first, end) of a block, for which there are s and dp; those past block.rows are padding. seen: the keys of
  // each row tile that there are products for.
  void differentiate(const AttentionTask& t, const Scores<Real>& scores, const BlockRows& block, int64_t first,
                     int64_t end, const Steps* seen) {
    for (int64_t r = first; r < end; ++r) {
      const Row row{s + scores_place(r), dp + scores_place(r), hidden + r * kKeys};
      if (r < block.rows) {
        differentiate_row(t, scores, block, r, row, seen[r / kTileRows]);
      } else {
        zero(row.s, kKeys), zero(row.dp, kKeys);
        for (int64_t j = 0; j < kKeys; ++j) row.hidden[j] = 1;
      }
      if (r % P::kStep == P::kStep - 1) narrow(r - (P::kStep - 1), block.width);
    }
  }

#if TFORMER_HAS_BF16_PRODUCTS
  // The rows of a row tile two by two, as operands are made of them: what differentiate does, without gradients of what
  // scores are made of besides products. In tile registers beside products, and so many keys at a time as a tile holds.
  class RowPairs {
   public:
    RowPairs(const AttentionGradientRows& rows, const Scores<Real>& scores, const BlockRows& block, int64_t first,
             int64_t end, const Steps& seen, int64_t products)
        : rows_(rows),
          block_(block),
          scores_(scores),
          range_(scores.range.from_key(block.key0)),
          width_(round_up(block.width, 2 * L)),
          seen_{seen.begin / (2 * L) * (2 * L), round_up(seen.end, 2 * L)},
          end_(block.finite && !rows.p.grad_bias && rows.p.softcap == 0 ? first + (end - first) / 2 * 2 : first),
          r_(first),
          j_(seen_.begin),
          share_((end_ - first) / 2 * ((seen_.end - seen_.begin + kKeysAtOnce - 1) / kKeysAtOnce), products) {}

    // Called after each of those products.
    TFORMER_INLINE void operator()() {
      share_.after_one([this]() TFORMER_LAMBDA { make_one(); });
    }
    // Returns the first row that is left.
    int64_t finish() {
      while (r_ < end_) make_one();
      return r_;
    }

   private:
    static constexpr int64_t kKeysAtOnce = kSlices == 1 ? kKeys : 2 * L, kNextRow = P::kTiles ? kTileSide : kAlong;

    __attribute__((noinline)) void make_one() {
      if (r_ >= end_) return;
      const bool dropping = rows_.p.dropout_p > 0;
      if (j_ == seen_.begin) {
        leave_out_unseen();
        if (!scores_.plain) finish_scores();
        if (dropping) draw();
      }
      const int64_t end = j_ + kKeysAtOnce < seen_.end ? j_ + kKeysAtOnce : seen_.end;
      const auto differentiate = [&](auto drops) TFORMER_LAMBDA {
        scores_.plain ? this->template differentiate<drops, kSlices == 1>(j_, end)
                      : this->template differentiate<drops, false>(j_, end);
      };
      dropping ? differentiate(std::true_type{}) : differentiate(std::false_type{});
      j_ = end;
      if (j_ < seen_.end) return;
      j_ = seen_.begin, r_ += 2;
    }

    void leave_out_unseen() const {
      for (int64_t j = 0; j < width_; j += 2 * L) {
        if (j == seen_.begin && j < seen_.end) j = seen_.end;
        if (j == width_) break;
        for (int64_t slice = 0; slice < kTileUnit<P>; slice += kTileGroups) {
          for (int n = 0; n < 2; ++n) {
            const int64_t pair = down(r_, j + n * L) + slice;
            store(rows_.p_down + pair, U32{}), store(rows_.ds_down + pair, U32{});
            store(rows_.ds_along + place_along<P>(r_ + n, j / 2, kAlong) + slice, U32{});
          }
        }
      }
    }

    void finish_scores() const {
      for (int64_t n = 0; n < 2; ++n) {
        Real* row = rows_.s + scores_place(r_ + n);
        scores_.finish_row(row, block_.i + r_ + n, block_.key0, width_, nullptr);
      }
    }

    // The factors of dropout of both rows.
    void draw() {
      for (int64_t j = seen_.begin / kKeyBlock * kKeyBlock; j < seen_.end; j += kKeyBlock) {
        F factor[2][Dropout::kVectors];
        rows_.dropout.factor_vectors(counter_of(block_, r_), block_.key0 + j, factor);
        for (int n = 0; n < 2; ++n) {
          for (int v = 0; v < Dropout::kVectors; ++v) store(keep_ + n * kKeys + j + v * L, factor[n][v]);
        }
      }
    }

    // kFused: an exponent is one multiply-add. Not where something is added to scores, which may be so large, and lse
    // with them, that lse has to be subtracted first.
    template <bool kDropping, bool kFused>
    TFORMER_INLINE void differentiate(int64_t begin, int64_t end) const {
      const int64_t i = block_.i + r_, at = block_.at + r_, place = scores_place(r_);
      // copies: a store could change the members
      const Real *const score_rows = rows_.s + place, *const dp_rows = rows_.dp + place;
      Group *const p_down = rows_.p_down, *const ds_down = rows_.ds_down, *const ds_along = rows_.ds_along;
      const int64_t r = r_;
      const KeyRange range = range_;
      const float pending = scores_.pending_scale();
      const F scale = splat(scores_.scale), to_exp2 = splat(pending * kLog2e<float>), none = splat(-kInfinity<float>);
      const bool edge = scores_.plain && (range.begin(i + 1) > begin || range.end(i) < end);
      F shift[2], row_delta[2];
      for (int n = 0; n < 2; ++n) {
        shift[n] = splat(kFused ? -rows_.lse[at + n] * kLog2e<float> : rows_.lse[at + n]);
        row_delta[n] = splat(scores_.scale * -rows_.delta[at + n]);
      }
      for (int64_t j = begin; j < end; j += 2 * L) {
        F weight[2][2], ds[2][2];
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            const int64_t key = j + v * L;
            F score = load(score_rows + n * kKeys + key);
            if (__builtin_expect(edge, 0)) {
              const F lane = lane_index<float>() + static_cast<float>(key);
              score = lane < static_cast<float>(range.begin(i + n)) ? none : score;
              score = lane < static_cast<float>(range.end(i + n)) ? score : none;
            }
            if constexpr (kFused) {
              weight[n][v] = exp2_vec<float, sizeof(T) == 2>(score * to_exp2 + shift[n]);
            } else {
              weight[n][v] = exp2_vec<float, sizeof(T) == 2>((score * pending - shift[n]) * kLog2e<float>);
            }
            F dweight = load(dp_rows + n * kKeys + key);
            F kept = weight[n][v];
            if constexpr (kDropping) {
              const F factor = load(keep_ + n * kKeys + key);
              dweight *= factor, kept *= factor;
            }
            const F all = weight[n][v] * (dweight * scale + row_delta[n]);
            ds[n][v] = score == none ? F{} : all;
            weight[n][v] = score == none ? F{} : kept;  // lse may be NaN, from keys of another block
          }
        }
        const int64_t along = place_along<P>(r, j / 2, kAlong), pairs[] = {down(r, j), down(r, j + L)};
        P::store_pairs(p_down + pairs[0], weight[0][0], weight[1][0]);
        P::store_pairs(p_down + pairs[1], weight[0][1], weight[1][1]);
        P::store_both({ds_along + along, ds_along + along + kNextRow}, {ds_down + pairs[0], ds_down + pairs[1]}, ds);
      }
    }

    const AttentionGradientRows& rows_;
    const BlockRows& block_;
    const Scores<Real>& scores_;
    const KeyRange range_;
    const int64_t width_;  // whole pairs of vectors, as are the keys seen: what is beyond those of the block is hidden
    const Steps seen_;
    const int64_t end_;
    int64_t r_, j_;
    EvenShare share_;
    alignas(64) float keep_[2 * kKeys];
  };
#endif

 private:
  // Where the pair of rows from `row` lies in p_down and ds_down, from key j on: in tile registers they are second
  // operands, in vectors first ones.
  static TFORMER_INLINE int64_t down(int64_t row, int64_t j) {
    return P::kTiles ? place_down<P>(row / P::kStep, j, kKeys, kDown) : row / P::kStep * kKeys + j;
  }

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
      const DropoutRow counter = counter_of(block, r);
      for (int64_t j = 0; j < kKeys; j += kKeyBlock) dropout.factors(counter, key0 + j, keep + j);
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
        const Vec<Real> weight = exp2_vec<Real, sizeof(T) == 2>((score * pending - shift) * kLog2e<Real>);
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

  // Where the bias's gradient for row i is summed, from key0 on; the stride of a broadcast dimension is 0.
  Real* grad_bias_row(int64_t b, int64_t h, int64_t i, int64_t key0) const {
    const int64_t* stride = p.grad_bias_stride;
    return static_cast<Real*>(p.grad_bias) + b * stride[0] + h * stride[1] + i * stride[2] + key0 * stride[3];
  }

  // The kStep rows from r, as operands of the last three products.
  TFORMER_INLINE void narrow(int64_t r, int64_t width) const {
    if constexpr (P::kStep == 2) {
      const int64_t at = scores_place(r);
      constexpr int64_t kSide = P::kTiles ? kDown / kTileSide * kTileUnit<P> : L;
      narrow_down_rows<P>(s + at, s + at + kKeys, width, p_down + down(r, 0), kSide);
      narrow_down_rows<P>(dp + at, dp + at + kKeys, width, ds_down + down(r, 0), kSide);
      narrow_along_row<P>(dp + at, width, ds_along + place_along<P>(r, 0, kAlong));
      narrow_along_row<P>(dp + at + kKeys, width, ds_along + place_along<P>(r + 1, 0, kAlong));
    }
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
