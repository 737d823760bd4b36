// What only sm_90a has: copies of tensors by the copy engine, barriers in shared memory that count their bytes,
// products of warpgroups. As gpu/device.h: PTX is here and nowhere else, tests/emulation/gpu/hopper.h has the same
// names for the host. Section names are those of the PTX ISA.
#pragma once

#include <gpu/device.h>
#include <gpu/tensor_map.h>

namespace tformer::gpu {

constexpr int kWarpgroup = 4 * kWarp;  // warps that multiply together; the first one's number is a multiple of 4

// The first multiple of `alignment` from `shared` on. The 128-byte swizzle is by address: boxes begin at multiples of
// 1024, blocks' shared memory at multiples of 128 only.
TFORMER_DEVICE char* align_shared(char* shared, int alignment) {
  return shared + (-shared_address(shared) & (static_cast<uint32_t>(alignment) - 1));
}

// ---- Barriers in shared memory. Parallel Synchronization and Communication: mbarrier. ----

// Goes through phases, counted from 0. A phase ends when all arrivals and all announced bytes have come.
struct alignas(8) Mbarrier {
  uint64_t opaque;
};

// By one thread, which then lets others and the copy engine know with mbarrier_publish; a sync_block follows.
// mbarrier.init; fence.mbarrier_init, fence.proxy.async.
TFORMER_DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
TFORMER_DEVICE void mbarrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// What this thread did before is seen by who waits for the phase. mbarrier.arrive, release at .cta scope by default.
TFORMER_DEVICE void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Announces bytes that copies will bring, and arrives. mbarrier.arrive.expect_tx.
TFORMER_DEVICE void mbarrier_arrive_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of this parity has ended: the present one if it has the parity, else the one before, which has.
// mbarrier.try_wait.parity, acquire at .cta scope by default.
TFORMER_DEVICE void mbarrier_wait(Mbarrier* barrier, int parity) {
  uint32_t ended = 0;
  while (!ended) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// ---- The copy engine. ----

// One box of the tensor to `shared`, a multiple of 1024: 64 columns from `column` on of the map's number of rows from
// `row` on. Its bytes, zeros too, count at the barrier. By one thread. The map lies in the kernel's parameters.
// Data Movement: cp.async.bulk.tensor.
TFORMER_DEVICE void tensor_load(void* shared, const TensorMap* map, int column, int row, int head, int batch,
                                Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}

// This thread's ordinary accesses to shared memory before, those of the copy engine and of products after: each thread
// that made some, before the barrier. Memory Consistency Model: Proxies; fence.proxy.async.
TFORMER_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Shared to global memory in the background: stored, or added to floats, each rounded to nearest with subnormal ones
// taken as 0. Addresses and bytes are multiples of 16. Data Movement: cp.async.bulk, cp.reduce.async.bulk.
TFORMER_DEVICE void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}
TFORMER_DEVICE void bulk_add(float* global, const void* shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
// Closes a group: this thread's bulk_store and bulk_add since the last one. cp.async.bulk.commit_group.
TFORMER_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits for all of this thread's groups but the kPending newest ones: that their shared memory has been read; that what
// they write is there, and seen by this thread. cp.async.bulk.wait_group.
template <int kPending>
TFORMER_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
TFORMER_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
// As fence_async_proxy, for global memory. fence.proxy.async.
TFORMER_DEVICE void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- Who runs. ----

// Arrives at a barrier of sync_threads_of without waiting; counts among its `count`. barrier.arrive.
TFORMER_DEVICE void arrive_threads_of(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// Registers of each thread of the warpgroup from now on, a multiple of 8 up to 256: all of its warps, at the same place
// of the source. more_registers waits until others have given up enough of what the block was launched with.
// Miscellaneous: setmaxnreg.
template <int kCount>
TFORMER_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
TFORMER_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Products of a warpgroup. Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions. ----

// Where a matrix lies in shared memory, 128-byte swizzle, rows of 128 bytes in groups of 8, a group 1024 bytes. Matrix
// Descriptor Format: bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16, 49-51 base offset: 0
// as groups begin at multiples of 1024, 62-63 swizzle: 1 = 128 bytes.
// A row of the matrix along a row in memory (K-major): `stride` from 8 rows to the next 8; `leading` is not used.
// A column along a row in memory (MN-major): `stride` from 8 rows to the next 8, `leading` from 64 columns to the next.
TFORMER_DEVICE uint64_t matrix_descriptor(const void* shared, int leading, int stride) {
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) |
         static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 | static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 |
         uint64_t{1} << 62;
}
// The matrix `bytes`, a multiple of 16, further on. The upper word stays what it is, a constant to the compiler.
TFORMER_DEVICE uint64_t advance(uint64_t descriptor, int bytes) {
  return (descriptor >> 32 << 32) | (static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(bytes / 16));
}

// Before the first product of a batch: registers written before are seen by it. wgmma.fence.
TFORMER_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group: the warp's products since the last one. wgmma.commit_group.
TFORMER_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all groups but the kPending newest ones. Until then nobody touches the registers of their products, nor
// writes where these read; then hold() the registers. wgmma.wait_group.
template <int kPending>
TFORMER_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Holds registers at this place of the source: else the compiler may take what reads them to before a wait.
template <class X, int kRows, int kColumns>
TFORMER_DEVICE void hold(X (&x)[kRows][kColumns]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if constexpr (sizeof(X) == 4 && X(0.5f) != X(0)) {
        asm volatile("" : "+f"(x[r][c])::"memory");
      } else {
        asm volatile("" : "+r"(x[r][c])::"memory");
      }
    }
  }
}

