// What the kernels of the residual norms share: how a row is spread over threads, read, written and summed.
//
// A piece is what 16 bytes hold of x. A quad is the pieces at columns c, c + 16, c + 32, c + 48 of a block of 64: a
// Philox counter serves two elements of each. Quad q of a row belongs to thread q % group of the threads
// that share it. A thread keeps the quads it has in registers; where a row is too wide for that it reads them again for
// each pass, which then come out of the cache.
#pragma once

#include <gpu/device.h>

#include <type_traits>

#include "dropout.h"
#include "residual_norm.h"

namespace tformer {

template <class T>
using RealOf = std::conditional_t<sizeof(T) == 8, double, float>;

template <class T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
// Quads of a block of 64 columns.
template <class T>
constexpr int kQuadsOfBlock = 16 / kPiece<T>;
template <class T>
constexpr int quads_of(int64_t N) {
  return static_cast<int>((N + kPhiloxBlock - 1) / kPhiloxBlock) * kQuadsOfBlock<T>;
}
// Quads that a thread keeps: 32 elements, 16 of double.
template <class T>
constexpr int kKept = (sizeof(T) == 8 ? 16 : 32) / (4 * kPiece<T>);

// Threads of a block, for rows that this many threads can keep and for wider ones.
constexpr int kNormThreads = 256, kNormWideThreads = 512;

TFORMER_DEVICE float widen(float x) { return x; }
TFORMER_DEVICE float widen(gpu::bf16 x) { return gpu::to_float(x); }
TFORMER_DEVICE float widen(gpu::f16 x) { return gpu::to_float(x); }
TFORMER_DEVICE double widen(double x) { return x; }

template <class V, class Real>
TFORMER_DEVICE V narrow(Real x) {
  if constexpr (std::is_same_v<V, double>) {
    return x;
  } else {
    return gpu::from_float<V>(static_cast<float>(x));
  }
}

// kCount elements as they lie in memory: half the registers of what they are computed in.
template <class V, int kCount>
struct Elements {
  V at[kCount];
};

// The elements of a row from `column` on; those past the end are 0. aligned: rows begin at multiples of 16 bytes.
template <class V, int kCount>
TFORMER_DEVICE Elements<V, kCount> load(const V* row, int column, int N, bool aligned) {
  constexpr int kAccess = 16 / static_cast<int>(sizeof(V));
  Elements<V, kCount> to;
  if constexpr (kCount % kAccess == 0) {
    if (aligned && column + kCount <= N) {
#pragma unroll
      for (int k = 0; k < kCount; k += kAccess) {
        const gpu::Bits16Bytes bits = gpu::load_16(row + column + k);
        __builtin_memcpy(&to.at[k], &bits, sizeof bits);
      }
      return to;
    }
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) to.at[e] = column + e < N ? row[column + e] : V{};
  return to;
}

template <class V, int kCount, class Real>
TFORMER_DEVICE void store(V* row, int column, int N, bool aligned, const Real (&x)[kCount]) {
  constexpr int kAccess = 16 / static_cast<int>(sizeof(V));
  Elements<V, kCount> from;
#pragma unroll
  for (int e = 0; e < kCount; ++e) from.at[e] = narrow<V>(x[e]);
  if constexpr (kCount % kAccess == 0) {
    if (aligned && column + kCount <= N) {
#pragma unroll
      for (int k = 0; k < kCount; k += kAccess) {
        gpu::Bits16Bytes bits;
        __builtin_memcpy(&bits, &from.at[k], sizeof bits);
        gpu::store_16(row + column + k, bits);
      }
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (column + e < N) row[column + e] = from.at[e];
  }
}

// Row i of an operand, or nothing.
template <class V>
struct Row {
  V* data;
  bool aligned;

  template <class Base>
  TFORMER_DEVICE Row(Base* base, int64_t i, int64_t stride)
      : data(base ? static_cast<V*>(base) + i * stride : nullptr),
        aligned(reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * static_cast<int64_t>(sizeof(V)) % 16 == 0) {}
};

// A row of the call as seen by one of the threads that share it. T: type of x and y. R: type of residual and sum.
template <class T, class R>
struct NormRow {
  using Real = RealOf<T>;
  static constexpr int kE = kPiece<T>;

  const NormCall& c;
  int64_t i;   // the row
  int N;       // columns
  int quads;   // of a row; 0 where there is no such row
  int member;  // of the group

  TFORMER_DEVICE NormRow(const NormCall& call, int64_t row)
      : c(call),
        i(row),
        N(static_cast<int>(call.p.N)),
        quads(row < call.p.M ? quads_of<T>(call.p.N) : 0),
        member(gpu::thread_index() % call.group) {}

  // The first column of quad q.
  static TFORMER_DEVICE int column_of(int q) {
    return q / kQuadsOfBlock<T> * static_cast<int>(kPhiloxBlock) + q % kQuadsOfBlock<T> * kE;
  }

  // act(q, k) for the quads of this thread, which are at most kQuads (any number if that is 0); k counts them from 0,
  // or is always 0.
  template <int kQuads, class Act>
  TFORMER_DEVICE void each_quad(Act&& act) const {
    if constexpr (kQuads == 0) {
      for (int q = member; q < quads; q += c.group) act(q, 0);
    } else {
#pragma unroll
      for (int k = 0; k < kQuads; ++k) {
        const int q = member + k * c.group;
        if (q < quads) act(q, k);
      }
    }
  }

  // Multiplies by what dropout leaves of quad q.
  TFORMER_DEVICE void drop(int q, Real (&x)[4][kE]) const {
    if (!c.dropout.seed) return;
    const auto seed = static_cast<uint64_t>(*c.dropout.seed);
    const Real scale = static_cast<Real>(c.dropout.scale);
    const auto first = static_cast<uint32_t>(q * (kE / 2));  // a counter for each two columns of a piece
#pragma unroll
    for (int e = 0; e < kE; e += 2) {
      const PhiloxWords random = philox(first + static_cast<uint32_t>(e / 2), static_cast<uint32_t>(i),
                                        static_cast<uint32_t>(i >> 32), kPhiloxNormStream, seed);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          x[n][e + odd] *= random.number(n, odd) < c.dropout.drop_below ? Real(0) : scale;
        }
      }
    }
  }

