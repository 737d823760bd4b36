// y = norm(residual + dropout(x)) and its gradient, row by row. A row is read from memory once, kept in L1 in the
// arithmetic type for the passes over it, and written once. Variance is two-pass: mean first, then squared distances.
#pragma once

#include "../../params.h"
#include "dropout.h"
#include "scratch.h"

namespace tformer::TFORMER_ISA {
namespace {

// T: type of x and y. R: type of the residual and of the sum.
template <class T, class R>
struct ResidualNorm {
  using Real = std::conditional_t<sizeof(T) == 8, double, float>;
  static constexpr int L = kLanes<Real>;

  const NormParams& p;
  const Dropout dropout;
  const int64_t whole;  // columns in whole vectors
  Real* row[2];         // one that is written, and the next
  Real* keep;           // the factors of dropout of the 64 columns at work
  size_t bytes;
  int64_t rows_ahead;  // of the row that forward reads: the one to be prefetched; none if all may be in cache

  ResidualNorm(const NormParams& params, Scratch scratch)
      : p(params), dropout(p.dropout_p, p.dropout_seed), whole(p.N / L * L) {
    const int64_t padded = (p.N + L - 1) / L * L;
    for (Real*& buffer : row) buffer = scratch.take<Real>(padded);
    keep = scratch.take<Real>(kPhiloxBlock);
    bytes = scratch.used();
    constexpr int64_t kBytesAhead = 4096, kSecondLevel = 1 << 20;
    const int64_t row_bytes = p.N * static_cast<int64_t>(sizeof(T));
    rows_ahead = p.M * row_bytes < kSecondLevel ? p.M : 1 + kBytesAhead / (row_bytes + 1);
  }

