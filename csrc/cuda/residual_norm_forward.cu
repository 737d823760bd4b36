// y = norm(residual + dropout(x)), a row at a time by a group of threads, which asks for its next row as soon as it has
// this one. Variance is two-pass: the mean first, then squared distances from it, out of registers.
#include <algorithm>

#include "residual_norm_row.h"

namespace tformer {
namespace {

template <class T, class R, int kBlockThreads, NormRows kRows>
struct NormForward {
  using Real = RealOf<T>;
  static constexpr int kThreads = kBlockThreads;
  static constexpr bool kReadsAgain = kRows == NormRows::kAgain;
  static constexpr int kMinimumBlocks = kReadsAgain || kThreads == kNormThreads ? 2 : 1;
  using Row = NormRow<T, R, kRows, kKeptForward<T>>;
  using Sum = GroupSum<Real, kThreads>;
  using Parameter = SharedParameter<Row>;
  using Numbers = typename Row::Numbers;
  static constexpr int kE = Row::kE, kPieces = Row::kPieces;

  // h of a piece, rounded to R: what is kept is what is normalised.
  static TFORMER_DEVICE void add(const Row& row, const Numbers& numbers, const Elements<T, kE>& x,
                                 const Elements<R, kE>& residual, Real (&h)[kE]) {
    unpack(x, h);
    if (!row.c.p.residual && !row.c.dropout.seed) return;
    row.drop(numbers, h);
    if (row.c.p.residual) {
      Real other[kE];
      unpack(residual, other);
#pragma unroll
      for (int e = 0; e < kE; ++e) h[e] += other[e];
    }
    unpack(pack<R>(h), h);
  }

  static TFORMER_DEVICE void read(const Row& row, const Numbers& numbers, const T* x, const R* residual, int column,
                                  Real (&h)[kE]) {
    Elements<R, kE> other{};
    if (row.c.p.residual) other = row.read(residual, column);
    add(row, numbers, row.read(x, column), other, h);
  }

  // A row on its way to registers: all of it is asked for before any of it is waited for.
  struct Fetched {
    Elements<T, kE> x[kPieces];
    Elements<R, kE> residual[kPieces];

    TFORMER_DEVICE void fetch(const Row& row) {
      const NormParams& p = row.c.p;
      const T* from = row.template of<T>(p.x, p.x_stride);
      row.each_piece([&](int column, int k) { x[k] = row.read(from, column); });
      if (!p.residual) return;
      const R* other = row.template of<R>(p.residual, p.residual_stride);
      row.each_piece([&](int column, int k) { residual[k] = row.read(other, column); });
    }
  };

  static constexpr size_t kParametersAt = (Sum::kBytes + 15) / 16 * 16;

  static size_t shared_bytes(const NormCall& c) {
    return kReadsAgain ? Sum::kBytes : kParametersAt + 2 * Parameter::bytes(c.p.N);
  }

  static TFORMER_DEVICE void run(const NormCall& c, char* shared) {
    Sum sums(shared, c.group);
    const int64_t rows = kThreads / c.group, step = gpu::block_count<0>() * rows;
    Row row(c, kThreads);
    Parameter weight(shared + kParametersAt, row), bias(shared + kParametersAt + Parameter::bytes(c.p.N), row);
    if constexpr (!kReadsAgain) {
      weight.fetch(row, c.weight, 1, kThreads);
      bias.fetch(row, c.bias, 0, kThreads);
      gpu::sync_block();
    }
    const Real share = Real(1) / static_cast<Real>(row.N), eps = static_cast<Real>(c.p.eps);
    Fetched fetched;
    if constexpr (!kReadsAgain) fetched.fetch(row);
    // every thread takes as many turns, as all meet in the sums
    for (int64_t first = gpu::block_index<0>() * rows; first < c.p.M; first += step) {
      Row next = row;
      next.move_to(row.i + step);
      normalise(row, next, fetched, sums, share, eps, [&](int column, Real(&w)[kE], Real(&b)[kE]) {
        if constexpr (kReadsAgain) {
          row.parameter(c.weight, column, 1, w);
          row.parameter(c.bias, column, 0, b);
        } else {
          weight.get(column, w);
          bias.get(column, b);
        }
      });
      row.move_to(next.i);
    }
  }

