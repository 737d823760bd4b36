// The gradients of a residual norm. With xhat = (h - mean) rstd and g = weight dy:
// dh = rstd (g - mean(g) - xhat mean(g xhat)), mean(g) absent for RMS. Blocks stay and take one set of rows after the
// other, so that each column's share of the gradients of weight and bias adds up in registers.
#include <algorithm>

#include "residual_norm_row.h"

namespace tformer {
namespace {

// What a thread works on, copied to shared memory in the background: its pieces of dy and h of a row and, where there
// is room, of the next one, and of the gradient of this row's sum. Only the thread itself looks at it, 16 bytes beside
// those of the next thread. Both passes read it there: in registers there is no room for it beside the shares of the
// gradients of weight and bias.
template <class T, class R, int kThreads>
class Stages {
  using Row = NormRow<T, R, NormRows::kWhole, kKeptBackward>;
  static constexpr int kE = Row::kE, kStep = 16 * kThreads;
  static constexpr int kOfR = kE * static_cast<int>(sizeof(R)) / 16;  // 16-byte parts of a piece of h

 public:
  static size_t bytes(const NormCall& c) {
    const size_t of_stage = size_t{kStep} * Row::kPieces * (1 + kOfR);
    return static_cast<size_t>(c.stages) * of_stage + (c.p.grad_sum ? size_t{kStep} * Row::kPieces * kOfR : 0);
  }

  TFORMER_DEVICE Stages(char* shared, const NormCall& c)
      : shared_(shared), mine_(16 * gpu::thread_index()), sums_at_(c.stages * Row::kPieces * (1 + kOfR) * kStep) {
    gpu::forget(mine_);  // else the thread is asked for its index at each access
  }

  TFORMER_DEVICE void fetch(const Row& row, int stage) {
    const NormParams& p = row.c.p;
    const T* dy = row.template of<T>(p.grad_y, p.grad_y_stride);
    const R* h = row.template of<R>(p.saved, p.saved_stride);
    row.each_piece([&](int column, int k) {
      const int bytes = row.has(column, 0) ? 16 : 0;  // of no piece there become 0
      gpu::copy_async_16(at(stage, k), dy + column, bytes);
      copy_parts(h + column, at(stage, k) + kStep, bytes);
    });
    gpu::copy_async_commit();
  }

  TFORMER_DEVICE void fetch_sum(const Row& row) {
    const NormParams& p = row.c.p;
    if (p.grad_sum) {
      const R* sum = row.template of<R>(p.grad_sum, p.grad_sum_stride);
      row.each_piece([&](int column, int k) { copy_parts(sum + column, sum_at(k), row.has(column, 0) ? 16 : 0); });
    }
    gpu::copy_async_commit();
  }

  TFORMER_DEVICE Elements<T, kE> dy(int stage, int k) const { return load_parts<T, kE>(at(stage, k)); }
  TFORMER_DEVICE Elements<R, kE> h(int stage, int k) const { return load_parts<R, kE>(at(stage, k) + kStep, kStep); }
  TFORMER_DEVICE Elements<R, kE> sum(int k) const { return load_parts<R, kE>(sum_at(k), kStep); }

 private:
  TFORMER_DEVICE char* at(int stage, int k) const {
    return shared_ + mine_ + (stage * Row::kPieces + k) * (1 + kOfR) * kStep;
  }
  TFORMER_DEVICE char* sum_at(int k) const { return shared_ + mine_ + sums_at_ + k * kOfR * kStep; }

  static TFORMER_DEVICE void copy_parts(const R* from, char* to, int bytes) {
#pragma unroll
    for (int n = 0; n < kOfR; ++n) gpu::copy_async_16(to + n * kStep, from + n * (kE / kOfR), bytes);
  }

  char* shared_;
  int mine_, sums_at_;
};

// Rows that are kept have their share of the gradients of weight and bias in registers. Of others the partials are left
// to NormPartial.
template <class T, class R, NormRows kRows>
struct NormBackward {
  using Real = RealOf<T>;
  static constexpr int kThreads = sizeof(T) == 2 ? kNormThreads : kNormWideThreads;
  static constexpr int kMinimumBlocks = 2 * kNormThreads / kThreads;
  static constexpr bool kReadsAgain = kRows == NormRows::kAgain, kStaged = kRows == NormRows::kWhole;
  using Row = NormRow<T, R, kRows, kKeptBackward>;
  using Sum = GroupSum<Real, kThreads>;
  using Weight = SharedParameter<Row>;
  using Held = Stages<T, R, kThreads>;
  using Numbers = typename Row::Numbers;
  static constexpr int kE = Row::kE, kPieces = Row::kPieces;

