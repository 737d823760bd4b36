// The host's implementation of csrc/cuda/gpu/device.h, where each name is documented. Wrappers whose threads must do
// something together, or whose addresses can be wrong, know where they were called: TFORMER_SITE.
#pragma once

#include <gpu/launch.h>
#include <gpu/types.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../emulator.h"
#include "../numbers.h"

#define TFORMER_DEVICE inline
#define TFORMER_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace tformer::gpu {

// ---- Who runs. ----

inline int thread_index() { return emulation::running.thread; }
inline int lane() { return thread_index() % kWarp; }
inline int warp() { return thread_index() / kWarp; }

template <int kDim>
int64_t block_index() {
  return emulation::running.block[kDim];
}
template <int kDim>
int64_t block_count() {
  return emulation::running.blocks[kDim];
}

inline void forget(int&) {}
template <class T>
void forget(T*&) {}

// ---- Barriers. ----

inline void sync_block(TFORMER_SITE) { emulation::meet_block({"sync_block", file, line}, 0, 0); }
inline void sync_warp(TFORMER_SITE) {
  emulation::meet_warp({"sync_warp", file, line}, nullptr, [](void* const(&)[kWarp]) {});
}
inline void sync_threads_of(int id, int count, TFORMER_SITE) {
  const emulation::Site site{"sync_threads_of", file, line};
  if (id < 1 || id > 15 || count <= 0 || count % kWarp) emulation::fail(site, "id is 1 to 15, count whole warps");
  emulation::meet_block(site, id, count);
}

// ---- Between the lanes of a warp. ----

namespace emulation {

template <class T>
struct Shuffled {
  T value;
  int source;
  T result;
};

template <class T>
T shuffle(const Site& site, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as in CUDA");
  Shuffled<T> mine{value, source, value};
  meet_warp(site, &mine, [](void* const(&operands)[kWarp]) {
    for (void* operand : operands) {
      auto& to = *static_cast<Shuffled<T>*>(operand);
      to.result = static_cast<Shuffled<T>*>(operands[to.source])->value;
    }
  });
  return mine.result;
}

}  // namespace emulation

template <class T>
T shuffle_xor(T value, int mask, TFORMER_SITE) {
  return emulation::shuffle({"shuffle_xor", file, line}, value, (lane() ^ mask) % kWarp);
}
template <class T>
T shuffle_down(T value, int delta, TFORMER_SITE) {
  const int source = lane() + delta;
  return emulation::shuffle({"shuffle_down", file, line}, value, source < kWarp ? source : lane());
}
template <class T>
T shuffle_index(T value, int source_lane, TFORMER_SITE) {
  return emulation::shuffle({"shuffle_index", file, line}, value, source_lane & (kWarp - 1));
}
inline uint32_t ballot(bool value, TFORMER_SITE) {
  struct Vote {
    bool value;
    uint32_t result;
  } mine{value, 0};
  emulation::meet_warp({"ballot", file, line}, &mine, [](void* const(&operands)[kWarp]) {
    uint32_t votes = 0;
    for (int n = 0; n < kWarp; ++n) votes |= static_cast<uint32_t>(static_cast<Vote*>(operands[n])->value) << n;
    for (void* operand : operands) static_cast<Vote*>(operand)->result = votes;
  });
  return mine.result;
}
inline bool any(bool value, TFORMER_SITE) { return ballot(value, file, line) != 0; }

// ---- Memory. ----

inline Bits16Bytes load_16(const void* from, TFORMER_SITE) {
  emulation::check_aligned({"load_16", file, line}, from, 16);
  return emulation::same_bits<Bits16Bytes>(from);
}
inline void store_16(void* to, const Bits16Bytes& v, TFORMER_SITE) {
  emulation::check_aligned({"store_16", file, line}, to, 16);
  std::memcpy(to, &v, sizeof v);
}
inline void store_16_global(void* to, const Bits16Bytes& v, TFORMER_SITE) {
  emulation::check_aligned({"store_16_global", file, line}, to, 16);
  std::memcpy(to, &v, sizeof v);
}

