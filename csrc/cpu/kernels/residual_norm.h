// y = norm(residual + dropout(x)) and its gradient, row by row. A row is read from memory once, kept in L1 in the
// arithmetic type for the passes over it, and written once. Variance is two-pass: mean first, then squared distances.
#pragma once

#include "../../params.h"
#include "dropout.h"
#include "scratch.h"
#include "vec_bf16_pairs.h"

namespace tformer::TFORMER_ISA {
namespace {

// T: type of x and y. R: type of the residual and of the sum.
template <class T, class R>
struct ResidualNorm {
  using Real = std::conditional_t<sizeof(T) == 8, double, float>;
  static constexpr int L = kLanes<Real>;
  static constexpr int kBlock = 4;  // vectors at once: independent sums whose latencies overlap
  // Blocks are in registers, and in rows of type Real, as pairs of vectors of even and of odd columns.
  static constexpr bool kEvenOdd = __is_same(T, bf16) && __is_same(R, bf16);

  const NormParams& p;
  const Dropout dropout;
  const int64_t whole;  // columns in whole vectors
  Real* row[2];         // forward: h of the row at work; backward: the gradients of weight and bias of a few rows
  Real* total[2];       // those of all rows of the chunk so far
  Real* parameter[2];   // weight and bias, where they cannot be read in place
  Real* keep;           // the factors of dropout of the 64 columns at work
  const Real *weight = nullptr, *bias = nullptr;
  size_t bytes;

  ResidualNorm(const NormParams& params, Scratch scratch)
      : p(params), dropout(p.dropout_p, p.dropout_seed), whole(p.N / L * L) {
    // Not a multiple of 4096 bytes apart for the usual widths: a load that agrees in the low 12 bits of its address
    // with a store before it waits for that.
    const int64_t padded = (p.N + L - 1) / L * L + kBlock * L;
    for (Real*& buffer : row) buffer = scratch.take<Real>(padded);
    for (Real*& buffer : total) buffer = scratch.take<Real>(padded);
    for (Real*& buffer : parameter) buffer = scratch.take<Real>(padded);
    keep = scratch.take<Real>(kPhiloxBlock);
    bytes = scratch.used();
  }

