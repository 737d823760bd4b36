// Gradients of attention_forward.h from the saved log-sum-exp (Dao et al. 2022, section 3.1 and appendix B):
//   p = exp(score - lse), dv = pT do, dp = do vT, ds = p (dp - delta), dq = scale ds k, dk = scale dsT q.
// Blocks of keys outermost, blocks of queries inside, both ascending. A task may cover any rectangle and may leave out
// dq, or dk and dv: every sum still runs in the same order, so the split over threads does not show in a single bit.
#pragma once

#include "scores.h"
#include "scratch.h"
#include "upcoming.h"

namespace tformer::TFORMER_ISA {
namespace {

// Rows of one block: two kQueryBlock x kKeyBlock tiles stay in cache between the five products.
constexpr int64_t kQueryBlock = 96;

// Row tiles of the sums over a block.
constexpr int64_t kQueryTiles = kQueryBlock / kTileRows, kKeyTiles = (kKeyBlock + kTileRows - 1) / kTileRows;

// rowsum(do * o) of one row.
template <class T>
TFORMER_INLINE double row_product(const T* go, const T* o, int64_t width) {
  using Real = typename Pack<T>::Real;
  constexpr int L = kLanes<Real>;
  Vec<Real> acc{};
  for (int64_t d = 0; d < width; d += L) {
    acc += width - d >= L ? load_as<Real>(o + d) * load_as<Real>(go + d)
                          : load_as<Real>(o + d, width - d) * load_as<Real>(go + d, width - d);
  }
  return static_cast<double>(sum_lanes<Real>(acc));
}

template <class T>
struct AttentionBackward {
  using P = Pack<T>;
  using Real = typename P::Real;
  using Group = typename P::Group;
  static constexpr int L = kLanes<Real>;

  const AttentionParams& p;
  const int64_t group;                 // query heads of a key head
  const int64_t groups, v_groups;      // steps of a sum over D, over Dv
  const int64_t q_columns, v_columns;  // D and Dv in whole vectors
  const int64_t q_row, v_row;          // groups of a packed row of q, of do
  int64_t q_count, k_count;            // padded rows and keys of the task

  // Operands by the letters of the formulas; _t: transposed panels, _down: summed down the rows.
  Group *k_t, *v_t, *k_down, *q_along, *do_along, *q_down, *do_down;
  struct {
    const Group* rows;
    int64_t row;
  } q_a, do_a;  // q and do along the row: packed, or the caller's own
  Real *s, *dp, *cap, *dq, *dk, *dv;
  Group *p_down, *ds_down, *ds_along;
  Real *lse, *delta;
  uint8_t *hidden, *q_finite;
  uint8_t *dq_progress, *dkv_progress;  // of the row tiles of dq, and of dk and of dv
  Upcoming<T> next;
  size_t bytes;

  AttentionBackward(const AttentionParams& params, const AttentionTask& t, Scratch scratch)
      : p(params),
        group(p.Hq / p.Hk),
        groups((p.D + P::kStep - 1) / P::kStep),
        v_groups((p.Dv + P::kStep - 1) / P::kStep),
        q_columns(round_up(p.D, L)),
        v_columns(round_up(p.Dv, L)),
        q_row(row_groups<P>(p.D)),
        v_row(row_groups<P>(p.Dv)),
        q_count(round_up(t.q_end - t.q_begin, P::kStep)),
        k_count(round_up(t.k_end - t.k_begin, kKeyBlock)) {
    k_t = scratch.take<Group>(kKeyBlock * groups);
    v_t = scratch.take<Group>(kKeyBlock * v_groups);
    k_down = scratch.take<Group>(kKeyBlock / P::kStep * q_columns);
    q_along = scratch.take<Group>(q_count * q_row);
    do_along = scratch.take<Group>(q_count * v_row);
    q_down = P::kStep == 1 ? q_along : scratch.take<Group>(q_count / P::kStep * q_columns);
    do_down = P::kStep == 1 ? do_along : scratch.take<Group>(q_count / P::kStep * v_columns);
    s = scratch.take<Real>(kQueryBlock * kKeyBlock);
    dp = scratch.take<Real>(kQueryBlock * kKeyBlock);
    cap = scratch.take<Real>(kKeyBlock);
    constexpr int64_t kTile = kQueryBlock * kKeyBlock / P::kStep;
    p_down = P::kStep == 1 ? reinterpret_cast<Group*>(s) : scratch.take<Group>(kTile);
    ds_down = P::kStep == 1 ? reinterpret_cast<Group*>(dp) : scratch.take<Group>(kTile);
    ds_along = P::kStep == 1 ? reinterpret_cast<Group*>(dp) : scratch.take<Group>(kTile);
    dq = t.want_dq ? scratch.take<Real>(q_count * q_columns) : nullptr;
    dk = t.want_dkv ? scratch.take<Real>(k_count * q_columns) : nullptr;
    dv = t.want_dkv ? scratch.take<Real>(k_count * v_columns) : nullptr;
    lse = scratch.take<Real>(q_count);
    delta = scratch.take<Real>(q_count);
    hidden = scratch.take<uint8_t>(kQueryBlock * kKeyBlock);
    q_finite = scratch.take<uint8_t>(q_count / kQueryBlock + 1);
    dq_progress = scratch.take<uint8_t>(dq_tiles());
    dkv_progress = scratch.take<uint8_t>(dkv_tiles());
    bytes = scratch.used();
  }

