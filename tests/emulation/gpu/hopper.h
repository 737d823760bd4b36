// The host's implementation of csrc/cuda/gpu/hopper.h, where each name is documented.
#pragma once

#include <gpu/device.h>
#include <gpu/tensor_map.h>

#include "../asynchronous.h"

namespace tformer::gpu {

constexpr int kWarpgroup = 4 * kWarp;

inline char* align_shared(char* shared, int alignment) {
  return shared + (-emulation::shared_address(shared) & (static_cast<uint32_t>(alignment) - 1));
}

struct alignas(8) Mbarrier {
  uint64_t opaque;
};

inline void mbarrier_init(Mbarrier* barrier, int arrivals, TFORMER_SITE) {
  emulation::init_barrier({"mbarrier_init", file, line}, barrier, arrivals);
}
inline void mbarrier_publish() {}
inline void mbarrier_arrive(Mbarrier* barrier, TFORMER_SITE) {
  emulation::arrive({"mbarrier_arrive", file, line}, barrier, 0);
}
inline void mbarrier_arrive_expect(Mbarrier* barrier, int bytes, TFORMER_SITE) {
  emulation::arrive({"mbarrier_arrive_expect", file, line}, barrier, bytes);
}
inline void mbarrier_wait(Mbarrier* barrier, int parity, TFORMER_SITE) {
  emulation::wait_for_phase({"mbarrier_wait", file, line}, barrier, parity);
}

inline void tensor_load(void* shared, const TensorMap* map, int column, int row, int head, int batch, Mbarrier* barrier,
                        TFORMER_SITE) {
  emulation::load_box({"tensor_load", file, line}, shared, map, {column, row, head, batch}, barrier);
}
inline void fence_async_proxy() {}

inline void bulk_store(void* global, const void* shared, int bytes, TFORMER_SITE) {
  emulation::send({"bulk_store", file, line}, global, shared, bytes, false);
}
inline void bulk_add(float* global, const void* shared, int bytes, TFORMER_SITE) {
  emulation::send({"bulk_add", file, line}, global, shared, bytes, true);
}
inline void bulk_commit() { emulation::commit_sent(); }
template <int kPending>
void bulk_wait_read(TFORMER_SITE) {
  emulation::wait_for_sent({"bulk_wait_read", file, line}, kPending, true);
}
template <int kPending>
void bulk_wait(TFORMER_SITE) {
  emulation::wait_for_sent({"bulk_wait", file, line}, kPending, false);
}
inline void fence_async_proxy_global() {}

inline void arrive_threads_of(int id, int count, TFORMER_SITE) {
  const emulation::Site site{"arrive_threads_of", file, line};
  if (id < 1 || id > 15 || count <= 0 || count % kWarp) emulation::fail(site, "id is 1 to 15, count whole warps");
  emulation::arrive_at_block(site, id, count);
}

template <int kCount>
void fewer_registers(TFORMER_SITE) {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
  emulation::change_registers({"fewer_registers", file, line}, kCount, false);
}
template <int kCount>
void more_registers(TFORMER_SITE) {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0);
  emulation::change_registers({"more_registers", file, line}, kCount, true);
}

inline uint64_t matrix_descriptor(const void* shared, int leading, int stride) {
  const auto field = [](int64_t bytes) { return static_cast<uint64_t>(bytes & 0x3ffff) >> 4; };
  return field(emulation::shared_address(shared)) | field(leading) << 16 | field(stride) << 32 | uint64_t{1} << 62;
}
inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + static_cast<uint64_t>(bytes / 16); }

inline void wgmma_fence(TFORMER_SITE) { emulation::fence_products({"wgmma_fence", file, line}); }
inline void wgmma_commit(TFORMER_SITE) { emulation::commit_products({"wgmma_commit", file, line}); }
template <int kPending>
void wgmma_wait(TFORMER_SITE) {
  emulation::wait_for_products({"wgmma_wait", file, line}, kPending);
}
template <class X, int kRows, int kColumns>
void hold(X (&)[kRows][kColumns]) {}

template <class T, int kN>
struct Wgmma {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);

  template <int kC>
  static void shared(float (&d)[2][kC], uint64_t a, uint64_t b, bool accumulate, TFORMER_SITE) {
    static_assert(4 * kC == kN);
    emulation::start_product({"Wgmma::shared", file, line},
                             {{d[0], d[1]}, nullptr, a, b, kN, accumulate, false, false, &wide});
  }
  template <int kC>
  static void across(float (&d)[2][kC], uint64_t a, uint64_t b, bool accumulate, TFORMER_SITE) {
    static_assert(4 * kC == kN);
    emulation::start_product({"Wgmma::across", file, line},
                             {{d[0], d[1]}, nullptr, a, b, kN, accumulate, true, true, &wide});
  }
  template <int kC>
  static void down(float (&d)[2][kC], uint64_t a, uint64_t b, bool accumulate, TFORMER_SITE) {
    static_assert(4 * kC == kN);
    emulation::start_product({"Wgmma::down", file, line},
                             {{d[0], d[1]}, nullptr, a, b, kN, accumulate, false, true, &wide});
  }
  template <int kFirst, int kC>
  static void registers(float (&d)[2][kC], const uint32_t (&a)[4], uint64_t b, bool accumulate, TFORMER_SITE) {
    static_assert(4 * (kC - kFirst) >= kN);
    emulation::start_product({"Wgmma::registers", file, line},
                             {{d[0] + kFirst, d[1] + kFirst}, a, 0, b, kN, accumulate, false, true, &wide});
  }

 private:
  static float wide(uint16_t bits) { return emulation::wide(T{bits}); }
};

}  // namespace tformer::gpu