inline void copy_async_16(void* shared, const void* global, int valid_bytes = 16, TFORMER_SITE) {
  emulation::copy_async({"copy_async_16", file, line}, shared, global, 16, valid_bytes);
}
inline void copy_async_4(void* shared, const void* global, int valid_bytes = 4, TFORMER_SITE) {
  emulation::copy_async({"copy_async_4", file, line}, shared, global, 4, valid_bytes);
}
inline void copy_async_commit() { emulation::commit_copies(); }
template <int kPending>
void copy_async_wait() {
  emulation::wait_for_copies(kPending);
}

// ---- Between blocks. ----

inline int32_t take_ticket(int32_t* counter) { return (*counter)++; }
inline void wait_for_turn_of(const int32_t* turn, int32_t value, TFORMER_SITE) {
  emulation::wait_for_value({"wait_for_turn_of", file, line}, turn, value);
}
inline void give_turn(int32_t* turn, int32_t value, TFORMER_SITE) {
  emulation::publish_value({"give_turn", file, line}, turn, value);
}
inline void add_global(float* sum, float x) { *sum += x; }

// ---- Matrices. ----

namespace emulation {

struct MatrixRow {
  const void* row;
  uint32_t out[4];
};

// (row, column) of the element that lane n holds first, and of the one it holds second, in each 8 x 8 matrix.
template <int kMatrices, bool kTransposed>
void load_matrices(void* const (&operands)[kWarp]) {
  for (int n = 0; n < kWarp; ++n) {
    for (int m = 0; m < kMatrices; ++m) {
      uint16_t two[2];
      for (int e = 0; e < 2; ++e) {
        const int row = kTransposed ? 2 * (n % 4) + e : n / 4, column = kTransposed ? n / 4 : 2 * (n % 4) + e;
        const auto* from = static_cast<const char*>(static_cast<MatrixRow*>(operands[8 * m + row])->row);
        std::memcpy(&two[e], from + 2 * column, 2);
      }
      static_cast<MatrixRow*>(operands[n])->out[m] = two[0] | static_cast<uint32_t>(two[1]) << 16;
    }
  }
}

template <int kMatrices, bool kTransposed>
void load_matrix(const Site& site, uint32_t (&out)[kMatrices], const void* row) {
  if (lane() < 8 * kMatrices) check_shared(site, row, 16, 16);
  MatrixRow mine{row, {}};
  meet_warp(site, &mine, &load_matrices<kMatrices, kTransposed>);
  for (int m = 0; m < kMatrices; ++m) out[m] = mine.out[m];
}

}  // namespace emulation

inline void load_matrix_x4(uint32_t (&out)[4], const void* row, TFORMER_SITE) {
  emulation::load_matrix<4, false>({"load_matrix_x4", file, line}, out, row);
}
inline void load_matrix_x2(uint32_t (&out)[2], const void* row, TFORMER_SITE) {
  emulation::load_matrix<2, false>({"load_matrix_x2", file, line}, out, row);
}
inline void load_matrix_x4_transposed(uint32_t (&out)[4], const void* row, TFORMER_SITE) {
  emulation::load_matrix<4, true>({"load_matrix_x4_transposed", file, line}, out, row);
}
inline void load_matrix_x2_transposed(uint32_t (&out)[2], const void* row, TFORMER_SITE) {
  emulation::load_matrix<2, true>({"load_matrix_x2_transposed", file, line}, out, row);
}

namespace emulation {

struct Fragments {
  float* c;
  const uint32_t *a, *b;
};

inline float cut_to_float(float x) { return x; }
// Tensor cores add up and cut off: towards zero. Kernels that sum float's digits have to live with it.
inline float cut_to_float(double x) {
  const float near = static_cast<float>(x);
  return std::isfinite(near) && std::fabs(near) > std::fabs(x) ? std::nextafter(near, 0.0f) : near;
}

// Halves: element(bits, which half) as a float. The operands of the whole warp become matrices, are multiplied in
// float, which holds every product exactly, and become fragments again. Sum: the type of the sums in between.
template <int kDepth, class Sum, class Element>
void multiply(void* const (&operands)[kWarp], Element&& element) {
  constexpr int kPairs = kDepth / 8;  // elements of a register
  float a[16][kDepth], b[kDepth][8];
  Sum c[16][8];
  for (int n = 0; n < kWarp; ++n) {
    const auto& mine = *static_cast<Fragments*>(operands[n]);
    const int g = n / 4, t = n % 4;
    for (int e = 0; e < kPairs; ++e) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][kPairs * t + e + kDepth / 2 * (r / 2)] = element(mine.a[r], e);
      for (int r = 0; r < 2; ++r) b[kPairs * t + e + kDepth / 2 * r][g] = element(mine.b[r], e);
    }
    for (int r = 0; r < 4; ++r) c[g + 8 * (r / 2)][2 * t + r % 2] = mine.c[r];
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int n = 0; n < kWarp; ++n) {
    const auto& mine = *static_cast<Fragments*>(operands[n]);
    for (int r = 0; r < 4; ++r) mine.c[r] = cut_to_float(c[n / 4 + 8 * (r / 2)][2 * (n % 4) + r % 2]);
  }
}