  void run(const AttentionTask& t) {
    for (int64_t b = t.b_begin; b < t.b_end; ++b) {
      const Sequence seq = sequence_of(p, b);
      for (int64_t h = t.h_begin; h < t.h_end; ++h) {
        if (h == t.h_begin || h % group == 0) std::memset(dkv_progress, kNothing, static_cast<size_t>(dkv_tiles()));
        next = Upcoming<T>();
        if (h + 1 < t.h_end) {
          expect(t, seq, b, h + 1);
        } else if (b + 1 < t.b_end) {
          expect(t, sequence_of(p, b + 1), b + 1, t.h_begin);
        }
        const bool last = h + 1 == t.h_end || (h + 1) % group == 0;  // of those that share dk and dv
        run_head(t, seq, b, h, last);
        if (t.want_dkv && last) write_dkv(t, b, h / group, seq);
      }
    }
  }

 private:
  template <class V>
  V* row_of(const Rows& r, int64_t b, int64_t h, int64_t i) const {
    return static_cast<V*>(r.data) + b * r.stride[0] + h * r.stride[1] + i * r.stride[2];
  }

  int64_t dq_tiles() const { return (q_count / kQueryBlock + 1) * kQueryTiles; }
  int64_t dkv_tiles() const { return 2 * k_count / kKeyBlock * kKeyTiles; }

  static void zero(Real* x, int64_t n) {
    for (int64_t i = 0; i < n; i += L) store(x + i, Vec<Real>{});
  }

  void expect(const AttentionTask& t, const Sequence& seq, int64_t b, int64_t h) {
    const int64_t q_count = (t.q_end < seq.Sq ? t.q_end : seq.Sq) - t.q_begin, q0 = seq.q_begin + t.q_begin;
    const int64_t k_count = (t.k_end < seq.Sk ? t.k_end : seq.Sk) - t.k_begin, k0 = seq.k_begin + t.k_begin;
    next.add(row_of<const T>(p.q, b, h, q0), p.q.stride[2], q_count, p.D);
    next.add(row_of<const T>(p.grad_o, b, h, q0), p.grad_o.stride[2], q_count, p.Dv);
    next.add(row_of<const T>(p.o, b, h, q0), p.o.stride[2], q_count, p.Dv);
    next.add(row_of<const T>(p.k, b, h / group, k0), p.k.stride[2], k_count, p.D);
    next.add(row_of<const T>(p.v, b, h / group, k0), p.v.stride[2], k_count, p.Dv);
  }

