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
  const int64_t whole;  // columns in whole vectors
  Real *row, *gradient, *keep;
  size_t bytes;

  ResidualNorm(const NormParams& params, Scratch scratch) : p(params), whole(p.N / L * L) {
    const int64_t padded = (p.N + kPhiloxBlock - 1) / kPhiloxBlock * kPhiloxBlock;
    row = scratch.take<Real>(padded);
    gradient = scratch.take<Real>(padded);
    keep = scratch.take<Real>(padded);
    bytes = scratch.used();
  }

  void forward(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) forward_row(i);
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
    for (int64_t i = chunk * p.chunk_rows; i < end; ++i) backward_row(i, dw, db);
  }

 private:
  // Calls f(column, count) for each vector of a row; count is below L only for the last.
  template <class F>
  TFORMER_INLINE void each_vector(F&& f) const {
    for (int64_t c = 0; c < whole; c += L) f(c, std::integral_constant<int, L>{});
    if (whole < p.N) f(whole, p.N - whole);
  }
  template <class V>
  static TFORMER_INLINE Vec<Real> read(const V* from, std::integral_constant<int, L>) {
    return load_as<Real>(from);
  }
  template <class V>
  static TFORMER_INLINE Vec<Real> read(const V* from, int64_t n) {
    return load_as<Real>(from, n);
  }
  template <class V>
  static TFORMER_INLINE void write(V* to, Vec<Real> x, std::integral_constant<int, L>) {
    store_as<Real>(to, x);
  }
  template <class V>
  static TFORMER_INLINE void write(V* to, Vec<Real> x, int64_t n) {
    store_as<Real>(to, x, n);
  }
  template <class V>
  static TFORMER_INLINE V* at(void* base, int64_t i, int64_t stride) {
    return base ? static_cast<V*>(base) + i * stride : nullptr;
  }
  template <class V>
  static TFORMER_INLINE const V* at(const void* base, int64_t i, int64_t stride) {
    return base ? static_cast<const V*>(base) + i * stride : nullptr;
  }

  TFORMER_INLINE void draw_dropout(int64_t i) const {
    const Dropout dropout(p.dropout_p, p.dropout_seed);
    const uint64_t r = static_cast<uint64_t>(i);
    const DropoutRow counter{static_cast<uint32_t>(r), static_cast<uint32_t>(r >> 32), kPhiloxNormStream};
    for (int64_t c = 0; c < p.N; c += kPhiloxBlock) dropout.factors(counter, c, kPhiloxBlock, keep + c);
  }

  // mean and the mean squared distance from it. The first pass's mean has rounding errors of the size of the row's
  // values; the distances are small, so their own mean gives the part that was lost (corrected two-pass algorithm:
  // Chan, Golub, LeVeque 1983).
  struct Moments {
    Real mean;
    double variance;
  };
  TFORMER_INLINE Moments moments(Real first_mean) const {
    for (int64_t c = p.N; c < whole + (whole < p.N ? L : 0); ++c) row[c] = first_mean;  // adds nothing
    Vec<Real> sum{}, squares{};
    for (int64_t c = 0; c < p.N; c += L) {
      const Vec<Real> d = load(row + c) - first_mean;
      sum += d;
      squares += d * d;
    }
    const double count = static_cast<double>(p.N);
    const double second_moment = static_cast<double>(sum_lanes<Real>(squares)) / count;
    if (p.rms) return {Real(0), second_moment};
    const double lost = static_cast<double>(sum_lanes<Real>(sum)) / count;
    return {static_cast<Real>(static_cast<double>(first_mean) + lost), second_moment - lost * lost};
  }

  TFORMER_INLINE void forward_row(int64_t i) const {
    const T* x = at<T>(p.x, i, p.x_stride);
    const R* residual = at<R>(p.residual, i, p.residual_stride);
    R* sum = at<R>(p.sum, i, p.N);
    T* y = at<T>(p.y, i, p.N);
    if (p.dropout_p > 0) draw_dropout(i);

    Vec<Real> total{};
    each_vector([&](int64_t c, auto n) {
      Vec<Real> h = read(x + c, n);
      if (p.dropout_p > 0) h *= load(keep + c);
      if (residual) h += read(residual + c, n);
      h = rounded<R>(h);  // what is kept is what is normalised: backward sees these numbers
      if (sum) write(sum + c, h, n);
      total += h;
      store(row + c, h);
    });

    const Moments m = moments(p.rms ? Real(0) : sum_lanes<Real>(total) / static_cast<Real>(p.N));
    const Real mean = m.mean, rstd = static_cast<Real>(1.0 / __builtin_sqrt(m.variance + p.eps));
    if (p.mean) static_cast<Real*>(p.mean)[i] = mean;
    if (p.rstd) static_cast<Real*>(p.rstd)[i] = rstd;

    const Real *weight = static_cast<const Real*>(p.weight), *bias = static_cast<const Real*>(p.bias);
    each_vector([&](int64_t c, auto n) {
      Vec<Real> h = (load(row + c) - mean) * rstd;
      if (weight) h *= read(weight + c, n);
      if (bias) h += read(bias + c, n);
      write(y + c, h, n);
    });
  }

  // xhat = (h - mean) rstd, g = weight dy: dh = rstd (g - mean(g) - xhat mean(g xhat)); mean(g) is absent for RMS.
  TFORMER_INLINE void backward_row(int64_t i, Real* dw, Real* db) const {
    const R* saved = at<R>(p.saved, i, p.saved_stride);
    const T* dy = at<T>(p.grad_y, i, p.grad_y_stride);
    const Real* weight = static_cast<const Real*>(p.weight);
    const Real mean = p.rms ? Real(0) : static_cast<const Real*>(p.mean)[i];
    const Real rstd = static_cast<const Real*>(p.rstd)[i];

    Vec<Real> sum_g{}, sum_gx{};
    each_vector([&](int64_t c, auto n) {
      const Vec<Real> d = read(dy + c, n);  // zero past the end, so those lanes add nothing
      const Vec<Real> xhat = (read(saved + c, n) - mean) * rstd;
      const Vec<Real> g = weight ? d * read(weight + c, n) : d;
      sum_g += g;
      sum_gx += g * xhat;
      if (dw) write(dw + c, read(dw + c, n) + d * xhat, n);
      if (db) write(db + c, read(db + c, n) + d, n);
      store(row + c, xhat);
      store(gradient + c, g);
    });
    const Real count = static_cast<Real>(p.N);
    const Real mean_g = p.rms ? Real(0) : sum_lanes<Real>(sum_g) / count;
    const Real mean_gx = sum_lanes<Real>(sum_gx) / count;

    const R* dsum = at<R>(p.grad_sum, i, p.grad_sum_stride);
    T* dx = at<T>(p.grad_x, i, p.N);
    R* dresidual = at<R>(p.grad_residual, i, p.N);
    if (p.dropout_p > 0) draw_dropout(i);
    each_vector([&](int64_t c, auto n) {
      Vec<Real> dh = (load(gradient + c) - mean_g - load(row + c) * mean_gx) * rstd;
      if (dsum) dh += read(dsum + c, n);
      if (dresidual) write(dresidual + c, dh, n);
      if (p.dropout_p > 0) dh *= load(keep + c);
      write(dx + c, dh, n);
    });
  }
};

}  // namespace
}  // namespace tformer::TFORMER_ISA