  struct Statistics {
    Real mean, rstd;
  };

  static TFORMER_DEVICE Statistics statistics(const Row& row) {
    const NormParams& p = row.c.p;
    if (row.i >= p.M) return {0, 0};
    const auto *mean = static_cast<const Real*>(p.mean), *rstd = static_cast<const Real*>(p.rstd);
    return {p.rms ? Real(0) : mean[row.i], rstd[row.i]};
  }

  struct Piece {
    Elements<T, kE> dy;
    Elements<R, kE> h;
  };

  // sums += (g, g (h - mean)), and act(e, dy, dy (h - mean)); past the end of the row dy is 0, so that nothing is
  // added.
  template <class Act>
  static TFORMER_DEVICE void add(Real mean, const Real (&weight)[kE], const Piece& piece, Real (&sums)[2], Act&& act) {
    Real dy[kE], h[kE];
    unpack(piece.dy, dy);
    unpack(piece.h, h);
#pragma unroll
    for (int e = 0; e < kE; ++e) {
      const Real product = dy[e] * (h[e] - mean);
      sums[0] = gpu::fma(dy[e], weight[e], sums[0]);
      sums[1] = gpu::fma(product, weight[e], sums[1]);
      act(e, dy[e], product);
    }
  }

  // Where a row of gradients goes.
  struct Gradients {
    R* residual;
    T* x;
  };

  // dsum(): the piece of the gradient of the sum.
  template <class Get>
  static TFORMER_DEVICE void write(const Row& row, const Statistics& of, int column, const Numbers& numbers,
                                   const Real (&weight)[kE], const Piece& piece, Real mean_g, Real slope,
                                   const Gradients& to, Get&& dsum) {
    const NormParams& p = row.c.p;
    Real dh[kE], h[kE];
    unpack(piece.dy, dh);
    unpack(piece.h, h);
#pragma unroll
    for (int e = 0; e < kE; ++e) {
      dh[e] = gpu::fma(of.mean - h[e], slope, gpu::fma(dh[e], weight[e], -mean_g)) * of.rstd;
    }
    if (p.grad_sum) {
      Real other[kE];
      unpack(dsum(), other);
#pragma unroll
      for (int e = 0; e < kE; ++e) dh[e] += other[e];
    }
    if (p.grad_residual) row.write(to.residual, column, pack<R>(dh));
    row.drop(numbers, dh);
    row.write(to.x, column, pack<T>(dh));
  }

  static TFORMER_DEVICE void run(const NormCall& c, char* shared) {
    Sum group_sum(shared, c.group);
    Row row(c, kThreads);
    Weight weight(shared + kWeightAt, row);
    if constexpr (!kReadsAgain) {
      weight.fetch(row, c.weight, 1, kThreads);
      gpu::sync_block();
    }
    const auto weights = [&](int column, Real(&w)[kE]) {
      kReadsAgain ? row.parameter(c.weight, column, 1, w) : weight.get(column, w);
    };
    const Real share = Real(1) / static_cast<Real>(row.N);  // of an element in a mean
    Held stages(shared + stages_at(c.p.N), c);
    const NormParams& p = c.p;
    const int64_t rows = kThreads / c.group, step = gpu::block_count<0>() * rows;
    const bool ahead = c.stages == 2;
    Real dw[kPieces][kE] = {}, db[kPieces][kE] = {};
    int stage = 0;
    if constexpr (kStaged) {
      if (ahead) stages.fetch(row, 0);
    }
    Statistics of_next = statistics(row);
    // every thread takes as many turns, as all meet in the sums
    for (int64_t first = gpu::block_index<0>() * rows; first < p.M; first += step) {
      Row next = row;
      next.move_to(row.i + step);
      if constexpr (kStaged) {
        // three groups of copies: what the sums need, what is written needs, the next row
        if (!ahead) stages.fetch(row, 0);
        stages.fetch_sum(row);
        ahead ? stages.fetch(next, stage ^ 1) : gpu::copy_async_commit();
        gpu::copy_async_wait<2>();
      }
      const Statistics of = of_next;
      of_next = statistics(next);
      const auto piece = [&](int column, int k) {
        if constexpr (kStaged) return Piece{stages.dy(stage, k), stages.h(stage, k)};
        const T* dy = row.template of<T>(p.grad_y, p.grad_y_stride);
        return Piece{row.read(dy, column), row.read(row.template of<R>(p.saved, p.saved_stride), column)};
      };
      Real sums[2] = {0, 0};
      row.each_piece([&](int column, int k) {
        Real w[kE];
        weights(column, w);
        add(of.mean, w, piece(column, k), sums, [&](int e, Real dy, Real product) {
          if (kReadsAgain) return;
          dw[k][e] = gpu::fma(product, of.rstd, dw[k][e]);
          db[k][e] += dy;
        });
      });
      group_sum.add_up(sums);
      const Real mean_g = p.rms ? Real(0) : sums[0] * share;
      const Real slope = of.rstd * (of.rstd * (sums[1] * share));
      if constexpr (kStaged) gpu::copy_async_wait<1>();
      const Gradients to{row.template of<R>(p.grad_residual), row.template of<T>(p.grad_x)};
      row.each_drawn_piece([&](int column, int k, const Numbers& numbers) {
        Real w[kE];
        weights(column, w);
        write(row, of, column, numbers, w, piece(column, k), mean_g, slope, to, [&] {
          if constexpr (kStaged) return stages.sum(k);
          return row.read(row.template of<R>(p.grad_sum, p.grad_sum_stride), column);
        });
      });
      if (ahead) stage ^= 1;
      row.move_to(row.i + step);
    }
    if constexpr (!kReadsAgain) {
      row.move_to(0);  // every group has shares, if only of 0
      store_partial(row, static_cast<Real*>(p.partial_weight), dw, shared);
      store_partial(row, static_cast<Real*>(p.partial_bias), db, shared);
    }
  }