  void forward(int64_t begin, int64_t end) {
    if (begin == end) return;
    weight = prepared(p.weight, p.weight_dtype, 1, parameter[0]);
    bias = prepared(p.bias, p.bias_dtype, -Real(0), parameter[1]);  // x + -0 is x, also if that is -0
    Reading reading = begin_reading(begin);
    each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA { read_block(reading, count, c, n); });
    for (int64_t i = begin + 1; i < end; ++i) {
      // One row is written while the next is read, so that memory is never left waiting for arithmetic, and read into
      // the place of what is written: weight, bias and a second row of some thousand columns do not fit in L1.
      const Writing writing = begin_writing(i - 1, reading);
      reading = begin_reading(i);
      each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA {
        Vec<Real> h[count];
        for (int u = 0; u < count; ++u) h[u] = load(reading.row + c + u * L);
        read_block(reading, count, c, n);
        write_block(writing, c, n, h);
      });
    }
    const Writing writing = begin_writing(end - 1, reading);
    each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA {
      Vec<Real> h[count];
      for (int u = 0; u < count; ++u) h[u] = load(reading.row + c + u * L);
      write_block(writing, c, n, h);
    });
    if (p.around_cache) stream_fence();
  }

  // The rows of one chunk, and their share of the gradients of weight and bias.
  void backward(int64_t chunk) {
    weight = prepared(p.weight, p.weight_dtype, 1, parameter[0]);
    for (int n = 0; n < 2; ++n) fill(row[n], 0), fill(total[n], 0);
    const int64_t end = (chunk + 1) * p.chunk_rows < p.M ? (chunk + 1) * p.chunk_rows : p.M;
    constexpr int64_t kRows = 64;  // after so many rows their sum goes to the total: few additions in a row round less
    for (int64_t i = chunk * p.chunk_rows; i < end; i += kRows) {
      backward_group(i, i + kRows < end ? i + kRows : end);
      for (int n = 0; n < 2; ++n) {
        for (int64_t c = 0; c < p.N; ++c) total[n][c] += row[n][c], row[n][c] = 0;
      }
    }
    if (p.partial_weight) write_partial(total[0], static_cast<Real*>(p.partial_weight) + chunk * p.N);
    if (p.partial_bias) write_partial(total[1], static_cast<Real*>(p.partial_bias) + chunk * p.N);
    if (p.around_cache) stream_fence();
  }

 private:
  // f(number of vectors, first column, elements of the last one): blocks, single vectors, the rest.
  template <class F>
  TFORMER_INLINE void each_block(F&& f) const {
    int64_t c = 0;
    for (; c + kBlock * L <= p.N; c += kBlock * L) f(std::integral_constant<int, kBlock>{}, c, L);
    for (; c < p.N; c += L) f(std::integral_constant<int, 1>{}, c, p.N - c < L ? p.N - c : L);
  }
  template <class V, int kCount>
  static TFORMER_INLINE void read(const V* from, int64_t n, Vec<Real> (&x)[kCount]) {
    if constexpr (kEvenOdd && kCount > 1 && sizeof(V) == 2) {
      for (int u = 0; u < kCount; u += 2) widen_even_odd(load_bytes<HalfPair>(from + u * L), x[u], x[u + 1]);
    } else {
      for (int u = 0; u < kCount; ++u) {
        x[u] = kCount > 1 || n == L ? load_as<Real>(from + u * L) : load_as<Real>(from, n);
      }
    }
  }
  // A block to memory, and to x what a reader of it will find there.
  template <class V, int kCount>
  TFORMER_INLINE void write(V* to, int64_t n, Vec<Real> (&x)[kCount]) const {
    if constexpr (kCount == 1) {
      n == L ? store_as<Real>(to, x[0]) : store_as<Real>(to, x[0], n);
    } else if constexpr (kEvenOdd) {
      HalfPair pair[kCount / 2];
      narrow_even_odd<kCount / 2>(x, pair);
      for (int u = 0; u < kCount; u += 2) {
        p.around_cache ? stream(to + u * L, pair[u / 2]) : store(to + u * L, pair[u / 2]);
      }
    } else {
      for (int u = 0; u < kCount; u += 2) {
        p.around_cache ? stream_two_as<Real>(to + u * L, x[u], x[u + 1])
                       : store_two_as<Real>(to + u * L, x[u], x[u + 1]);
      }
    }
  }
  // A block of h as the sum's type holds it, which is what is normalised: backward sees these numbers. Written to `to`
  // if that is not null.
  template <int kCount>
  TFORMER_INLINE void round_and_write(R* to, int64_t n, Vec<Real> (&h)[kCount]) const {
    if constexpr (kEvenOdd && kCount > 1) {
      HalfPair pair[kCount / 2];
      narrow_even_odd<kCount / 2>(h, pair);
      for (int u = 0; u < kCount; u += 2) {
        if (to) p.around_cache ? stream(to + u * L, pair[u / 2]) : store(to + u * L, pair[u / 2]);
        widen_even_odd(pair[u / 2], h[u], h[u + 1]);
      }
    } else {
      for (int u = 0; u < kCount; ++u) h[u] = rounded<R>(h[u]);
      if (to) write(to, n, h);
    }
  }

  void fill(Real* to, Real value) const {
    for (int64_t c = 0; c < p.N; ++c) to[c] = value;
  }
  // weight or bias as blocks are in registers, in the arithmetic type; `absent` everywhere where there is none.
  const Real* prepared(const void* from, DType type, Real absent, Real* to) const {
    if (!from) {
      fill(to, absent);
      return to;
    }
    switch (type) {
      case DType::f64:
        return prepared(static_cast<const double*>(from), to);
      case DType::bf16:
        return prepared(static_cast<const bf16*>(from), to);
      case DType::f16:
        return prepared(static_cast<const f16*>(from), to);
      default:
        return prepared(static_cast<const float*>(from), to);
    }
  }
  template <class V>
  const Real* prepared(const V* from, Real* to) const {
    if constexpr (__is_same(V, Real) && !kEvenOdd) return from;
    each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA {
      Vec<Real> v[count];
      read(from + c, n, v);
      if constexpr (kEvenOdd && count > 1 && sizeof(V) != 2) {
        for (int u = 0; u < count; u += 2) split_even_odd(v[u], v[u + 1]);
      }
      for (int u = 0; u < count; ++u) store(to + c + u * L, v[u]);
    });
    return to;
  }
  void write_partial(const Real* from, Real* to) const {
    each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA {
      Vec<Real> v[count];
      read(from + c, n, v);
      if constexpr (kEvenOdd && count > 1) {
        for (int u = 0; u < count; u += 2) merge_even_odd(v[u], v[u + 1]);
      }
      if constexpr (count > 1) {
        for (int u = 0; u < count; ++u) store(to + c + u * L, v[u]);
      } else {
        store_as<Real>(to + c, v[0], n);
      }
    });
  }

  static TFORMER_INLINE Real total_of(const Vec<Real> (&x)[kBlock]) {
    return sum_lanes<Real>((x[0] + x[1]) + (x[2] + x[3]));
  }
  template <class V>
  static TFORMER_INLINE V* at(void* base, int64_t i, int64_t stride) {
    return base ? static_cast<V*>(base) + i * stride : nullptr;
  }
  template <class V>
  static TFORMER_INLINE const V* at(const void* base, int64_t i, int64_t stride) {
    return base ? static_cast<const V*>(base) + i * stride : nullptr;
  }

  // Asks for a block of a later row: it arrives while this one is worked on.
  template <class V>
  static TFORMER_INLINE void prefetch_block(const V* from) {
    constexpr int kLine = 64, kBytes = kBlock * L * static_cast<int>(sizeof(V));
    for (int at = 0; at < kBytes; at += kLine) __builtin_prefetch(reinterpret_cast<const char*>(from) + at);
  }
  template <class V>
  TFORMER_INLINE void prefetch_ahead(const V* from, int64_t stride, int64_t c, int64_t i, int64_t ahead) const {
    if (from && i + ahead < p.M) prefetch_block(from + ahead * stride + c);
  }

  // Dropout of the columns from c in row i, h times their factors; whoever works on a row goes through it in order.
  template <int kCount>
  TFORMER_INLINE void drop(int64_t i, int64_t c, Vec<Real> (&h)[kCount]) const {
    static_assert(kPhiloxBlock % (kBlock * L) == 0);
    if constexpr (kCount * L == kPhiloxBlock) {
      const uint64_t r = static_cast<uint64_t>(i);
      const DropoutRow counter{static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), kPhiloxNormStream};
      Vec<Real> factor[1][kCount];
      dropout.factor_vectors(counter, c, factor);
      if constexpr (kEvenOdd && kCount > 1) {
        for (int u = 0; u < kCount; u += 2) split_even_odd(factor[0][u], factor[0][u + 1]);
      }
      for (int u = 0; u < kCount; ++u) h[u] *= factor[0][u];
      return;
    }
    if (c % kPhiloxBlock == 0) {
      const uint64_t r = static_cast<uint64_t>(i);
      const DropoutRow counter{static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), kPhiloxNormStream};
      dropout.factors(counter, c, keep);
    }
    Vec<Real> factor[kCount];
    for (int u = 0; u < kCount; ++u) factor[u] = load(keep + c % kPhiloxBlock + u * L);
    if constexpr (kEvenOdd && kCount > 1) {
      for (int u = 0; u < kCount; u += 2) split_even_odd(factor[u], factor[u + 1]);
    }
    for (int u = 0; u < kCount; ++u) h[u] *= factor[u];
  }

  // mean and the mean squared distance from it. The first pass's mean has rounding errors of the size of the row's
  // values; the distances are small, so their own mean gives the part that was lost (corrected two-pass algorithm:
  // Chan, Golub, LeVeque 1983).
  struct Moments {
    Real mean;
    double variance;
  };
  TFORMER_INLINE Moments moments(Real* row, Real first_mean) const {
    for (int64_t c = p.N; c < whole + (whole < p.N ? L : 0); ++c) row[c] = first_mean;  // adds nothing
    Vec<Real> sum[kBlock] = {}, squares[kBlock] = {};
    each_block([&](auto count, int64_t c, int64_t) TFORMER_LAMBDA {
      for (int u = 0; u < count; ++u) {
        const Vec<Real> d = load(row + c + u * L) - first_mean;
        sum[u] += d;
        squares[u] += d * d;
      }
    });
    const double n = static_cast<double>(p.N);
    const double second_moment = static_cast<double>(total_of(squares)) / n;
    if (p.rms) return {Real(0), second_moment};
    const double lost = static_cast<double>(total_of(sum)) / n;
    return {static_cast<Real>(static_cast<double>(first_mean) + lost), second_moment - lost * lost};
  }

  // h = residual + dropout(x) of row i, a block at a time: into `row`, and added to `total`.
  struct Reading {
    int64_t i;
    const T* x;
    const R* residual;
    R* sum;
    Real* row;
    Vec<Real> total[kBlock];
  };
  TFORMER_INLINE Reading begin_reading(int64_t i) const {
    return {i, at<T>(p.x, i, p.x_stride), at<R>(p.residual, i, p.residual_stride), at<R>(p.sum, i, p.N), row[0], {}};
  }
  template <class Count>
  TFORMER_INLINE void read_block(Reading& to, Count count, int64_t c, int64_t n) const {
    Vec<Real> h[count], other[count];
    prefetch_ahead(to.x, p.x_stride, c, to.i, p.rows_ahead);
    prefetch_ahead(to.residual, p.residual_stride, c, to.i, p.rows_ahead);
    read(to.x + c, n, h);
    if (p.dropout_p > 0) drop(to.i, c, h);
    if (to.residual) {
      read(to.residual + c, n, other);
      for (int u = 0; u < count; ++u) h[u] += other[u];
    }
    round_and_write(to.sum ? to.sum + c : nullptr, n, h);
    for (int u = 0; u < count; ++u) {
      to.total[u] += h[u];
      store(to.row + c + u * L, h[u]);
    }
  }

  // y of a row that has been read, from its h a block at a time.
  struct Writing {
    T* y;
    Real mean, rstd;
  };
  TFORMER_INLINE Writing begin_writing(int64_t i, const Reading& from) const {
    const Moments m = moments(from.row, p.rms ? Real(0) : total_of(from.total) / static_cast<Real>(p.N));
    const Real rstd = static_cast<Real>(1.0 / __builtin_sqrt(m.variance + p.eps));
    if (p.mean) static_cast<Real*>(p.mean)[i] = m.mean;
    if (p.rstd) static_cast<Real*>(p.rstd)[i] = rstd;
    return {at<T>(p.y, i, p.N), m.mean, rstd};
  }
  template <int kCount>
  TFORMER_INLINE void write_block(const Writing& to, int64_t c, int64_t n, Vec<Real> (&h)[kCount]) const {
    Vec<Real> w[kCount], b[kCount];
    read(weight + c, n, w);
    read(bias + c, n, b);
    for (int u = 0; u < kCount; ++u) h[u] = (h[u] - to.mean) * to.rstd * w[u] + b[u];
    write(to.y + c, n, h);
  }

  // xhat = (h - mean) rstd, g = weight dy: dh = rstd (g - mean(g) - xhat mean(g xhat)); mean(g) is absent for RMS.
  template <int kRows>
  struct Rows {
    int64_t i;
    const R *saved[kRows], *dsum[kRows];
    const T *dy[kRows], *next_dy[kRows];
    T* dx[kRows];
    R* dresidual[kRows];
    Real mean[kRows], rstd[kRows];
    Vec<Real> sum_g[kRows], sum_gx[kRows];
  };
  template <int kRows, int kCount>
  TFORMER_INLINE void first_pass(Rows<kRows>& rows, int64_t c, int64_t n) const {
    Vec<Real> w[kCount], for_w[kCount] = {}, for_b[kCount] = {};
    read(weight + c, n, w);
    for (int r = 0; r < kRows; ++r) {
      Vec<Real> d[kCount], h[kCount];
      read(rows.dy[r] + c, n, d);  // zero past the end, so those lanes add nothing
      read(rows.saved[r] + c, n, h);
      for (int u = 0; u < kCount; ++u) {
        const Vec<Real> product = d[u] * ((h[u] - rows.mean[r]) * rows.rstd[r]);
        rows.sum_g[r] += w[u] * d[u];
        rows.sum_gx[r] += w[u] * product;
        for_w[u] += product;
        for_b[u] += d[u];
      }
    }
    Real *dw = row[0] + c, *db = row[1] + c;
    for (int u = 0; u < kCount; ++u) for_w[u] += load(dw + u * L), for_b[u] += load(db + u * L);
    for (int u = 0; u < kCount; ++u) store(dw + u * L, for_w[u]), store(db + u * L, for_b[u]);
  }
  // Several rows at once, so that the gradients of weight and bias are read and written once for all; few enough to
  // stay in an L1 of 32 KB. One by one where that has room for the next one too and rows are not narrowed (their bytes
  // count more than those of the gradients) or come from memory, which gives more if it is read in order: from so many
  // bytes on. Numbers that are not this machine's own: how many rows shows in the rounding.
  void backward_group(int64_t i, int64_t end) const {
    constexpr bool kNarrow = sizeof(T) < sizeof(Real);
    constexpr int64_t kAlone = (kNarrow ? 12 : 16) * 1024, kFour = 6 * 1024, kFromMemory = 32 * 1024 * 1024;
    const int64_t read = p.N * static_cast<int64_t>(sizeof(T) + sizeof(R));
    const int64_t more =
        p.N * static_cast<int64_t>(sizeof(T) + (p.grad_sum ? sizeof(R) : 0) + (p.grad_residual ? sizeof(R) : 0));
    const bool one = read <= kAlone && (!kNarrow || p.M * (read + more) >= kFromMemory);
    if constexpr (kNarrow) {
      for (; !one && read <= kFour && i + 4 <= end; i += 4) backward_rows<4>(i);
    }
    for (; !one && i + 2 <= end; i += 2) backward_rows<2>(i);
    for (; i < end; ++i) backward_rows<1>(i);
  }
  template <int kRows>
  TFORMER_INLINE void backward_rows(int64_t i) const {
    Rows<kRows> rows = {};
    rows.i = i;
    for (int r = 0; r < kRows; ++r) {
      rows.saved[r] = at<R>(p.saved, i + r, p.saved_stride), rows.dy[r] = at<T>(p.grad_y, i + r, p.grad_y_stride);
      rows.dsum[r] = at<R>(p.grad_sum, i + r, p.grad_sum_stride);
      rows.dx[r] = at<T>(p.grad_x, i + r, p.N), rows.dresidual[r] = at<R>(p.grad_residual, i + r, p.N);
      rows.next_dy[r] = i + r + kRows < p.M ? rows.dy[r] + kRows * p.grad_y_stride : rows.dy[r];
      rows.mean[r] = p.rms ? Real(0) : static_cast<const Real*>(p.mean)[i + r];
      rows.rstd[r] = static_cast<const Real*>(p.rstd)[i + r];
    }
    each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA {
      if constexpr (count > 1) {
        for (int r = 0; r < kRows; ++r) prefetch_block(rows.next_dy[r] + c);
        if (p.grad_sum) {
          for (int r = 0; r < kRows; ++r) prefetch_block(rows.dsum[r] + c);
        }
        if (p.fetch_results) {
          for (int r = 0; r < kRows; ++r) prefetch_block(rows.dx[r] + c);
          if (p.grad_residual) {
            for (int r = 0; r < kRows; ++r) prefetch_block(rows.dresidual[r] + c);
          }
        }
        for (int u = 0; u < count; u += 2) first_pass<kRows, 2>(rows, c + u * L, n);
      } else {
        first_pass<kRows, 1>(rows, c, n);
      }
    });
    const Real count = static_cast<Real>(p.N);
    for (int r = 0; r < kRows; ++r) {
      const Real mean_g = p.rms ? Real(0) : sum_lanes<Real>(rows.sum_g[r]) / count;
      const Real mean_gx = sum_lanes<Real>(rows.sum_gx[r]) / count;
      write_gradients(rows, r, mean_g, rows.rstd[r] * mean_gx);
    }
  }

  template <int kRows>
  TFORMER_INLINE void write_gradients(const Rows<kRows>& rows, int r, Real mean_g, Real slope) const {
    const int64_t i = rows.i + r;
    const R *saved = rows.saved[r], *dsum = rows.dsum[r];
    const T* dy = rows.dy[r];
    T* dx = rows.dx[r];
    R* dresidual = rows.dresidual[r];
    const Real mean = rows.mean[r], rstd = rows.rstd[r];
    const R* next_saved = i + kRows < p.M ? saved + kRows * p.saved_stride : saved;
    each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA {
      Vec<Real> g[count], h[count], w[count];
      prefetch_block(next_saved + c);
      read(dy + c, n, g);
      read(saved + c, n, h);
      read(weight + c, n, w);
      for (int u = 0; u < count; ++u) h[u] = (g[u] * w[u] - mean_g - (h[u] - mean) * slope) * rstd;
      if (dsum) {
        read(dsum + c, n, g);
        for (int u = 0; u < count; ++u) h[u] += g[u];
      }
      if (dresidual) write(dresidual + c, n, h);
      if (p.dropout_p > 0) drop(i, c, h);
      write(dx + c, n, h);
    });
  }
};

