// What the kernels of the residual norms share: how a row is spread over threads, read, written and summed.
//
// A piece is what 16 bytes hold of x. Piece k of a thread is piece member + k * group of the row, so that what a warp
// reads at a time is contiguous. A thread keeps its pieces of a row in registers, as they lie in memory; where a row is
// too wide for that it reads them again for each pass, which then come out of the cache.
#pragma once

#include <gpu/device.h>

#include <algorithm>
#include <type_traits>

#include "dropout.h"
#include "residual_norm.h"

namespace tformer {

template <class T>
using RealOf = std::conditional_t<sizeof(T) == 8, double, float>;

// Elements of a piece.
template <class T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int pieces_of(int64_t N) {
  return static_cast<int>((N + kPiece<T> - 1) / kPiece<T>);
}
// Pieces that a thread keeps in forward, 32 elements, 16 of double; backward has as many sums besides.
template <class T>
constexpr int kKeptForward = (sizeof(T) == 8 ? 16 : 32) / kPiece<T>;
constexpr int kKeptBackward = 4;

// Threads of a block, for rows that this many threads can keep and for wider ones.
constexpr int kNormThreads = 256, kNormWideThreads = 512;

// What a kernel is compiled for.
enum class NormRows {
  kWhole,  // NormCall::whole: pieces are in the row or not, no element is looked at
  kAny,    // any width and alignment, an element at a time
  kAgain,  // too wide to be kept; whole or not
};

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

// kCount elements as they lie in memory: of 16 bits, half the registers of what they are computed in.
template <class V, int kCount>
struct Elements {
  V at[kCount];
};

template <class V, int kCount, class Real>
TFORMER_DEVICE void unpack(const Elements<V, kCount>& from, Real (&to)[kCount]) {
  if constexpr (sizeof(V) == 2) {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) {
      uint32_t two;
      __builtin_memcpy(&two, &from.at[e], sizeof two);
      gpu::unpack_two<V>(two, to[e], to[e + 1]);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) to[e] = from.at[e];
  }
}

template <class V, int kCount, class Real>
TFORMER_DEVICE Elements<V, kCount> pack(const Real (&from)[kCount]) {
  Elements<V, kCount> to;
  if constexpr (sizeof(V) == 2) {
#pragma unroll
    for (int e = 0; e < kCount; e += 2) {
      const uint32_t two = gpu::pack_two<V>(from[e], from[e + 1]);
      __builtin_memcpy(&to.at[e], &two, sizeof two);
    }
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) to.at[e] = from[e];
  }
  return to;
}

// What lies in 16-byte parts, `step` bytes from one to the next; zeros where it is not there.
template <class V, int kCount>
TFORMER_DEVICE Elements<V, kCount> load_parts(const void* from, int step = 16, bool there = true) {
  constexpr int kPart = 16 / static_cast<int>(sizeof(V));
  Elements<V, kCount> to;
#pragma unroll
  for (int n = 0; n < kCount / kPart; ++n) {
    gpu::Bits16Bytes bits{};
    if (there) bits = gpu::load_16(static_cast<const char*>(from) + n * step);
    __builtin_memcpy(&to.at[n * kPart], &bits, sizeof bits);
  }
  return to;
}

// The elements of a row from `column` on; those past the end are 0. whole: as NormCall::whole.
template <class V, int kCount>
TFORMER_DEVICE Elements<V, kCount> load(const V* row, int column, int N, bool whole) {
  if (whole) return load_parts<V, kCount>(row + column, 16, column < N);
  Elements<V, kCount> to;
#pragma unroll
  for (int e = 0; e < kCount; ++e) to.at[e] = column + e < N ? row[column + e] : V{};
  return to;
}