  // Piece of weight or bias at `column`.
  TFORMER_DEVICE void parameter(const NormVector& vector, int column, Real (&to)[kE]) const {
    if (vector.dtype == c.p.dtype) {
      const Row<const T> row(vector.data, 0, 0);
      const auto x = load<T, kE>(row.data, column, N, row.aligned);
#pragma unroll
      for (int e = 0; e < kE; ++e) to[e] = widen(x.at[e]);
    } else {
      const Row<const Real> row(vector.data, 0, 0);
      const auto x = load<Real, kE>(row.data, column, N, row.aligned);
#pragma unroll
      for (int e = 0; e < kE; ++e) to[e] = x.at[e];
    }
  }
};

// Sums over the threads of a group, the same in all of them.
template <class Real, int kThreads>
class GroupSum {
  static constexpr int kMost = 2;  // numbers at a time
  static constexpr int kWarps = kThreads / gpu::kWarp;

 public:
  static constexpr size_t kBytes = 2 * kMost * kWarps * sizeof(Real);

  TFORMER_DEVICE GroupSum(char* shared, int group) : of_warps_(reinterpret_cast<Real*>(shared)), group_(group) {}

  template <int kCount>
  TFORMER_DEVICE void add_up(Real (&x)[kCount]) {
    for (int mask = (group_ < gpu::kWarp ? group_ : gpu::kWarp) / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) x[n] += gpu::shuffle_xor(x[n], mask);
    }
    if (group_ <= gpu::kWarp) return;
    // One barrier for each sum: who is still reading the last one does so in the other half.
    Real* of_warps = of_warps_ + turn_ * kMost * kWarps;
    turn_ ^= 1;
    if (gpu::lane() == 0) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) of_warps[gpu::warp() * kCount + n] = x[n];
    }
    gpu::sync_block();
    const int warps = group_ / gpu::kWarp, first = gpu::warp() / warps * warps;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      x[n] = of_warps[first * kCount + n];
      for (int w = 1; w < warps; ++w) x[n] += of_warps[(first + w) * kCount + n];
    }
  }

 private:
  Real* of_warps_;
  int group_, turn_ = 0;
};

// Runs launch<T, R>() for the dtypes of the call.
template <class Launch>
gpu::Status for_dtypes(const NormParams& p, Launch&& launch) {
  const bool wide_sum = p.sum_dtype == DType::f32;
  switch (p.dtype) {
    case DType::f64:
      return launch(double(), double());
    case DType::f32:
      return launch(float(), float());
    case DType::bf16:
      return wide_sum ? launch(gpu::bf16(), float()) : launch(gpu::bf16(), gpu::bf16());
    default:
      return wide_sum ? launch(gpu::f16(), float()) : launch(gpu::f16(), gpu::f16());
  }
}

}  // namespace tformer