  void run_head(const AttentionTask& t, const Sequence& seq, int64_t b, int64_t h, bool last_head) {
    const int64_t q_end = t.q_end < seq.Sq ? t.q_end : seq.Sq;
    const int64_t k_end = t.k_end < seq.Sk ? t.k_end : seq.Sk;
    if (t.q_begin >= q_end) return;
    next.spread_over((q_end - t.q_begin) * ((k_end - t.k_begin + kKeyBlock - 1) / kKeyBlock));
    pack_queries(seq, b, h, t.q_begin, q_end);
    std::memset(dq_progress, kNothing, static_cast<size_t>(dq_tiles()));
    const Scores<Real> scores(p, seq, b, h);
    for (int64_t key0 = t.k_begin; key0 < k_end; key0 += kKeyBlock) {
      const Keys keys{b, h, key0, k_end - key0 < kKeyBlock ? k_end - key0 : kKeyBlock, key0 + kKeyBlock >= k_end};
      int64_t block = next_block(scores, keys, t.q_begin, q_end);
      if (block >= q_end) continue;
      const bool k_finite = pack_keys(seq, keys);
      while (block < q_end) {
        int64_t i = block, i_end = q_end - block < kQueryBlock ? q_end : block + kQueryBlock;
        // row tiles at either end that position alone hides
        while (scores.range.end(i + kTileRows - 1) <= key0) i += kTileRows;
        int64_t tile = i + (i_end - i - 1) / kTileRows * kTileRows;
        for (; tile > i && scores.range.begin(tile) >= key0 + keys.count; tile -= kTileRows) i_end = tile;
        const bool finite = k_finite && q_finite[(block - t.q_begin) / kQueryBlock];
        block = next_block(scores, keys, block + kQueryBlock, q_end);
        run_block(t, seq, scores, keys, i, i_end - i, finite, last_head && block >= q_end);
      }
    }
    if (!t.want_dq) return;
    for (int64_t i = 0; i < q_end - t.q_begin; i += kTileRows) {  // what later keys would have been added to
      const int64_t rows = q_end - t.q_begin - i < kTileRows ? q_end - t.q_begin - i : kTileRows;
      write(dq_progress[i / kTileRows], dq + i * q_columns, q_columns, p.grad_q, b, h, seq.q_begin + t.q_begin + i,
            rows, rows, p.D);
    }
  }

  // A block of keys and a query head.
  struct Keys {
    int64_t b, h, begin, count;
    bool last;  // of the head
  };

  // The first block of queries from `block` on of which some may attend to some of the keys.
  int64_t next_block(const Scores<Real>& scores, const Keys& keys, int64_t block, int64_t q_end) const {
    while (block < q_end && !scores.any_visible(block, block + kQueryBlock < q_end ? block + kQueryBlock : q_end,
                                                keys.begin, keys.begin + keys.count)) {
      block += kQueryBlock;
    }
    return block;
  }

  // Rows that are read in place where they are groups as they stand, packed otherwise.
  void pack_queries(const Sequence& seq, int64_t b, int64_t h, int64_t i0, int64_t i1) {
    const T* q = row_of<const T>(p.q, b, h, seq.q_begin + i0);
    const T* go = row_of<const T>(p.grad_o, b, h, seq.q_begin + i0);
    const int64_t q_stride = p.q.stride[2], go_stride = p.grad_o.stride[2];
    q_a = {q_along, q_row}, do_a = {do_along, v_row};
    if (P::kStep == 2 && in_place<P, T>(p.D, q_stride)) q_a = {reinterpret_cast<const Group*>(q), q_stride / P::kStep};
    if (P::kStep == 2 && in_place<P, T>(p.Dv, go_stride)) {
      do_a = {reinterpret_cast<const Group*>(go), go_stride / P::kStep};
    }
    for (int64_t i = 0; i < i1 - i0; i += kQueryBlock) {
      const int64_t count = i1 - i0 - i < kQueryBlock ? i1 - i0 - i : kQueryBlock, padded = round_up(count, P::kStep);
      const T *q_rows = q + i * q_stride, *go_rows = go + i * go_stride;
      Finite<P> finite;
      pack_down_rows<P>(q_rows, q_stride, count, padded, p.D, q_down + i / P::kStep * q_columns, finite);
      pack_down_rows<P>(go_rows, go_stride, count, padded, p.Dv, do_down + i / P::kStep * v_columns, finite);
      q_finite[i / kQueryBlock] = finite.holds();
      if (q_a.rows == q_along && P::kStep == 2) {
        pack_along_row<P>(q_rows, q_stride, count, padded, p.D, q_along + i * q_row, Unseen{});
      }
      if (do_a.rows == do_along && P::kStep == 2) {
        pack_along_row<P>(go_rows, go_stride, count, padded, p.Dv, do_along + i * v_row, Unseen{});
      }
    }
    const T* o = row_of<const T>(p.o, b, h, seq.q_begin + i0);
    const int64_t at = b * p.lse_stride[0] + h * p.lse_stride[1] + seq.q_begin + i0;
    for (int64_t i = 0; i < i1 - i0; ++i) {
      const Real x = static_cast<const Real*>(p.lse)[at + i];
      const bool dead = x == -kInfinity<Real>;
      lse[i] = dead ? Real(0) : x;  // a dead row has only -inf scores
      const double dlse = p.grad_lse && !dead ? static_cast<const Real*>(p.grad_lse)[at + i] : Real(0);
      delta[i] = static_cast<Real>(row_product<T>(go + i * go_stride, o + i * p.o.stride[2], p.Dv) - dlse);
    }
  }