template <class V, int kCount>
TFORMER_DEVICE void store(V* row, int column, int N, bool whole, const Elements<V, kCount>& from) {
  constexpr int kPart = 16 / static_cast<int>(sizeof(V));
  if (whole) {
    if (column >= N) return;
#pragma unroll
    for (int e = 0; e < kCount; e += kPart) {
      gpu::Bits16Bytes bits;
      __builtin_memcpy(&bits, &from.at[e], sizeof bits);
      gpu::store_16_global(row + column + e, bits);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (column + e < N) row[column + e] = from.at[e];
  }
}

// A row of the call as seen by one of the threads that share it. T: type of x and y. R: type of residual and sum.
template <class T, class R, NormRows kRows, int kKept>
struct NormRow {
  using Type = T;
  using Real = RealOf<T>;
  static constexpr int kE = kPiece<T>, kPieces = kRows == NormRows::kAgain ? 1 : kKept;

  const NormCall& c;
  int N;       // columns
  int member;  // of the group
  int64_t i;   // the row
  int end;     // its columns: N, or 0 where there is no such row

  // The thread's first row.
  TFORMER_DEVICE NormRow(const NormCall& call, int threads)
      : c(call), N(static_cast<int>(call.p.N)), member(gpu::thread_index() % call.group) {
    move_to(gpu::block_index<0>() * (threads / call.group) + gpu::thread_index() / call.group);
  }

  TFORMER_DEVICE void move_to(int64_t row) {
    gpu::forget(member);  // else the columns of all pieces, and all that comes of them, are kept from row to row
    i = row;
    end = row < c.p.M ? N : 0;
  }

  TFORMER_DEVICE bool whole() const { return kRows == NormRows::kWhole || (kRows == NormRows::kAgain && c.whole); }

  // act(column, k) for the pieces of this thread; k counts them from 0, or is always 0 where they are not kept. Of kept
  // ones some may lie past the end of the row: they are read as 0, not written, and spare the others a branch.
  template <class Act>
  TFORMER_DEVICE void each_piece(Act&& act) const {
    if constexpr (kRows == NormRows::kAgain) {
      for (int column = member * kE; column < end; column += c.group * kE) act(column, 0);
    } else {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) act((member + k * c.group) * kE, k);
    }
  }

  // act(column, k, numbers) for these pieces, with dropout's numbers.
  template <class Act>
  TFORMER_DEVICE void each_drawn_piece(Act&& act) const {
    if (!c.dropout.seed) {
      each_piece([&](int column, int k) { act(column, k, Numbers{}); });
      return;
    }
    const auto draw_one = [&](int first, int k) {
      const int column = first + member * kE;
      const Numbers numbers = draw(column);
      if (column < end) act(column, k, numbers);
    };
    if constexpr (kRows == NormRows::kAgain) {
      for (int first = 0; first < N; first += c.group * kE) draw_one(first, 0);
    } else {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) draw_one(k * c.group * kE, k);
    }
  }

  // Whether element e of the piece at `column` is in the row.
  TFORMER_DEVICE bool has(int column, int e) const { return column + (whole() ? 0 : e) < end; }

  // This row of a matrix, and pieces of it.
  template <class V>
  TFORMER_DEVICE const V* of(const void* matrix, int64_t stride) const {
    const V* row = static_cast<const V*>(matrix) + i * stride;
    gpu::forget(row);  // else its product is made anew for each piece
    return row;
  }
  template <class V>
  TFORMER_DEVICE V* of(void* matrix) const {
    V* row = static_cast<V*>(matrix) + i * c.p.N;
    gpu::forget(row);
    return row;
  }
  template <class V>
  TFORMER_DEVICE Elements<V, kE> read(const V* row, int column) const {
    return load<V, kE>(row, column, end, whole());
  }
  template <class V>
  TFORMER_DEVICE void write(V* row, int column, const Elements<V, kE>& piece) const {
    store<V, kE>(row, column, end, whole(), piece);
  }

  // The piece at `column` of weight or bias, or `otherwise` where there is none.
  TFORMER_DEVICE void parameter(const NormVector& vector, int column, Real otherwise, Real (&to)[kE]) const {
    if (!vector.data) {
#pragma unroll
      for (int e = 0; e < kE; ++e) to[e] = otherwise;
    } else if (vector.dtype == c.p.dtype) {
      unpack(load<T, kE>(static_cast<const T*>(vector.data), column, N, whole()), to);
    } else {
      unpack(load<Real, kE>(static_cast<const Real*>(vector.data), column, N, whole()), to);
    }
  }

  // The numbers of a piece, two in a word.
  struct Numbers {
    uint32_t pair[kE / 2];
  };

  // Multiplies by what dropout leaves.
  TFORMER_DEVICE void drop(const Numbers& numbers, Real (&x)[kE]) const {
    if (!c.dropout.seed) return;
    const Real scale = static_cast<Real>(c.dropout.scale);
    const uint32_t below = c.dropout.drop_below << 16;  // what a number has behind it does not matter then
#pragma unroll
    for (int e = 0; e < kE; ++e) {
      const uint32_t number = e % 2 ? numbers.pair[e / 2] : numbers.pair[e / 2] << 16;
      x[e] *= number < below ? Real(0) : scale;
    }
  }

 private:
  // A counter has pairs of numbers for the four groups of 16 positions of a block of 64 (philox.h), a piece is in one
  // group and wants pairs of kE / 2 counters. So the lanes whose pieces lie 16 positions apart draw one counter each,
  // and hand each other what they want of it. All lanes of the warp, with pieces in the row or not.
  TFORMER_DEVICE Numbers draw(int column) const {
    Numbers numbers;
    constexpr auto kBlock = static_cast<uint32_t>(kPhiloxBlock);
    constexpr int kCounters = kE / 2, kNextGroup = 16 / kE;  // lanes
    const auto block = static_cast<uint32_t>(column) / kBlock, position = static_cast<uint32_t>(column) % kBlock;
    const uint32_t group = position / 16;
    const PhiloxWords random =
        philox(block * kPhiloxCounters + position % 16 / 2 + group % kCounters, static_cast<uint32_t>(i),
               static_cast<uint32_t>(i >> 32), kPhiloxNormStream, static_cast<uint64_t>(*c.dropout.seed));
    uint32_t pair[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) pair[g] = random.number(g, 0) | random.number(g, 1) << 16;
    // from the pairs of one counter to those of one group, a bit of the group's number at a time
    if constexpr (kCounters > 1) {
      exchange(pair[0], pair[1], group & 1, kNextGroup);
      exchange(pair[2], pair[3], group & 1, kNextGroup);
    } else {
      pair[0] = group & 1 ? pair[1] : pair[0];
      pair[2] = group & 1 ? pair[3] : pair[2];
    }
    if constexpr (kCounters > 2) {
      exchange(pair[0], pair[2], group & 2, 2 * kNextGroup);
      exchange(pair[1], pair[3], group & 2, 2 * kNextGroup);
    } else {
#pragma unroll
      for (int n = 0; n < kCounters; ++n) pair[n] = group & 2 ? pair[2 + n] : pair[n];
    }
#pragma unroll
    for (int n = 0; n < kCounters; ++n) numbers.pair[n] = pair[n];
    return numbers;
  }

  // The lower lane gets both `low`, the upper one both `high`.
  static TFORMER_DEVICE void exchange(uint32_t& low, uint32_t& high, bool upper, int mask) {
    const uint32_t other = gpu::shuffle_xor(upper ? low : high, mask);
    low = upper ? other : low;
    high = upper ? high : other;
  }
};