  static constexpr size_t kWeightAt = (Sum::kBytes + 15) / 16 * 16;
  static constexpr size_t stages_at(int64_t N) { return kWeightAt + (kReadsAgain ? 0 : Weight::bytes(N)); }

  static size_t shared_bytes(const NormCall& c) {
    const int64_t groups = kThreads / c.group;
    const size_t shares = kReadsAgain || groups == 1 ? 0 : groups * pieces_of<T>(c.p.N) * kE * sizeof(Real);
    return std::max(shares, stages_at(c.p.N) + (kStaged ? Held::bytes(c) : 0));
  }

  // The block's row of partials: the groups' shares, of whole pieces, added in order.
  static TFORMER_DEVICE void store_partial(const Row& row, Real* partial, const Real (&mine)[kPieces][kE],
                                           char* shared) {
    if (!partial) return;
    const int groups = kThreads / row.c.group, width = pieces_of<T>(row.N) * kE;
    Real* to = partial + gpu::block_index<0>() * row.c.p.N;
    auto* shares = reinterpret_cast<Real*>(shared);  // (groups, width)
    if (groups > 1) gpu::sync_block();
    Real* share = shares + gpu::thread_index() / row.c.group * width;
    row.each_piece([&](int column, int k) {
      if (groups == 1) {
        store<Real, kE>(to, column, row.N, row.whole(), pack<Real>(mine[k]));
      } else if (column < width) {
#pragma unroll
        for (int e = 0; e < kE; ++e) share[column + e] = mine[k][e];
      }
    });
    if (groups == 1) return;
    gpu::sync_block();
    for (int column = gpu::thread_index(); column < row.N; column += kThreads) {
      Real total = shares[column];
      for (int g = 1; g < groups; ++g) total += shares[g * width + column];
      to[column] = total;
    }
  }
};

// Partials of wide rows: a thread a column, a block every blocks-th row.
template <class T, class R>
struct NormPartial {
  using Real = RealOf<T>;
  static constexpr int kThreads = 128;

  static TFORMER_DEVICE void run(const NormCall& c, char*) {
    const NormParams& p = c.p;
    const int64_t column = gpu::block_index<0>() * kThreads + gpu::thread_index();
    if (column >= p.N) return;
    const auto* dy = static_cast<const T*>(p.grad_y) + column;
    const auto* h = static_cast<const R*>(p.saved) + column;
    Real dw = 0, db = 0;
    for (int64_t i = gpu::block_index<1>(); i < p.M; i += c.blocks) {
      const Real d = widen(dy[i * p.grad_y_stride]);
      const Real mean = p.rms ? Real(0) : static_cast<const Real*>(p.mean)[i];
      dw += d * (widen(h[i * p.saved_stride]) - mean) * static_cast<const Real*>(p.rstd)[i];
      db += d;
    }
    const int64_t at = gpu::block_index<1>() * p.N + column;
    if (p.partial_weight) static_cast<Real*>(p.partial_weight)[at] = dw;
    if (p.partial_bias) static_cast<Real*>(p.partial_bias)[at] = db;
  }
};

// 32 columns of one of the two sums: each warp takes every 8th row of partials, the first one adds up the warps.
struct NormSum {
  static constexpr int kThreads = 256, kWarps = kThreads / gpu::kWarp;