  // fetched: of this row, then of the next one. share: what an element has in a mean. parameters(column, weight, bias)
  template <class Get>
  static TFORMER_DEVICE void normalise(const Row& row, const Row& next, Fetched& fetched, Sum& sums, Real share,
                                       Real eps, Get&& parameters) {
    const NormParams& p = row.c.p;
    const T* x = row.template of<T>(p.x, p.x_stride);
    const R* residual = row.template of<R>(p.residual, p.residual_stride);
    const auto each_again = [&](auto&& act) {
      if constexpr (kReadsAgain) {
        row.each_drawn_piece(act);
      } else {
        row.each_piece([&](int column, int k) { act(column, k, Numbers{}); });
      }
    };
    Real h[kPieces][kE] = {};
    R* sum = row.template of<R>(p.sum);
    Real total[1] = {0};
    row.each_drawn_piece([&](int column, int k, const Numbers& numbers) {
      kReadsAgain ? read(row, numbers, x, residual, column, h[k])
                  : add(row, numbers, fetched.x[k], fetched.residual[k], h[k]);
      if (p.sum) row.write(sum, column, pack<R>(h[k]));
#pragma unroll
      for (int e = 0; e < kE; ++e) total[0] += h[k][e];
    });
    if constexpr (!kReadsAgain) fetched.fetch(next);
    Real first_mean = 0;
    if (!p.rms) {
      sums.add_up(total);
      first_mean = total[0] * share;
    }

    // The distances' own mean gives what rounding took from the first (corrected two-pass algorithm: Chan, Golub,
    // LeVeque 1983).
    Real distance[2] = {0, 0};
    each_again([&](int column, int k, const Numbers& numbers) {
      if constexpr (kReadsAgain) read(row, numbers, x, residual, column, h[k]);
#pragma unroll
      for (int e = 0; e < kE; ++e) {
        h[k][e] -= row.has(column, e) ? first_mean : Real(0);
        distance[0] += h[k][e];
        distance[1] = gpu::fma(h[k][e], h[k][e], distance[1]);
      }
    });
    sums.add_up(distance);
    const Real lost = p.rms ? Real(0) : distance[0] * share;
    const Real variance = gpu::fma(-lost, lost, distance[1] * share);
    const Real rstd = gpu::reciprocal_sqrt(variance + eps), shift = -lost * rstd;
    if (row.member == 0 && row.i < p.M) {
      if (p.mean) static_cast<Real*>(p.mean)[row.i] = first_mean + lost;
      if (p.rstd) static_cast<Real*>(p.rstd)[row.i] = rstd;
    }

    T* y = row.template of<T>(p.y);
    each_again([&](int column, int k, const Numbers& numbers) {
      if constexpr (kReadsAgain) {
        read(row, numbers, x, residual, column, h[k]);
#pragma unroll
        for (int e = 0; e < kE; ++e) h[k][e] -= first_mean;
      }
      Real weight[kE], bias[kE];
      parameters(column, weight, bias);
#pragma unroll
      for (int e = 0; e < kE; ++e) h[k][e] = gpu::fma(gpu::fma(h[k][e], rstd, shift), weight[e], bias[e]);
      row.write(y, column, pack<T>(h[k]));
    });
  }
};

// Blocks stay, so that what they fetch at first serves many rows.
template <class Kernel>
gpu::Status launch_blocks(NormCall call, const NormDevice& device, gpu::Stream stream) {
  const int64_t rows = Kernel::kThreads / call.group;
  const int64_t resident = int64_t{Kernel::kMinimumBlocks} * device.multiprocessors;
  call.blocks = std::min((call.p.M + rows - 1) / rows, resident);
  return gpu::launch<Kernel>({call.blocks}, Kernel::shared_bytes(call), stream, call);
}

template <class T, class R, int kThreads>
gpu::Status launch_rows(const NormCall& call, const NormDevice& device, gpu::Stream stream) {
  using Kernel = NormForward<T, R, kThreads, NormRows::kWhole>;
  if (!call.keeps_rows || Kernel::shared_bytes(call) > device.shared_bytes) {
    return launch_blocks<NormForward<T, R, kNormWideThreads, NormRows::kAgain>>(call, device, stream);
  }
  return call.whole ? launch_blocks<Kernel>(call, device, stream)
                    : launch_blocks<NormForward<T, R, kThreads, NormRows::kAny>>(call, device, stream);
}

}  // namespace

gpu::Status launch_norm_forward(NormCall call, const NormDevice& device, gpu::Stream stream) {
  return for_dtypes(call.p, [&](auto t, auto r) {
    using T = decltype(t);
    using R = decltype(r);
    share_rows<T>(call, kKeptForward<T>, kNormWideThreads);
    call.whole = whole_pieces<T, R>(call);
    return call.group <= kNormThreads ? launch_rows<T, R, kNormThreads>(call, device, stream)
                                      : launch_rows<T, R, kNormWideThreads>(call, device, stream);
  });
}

}  // namespace tformer
