// Everything a kernel asks of the GPU. The only file with CUDA builtins, PTX and <<<>>>.
//
// tests/emulation/gpu/device.h has the same names for the host. Which one a kernel is compiled against is the include
// path's decision, hence <gpu/device.h> there. csrc/cuda/README.md says how to write a kernel.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "launch.h"
#include "types.h"

#define TFORMER_DEVICE __device__ __forceinline__

namespace tformer::gpu {

// ---- Who runs. ----

TFORMER_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
TFORMER_DEVICE int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
TFORMER_DEVICE int warp() { return static_cast<int>(threadIdx.x) / kWarp; }

template <int kDim>
TFORMER_DEVICE int64_t block_index() {
  return kDim == 0 ? blockIdx.x : kDim == 1 ? blockIdx.y : blockIdx.z;
}
template <int kDim>
TFORMER_DEVICE int64_t block_count() {
  return kDim == 0 ? gridDim.x : kDim == 1 ? gridDim.y : gridDim.z;
}

// The compiler no longer knows where x comes from: it neither keeps what depends on x from before, nor takes the
// computation of x into that of what depends on it.
TFORMER_DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }
// x points to global memory.
template <class T>
TFORMER_DEVICE void forget(T*& x) {
  asm volatile("" : "+l"(x));
  __builtin_assume(__isGlobal(x));
}

// ---- Barriers. What one thread wrote to shared memory before, the others see after. ----

// All threads of the block, at the same place of the source.
TFORMER_DEVICE void sync_block() { __syncthreads(); }
// All lanes of the warp.
TFORMER_DEVICE void sync_warp() { __syncwarp(); }
// `count` threads, whole warps, at barrier `id` from 1 to 15. PTX ISA: Parallel Synchronization, barrier.
TFORMER_DEVICE void sync_threads_of(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// ---- Between the lanes of a warp, all of which take part. T has 32 or 64 bits. ----

constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
TFORMER_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
// From lane + delta; the last delta lanes keep their own.
template <class T>
TFORMER_DEVICE T shuffle_down(T value, int delta) {
  return __shfl_down_sync(kAllLanes, value, delta);
}
template <class T>
TFORMER_DEVICE T shuffle_index(T value, int source_lane) {
  return __shfl_sync(kAllLanes, value, source_lane);
}
TFORMER_DEVICE bool any(bool value) { return __any_sync(kAllLanes, value); }
// Bit n is lane n's value.
TFORMER_DEVICE uint32_t ballot(bool value) { return __ballot_sync(kAllLanes, value); }

// ---- Memory. Addresses of 16-byte accesses are multiples of 16. ----

TFORMER_DEVICE Bits16Bytes load_16(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
TFORMER_DEVICE void store_16(void* to, const Bits16Bytes& v) {
  *static_cast<uint4*>(to) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}
// To global memory in one access, whatever the compiler knows of the words: it takes some of store_16 apart.
TFORMER_DEVICE void store_16_global(void* to, const Bits16Bytes& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

TFORMER_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes (4 bytes) from global to shared memory in the background; those from valid_bytes on become 0 and are not
// read. PTX ISA: Data Movement, cp.async. The copy is seen by this thread after copy_async_wait, by others after a
// barrier that follows it.
TFORMER_DEVICE void copy_async_16(void* shared, const void* global, int valid_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid_bytes)
               : "memory");
}
TFORMER_DEVICE void copy_async_4(void* shared, const void* global, int valid_bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid_bytes)
               : "memory");
}
// Closes a group: this thread's copies since the last one. PTX ISA: cp.async.commit_group.
TFORMER_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all of this thread's groups but the kPending newest ones. PTX ISA: cp.async.wait_group.
template <int kPending>
TFORMER_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Between blocks, through words of global memory. Memory Consistency Model. ----