// d (64 x kN) += a (64 x 16) b (16 x kN), T bf16 or f16, d float: d = a b without `accumulate`. Warp w of the warpgroup
// has rows 16 w to 16 w + 15 of d and a: with g = lane / 4, t = lane % 4, d[r][c] is (16 w + g + 8 r, 8 (c / 2) + 2 t +
// c % 2), and a in registers is spread as for mma_16x8x16 (Register Fragments for wgmma.m64nNk16).
//   shared(d, a, b): descriptors, K-major both: element (i, k) of a, (j, k) of the transposed b along rows in memory.
//   across(d, a, b): M-major and N-major: element (i, k) of a, (k, j) of b in row k of memory.
//   down(d, a, b): a as for shared, b as for across.
//   registers<kFirst>(d, a, b): b N-major; columns of d from kFirst on.
// wgmma.mma_async: m64nNk16, scale-d by predicate, imm-scale-a and -b 1, imm-trans-a and -b 0 or 1.
template <class T, int kN>
struct Wgmma;

#define TFORMER_D8(c)                                                                           \
  "+f"(d[0][kFirst + 2 * (c)]), "+f"(d[0][kFirst + 2 * (c) + 1]), "+f"(d[1][kFirst + 2 * (c)]), \
      "+f"(d[1][kFirst + 2 * (c) + 1])
#define TFORMER_D32(c) TFORMER_D8(c), TFORMER_D8(c + 1), TFORMER_D8(c + 2), TFORMER_D8(c + 3)
#define TFORMER_R32_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define TFORMER_R32_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TFORMER_R32_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define TFORMER_R32_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TFORMER_D_32 TFORMER_D32(0)
#define TFORMER_R_32 TFORMER_R32_0
#define TFORMER_D_64 TFORMER_D32(0), TFORMER_D32(4)
#define TFORMER_R_64 TFORMER_R32_0 ", " TFORMER_R32_1
#define TFORMER_D_80 TFORMER_D_64, TFORMER_D8(8), TFORMER_D8(9)
#define TFORMER_R_80 TFORMER_R_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define TFORMER_D_112 TFORMER_D_64, TFORMER_D32(8), TFORMER_D8(12), TFORMER_D8(13)
#define TFORMER_R_112 TFORMER_R_64 ", " TFORMER_R32_2 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define TFORMER_D_128 TFORMER_D_64, TFORMER_D32(8), TFORMER_D32(12)
#define TFORMER_R_128 TFORMER_R_64 ", " TFORMER_R32_2 ", " TFORMER_R32_3

