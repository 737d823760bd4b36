// The gradients of a residual norm. With xhat = (h - mean) rstd and g = weight dy:
// dh = rstd (g - mean(g) - xhat mean(g xhat)), mean(g) absent for RMS. Blocks stay and take one set of rows after the
// other, so that each column's share of the gradients of weight and bias adds up in registers.
#include <algorithm>

#include "residual_norm_row.h"

namespace tformer {
namespace {

template <class T, class R>
struct Quad {
  Elements<T, kPiece<T>> dy[4];
  Elements<R, kPiece<T>> h[4];
};

// What a thread has of the rows of dy and h it works on next is copied to shared memory in the background. Only the
// thread itself looks at it, 16 bytes beside those of the next thread.
template <class T, class R, int kThreads, int kQuads>
class Stages {
  static constexpr int kE = kPiece<T>;
  static constexpr int kOfH = kE * static_cast<int>(sizeof(R)) / 16, kOfPiece = 1 + kOfH;  // 16-byte parts

 public:
  static constexpr size_t bytes_of_stage() { return size_t{16} * kThreads * kQuads * 4 * kOfPiece; }

  TFORMER_DEVICE explicit Stages(char* shared) : mine_(shared + 16 * gpu::thread_index()) {}

  TFORMER_DEVICE void fetch(const NormRow<T, R>& row, int stage) {
    const NormParams& p = row.c.p;
    const Row<const T> dy(p.grad_y, row.i, p.grad_y_stride);
    const Row<const R> h(p.saved, row.i, p.saved_stride);
    row.template each_quad<kQuads>([&](int q, int k) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int column = row.column_of(q) + 16 * w;
        copy<T, 1>(dy, column, row.N, part(stage, k, w));
        copy<R, kOfH>(h, column, row.N, part(stage, k, w) + kStep);
      }
    });
    gpu::copy_async_commit();
  }

  TFORMER_DEVICE Quad<T, R> read(int stage, int k) const {
    Quad<T, R> quad;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const char* from = part(stage, k, w);
      quad.dy[w] = held<T, 1>(from);
      quad.h[w] = held<R, kOfH>(from + kStep);
    }
    return quad;
  }

 private:
  static constexpr int kStep = 16 * kThreads;

  TFORMER_DEVICE char* part(int stage, int k, int w) const {
    return mine_ + ((stage * kQuads + k) * 4 + w) * kOfPiece * kStep;
  }

  template <class V, int kParts>
  static TFORMER_DEVICE void copy(const Row<const V>& row, int column, int N, char* to) {
    constexpr int kElements = 16 / static_cast<int>(sizeof(V));
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      const int first = column + n * kElements, left = N - first;
      if (row.aligned) {
        const int count = left < 0 ? 0 : left < kElements ? left : kElements;
        gpu::copy_async_16(to + n * kStep, row.data + (count ? first : 0), count * static_cast<int>(sizeof(V)));
      } else {
        const auto elements = load<V, kElements>(row.data, first, N, false);
        gpu::Bits16Bytes bits;
        __builtin_memcpy(&bits, &elements, sizeof bits);
        gpu::store_16(to + n * kStep, bits);
      }
    }
  }

  template <class V, int kParts>
  static TFORMER_DEVICE Elements<V, kE> held(const char* from) {
    Elements<V, kE> to;
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      const gpu::Bits16Bytes bits = gpu::load_16(from + n * kStep);
      __builtin_memcpy(&to.at[n * (kE / kParts)], &bits, sizeof bits);
    }
    return to;
  }

  char* mine_;
};

// kQuads: those that a thread has at most, with its share of the gradients of weight and bias in registers. 0: any
// number, read twice, and the partials are left to NormPartial.
template <class T, class R, int kBlockThreads, int kQuads>
struct NormBackward {
  using Real = RealOf<T>;
  static constexpr int kThreads = kBlockThreads, kMinimumBlocks = sizeof(T) == 2 ? 2 : 1;
  static constexpr int kE = kPiece<T>;
  static constexpr bool kReadsAgain = kQuads == 0;
  static constexpr int kHeld = kReadsAgain ? 1 : kQuads;
  using Sum = GroupSum<Real, kThreads>;
  using Held = Stages<T, R, kThreads, kHeld>;

