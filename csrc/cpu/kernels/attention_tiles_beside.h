// The row tiles of attention_forward.h in tile registers, which multiply while the CPU does something else: scores
// become weights beside the next products.
#pragma once

#include "attention_row_tile.h"

namespace tformer::TFORMER_ISA {
namespace {

template <class T, class P>
struct AttentionTilesBeside : AttentionRowTiles<T, P> {
  using Base = AttentionRowTiles<T, P>;
  using typename Base::Keys, typename Base::Product, typename Base::Results, typename Base::Span, typename Base::State;
  using typename Base::Tile;
  using Real = typename P::Real;
  using Group = typename P::Group;
  using Base::Base;
  using Base::L, Base::kTileRows, Base::kSlices, Base::kStrip;
  using Base::p, Base::groups, Base::out_columns, Base::stretch_keys, Base::weight_groups, Base::dropout;
  using Base::weights, Base::other_weights;
  // Rows of scores that become weights at once; fewer where there are more products beside them.
  static constexpr int kRowsAtOnce = kSlices == 1 ? 2 : 1;

  // Of the sums of a row tile; a whole number of strips.
  struct Columns {
    int64_t begin, end;
  };

  // A stretch whose weights are made, while its values are still to be added to the sums of its row tile: `last`, after
  // which the sums are the tile's results.
  struct Waiting {
    int64_t rows = 0;  // of the tile; 0 if nothing is waiting
    Span stretch;
    const Group* weights;
    Real* sums;
    bool adds, last;
    // of the last ones
    uint8_t progress;
    Real factors[kTileRows];
    T* results;
    int64_t results_row;
  };
  Waiting waiting;

  // The weights of one row tile, stretch by stretch: the scores of a key block become weights beside the products of
  // the next one, and beside those of the weights that are waiting with their values. Returns the last stretch, whose
  // values are still to be added.
  Span weigh_beside(const Scores<Real>& row_scores, const Tile& tile, const Product& q_k, int64_t key0,
                    const Span& seen, bool finite, Upcoming<T>& next) {
    if (seen.begin >= seen.end) return seen;
    const auto block = [&](int64_t begin, int64_t from) {
      return Keys{key0, begin, from, from + kKeyBlock < seen.end ? from + kKeyBlock : seen.end};
    };
    this->multiply_keys(q_k, tile.rows, block(seen.begin, seen.begin));
    for (Span stretch{seen.begin, seen.begin, seen.begin, seen.begin};;) {
      const int64_t end = stretch.end + stretch_keys < seen.end ? stretch.end + stretch_keys : seen.end;
      stretch = {stretch.end, end, stretch.end, end};
      std::swap(weights, other_weights);
      const int64_t blocks = (stretch.end - stretch.begin + kKeyBlock - 1) / kKeyBlock;
      Real rescale[kTileRows];
      for (int64_t r = 0; r < tile.rows; ++r) rescale[r] = 1;
      for (int64_t n = 0; n < blocks; ++n) {
        const Keys some = block(stretch.begin, stretch.begin + n * kKeyBlock), after = block(stretch.begin, some.to);
        const int64_t strips = (out_columns + kStrip - 1) / kStrip;
        const Columns columns{strips * n / blocks * kStrip, strips * (n + 1) / blocks * kStrip};
        weigh_block(row_scores, tile, q_k, some, after, columns, finite, rescale);
        for (int i = 0; i < 4; ++i) next.fetch();
      }
      waiting.rows = 0;
      this->scale_sums(tile, rescale);
      if (stretch.end == seen.end) return stretch;
      if (finite) {
        if (this->any_live(stretch)) wait(tile, stretch);
      } else {
        this->multiply_values(tile, stretch, finite, nullptr);
      }
    }
  }

  // Leaves the values of the present weights for later; only where all are finite.
  void wait(const Tile& tile, const Span& stretch) {
    if (stretch.begin >= stretch.end) return;
    waiting.rows = tile.rows, waiting.stretch = stretch, waiting.weights = weights;
    waiting.sums = tile.o, waiting.adds = !tile.state.empty, waiting.last = false;
    tile.state.empty = false;
  }

  // Likewise the last ones of a tile, whose sums times a factor each are then the rows from `results` on.
  void wait(const Tile& tile, const Span& stretch, const Real* factors, T* results, int64_t results_row) {
    wait(tile, stretch);
    waiting.last = true, waiting.progress = waiting.adds ? kLast | kSums : kLast;
    std::memcpy(waiting.factors, factors, sizeof(waiting.factors));
    waiting.results = results, waiting.results_row = results_row;
  }

  // One block of them, `some`; beside it the scores of `after`, and `columns` of the values that are waiting.
  void weigh_block(const Scores<Real>& row_scores, const Tile& tile, const Product& q_k, const Keys& some,
                   const Keys& after, const Columns& columns, bool finite, Real* rescale) {
    const int64_t last_column = columns.end < out_columns ? columns.end : out_columns;
    const auto products_of = [](int64_t rows, int64_t units) {
      return units * (rows > L ? 2 : 1) * Terms<kSlices>::kCount;
    };
    const int64_t of_values = waiting.rows == 0 ? 0
                                                : (last_column - columns.begin) / L *
                                                      ((waiting.stretch.end - waiting.stretch.begin) / kUnit<P>);
    const int64_t products =
        products_of(tile.rows, after.count() / L * (groups / P::kSumUnit)) + products_of(waiting.rows, of_values);
    Pieces pieces(*this, row_scores, tile, some, finite, rescale, products);
    if (after.count() > 0) this->multiply_keys(q_k, tile.rows, after, pieces);
    for (int64_t column = columns.begin; of_values > 0 && column < last_column; column += kStrip) {
      add_values(column, pieces);
    }
    pieces.finish();
  }