// n0 to n5: the numbers of the operands after those of d.
// in_a, in_b: imm-trans.
#define TFORMER_WGMMA_SHARED(name, T, kN, n, n0, n1, n2, in_a, in_b)                             \
  template <int kC>                                                                              \
  static TFORMER_DEVICE void name(float (&d)[2][kC], uint64_t a, uint64_t b, bool accumulate) {  \
    static_assert(4 * kC == kN);                                                                 \
    constexpr int kFirst = 0;                                                                    \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #n2                                    \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." #T "." #T " {" TFORMER_R_##n \
                 "}, %" #n0 ", %" #n1 ", add, 1, 1, " #in_a ", " #in_b ";\n}"                    \
                 : TFORMER_D_##n                                                                 \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                           \
  }

#define TFORMER_WGMMA(T, kN, n, n0, n1, n2, n3, n4, n5)                                                            \
  template <>                                                                                                      \
  struct Wgmma<T, kN> {                                                                                            \
    TFORMER_WGMMA_SHARED(shared, T, kN, n, n0, n1, n2, 0, 0)                                                       \
    TFORMER_WGMMA_SHARED(across, T, kN, n, n0, n1, n2, 1, 1)                                                       \
    TFORMER_WGMMA_SHARED(down, T, kN, n, n0, n1, n2, 0, 1)                                                         \
    template <int kFirst, int kC>                                                                                  \
    static TFORMER_DEVICE void registers(float (&d)[2][kC], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
      static_assert(4 * (kC - kFirst) >= kN);                                                                      \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #n5                                                    \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." #T "." #T " {" TFORMER_R_##n                 \
                   "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4 ", add, 1, 1, 1;\n}"                       \
                   : TFORMER_D_##n                                                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));       \
    }                                                                                                              \
  };

TFORMER_WGMMA(bf16, 32, 32, 16, 17, 18, 19, 20, 21)
TFORMER_WGMMA(bf16, 64, 64, 32, 33, 34, 35, 36, 37)
TFORMER_WGMMA(bf16, 80, 80, 40, 41, 42, 43, 44, 45)
TFORMER_WGMMA(bf16, 112, 112, 56, 57, 58, 59, 60, 61)
TFORMER_WGMMA(bf16, 128, 128, 64, 65, 66, 67, 68, 69)
TFORMER_WGMMA(f16, 32, 32, 16, 17, 18, 19, 20, 21)
TFORMER_WGMMA(f16, 64, 64, 32, 33, 34, 35, 36, 37)
TFORMER_WGMMA(f16, 80, 80, 40, 41, 42, 43, 44, 45)
TFORMER_WGMMA(f16, 112, 112, 56, 57, 58, 59, 60, 61)
TFORMER_WGMMA(f16, 128, 128, 64, 65, 66, 67, 68, 69)

#undef TFORMER_WGMMA
#undef TFORMER_WGMMA_SHARED
#undef TFORMER_R_128
#undef TFORMER_D_128
#undef TFORMER_R_112
#undef TFORMER_D_112
#undef TFORMER_R_80
#undef TFORMER_D_80
#undef TFORMER_R_64
#undef TFORMER_D_64
#undef TFORMER_R_32
#undef TFORMER_D_32
#undef TFORMER_R32_3
#undef TFORMER_R32_2
#undef TFORMER_R32_1
#undef TFORMER_R32_0
#undef TFORMER_D32
#undef TFORMER_D8

}  // namespace tformer::gpu