// out[c] = the sum of partial (chunks, N) over the chunks, in their order and in double precision.
template <class Real, class V>
void sum_partials(const Real* partial, int64_t chunks, int64_t N, V* out) {
  constexpr int L = kLanes<Real>, kVectors = 8, kColumns = kLanes<double>, kBlock = kVectors * kColumns;
  using Narrow = VecN<Real, kColumns>;
  Real block[kBlock] = {};
  for (int64_t c = 0; c < N; c += kBlock) {
    const int64_t width = N - c < kBlock ? N - c : kBlock;
    if (width == kBlock) {
      Vec<double> sum[kVectors] = {};
      for (int64_t n = 0; n < chunks; ++n) {
        const Real* from = partial + n * N + c;
        for (int u = 0; u < kVectors; ++u) {
          sum[u] += __builtin_convertvector(load_bytes<Narrow>(from + u * kColumns), Vec<double>);
        }
      }
      for (int u = 0; u < kVectors; ++u) store(block + u * kColumns, __builtin_convertvector(sum[u], Narrow));
    } else {
      for (int64_t j = 0; j < width; ++j) {
        double sum = 0;
        for (int64_t n = 0; n < chunks; ++n) sum += static_cast<double>(partial[n * N + c + j]);
        block[j] = static_cast<Real>(sum);
      }
    }
    for (int64_t j = 0; j < width; j += L) {
      width - j < L ? store_as<Real>(out + c + j, load(block + j), width - j)
                    : store_as<Real>(out + c + j, load(block + j));
    }
  }
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