template <class T>
void multiply_16(void* const (&operands)[kWarp]) {
  multiply<16, float>(operands,
                      [](uint32_t bits, int half) { return wide(T{static_cast<uint16_t>(half ? bits >> 16 : bits)}); });
}

}  // namespace emulation

template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], TFORMER_SITE) {
  emulation::Fragments mine{c, a, b};
  emulation::meet_warp({"mma_16x8x16", file, line}, &mine, &emulation::multiply_16<T>);
}
inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], TFORMER_SITE) {
  emulation::Fragments mine{c, a, b};
  emulation::meet_warp({"mma_16x8x8_tf32", file, line}, &mine, [](void* const(&operands)[kWarp]) {
    constexpr uint32_t kRead = ~0u << 13;
    emulation::multiply<8, double>(operands, [](uint32_t bits, int) { return emulation::float_of(bits & kRead); });
  });
}

// ---- Numbers. ----

inline uint32_t bits_of(float x) { return emulation::same_bits<uint32_t>(&x); }
inline float float_of_bits(uint32_t bits) { return emulation::float_of(bits); }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return emulation::wide(x); }
inline float to_float(f16 x) { return emulation::wide(x); }
inline uint32_t to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  return std::isfinite(x) ? (bits + 0x1000) & (~0u << 13) : bits;
}

template <class T>
T from_float(float x) {
  return emulation::narrow<T>(x);
}
template <>
inline float from_float<float>(float x) {
  return x;
}
template <class T>
uint32_t pack_two(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
uint32_t pack_two_positive(float low, float high) {
  return pack_two<T>(low < 0 ? 0.0f : low, high < 0 ? 0.0f : high);
}
template <class T>
void unpack_two(uint32_t bits, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(bits)});
  high = to_float(T{static_cast<uint16_t>(bits >> 16)});
}

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma(double a, double b, double c) { return std::fma(a, b, c); }
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float exp2(float x) { return std::exp2(x); }
inline double exp2(double x) { return std::exp2(x); }
inline float exp(float x) { return std::exp(x); }
inline double exp(double x) { return std::exp(x); }
inline float log2(float x) { return std::log2(x); }
inline double log2(double x) { return std::log2(x); }
inline float log(float x) { return std::log(x); }
inline double log(double x) { return std::log(x); }
inline float tanh(float x) { return std::tanh(x); }
inline double tanh(double x) { return std::tanh(x); }
inline float reciprocal_sqrt(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double reciprocal_sqrt(double x) { return 1.0 / std::sqrt(x); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline double maximum(double a, double b) { return std::fmax(a, b); }
inline float absolute(float x) { return std::fabs(x); }
inline double absolute(double x) { return std::fabs(x); }
inline bool is_finite(float x) { return std::isfinite(x); }
inline bool is_finite(double x) { return std::isfinite(x); }

// ---- Launching. ----

template <class Kernel, class Params>
Status launch(Grid grid, size_t shared_bytes, Stream, const Params& params) {
  static_assert(Kernel::kThreads % kWarp == 0 && Kernel::kThreads > 0 && Kernel::kThreads <= 1024);
  static_assert(sizeof(Params) <= 4096);
  const auto body = [](const void* p, char* shared) { Kernel::run(*static_cast<const Params*>(p), shared); };
  return emulation::run(body, &params, grid, Kernel::kThreads, shared_bytes);
}

}  // namespace tformer::gpu