  void forward(int64_t begin, int64_t end) const {
    if (begin == end) return;
    Reading reading = begin_reading(begin);
    each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA { read_block(reading, count, c, n); });
    for (int64_t i = begin; i < end; ++i) {
      const Writing writing = begin_writing(i, reading);
      if (i + 1 == end) {
        each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA { write_block(writing, count, c, n); });
      } else {  // one row is written while the next is read, so that memory is never left waiting for arithmetic
        reading = begin_reading(i + 1);
        each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA {
          read_block(reading, count, c, n);
          write_block(writing, count, c, n);
        });
      }
    }
    if (p.around_cache) stream_fence();
  }

  // The rows of one chunk, and their share of the gradients of weight and bias.
  void backward(int64_t chunk) const {
    Real* dw = p.partial_weight ? static_cast<Real*>(p.partial_weight) + chunk * p.N : nullptr;
    Real* db = p.partial_bias ? static_cast<Real*>(p.partial_bias) + chunk * p.N : nullptr;
    for (int64_t c = 0; c < p.N; ++c) {
      if (dw) dw[c] = 0;
      if (db) db[c] = 0;
    }
    const int64_t end = (chunk + 1) * p.chunk_rows < p.M ? (chunk + 1) * p.chunk_rows : p.M;
    int64_t i = chunk * p.chunk_rows;
    // Several rows at once, so that dw and db are read and written once for all; few enough to stay in L1.
    constexpr int64_t kRowBytes = 24 * 1024;
    const bool four = 4 * p.N * static_cast<int64_t>(sizeof(T) + sizeof(R)) <= kRowBytes;
    for (; four && i + 4 <= end; i += 4) backward_rows<4>(i, dw, db);
    for (; i + 2 <= end; i += 2) backward_rows<2>(i, dw, db);
    if (i < end) backward_rows<1>(i, dw, db);
    if (p.around_cache) stream_fence();
  }

 private:
  static constexpr int kBlock = 4;  // vectors at once: independent sums whose latencies overlap

  // f(number of vectors, first column, elements of the last one): blocks, single vectors, the rest.
  template <class F>
  TFORMER_INLINE void each_block(F&& f) const {
    int64_t c = 0;
    for (; c + kBlock * L <= p.N; c += kBlock * L) f(std::integral_constant<int, kBlock>{}, c, L);
    for (; c < p.N; c += L) f(std::integral_constant<int, 1>{}, c, p.N - c < L ? p.N - c : L);
  }
  template <class V, int kCount>
  static TFORMER_INLINE void read(const V* from, int64_t n, Vec<Real> (&x)[kCount]) {
    for (int u = 0; u < kCount; ++u) {
      x[u] = kCount > 1 || n == L ? load_as<Real>(from + u * L) : load_as<Real>(from, n);
    }
  }
  template <class V, int kCount>
  static TFORMER_INLINE void write(V* to, int64_t n, const Vec<Real> (&x)[kCount]) {
    if constexpr (kCount == 1) {
      n == L ? store_as<Real>(to, x[0]) : store_as<Real>(to, x[0], n);
    } else {
      for (int u = 0; u < kCount; u += 2) store_two_as<Real>(to + u * L, x[u], x[u + 1]);
    }
  }
  // write for the large tensors.
  template <class V, int kCount>
  TFORMER_INLINE void write_result(V* to, int64_t n, const Vec<Real> (&x)[kCount]) const {
    if constexpr (kCount > 1) {
      if (p.around_cache) {
        for (int u = 0; u < kCount; u += 2) stream_two_as<Real>(to + u * L, x[u], x[u + 1]);
        return;
      }
    }
    write(to, n, x);
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

  // Asks for a block of a later row: it arrives while this one is worked on. Into the second-level cache, which has
  // room for more requests on their way than the first.
  template <class V>
  TFORMER_INLINE void prefetch_ahead(const V* from, int64_t stride, int64_t c, int64_t i, int64_t ahead) const {
    constexpr int kLine = 64, kBytes = kBlock * L * static_cast<int>(sizeof(V));
    if (!from || i + ahead >= p.M) return;
    const char* next = reinterpret_cast<const char*>(from + ahead * stride + c);
    for (int at = 0; at < kBytes; at += kLine) __builtin_prefetch(next + at, 0, 2);
  }

  // Dropout of the columns from c in row i, h times their factors; whoever works on a row goes through it in order.
  template <int kCount>
  TFORMER_INLINE void drop(int64_t i, int64_t c, Vec<Real> (&h)[kCount]) const {
    static_assert(kPhiloxBlock % (kBlock * L) == 0);
    if (c % kPhiloxBlock == 0) {
      const uint64_t r = static_cast<uint64_t>(i);
      const DropoutRow counter{static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), kPhiloxNormStream};
      dropout.factors(counter, c, kPhiloxBlock, keep);
    }
    for (int u = 0; u < kCount; ++u) h[u] *= load(keep + c % kPhiloxBlock + u * L);
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
    return {i, at<T>(p.x, i, p.x_stride), at<R>(p.residual, i, p.residual_stride), at<R>(p.sum, i, p.N), row[i % 2],
            {}};
  }
  template <class Count>
  TFORMER_INLINE void read_block(Reading& to, Count count, int64_t c, int64_t n) const {
    Vec<Real> h[count], other[count];
    prefetch_ahead(to.x, p.x_stride, c, to.i, rows_ahead);
    prefetch_ahead(to.residual, p.residual_stride, c, to.i, rows_ahead);
    read(to.x + c, n, h);
    if (p.dropout_p > 0) drop(to.i, c, h);
    if (to.residual) {
      read(to.residual + c, n, other);
      for (int u = 0; u < count; ++u) h[u] += other[u];
    }
    // what is kept is what is normalised: backward sees these numbers
    if constexpr (count > 1) {
      for (int u = 0; u < count; u += 2) round_two<R>(h[u], h[u + 1]);
    } else {
      h[0] = rounded<R>(h[0]);
    }
    for (int u = 0; u < count; ++u) {
      to.total[u] += h[u];
      store(to.row + c + u * L, h[u]);
    }
    if (to.sum) write_result(to.sum + c, n, h);
  }

  // y of a row that has been read, a block at a time.
  struct Writing {
    T* y;
    const Real* row;
    Real mean, rstd;
  };
  TFORMER_INLINE Writing begin_writing(int64_t i, const Reading& from) const {
    const Moments m = moments(from.row, p.rms ? Real(0) : total_of(from.total) / static_cast<Real>(p.N));
    const Real rstd = static_cast<Real>(1.0 / __builtin_sqrt(m.variance + p.eps));
    if (p.mean) static_cast<Real*>(p.mean)[i] = m.mean;
    if (p.rstd) static_cast<Real*>(p.rstd)[i] = rstd;
    return {at<T>(p.y, i, p.N), from.row, m.mean, rstd};
  }
  template <class Count>
  TFORMER_INLINE void write_block(const Writing& from, Count count, int64_t c, int64_t n) const {
    const Real *weight = static_cast<const Real*>(p.weight), *bias = static_cast<const Real*>(p.bias);
    Vec<Real> h[count], other[count];
    for (int u = 0; u < count; ++u) h[u] = (load(from.row + c + u * L) - from.mean) * from.rstd;
    if (weight) {
      read(weight + c, n, other);
      for (int u = 0; u < count; ++u) h[u] *= other[u];
    }
    if (bias) {
      read(bias + c, n, other);
      for (int u = 0; u < count; ++u) h[u] += other[u];
    }
    write_result(from.y + c, n, h);
  }

  // xhat = (h - mean) rstd, g = weight dy: dh = rstd (g - mean(g) - xhat mean(g xhat)); mean(g) is absent for RMS.
  template <int kRows>
  TFORMER_INLINE void backward_rows(int64_t i, Real* dw, Real* db) const {
    const R *saved[kRows], *dsum[kRows];
    const T* dy[kRows];
    Real mean[kRows], rstd[kRows];
    Vec<Real> sum_g[kRows] = {}, sum_gx[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      saved[r] = at<R>(p.saved, i + r, p.saved_stride), dy[r] = at<T>(p.grad_y, i + r, p.grad_y_stride);
      dsum[r] = at<R>(p.grad_sum, i + r, p.grad_sum_stride);
      mean[r] = p.rms ? Real(0) : static_cast<const Real*>(p.mean)[i + r];
      rstd[r] = static_cast<const Real*>(p.rstd)[i + r];
    }
    const Real* weight = static_cast<const Real*>(p.weight);
    const auto first_pass = [&](int64_t c, int64_t n) TFORMER_LAMBDA {
      Vec<Real> w[1] = {splat(Real(1))}, h[1], d[1], for_w[1] = {}, for_b[1] = {};
      if (weight) read(weight + c, n, w);
      if (dw) read(dw + c, n, for_w);
      if (db) read(db + c, n, for_b);
      for (int r = 0; r < kRows; ++r) {
        read(dy[r] + c, n, d);  // zero past the end, so those lanes add nothing
        read(saved[r] + c, n, h);
        const Vec<Real> xhat = (h[0] - mean[r]) * rstd[r], g = d[0] * w[0];
        sum_g[r] += g;
        sum_gx[r] += g * xhat;
        for_w[0] += d[0] * xhat;
        for_b[0] += d[0];
      }
      if (dw) write(dw + c, n, for_w);
      if (db) write(db + c, n, for_b);
    };
    int64_t c = 0;
    for (; c + kBlock * L <= p.N; c += kBlock * L) {
      for (int r = 0; r < kRows; ++r) {  // what the second pass reads of this row, and this one of a later row
        prefetch_ahead(dsum[r], p.grad_sum_stride, c, i + r, 0);
        prefetch_ahead(dy[r], p.grad_y_stride, c, i + r, kRows);
      }
      for (int u = 0; u < kBlock; ++u) first_pass(c + u * L, L);
    }
    for (; c < whole; c += L) first_pass(c, L);
    if (whole < p.N) first_pass(whole, p.N - whole);
    const Real count = static_cast<Real>(p.N);
    for (int r = 0; r < kRows; ++r) {
      const Real mean_g = p.rms ? Real(0) : sum_lanes<Real>(sum_g[r]) / count;
      write_gradients(i + r, kRows, saved[r], dy[r], dsum[r], mean[r], rstd[r], mean_g,
                      sum_lanes<Real>(sum_gx[r]) / count);
    }
  }

  // ahead: rows from i to the one that is read at this place next.
  TFORMER_INLINE void write_gradients(int64_t i, int64_t ahead, const R* saved, const T* dy, const R* dsum, Real mean,
                                      Real rstd, Real mean_g, Real mean_gx) const {
    const Real* weight = static_cast<const Real*>(p.weight);
    T* dx = at<T>(p.grad_x, i, p.N);
    R* dresidual = at<R>(p.grad_residual, i, p.N);
    const Real slope = rstd * mean_gx;
    each_block([&](auto count, int64_t c, int64_t n) TFORMER_LAMBDA {
      Vec<Real> g[count], h[count], other[count];
      prefetch_ahead(saved, p.saved_stride, c, i, ahead);
      read(dy + c, n, g);
      read(saved + c, n, h);
      if (weight) {
        read(weight + c, n, other);
        for (int u = 0; u < count; ++u) g[u] *= other[u];
      }
      for (int u = 0; u < count; ++u) h[u] = (g[u] - mean_g - (h[u] - mean) * slope) * rstd;
      if (dsum) {
        read(dsum + c, n, other);
        for (int u = 0; u < count; ++u) h[u] += other[u];
      }
      if (dresidual) write_result(dresidual + c, n, h);
      if (p.dropout_p > 0) drop(i, c, h);
      write_result(dx + c, n, h);
    });
  }
};

// out[c] = the sum of partial (chunks, N) over the chunks, in their order and in double precision.
template <class Real>
void sum_partials(const Real* partial, int64_t chunks, int64_t N, Real* out) {
  constexpr int kVectors = 8, kColumns = kLanes<double>;
  using Narrow = VecN<Real, kColumns>;
  int64_t c = 0;
  for (; c + kVectors * kColumns <= N; c += kVectors * kColumns) {
    Vec<double> sum[kVectors] = {};
    for (int64_t n = 0; n < chunks; ++n) {
      const Real* from = partial + n * N + c;
      for (int u = 0; u < kVectors; ++u) {
        sum[u] += __builtin_convertvector(load_bytes<Narrow>(from + u * kColumns), Vec<double>);
      }
    }
    for (int u = 0; u < kVectors; ++u) store(out + c + u * kColumns, __builtin_convertvector(sum[u], Narrow));
  }
  for (; c < N; ++c) {
    double sum = 0;
    for (int64_t n = 0; n < chunks; ++n) sum += static_cast<double>(partial[n * N + c]);
    out[c] = static_cast<Real>(sum);
  }
}

}  // namespace
}  // namespace tformer::TFORMER_ISA