  bool pack_keys(const Sequence& seq, const Keys& keys) {
    const T* k = row_of<const T>(p.k, keys.b, keys.h / group, seq.k_begin + keys.begin);
    const T* v = row_of<const T>(p.v, keys.b, keys.h / group, seq.k_begin + keys.begin);
    const int64_t padded = round_up(keys.count, L);
    pack_transposed<P>(k, p.k.stride[2], keys.count, padded, p.D, k_t);
    pack_transposed<P>(v, p.v.stride[2], keys.count, padded, p.Dv, v_t);
    Finite<P> finite;
    pack_down_rows<P>(k, p.k.stride[2], keys.count, padded, p.D, k_down, finite);
    return finite.holds();
  }

  // One kQueryBlock x kKeyBlock block: the five products. What position alone hides from all rows, or all keys, of a
  // register tile is left out of them. `last_rows`: no more is added to the gradients of these keys.
  void run_block(const AttentionTask& t, const Sequence& seq, const Scores<Real>& scores, const Keys& block, int64_t i,
                 int64_t rows, bool finite, bool last_rows) {
    const int64_t b = block.b, h = block.h, key0 = block.begin, keys = block.count;
    const int64_t at = i - t.q_begin, padded = round_up(rows, P::kStep), width = round_up(keys, L);
    const KeyRange range = scores.range.from_key(key0);
    Steps seen[kQueryTiles];  // keys of each row tile, in whole vectors
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t last = i + (r + kTileRows < rows ? r + kTileRows : rows) - 1, end = round_up(range.end(last), L);
      seen[r / kTileRows] = {range.begin(i + r) / L * L, end < width ? end : width};
    }
    for (int64_t n = 0; n < width; n += kPanel<P>) {
      const auto panel = [&](const Group* a, int64_t a_row, const Group* transposed, int64_t steps, Real* c) {
        const ProductOperands<P> m{a + at * a_row, a_row, 1, transposed + n * steps, kPanel<P>, steps};
        const IntoSums<P> into{c, kKeyBlock, false};
        for (int64_t r = 0; r < rows; r += kTileRows) {
          const Steps& all = seen[r / kTileRows];
          const int64_t from = all.begin > n ? all.begin : n, to = all.end < n + kPanel<P> ? all.end : n + kPanel<P>;
          if (from >= to) continue;
          register_tile_rows<P>(rows - r < kTileRows ? rows - r : kTileRows, static_cast<int>((to - from) / L), m, into,
                                m.a + r * a_row, m.b + from - n, steps, r, from);
        }
      };
      panel(q_a.rows, q_a.row, k_t, groups, s);
      panel(do_a.rows, do_a.row, v_t, v_groups, dp);
    }
    for (int64_t r = rows; r < padded; ++r) {
      zero(s + r * kKeyBlock, kKeyBlock);
      zero(dp + r * kKeyBlock, kKeyBlock);
      for (int64_t j = 0; j < kKeyBlock; ++j) hidden[r * kKeyBlock + j] = 1;
    }
    for (int64_t r = 0; r < rows; ++r) {
      next.fetch();
      differentiate_row(t, scores, b, h, i + r, r, at + r, key0, keys, seen[r / kTileRows], finite);
      if (r % P::kStep == P::kStep - 1 || r + 1 == rows) narrow(r / P::kStep * P::kStep, width);
    }
    if (t.want_dkv) {
      const int64_t key = key0 - t.k_begin, row_steps = padded / P::kStep;
      const auto rows_of = [&](int64_t j) TFORMER_LAMBDA {  // that see a key of the key tile from j
        const int64_t last = (j + kTileRows < keys ? j + kTileRows : keys) - 1;
        const int64_t first = range.query_begin(j) - i, end = range.query_end(last, i + rows) - i;
        return Steps{(first > 0 ? first : 0) / P::kStep, (end + P::kStep - 1) / P::kStep};
      };
      uint8_t* progress = dkv_progress + 2 * key / kKeyBlock * kKeyTiles;
      for (int64_t n = 0; n < 2 * kKeyTiles && last_rows; ++n) progress[n] |= kLast;
      const Gradient d_value{
          dv + key * v_columns, v_columns, progress, row_of<T>(p.grad_v, b, h / group, seq.k_begin + key0),
          p.grad_v.stride[2],   p.Dv,      nullptr};
      const Gradient d_key{dk + key * q_columns,
                           q_columns,
                           progress + kKeyTiles,
                           row_of<T>(p.grad_k, b, h / group, seq.k_begin + key0),
                           p.grad_k.stride[2],
                           p.D,
                           nullptr};
      multiply({p_down, 1, kKeyBlock, do_down + at / P::kStep * v_columns, v_columns, row_steps}, keys, v_columns,
               d_value, rows_of, finite, 1, kKeyBlock);
      multiply({ds_down, 1, kKeyBlock, q_down + at / P::kStep * q_columns, q_columns, row_steps}, keys, q_columns,
               d_key, rows_of, finite, 1, kKeyBlock);
    }
    if (t.want_dq) {
      const auto keys_of = [&](int64_t r) TFORMER_LAMBDA {
        return Steps{seen[r / kTileRows].begin / P::kStep, seen[r / kTileRows].end / P::kStep};
      };
      uint8_t* progress = dq_progress + at / kTileRows;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t last = i + (r + kTileRows < rows ? r + kTileRows : rows) - 1;
        if (block.last || range.end(last) <= kKeyBlock) progress[r / kTileRows] |= kLast;
      }
      const Gradient d_query{dq + at * q_columns, q_columns, progress, row_of<T>(p.grad_q, b, h, seq.q_begin + i),
                             p.grad_q.stride[2],  p.D,       nullptr};
      multiply({ds_along, kKeyBlock / P::kStep, 1, k_down, q_columns, width / P::kStep}, rows, q_columns, d_query,
               keys_of, finite, kKeyBlock, 1);
    }
  }