// The counter before it grew by 1: each caller gets another number. atom, relaxed.
TFORMER_DEVICE int32_t take_ticket(int32_t* counter) {
  int32_t ticket;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(ticket) : "l"(counter) : "memory");
  return ticket;
}
// Waits until give_turn has set the word to `value`; what that thread did before, or had seen, is seen after. Only for
// what a block does that runs already or has run: others may wait for a place. ld.acquire.
TFORMER_DEVICE void wait_for_turn_of(const int32_t* turn, int32_t value) {
  int32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  } while (now != value);
}
// st.release.
TFORMER_DEVICE void give_turn(int32_t* turn, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(value) : "memory");
}
// sum += x. Before a turn is given, so that one block at a time adds; subnormal numbers become 0. red, relaxed.
TFORMER_DEVICE void add_global(float* sum, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(sum), "f"(x) : "memory");
}

// ---- Matrices: fragments are spread over the warp as the PTX ISA says. ----

// 8 x 8 matrices of 16-bit elements out of shared memory. Lane n gives the address of row n % 8 of matrix n / 8, a
// multiple of 16 (x2 uses lanes 0 to 15 only). out[m]: of matrix m the elements (lane / 4, 2 (lane % 4)) and the one
// right of it; transposed: (2 (lane % 4), lane / 4) and the one below. PTX ISA: Warp-Level Matrix Load, ldmatrix.
TFORMER_DEVICE void load_matrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
TFORMER_DEVICE void load_matrix_x2(uint32_t (&out)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared_address(row))
               : "memory");
}
TFORMER_DEVICE void load_matrix_x4_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}
TFORMER_DEVICE void load_matrix_x2_transposed(uint32_t (&out)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8), float sums; T is bf16 or f16. With g = lane / 4, t = lane % 4, pairs from low
// to high half: a[0] (g, 2t ..), a[1] (g + 8, 2t ..), a[2] (g, 2t + 8 ..), a[3] (g + 8, 2t + 8 ..); b[0] (2t .., g),
// b[1] (2t + 8 .., g), down the column; c[0], c[1] (g, 2t), (g, 2t + 1), c[2], c[3] the same in row g + 8.
// PTX ISA: Warp-Level Matrix Multiply-Accumulate, Matrix Fragments for mma.m16n8k16 with floating point type.
template <class T>
TFORMER_DEVICE void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
TFORMER_DEVICE void mma_16x8x16<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
TFORMER_DEVICE void mma_16x8x16<f16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c (16 x 8) += a (16 x 8) b (8 x 8) of to_tf32 values: a[0] (g, t), a[1] (g + 8, t), a[2] (g, t + 4),
// a[3] (g + 8, t + 4); b[0] (t, g), b[1] (t + 4, g); c as above. PTX ISA: Matrix Fragments for mma.m16n8k8, .tf32.
TFORMER_DEVICE void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Numbers. Conversions round to nearest, ties to even (to_tf32: ties away). ----

TFORMER_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
TFORMER_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

TFORMER_DEVICE float to_float(float x) { return x; }
TFORMER_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
TFORMER_DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// 19 of float's bits, those that mma_16x8x8_tf32 reads.
TFORMER_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Two values as T (bf16 or f16), low in the lower half; and back.
template <class T>
TFORMER_DEVICE uint32_t pack_two(float low, float high);
template <>
TFORMER_DEVICE uint32_t pack_two<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
TFORMER_DEVICE uint32_t pack_two<f16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// The same of the larger of each and 0; a NaN stays one.
template <class T>
TFORMER_DEVICE uint32_t pack_two_positive(float low, float high);
template <>
TFORMER_DEVICE uint32_t pack_two_positive<bf16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
TFORMER_DEVICE uint32_t pack_two_positive<f16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <class T>
TFORMER_DEVICE void unpack_two(uint32_t bits, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(bits)});
  high = to_float(T{static_cast<uint16_t>(bits >> 16)});
}

