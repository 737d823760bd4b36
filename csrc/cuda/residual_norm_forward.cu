// y = norm(residual + dropout(x)), a row at a time by a group of threads. Variance is two-pass: the mean first, then
// squared distances from it, out of registers.
#include <algorithm>

#include "residual_norm_row.h"

namespace tformer {
namespace {

template <class T, class R, int kBlockThreads, NormRows kRows>
struct NormForward {
  using Real = RealOf<T>;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kMinimumBlocks = kThreads == kNormWideThreads ? 1 : sizeof(R) == 2 ? 3 : 2;
  static constexpr bool kReadsAgain = kRows == NormRows::kAgain;
  using Row = NormRow<T, R, kRows>;
  using Sum = GroupSum<Real, kThreads>;
  static constexpr int kE = Row::kE, kPieces = Row::kPieces;

  // h of the piece at `column`, rounded to R: what is kept is what is normalised.
  static TFORMER_DEVICE Elements<R, kE> add(const Row& row, int column, const Elements<T, kE>& x,
                                            const Elements<R, kE>& residual) {
    Real h[kE];
    unpack(x, h);
    row.drop(column, h);
    if (row.c.p.residual) {
      Real other[kE];
      unpack(residual, other);
#pragma unroll
      for (int e = 0; e < kE; ++e) h[e] += other[e];
    }
    return pack<R>(h);
  }

  static TFORMER_DEVICE Elements<R, kE> read(const Row& row, const T* x, const R* residual, int column) {
    Elements<R, kE> other{};
    if (row.c.p.residual) other = row.read(residual, column);
    return add(row, column, row.read(x, column), other);
  }

  static TFORMER_DEVICE void write(const Row& row, int column, Real mean, Real rstd, const Elements<R, kE>& piece,
                                   T* y) {
    Real h[kE], weight[kE], bias[kE];
    row.parameter(row.c.weight, column, 1, weight);
    row.parameter(row.c.bias, column, 0, bias);
    unpack(piece, h);
#pragma unroll
    for (int e = 0; e < kE; ++e) h[e] = gpu::fma((h[e] - mean) * rstd, weight[e], bias[e]);
    row.write(y, column, pack<T>(h));
  }

  static TFORMER_DEVICE void run(const NormCall& c, char* shared) {
    Sum sums(shared, c.group);
    const int64_t rows = kThreads / c.group, step = gpu::block_count<0>() * rows;
    Row row(c, kThreads);
    // every thread takes as many turns, as all meet in the sums
    for (int64_t first = gpu::block_index<0>() * rows; first < c.p.M; first += step) {
      normalise(row, sums);
      row.move_to(row.i + step);
    }
  }

  static TFORMER_DEVICE void normalise(const Row& row, Sum& sums) {
    const NormParams& p = row.c.p;
    const Real N = static_cast<Real>(row.N);
    const T* x = row.template of<T>(p.x, p.x_stride);
    const R* residual = row.template of<R>(p.residual, p.residual_stride);
    Elements<T, kE> from[kPieces];
    Elements<R, kE> h[kPieces];  // the residual at first
    if constexpr (!kReadsAgain) {
      // all of the row is asked for before any of it is waited for
      row.each_piece([&](int column, int k) { from[k] = row.read(x, column); });
      if (p.residual) {
        row.each_piece([&](int column, int k) { h[k] = row.read(residual, column); });
      }
    }
    R* sum = row.template of<R>(p.sum);
    Real total[1] = {0};
    row.each_piece([&](int column, int k) {
      h[k] = kReadsAgain ? read(row, x, residual, column) : add(row, column, from[k], h[k]);
      if (p.sum) row.write(sum, column, h[k]);
      Real of_piece[kE];
      unpack(h[k], of_piece);
      row.each_element(column, [&](int e) { total[0] += of_piece[e]; });
    });
    Real first_mean = 0;
    if (!p.rms) {
      sums.add_up(total);
      first_mean = total[0] / N;
    }

    // The distances' own mean gives what rounding took from the first (corrected two-pass algorithm: Chan, Golub,
    // LeVeque 1983).
    Real distance[2] = {0, 0};
    row.each_piece([&](int column, int k) {
      Real of_piece[kE];
      unpack(kReadsAgain ? read(row, x, residual, column) : h[k], of_piece);
      row.each_element(column, [&](int e) {
        const Real d = of_piece[e] - first_mean;
        distance[0] += d;
        distance[1] = gpu::fma(d, d, distance[1]);
      });
    });
    sums.add_up(distance);
    const Real lost = p.rms ? Real(0) : distance[0] / N, mean = first_mean + lost;
    const Real variance = gpu::fma(-lost, lost, distance[1] / N);
    const Real rstd = gpu::reciprocal_sqrt(variance + static_cast<Real>(p.eps));
    if (row.member == 0 && row.i < p.M) {
      if (p.mean) static_cast<Real*>(p.mean)[row.i] = mean;
      if (p.rstd) static_cast<Real*>(p.rstd)[row.i] = rstd;
    }

    T* y = row.template of<T>(p.y);
    row.each_piece([&](int column, int k) {
      write(row, column, mean, rstd, kReadsAgain ? read(row, x, residual, column) : h[k], y);
    });
  }
};

template <class T, class R, int kThreads, NormRows kRows>
gpu::Status launch_rows(const NormCall& call, gpu::Stream stream) {
  using Kernel = NormForward<T, R, kThreads, kRows>;
  return gpu::launch<Kernel>({call.blocks}, Kernel::Sum::kBytes, stream, call);
}

template <class T, class R, int kThreads>
gpu::Status launch_kept(const NormCall& call, gpu::Stream stream) {
  return call.whole ? launch_rows<T, R, kThreads, NormRows::kWhole>(call, stream)
                    : launch_rows<T, R, kThreads, NormRows::kAny>(call, stream);
}

}  // namespace

gpu::Status launch_norm_forward(NormCall call, const NormDevice& device, gpu::Stream stream) {
  return for_dtypes(call.p, [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    share_rows<T>(call, kNormWideThreads);
    call.whole = whole_pieces<T, R>(call);
    const int64_t rows = call.group > kNormThreads ? 1 : kNormThreads / call.group;
    call.blocks = std::min<int64_t>((call.p.M + rows - 1) / rows, int64_t{32} * device.multiprocessors);
    if (!call.keeps_rows) return launch_rows<T, R, kNormWideThreads, NormRows::kAgain>(call, stream);
    return call.group <= kNormThreads ? launch_kept<T, R, kNormThreads>(call, stream)
                                      : launch_kept<T, R, kNormWideThreads>(call, stream);
  });
}

}  // namespace tformer