  using Gradient = IntoRows<P, T>;

  template <class StepsOf>
  void multiply(const ProductOperands<P>& m, int64_t rows, int64_t columns, const Gradient& into, StepsOf&& steps_of,
                bool finite, int64_t hidden_row, int64_t hidden_step) const {
    if (finite) {
      product<P>(m, rows, columns, into, steps_of);
    } else {
      product_without_hidden<P>(m, rows, columns, into, hidden, hidden_row, hidden_step);
    }
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const Steps sum = steps_of(r);
      into.advance(r, !finite || sum.begin < sum.end);
    }
  }

  // Row r of the block: s becomes p (with dropout), dp becomes scale * ds. `seen`: the keys there are products for.
  void differentiate_row(const AttentionTask& t, const Scores<Real>& scores, int64_t b, int64_t h, int64_t i, int64_t r,
                         int64_t at, int64_t key0, int64_t keys, const Steps& seen, bool finite) {
    Real* x = s + r * kKeyBlock;
    Real* g = dp + r * kKeyBlock;
    const int64_t width = round_up(keys, L);
    scores.finish_row(x, i, key0, width, p.softcap != 0 ? cap : nullptr);
    alignas(64) Real keep[kKeyBlock];
    if (p.dropout_p > 0) {
      const DropoutRow counter{static_cast<uint32_t>(i), static_cast<uint32_t>(h), static_cast<uint32_t>(b)};
      Dropout(p.dropout_p, p.dropout_seed).factors(counter, key0, kKeyBlock, keep);
    }
    if (!finite) {
      for (int64_t j = 0; j < width; ++j) hidden[r * kKeyBlock + j] = x[j] == -kInfinity<Real>;
    }
    const Real scale = static_cast<Real>(p.scale);
    const Vec<Real> none = splat(-kInfinity<Real>);
    const Real pending = scores.pending_scale(), shift = lse[at], row_delta = delta[at];
    Real* bias = t.want_dbias ? grad_bias_row(b, h, i, key0) : nullptr;
    alignas(64) Real unscaled[kKeyBlock];  // ds, the gradient of the bias, where its row is no vector
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
        } else if (!plain && bias) {
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
      const int64_t at = r * kKeyBlock, pair = r / 2 * kKeyBlock;
      narrow_down_rows<P>(s + at, s + at + kKeyBlock, width, p_down + pair);
      narrow_down_rows<P>(dp + at, dp + at + kKeyBlock, width, ds_down + pair);
      narrow_along_row<P>(dp + at, width, ds_along + at / 2);
      narrow_along_row<P>(dp + at + kKeyBlock, width, ds_along + (at + kKeyBlock) / 2);
    }
  }

  void write_dkv(const AttentionTask& t, int64_t b, int64_t kv_head, const Sequence& seq) const {
    const int64_t length = p.cu_seqlens_k ? seq.Sk : p.Sk;  // keys past key_lengths get zeros
    const int64_t k_end = t.k_end < length ? t.k_end : length;
    const int64_t seen_end = t.k_end < seq.Sk ? t.k_end : seq.Sk;
    for (int64_t key0 = t.k_begin; key0 < k_end; key0 += kKeyBlock) {
      for (int64_t j = 0; j < kKeyBlock && key0 + j < k_end; j += kTileRows) {
        const int64_t key = key0 - t.k_begin + j, in_block = kKeyBlock - j < kTileRows ? kKeyBlock - j : kTileRows;
        const int64_t rows = k_end - key0 - j < in_block ? k_end - key0 - j : in_block, seen = seen_end - key0 - j;
        const uint8_t* progress = dkv_progress + 2 * (key0 - t.k_begin) / kKeyBlock * kKeyTiles + j / kTileRows;
        write(progress[0], dv + key * v_columns, v_columns, p.grad_v, b, kv_head, seq.k_begin + key0 + j, rows, seen,
              p.Dv);
        write(progress[kKeyTiles], dk + key * q_columns, q_columns, p.grad_k, b, kv_head, seq.k_begin + key0 + j, rows,
              seen, p.D);
      }
    }
  }

  // What products have not written of the row tile from `row`: sums; zeros where there are none, or from row `seen` on.
  void write(uint8_t progress, const Real* sums, int64_t columns, const Rows& to, int64_t b, int64_t h, int64_t row,
             int64_t rows, int64_t seen, int64_t width) const {
    for (int64_t i = 0; i < rows; ++i) {
      const bool zeros = i >= seen || progress == kNothing;
      if (progress == kWritten && !zeros) continue;
      store_row<Real>(row_of<T>(to, b, h, row + i), width,
                      [&](int64_t d) TFORMER_LAMBDA { return zeros ? Vec<Real>{} : load(sums + i * columns + d); });
    }
  }
};

// The gradient of the sink logit of one (batch, head): the sum over its rows of p_sink (dlse - rowsum(do * o)).
template <class T>
double attention_sink_gradient(const AttentionParams& p, int64_t b, int64_t h) {
  using Real = typename Pack<T>::Real;
  const Sequence seq = sequence_of(p, b);
  const int64_t at = b * p.lse_stride[0] + h * p.lse_stride[1] + seq.q_begin;
  const Real logit = sink_of<Real>(p, h);
  const auto row_of = [&](const Rows& r, int64_t i) {
    return static_cast<const T*>(r.data) + b * r.stride[0] + h * r.stride[1] + (seq.q_begin + i) * r.stride[2];
  };
  double sum = 0;
  for (int64_t i = 0; i < seq.Sq; ++i) {
    const Real lse = static_cast<const Real*>(p.lse)[at + i];
    if (lse == -kInfinity<Real>) continue;
    const double dlse = p.grad_lse ? static_cast<const Real*>(p.grad_lse)[at + i] : Real(0);
    const double product = row_product<T>(row_of(p.grad_o, i), row_of(p.o, i), p.Dv);
    sum += __builtin_exp(static_cast<double>(logit - lse)) * (dlse - product);
  }
  return sum;
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