  struct Statistics {
    Real mean, rstd;
  };

  static TFORMER_DEVICE Quad<T, R> read(const NormRow<T, R>& row, int q) {
    const NormParams& p = row.c.p;
    const Row<const T> dy(p.grad_y, row.i, p.grad_y_stride);
    const Row<const R> h(p.saved, row.i, p.saved_stride);
    Quad<T, R> quad;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int column = row.column_of(q) + 16 * w;
      quad.dy[w] = load<T, kE>(dy.data, column, row.N, dy.aligned);
      quad.h[w] = load<R, kE>(h.data, column, row.N, h.aligned);
    }
    return quad;
  }

  // sums += (g, g xhat), and act(w, e, dy, xhat); past the end of the row dy is 0, so that nothing is added.
  template <class Act>
  static TFORMER_DEVICE void add(const NormRow<T, R>& row, const Statistics& of, int q, const Quad<T, R>& quad,
                                 Real (&sums)[2], Act&& act) {
    const bool weighted = row.c.weight.data != nullptr;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      Real weight[kE];
      if (weighted) row.parameter(row.c.weight, row.column_of(q) + 16 * w, weight);
#pragma unroll
      for (int e = 0; e < kE; ++e) {
        const Real dy = widen(quad.dy[w].at[e]), xhat = (widen(quad.h[w].at[e]) - of.mean) * of.rstd;
        const Real g = weighted ? dy * weight[e] : dy;
        sums[0] += g;
        sums[1] += g * xhat;
        act(w, e, dy, xhat);
      }
    }
  }

  static TFORMER_DEVICE void write(const NormRow<T, R>& row, const Statistics& of, int q, const Quad<T, R>& quad,
                                   Real mean_g, Real slope) {
    const NormParams& p = row.c.p;
    const Row<const R> dsum(p.grad_sum, row.i, p.grad_sum_stride);
    const Row<R> dresidual(p.grad_residual, row.i, p.N);
    const Row<T> dx(p.grad_x, row.i, p.N);
    const bool weighted = row.c.weight.data != nullptr;
    Real dh[4][kE];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int column = row.column_of(q) + 16 * w;
      Real weight[kE];
      if (weighted) row.parameter(row.c.weight, column, weight);
#pragma unroll
      for (int e = 0; e < kE; ++e) {
        const Real dy = widen(quad.dy[w].at[e]), g = weighted ? dy * weight[e] : dy;
        dh[w][e] = (g - mean_g - (widen(quad.h[w].at[e]) - of.mean) * slope) * of.rstd;
      }
      if (dsum.data) {
        const auto other = load<R, kE>(dsum.data, column, row.N, dsum.aligned);
#pragma unroll
        for (int e = 0; e < kE; ++e) dh[w][e] += widen(other.at[e]);
      }
      if (dresidual.data) store<R>(dresidual.data, column, row.N, dresidual.aligned, dh[w]);
    }
    row.drop(q, dh);
