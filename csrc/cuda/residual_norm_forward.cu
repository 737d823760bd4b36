// y = norm(residual + dropout(x)), a row at a time by a group of threads. Variance is two-pass: the mean first, then
// squared distances from it, out of registers.
#include <algorithm>

#include "residual_norm_row.h"

namespace tformer {
namespace {

// kQuads: those that a thread keeps, or 0.
template <class T, class R, int kBlockThreads, int kQuads>
struct NormForward {
  using Real = RealOf<T>;
  static constexpr int kThreads = kBlockThreads, kMinimumBlocks = 512 / kThreads;
  static constexpr int kE = kPiece<T>;
  static constexpr bool kReadsAgain = kQuads == 0;

  // h of quad q, rounded to R: what is kept is what is normalised. With `sum`, also stored there.
  static TFORMER_DEVICE void read(const NormRow<T, R>& row, R* sum, int q, Real (&h)[4][kE]) {
    const NormParams& p = row.c.p;
    const int column = row.column_of(q);
    const Row<const T> x(p.x, row.i, p.x_stride);
    const Row<const R> residual(p.residual, row.i, p.residual_stride);
    const Row<R> to(sum, row.i, p.N);
    Elements<T, kE> from[4];
    Elements<R, kE> other[4] = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      from[w] = load<T, kE>(x.data, column + 16 * w, row.N, x.aligned);
      if (residual.data) other[w] = load<R, kE>(residual.data, column + 16 * w, row.N, residual.aligned);
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int e = 0; e < kE; ++e) h[w][e] = widen(from[w].at[e]);
    }
    row.drop(q, h);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int e = 0; e < kE; ++e) {
        if (residual.data) h[w][e] += widen(other[w].at[e]);
        h[w][e] = widen(narrow<R>(h[w][e]));
      }
      if (to.data) store<R>(to.data, column + 16 * w, row.N, to.aligned, h[w]);
    }
  }

  // act(element) for those of the quad that are in the row.
  template <class Act>
  static TFORMER_DEVICE void each(const NormRow<T, R>& row, int q, const Real (&h)[4][kE], Act&& act) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int count = row.N - row.column_of(q) - 16 * w;
#pragma unroll
      for (int e = 0; e < kE; ++e) {
        if (e < count) act(h[w][e]);
      }
    }
  }

  static TFORMER_DEVICE void write(const NormRow<T, R>& row, int q, Real mean, Real rstd, const Real (&h)[4][kE]) {
    const Row<T> y(row.c.p.y, row.i, row.c.p.N);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int column = row.column_of(q) + 16 * w;
      Real out[kE], parameter[kE];
#pragma unroll
      for (int e = 0; e < kE; ++e) out[e] = (h[w][e] - mean) * rstd;
      if (row.c.weight.data) {
        row.parameter(row.c.weight, column, parameter);
#pragma unroll
        for (int e = 0; e < kE; ++e) out[e] *= parameter[e];
      }
      if (row.c.bias.data) {
        row.parameter(row.c.bias, column, parameter);
#pragma unroll
        for (int e = 0; e < kE; ++e) out[e] += parameter[e];
      }
      store<T>(y.data, column, row.N, y.aligned, out);
    }
  }

  static TFORMER_DEVICE void run(const NormCall& c, char* shared) {
    GroupSum<Real, kThreads> sums(shared, c.group);
    const int64_t rows = kThreads / c.group, step = gpu::block_count<0>() * rows;
    // every thread takes as many turns, as all meet in the sums
    for (int64_t first = gpu::block_index<0>() * rows; first < c.p.M; first += step) {
      normalise(NormRow<T, R>(c, first + gpu::thread_index() / c.group), sums);
    }
  }

  static TFORMER_DEVICE void normalise(const NormRow<T, R>& row, GroupSum<Real, kThreads>& sums) {
    const NormParams& p = row.c.p;
    const Real N = static_cast<Real>(row.N);
    Real h[kReadsAgain ? 1 : kQuads][4][kE], total[1] = {0};
    row.template each_quad<kQuads>([&](int q, int k) {
      read(row, static_cast<R*>(p.sum), q, h[k]);
      each(row, q, h[k], [&](Real x) { total[0] += x; });
    });
    Real first_mean = 0;
    if (!p.rms) {
      sums.add_up(total);
      first_mean = total[0] / N;
    }

    // The distances' own mean gives what rounding took from the first (corrected two-pass algorithm: Chan, Golub,
    // LeVeque 1983).
    Real distance[2] = {0, 0};
    row.template each_quad<kQuads>([&](int q, int k) {
      if (kReadsAgain) read(row, nullptr, q, h[k]);
      each(row, q, h[k], [&](Real x) {
        const Real d = x - first_mean;
        distance[0] += d;
        distance[1] += d * d;
      });
    });
    sums.add_up(distance);
    const Real lost = p.rms ? Real(0) : distance[0] / N, mean = first_mean + lost;
    const Real rstd = gpu::reciprocal_sqrt(distance[1] / N - lost * lost + static_cast<Real>(p.eps));
    if (row.member == 0 && row.i < p.M) {
      if (p.mean) static_cast<Real*>(p.mean)[row.i] = mean;
      if (p.rstd) static_cast<Real*>(p.rstd)[row.i] = rstd;
    }

    row.template each_quad<kQuads>([&](int q, int k) {
      if (kReadsAgain) read(row, nullptr, q, h[k]);
      write(row, q, mean, rstd, h[k]);
    });
  }
};

template <class T>
void plan(NormCall& call, const NormDevice& device) {
  const int quads = quads_of<T>(call.p.N);
  call.group = 1;
  while (call.group < kNormWideThreads && call.group * kKept<T> < quads) call.group *= 2;
  call.keeps_rows = call.group * kKept<T> >= quads;
  const int64_t rows = call.group > kNormThreads ? 1 : kNormThreads / call.group;
  call.blocks = std::min<int64_t>((call.p.M + rows - 1) / rows, int64_t{32} * device.multiprocessors);
}

template <class T, class R, int kThreads, int kQuads>
gpu::Status launch_forward(const NormCall& call, gpu::Stream stream) {
  constexpr size_t kShared = GroupSum<RealOf<T>, kThreads>::kBytes;
  return gpu::launch<NormForward<T, R, kThreads, kQuads>>({call.blocks}, kShared, stream, call);
}

}  // namespace

gpu::Status launch_norm_forward(NormCall call, const NormDevice& device, gpu::Stream stream) {
  return for_dtypes(call.p, [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    plan<T>(call, device);
    if (call.group <= kNormThreads) return launch_forward<T, R, kNormThreads, kKept<T>>(call, stream);
    if (call.keeps_rows) return launch_forward<T, R, kNormWideThreads, kKept<T>>(call, stream);
    return launch_forward<T, R, kNormWideThreads, 0>(call, stream);
  });
}

}  // namespace tformer