  // The scores of a key block, which become weights kRowsAtOnce rows at a time.
  class Pieces {
   public:
    Pieces(AttentionTilesBeside& tiles, const Scores<Real>& row_scores, const Tile& tile, const Keys& block,
           bool finite, Real* rescale, int64_t products)
        : tiles_(tiles),
          row_scores_(row_scores),
          tile_(tile),
          block_(block),
          finite_(finite),
          rescale_(rescale),
          edge_(row_scores.by_keys && tiles.bounds_of(row_scores, tile, block, bounds_)),
          scaling_(row_scores.pending_scale()),
          scores_(tiles.scores_of(0, block)),
          weights_(tiles.weights_of(0, block)),
          share_((tile.rows + kRowsAtOnce - 1) / kRowsAtOnce, products) {}

    // Called after each of those products.
    TFORMER_INLINE void operator()() {
      share_.after_one([this]() TFORMER_LAMBDA { make_one(); });
    }
    void finish() {
      for (; r_ < tile_.rows; make_one()) {
        if (r_ % 8 == 0) keep_tiles_awake<P>();
      }
    }

   private:
    __attribute__((noinline)) void make_one() {
      if (r_ >= tile_.rows) return;
      const int64_t end = r_ + kRowsAtOnce < tile_.rows ? r_ + kRowsAtOnce : tile_.rows;
      const bool finished = !row_scores_.by_keys;
      for (int64_t r = r_; finished && r < end; ++r) {
        row_scores_.finish_row(tiles_.scores_of(r, block_), tile_.query(r), block_.key0 + block_.from, block_.count(),
                               nullptr);
      }
      if (!finite_ || !weigh()) {
        tiles_.add_rows(row_scores_, tile_, block_, r_, end, finished, finite_, rescale_);
      }
      r_ += kRowsAtOnce;
    }

    TFORMER_INLINE bool weigh() {
      if (tiles_.p.dropout_p == 0) return weigh([](int, int, F weight) TFORMER_LAMBDA { return weight; });
      U32 number[kRowsAtOnce][kKeyBlock / L];
      const Dropout& dropout = tiles_.dropout;
      dropout.template numbers<kRowsAtOnce>(Base::counter_of(tile_, r_), block_.key0 + block_.from,
                                            [&](int i, int at, U32 some) TFORMER_LAMBDA { number[i][at / L] = some; });
      return weigh([&, kept = static_cast<float>(dropout.scale)](int i, int n, F weight)
                       TFORMER_LAMBDA { return multiply_where_at_least(number[i][n], dropout.least, weight, kept); });
    }

    template <class Leave>
    TFORMER_INLINE bool weigh(Leave&& leave) {
      constexpr int kAll = static_cast<int>(kKeyBlock / L);
      const auto weigh = [&](auto columns) TFORMER_LAMBDA {
        return tile_.state.template weigh_scores<kRowsAtOnce, columns>(
            r_, scores_ + r_ * kKeyBlock, kKeyBlock, edge_ ? &bounds_ : nullptr, scaling_,
            weights_ + place_along<P>(r_, 0, tiles_.weight_groups), leave);
      };
      if (block_.count() == kKeyBlock) return weigh(std::integral_constant<int, kAll>{});
      return weigh(std::integral_constant<int, kAll / 2>{});
    }

    AttentionTilesBeside& tiles_;
    const Scores<Real>& row_scores_;
    const Tile& tile_;
    const Keys& block_;
    const bool finite_;
    Real* const rescale_;
    typename State::Bounds bounds_;
    const bool edge_;
    const typename State::Scaling scaling_;
    const Real* const scores_;
    Group* const weights_;
    EvenShare share_;
    int64_t r_ = 0;
  };

  // A strip of columns of the values that are waiting.
  template <class Beside>
  void add_values(int64_t column, Beside&& beside) const {
    if constexpr (P::kTiles) {
      const Product m =
          this->values_product(waiting.weights, waiting.stretch, waiting.stretch.begin, waiting.stretch.end);
      const int vectors = column + kStrip <= out_columns ? 2 : 1;
      const auto add = [&](const auto& into) TFORMER_LAMBDA {
        tile_product(waiting.rows, vectors, m, into, beside, m.a, m.b_at(0, column), m.steps, int64_t{0}, column);
      };
      if (waiting.last) {
        uint8_t progress = waiting.progress;
        add(Results{waiting.sums, out_columns, &progress, waiting.results, waiting.results_row, p.Dv, waiting.factors});
      } else {
        add(IntoSums<P>{waiting.sums, out_columns, waiting.adds});
      }
    }
  }

  // All of them, beside nothing.
  void add_waiting() {
    for (int64_t column = 0; waiting.rows > 0 && column < out_columns; column += kStrip) {
      add_values(column, []() TFORMER_LAMBDA {});
    }
    waiting.rows = 0;
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