// Weight or bias in shared memory, as it is computed with: asked for anew for each row, it costs as much as the row.
// Part n of all pieces lies before part n + 1.
template <class Row>
class SharedParameter {
  using Real = typename Row::Real;
  static constexpr int kE = Row::kE, kParts = kE * static_cast<int>(sizeof(Real)) / 16, kOfPart = kE / kParts;

 public:
  static constexpr size_t bytes(int64_t N) { return size_t{16} * kParts * pieces_of<typename Row::Type>(N); }

  TFORMER_DEVICE SharedParameter(char* shared, const Row& row)
      : shared_(shared), step_(16 * pieces_of<typename Row::Type>(row.N)) {}

  // By all threads of the block; seen after a barrier.
  TFORMER_DEVICE void fetch(const Row& row, const NormVector& from, Real otherwise, int threads) {
    for (int at = 16 * gpu::thread_index(); at < step_; at += 16 * threads) {
      Real x[kE];
      row.parameter(from, at / 16 * kE, otherwise, x);
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        gpu::Bits16Bytes bits;
        __builtin_memcpy(&bits, &x[n * kOfPart], sizeof bits);
        gpu::store_16(shared_ + n * step_ + at, bits);
      }
    }
  }

  // Something past the end of the row.
  TFORMER_DEVICE void get(int column, Real (&to)[kE]) const {
    const int at = column * (16 / kE);
    unpack(load_parts<Real, kE>(shared_ + (at < step_ ? at : 0), step_), to);
  }

 private:
  char* shared_;
  int step_;
};