template <class T>
TFORMER_DEVICE T from_float(float x) {
  return T{static_cast<uint16_t>(pack_two<T>(x, 0.0f))};
}
template <>
TFORMER_DEVICE float from_float<float>(float x) {
  return x;
}

TFORMER_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
TFORMER_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
// 2^x: relative error below 2^-22, results below 2^-126 become 0. PTX ISA: ex2.approx.ftz.
TFORMER_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TFORMER_DEVICE float exp2(float x) { return ::exp2f(x); }
TFORMER_DEVICE double exp2(double x) { return ::exp2(x); }
TFORMER_DEVICE float exp(float x) { return ::expf(x); }
TFORMER_DEVICE double exp(double x) { return ::exp(x); }
TFORMER_DEVICE float log2(float x) { return ::log2f(x); }
TFORMER_DEVICE double log2(double x) { return ::log2(x); }
TFORMER_DEVICE float log(float x) { return ::logf(x); }
TFORMER_DEVICE double log(double x) { return ::log(x); }
TFORMER_DEVICE float tanh(float x) { return ::tanhf(x); }
TFORMER_DEVICE double tanh(double x) { return ::tanh(x); }
// 1 / sqrt(x): float rounded correctly, double in each of the two steps.
TFORMER_DEVICE float reciprocal_sqrt(float x) { return __frsqrt_rn(x); }
TFORMER_DEVICE double reciprocal_sqrt(double x) { return __ddiv_rn(1.0, __dsqrt_rn(x)); }
// The larger one; the other one if one is NaN.
TFORMER_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
TFORMER_DEVICE double maximum(double a, double b) { return fmax(a, b); }
TFORMER_DEVICE float absolute(float x) { return fabsf(x); }
TFORMER_DEVICE double absolute(double x) { return fabs(x); }
TFORMER_DEVICE bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }
TFORMER_DEVICE bool is_finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

// ---- Launching. ----

template <class Kernel, class = void>
struct MinimumBlocks {
  static constexpr int value = 1;
};
template <class Kernel>
struct MinimumBlocks<Kernel, decltype(void(Kernel::kMinimumBlocks))> {
  static constexpr int value = Kernel::kMinimumBlocks;
};

template <class Kernel, class Params>
__global__ void __launch_bounds__(Kernel::kThreads, MinimumBlocks<Kernel>::value)
    kernel_entry(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) char shared[];
  Kernel::run(params, shared);
}

// Runs Kernel::run(params, shared) in grid.x * grid.y * grid.z blocks of Kernel::kThreads threads, a multiple of 32,
// with so much shared memory each, aligned to 128 bytes. Kernel::kMinimumBlocks, where there is one: blocks that
// shall fit a multiprocessor at a time, which bounds registers. A grid without blocks does nothing.
template <class Kernel, class Params>
Status launch(Grid grid, size_t shared_bytes, Stream stream, const Params& params) {
  static_assert(Kernel::kThreads % kWarp == 0 && Kernel::kThreads > 0 && Kernel::kThreads <= 1024);
  static_assert(sizeof(Params) <= 4096);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return kSuccess;
  if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) return cudaErrorInvalidConfiguration;
  // What was not asked for in this way is at most 48 KiB; once for each kernel and device.
  constexpr size_t kAlwaysAllowed = size_t{48} << 10;
  constexpr int kDevices = 64;
  static std::atomic<size_t> allowed[kDevices];
  const int device = stream.device % kDevices;
  if (shared_bytes > kAlwaysAllowed && shared_bytes > allowed[device].load(std::memory_order_relaxed)) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel_entry<Kernel, Params>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // it is reported here, not by the next launch
      return error;
    }
    allowed[device].store(shared_bytes, std::memory_order_relaxed);
  }
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  kernel_entry<Kernel, Params>
      <<<blocks, Kernel::kThreads, shared_bytes, static_cast<cudaStream_t>(stream.handle)>>>(params);
  return cudaGetLastError();
}

}  // namespace tformer::gpu