#pragma unroll
    for (int w = 0; w < 4; ++w) store<T>(dx.data, row.column_of(q) + 16 * w, row.N, dx.aligned, dh[w]);
  }

  static TFORMER_DEVICE void run(const NormCall& c, char* shared) {
    Sum group_sum(shared, c.group);
    Held stages(shared + kStagesAt);
    const NormParams& p = c.p;
    const int64_t rows = kThreads / c.group, step = gpu::block_count<0>() * rows;
    const int64_t mine = gpu::block_index<0>() * rows + gpu::thread_index() / c.group;
    const bool ahead = c.stages == 2;
    Real dw[kHeld][4][kE] = {}, db[kHeld][4][kE] = {};
    int stage = 0;
    if (!kReadsAgain && ahead) stages.fetch(NormRow<T, R>(c, mine), 0);
    // every thread takes as many turns, as all meet in the sums
    for (int64_t first = gpu::block_index<0>() * rows; first < p.M; first += step) {
      const NormRow<T, R> row(c, first + gpu::thread_index() / c.group);
      if constexpr (!kReadsAgain) {
        if (ahead) {
          stages.fetch(NormRow<T, R>(c, row.i + step), stage ^ 1);
          gpu::copy_async_wait<1>();
        } else {
          stages.fetch(row, 0);
          gpu::copy_async_wait<0>();
        }
      }
      Statistics of{0, 0};
      if (row.i < p.M) {
        of.rstd = static_cast<const Real*>(p.rstd)[row.i];
        if (!p.rms) of.mean = static_cast<const Real*>(p.mean)[row.i];
      }
      Real sums[2] = {0, 0};
      row.template each_quad<kQuads>([&](int q, int k) {
        const Quad<T, R> quad = kReadsAgain ? read(row, q) : stages.read(stage, k);
        add(row, of, q, quad, sums, [&](int w, int e, Real dy, Real xhat) {
          if (kReadsAgain) return;
          dw[k][w][e] += dy * xhat;
          db[k][w][e] += dy;
        });
      });
      group_sum.add_up(sums);
      const Real mean_g = p.rms ? Real(0) : sums[0] / static_cast<Real>(row.N);
      const Real slope = of.rstd * (sums[1] / static_cast<Real>(row.N));
      row.template each_quad<kQuads>(
          [&](int q, int k) { write(row, of, q, kReadsAgain ? read(row, q) : stages.read(stage, k), mean_g, slope); });
      if (ahead) stage ^= 1;
    }
    if (kReadsAgain) return;
    store_partial(c, static_cast<Real*>(p.partial_weight), dw, shared);
    store_partial(c, static_cast<Real*>(p.partial_bias), db, shared);
  }

  static constexpr size_t kStagesAt = (Sum::kBytes + 127) / 128 * 128;
  // Of a call whose rows are kept.
  static size_t shared_bytes(const NormCall& c) {
    const size_t sums = c.group < kThreads ? static_cast<size_t>(c.p.N) * sizeof(Real) : 0;
    return std::max(sums, kStagesAt + static_cast<size_t>(c.stages) * Held::bytes_of_stage());
  }

  // The block's row of partials: the groups' shares added one after the other.
  static TFORMER_DEVICE void store_partial(const NormCall& c, Real* partial, const Real (&mine)[kHeld][4][kE],
                                           char* shared) {
    if (!partial) return;
    auto* sums = reinterpret_cast<Real*>(shared);  // (N)
    const int groups = kThreads / c.group, N = static_cast<int>(c.p.N);
    Real* row = partial + gpu::block_index<0>() * c.p.N;
    for (int turn = 0; turn < groups; ++turn) {
      gpu::sync_block();
      if (turn != gpu::thread_index() / c.group) continue;
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const int first = NormRow<T, R>::column_of(gpu::thread_index() % c.group + k * c.group);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
#pragma unroll
          for (int e = 0; e < kE; ++e) {
            const int column = first + 16 * w + e;
            if (column >= N) continue;
            const Real total = turn == 0 ? mine[k][w][e] : sums[column] + mine[k][w][e];
            (turn == groups - 1 ? row : sums)[column] = total;
          }
        }
      }
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
  const int quads = quads_of<T>(call.p.N);
  call.group = 1;
  while (call.group < kNormThreads && call.group * kKept<T> < quads) call.group *= 2;
  call.keeps_rows = call.group * kKept<T> >= quads;
  const int64_t rows = kNormThreads / call.group;
  call.blocks = std::min<int64_t>((call.p.M + rows - 1) / rows, most_norm_partials(device));
  using Keeping = NormBackward<T, R, kNormThreads, kKept<T>>;
  call.stages = 2;
  if (Keeping::shared_bytes(call) > device.shared_bytes) call.stages = 1;
}

template <class T, class R>
gpu::Status launch_backward(const NormCall& call, gpu::Stream stream) {
  using Keeping = NormBackward<T, R, kNormThreads, kKept<T>>;
  using Partial = NormPartial<T, R>;
  if (call.keeps_rows) return gpu::launch<Keeping>({call.blocks}, Keeping::shared_bytes(call), stream, call);
  constexpr size_t kSums = GroupSum<RealOf<T>, kNormThreads>::kBytes;
  const gpu::Status status = gpu::launch<NormBackward<T, R, kNormThreads, 0>>({call.blocks}, kSums, stream, call);
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