  template <class Real>
  static TFORMER_DEVICE double sum(const NormSums& p, int which, int64_t column) {
    const auto* partial = static_cast<const Real*>(p.partial[which]) + column;
    double total = 0;
#pragma unroll 8  // as many loads on their way
    for (int64_t n = gpu::warp(); n < p.blocks; n += kWarps) total += static_cast<double>(partial[n * p.N]);
    return total;
  }

  static TFORMER_DEVICE void run(const NormSums& p, char* shared) {
    auto* of_warps = reinterpret_cast<double*>(shared);
    const int which = static_cast<int>(gpu::block_index<1>());
    const int64_t column = gpu::block_index<0>() * gpu::kWarp + gpu::lane();
    const bool there = p.partial[which] && column < p.N;
    if (there) of_warps[gpu::thread_index()] = p.wide ? sum<double>(p, which, column) : sum<float>(p, which, column);
    gpu::sync_block();
    if (!there || gpu::warp() != 0) return;
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += of_warps[w * gpu::kWarp + gpu::lane()];
    void* out = p.out[which];
    switch (p.dtype[which]) {
      case DType::f64:
        static_cast<double*>(out)[column] = total;
        break;
      case DType::f32:
        static_cast<float*>(out)[column] = static_cast<float>(total);
        break;
      case DType::bf16:
        static_cast<gpu::bf16*>(out)[column] = narrow<gpu::bf16>(total);
        break;
      default:
        static_cast<gpu::f16*>(out)[column] = narrow<gpu::f16>(total);
    }
  }
};

template <class T, class R>
void plan(NormCall& call, const NormDevice& device) {
  using Kernel = NormBackward<T, R, NormRows::kWhole>;
  share_rows<T>(call, kKeptBackward, Kernel::kThreads);
  const int64_t rows = Kernel::kThreads / call.group, resident = Kernel::kMinimumBlocks * device.multiprocessors;
  call.blocks = std::min((call.p.M + rows - 1) / rows, resident);
  call.stages = 2;
  if (Kernel::shared_bytes(call) > device.shared_bytes) call.stages = 1;
  call.whole = whole_pieces<T, R>(call) && Kernel::shared_bytes(call) <= device.shared_bytes;
}

template <class T, class R, NormRows kRows>
gpu::Status launch_rows(const NormCall& call, gpu::Stream stream) {
  using Kernel = NormBackward<T, R, kRows>;
  return gpu::launch<Kernel>({call.blocks}, Kernel::shared_bytes(call), stream, call);
}

template <class T, class R>
gpu::Status launch_backward(const NormCall& call, gpu::Stream stream) {
  using Partial = NormPartial<T, R>;
  if (call.keeps_rows) {
    return call.whole ? launch_rows<T, R, NormRows::kWhole>(call, stream)
                      : launch_rows<T, R, NormRows::kAny>(call, stream);
  }
  const gpu::Status status = launch_rows<T, R, NormRows::kAgain>(call, stream);
  if (status != gpu::kSuccess || !(call.p.partial_weight || call.p.partial_bias)) return status;
  const int64_t strips = (call.p.N + Partial::kThreads - 1) / Partial::kThreads;
  return gpu::launch<Partial>({strips, call.blocks}, 0, stream, call);
}

}  // namespace

int64_t most_norm_partials(const NormDevice& device) { return int64_t{2} * device.multiprocessors; }

gpu::Status launch_norm_backward(NormCall call, const NormDevice& device, NormSums sums, gpu::Stream stream) {
  gpu::Status status = for_dtypes(call.p, [&](auto t, auto r) {
    plan<decltype(t), decltype(r)>(call, device);
    return launch_backward<decltype(t), decltype(r)>(call, stream);
  });
  if (status != gpu::kSuccess || !(call.p.partial_weight || call.p.partial_bias)) return status;
  sums.partial[0] = call.p.partial_weight, sums.partial[1] = call.p.partial_bias;
  sums.blocks = call.blocks, sums.N = call.p.N, sums.wide = call.p.dtype == DType::f64;
  return gpu::launch<NormSum>({(sums.N + gpu::kWarp - 1) / gpu::kWarp, 2}, NormSum::kThreads * sizeof(double), stream,
                              sums);
}

}  // namespace tformer