// Sums over the threads of a group, the same in all of them. Groups of several warps have a barrier each, so that none
// waits for another one's rows.
template <class Real, int kThreads>
class GroupSum {
  static constexpr int kMost = 2;  // numbers at a time
  static constexpr int kWarps = kThreads / gpu::kWarp;

 public:
  static constexpr size_t kBytes = 2 * kMost * kWarps * sizeof(Real);

  TFORMER_DEVICE GroupSum(char* shared, int group)
      : of_warps_(reinterpret_cast<Real*>(shared)), group_(group), warps_(group / gpu::kWarp) {
    if (warps_ <= 1) return;
    barrier_ = 1 + gpu::warp() / warps_;
    other_ = (barrier_ - 1) * warps_ + gpu::lane() % warps_;
  }

  template <int kCount>
  TFORMER_DEVICE void add_up(Real (&x)[kCount]) {
    if (warps_ == 0) {
      for (int mask = group_ / 2; mask > 0; mask /= 2) add_lanes(x, mask);
      return;
    }
#pragma unroll
    for (int mask = gpu::kWarp / 2; mask > 0; mask /= 2) add_lanes(x, mask);
    if (warps_ == 1) return;
    // One barrier for each sum: who is still reading the last one does so in the other half.
    Real* of_warps = of_warps_ + turn_ * kMost * kWarps;
    turn_ ^= 1;
    if (gpu::lane() == 0) {
#pragma unroll
      for (int n = 0; n < kCount; ++n) of_warps[gpu::warp() * kCount + n] = x[n];
    }
    gpu::sync_threads_of(barrier_, group_);
#pragma unroll
    for (int n = 0; n < kCount; ++n) x[n] = of_warps[other_ * kCount + n];
    for (int mask = warps_ / 2; mask > 0; mask /= 2) add_lanes(x, mask);
  }

 private:
  template <int kCount>
  static TFORMER_DEVICE void add_lanes(Real (&x)[kCount], int mask) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) x[n] += gpu::shuffle_xor(x[n], mask);
  }

  Real* of_warps_;
  int group_, warps_, barrier_ = 0, turn_ = 0;
  int other_ = 0;  // the warp of the group whose sum this lane reads
};

// Spreads rows over groups of at most `most` threads, each of which can keep `kept` pieces. With dropout groups have no
// less than 8: NormRow::draw.
template <class T>
void share_rows(NormCall& call, int kept, int most) {
  constexpr int kLine = 8;  // pieces of a cache line: a group reads all of it at a time
  const int pieces = pieces_of<T>(call.p.N);
  call.group = 1;
  const int least = call.dropout.seed ? kLine : std::min(kLine, pieces);
  while (call.group < most && (call.group * kept < pieces || call.group < least)) call.group *= 2;
  call.keeps_rows = call.group * kept >= pieces;
}

template <class T, class R>
bool whole_pieces(const NormCall& call) {
  const NormParams& p = call.p;
  bool whole = p.N % kPiece<T> == 0;
  for (const void* pointer : {p.x, p.residual, call.weight.data, call.bias.data, p.saved, p.grad_y, p.grad_sum}) {
    whole = whole && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  for (const void* pointer : {p.y, p.sum, p.grad_x, p.grad_residual, p.partial_weight, p.partial_bias}) {
    whole = whole && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  for (int64_t stride : {p.x_stride, p.grad_y_stride}) whole = whole && stride % kPiece<T> == 0;
  for (int64_t stride : {p.residual_stride, p.saved_stride, p.grad_sum_stride}) {
    whole = whole && stride % kPiece<R> == 0;
  }
  return whole;
}

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
