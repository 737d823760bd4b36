// One small kernel for each wrapper of gpu/device.h, so that its two implementations can be held to the same results,
// and kernels with planted faults, which the emulation has to find. Buffers are those of one warp unless said.
#include <gpu/device.h>

namespace tformer::gpu {
namespace {

struct Buffers {
  const void* in;
  const void* more;
  void* out;
  int64_t n;
};

template <class T>
TFORMER_DEVICE const T* in(const Buffers& p) {
  return static_cast<const T*>(p.in);
}
template <class T>
TFORMER_DEVICE T* out(const Buffers& p) {
  return static_cast<T*>(p.out);
}

// in (16, 16), more (16, 8), out (16, 8) float: fragments are filled by their definition.
template <class T>
struct Multiply {
  static constexpr int kThreads = 32;
  static TFORMER_DEVICE void run(const Buffers& p, char*) {
    const int g = lane() / 4, t = lane() % 4;
    const T *a = in<T>(p), *b = static_cast<const T*>(p.more);
    const auto two = [](T low, T high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; };
    uint32_t fa[4], fb[2];
    for (int r = 0; r < 4; ++r) {
      const T* from = a + (g + 8 * (r % 2)) * 16 + 2 * t + 8 * (r / 2);
      fa[r] = two(from[0], from[1]);
    }
    for (int r = 0; r < 2; ++r) fb[r] = two(b[(2 * t + 8 * r) * 8 + g], b[(2 * t + 8 * r + 1) * 8 + g]);
    float c[4];
    for (int r = 0; r < 4; ++r) c[r] = out<float>(p)[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2];
    mma_16x8x16<T>(c, fa, fb);
    for (int r = 0; r < 4; ++r) out<float>(p)[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = c[r];
  }
};

// in (16, 8), more (8, 8), out (16, 8) float.
struct MultiplyTf32 {
  static constexpr int kThreads = 32;
  static TFORMER_DEVICE void run(const Buffers& p, char*) {
    const int g = lane() / 4, t = lane() % 4;
    const float *a = in<float>(p), *b = static_cast<const float*>(p.more);
    const uint32_t fa[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                            to_tf32(a[(g + 8) * 8 + t + 4])};
    const uint32_t fb[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
    float c[4] = {};
    mma_16x8x8_tf32(c, fa, fb);
    for (int r = 0; r < 4; ++r) out<float>(p)[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = c[r];
  }
};

// in (32, 8) of 16 bits, four matrices; out (4, 32 lanes, 4 registers): x4, x4 transposed, x2, x2 transposed.
struct LoadMatrices {
  static constexpr int kThreads = 32;
  static TFORMER_DEVICE void run(const Buffers& p, char* shared) {
    copy_async_16(shared + 16 * lane(), in<char>(p) + 16 * lane());
    copy_async_commit();
    copy_async_wait<0>();
    sync_warp();
    uint32_t four[4], two[2];
    uint32_t* to = out<uint32_t>(p) + 4 * lane();
    load_matrix_x4(four, shared + 16 * lane());
    for (int r = 0; r < 4; ++r) to[r] = four[r];
    load_matrix_x4_transposed(four, shared + 16 * lane());
    for (int r = 0; r < 4; ++r) to[128 + r] = four[r];
    load_matrix_x2(two, shared + 16 * (lane() % 16));
    for (int r = 0; r < 2; ++r) to[256 + r] = two[r];
    load_matrix_x2_transposed(two, shared + 16 * (lane() % 16));
    for (int r = 0; r < 2; ++r) to[384 + r] = two[r];
  }
};

// in (32) float, more (32) double; out (6, 32) double.
struct Shuffle {
  static constexpr int kThreads = 32;
  static TFORMER_DEVICE void run(const Buffers& p, char*) {
    const float x = in<float>(p)[lane()];
    const double y = static_cast<const double*>(p.more)[lane()];
    double* to = out<double>(p) + lane();
    to[0] = shuffle_xor(x, 5);
    to[32] = shuffle_down(y, 3);
    to[64] = shuffle_index(x, 7);
    to[96] = shuffle_index(y, (lane() + 1) % kWarp);
    to[128] = ballot(x > 0);
    to[160] = any(lane() == 4) + 2 * any(lane() > kWarp);
  }
};

// Each of n blocks of 128 threads sums n * 128 floats through shared memory, in two steps of background copies.
struct BlockSum {
  static constexpr int kThreads = 128;
  static TFORMER_DEVICE void run(const Buffers& p, char* shared) {
    auto* values = reinterpret_cast<float*>(shared);
    const float* from = in<float>(p) + block_index<0>() * 2 * kThreads;
    for (int half = 0; half < 2; ++half) {
      copy_async_4(values + half * kThreads + thread_index(), from + half * kThreads + thread_index());
      copy_async_commit();
    }
    float sum = 0;
    copy_async_wait<1>();
    sync_threads_of(1 + warp() / 2, 64);  // a half of the block for itself
    for (int n = 0; n < 64; ++n) sum += values[warp() / 2 * 64 + n];
    copy_async_wait<0>();
    sync_block();
    for (int n = 0; n < kThreads; ++n) sum += values[kThreads + (thread_index() + n) % kThreads];
    out<float>(p)[block_index<0>() * kThreads + thread_index()] = sum;
  }
};

// in (n) float; out: (12, n) float of what the functions of one number give.
struct Numbers {
  static constexpr int kThreads = 64;
  static TFORMER_DEVICE void run(const Buffers& p, char*) {
    int thread = thread_index();
    forget(thread);
    const int64_t i = block_index<0>() * kThreads + thread;
    if (i >= p.n) return;
    const float* from = in<float>(p);
    forget(from);
    const float x = from[i];
    float low, high, *to = out<float>(p) + i;
    unpack_two<bf16>(pack_two<bf16>(x, -x), low, high);
    to[0] = low, to[p.n] = high;
    unpack_two<f16>(pack_two<f16>(x, -x), low, high);
    to[2 * p.n] = low, to[3 * p.n] = high;
    to[4 * p.n] = float_of_bits(to_tf32(x));
    to[5 * p.n] = exp2_fast(x);
    to[6 * p.n] = to_float(from_float<f16>(x));
    to[7 * p.n] = reciprocal_sqrt(absolute(x));
    unpack_two<bf16>(pack_two_positive<bf16>(x, -x), low, high);
    to[8 * p.n] = low, to[9 * p.n] = high;
    unpack_two<f16>(pack_two_positive<f16>(x, -x), low, high);
    to[10 * p.n] = low, to[11 * p.n] = high;
  }
};

// in, out (n) bytes: copies with every number of valid bytes, n = 16 * 17.
struct PartialCopies {
  static constexpr int kThreads = 32;
  static TFORMER_DEVICE void run(const Buffers& p, char* shared) {
    if (lane() <= 16) copy_async_16(shared + 16 * lane(), in<char>(p) + 16 * lane(), lane());
    copy_async_commit();
    copy_async_wait<0>();
    if (lane() > 16) return;
    const Bits16Bytes bits = load_16(shared + 16 * lane());
    lane() % 2 ? store_16(out<char>(p) + 16 * lane(), bits) : store_16_global(out<char>(p) + 16 * lane(), bits);
  }
};

// Planted faults. A barrier between writing and reading is missing: who comes first decides.
struct Race {
  static constexpr int kThreads = 64;
  static TFORMER_DEVICE void run(const Buffers& p, char* shared) {
    auto* values = reinterpret_cast<int*>(shared);
    values[thread_index()] = thread_index();
    if (p.n) sync_block();
    out<int>(p)[thread_index()] = values[(thread_index() + 32) % kThreads];
  }
};

// n = 0: half a warp leaves out a shuffle; 1: a warp leaves out a barrier; 2: two places; 3: it ends before.
struct Divergence {
  static constexpr int kThreads = 64;
  static TFORMER_DEVICE void run(const Buffers& p, char*) {
    int x = 0;
    if (p.n == 0 && lane() < 16) x = shuffle_xor(x, 1);
    if (p.n == 1 && warp() == 0) sync_block();
    if (p.n == 2) {
      if (lane() < 16) {
        sync_warp();
      } else {
        x = shuffle_xor(x, 1);
      }
    }
    if (p.n == 3 && thread_index() == 5) return;
    if (p.n == 3) sync_block();
    out<int>(p)[thread_index()] = x;
  }
};

// What is read before a wait, or never written, is poison. n = 0: no wait; 1: nothing written; 2: the last group is
// not closed.
struct TooEarly {
  static constexpr int kThreads = 32;
  static TFORMER_DEVICE void run(const Buffers& p, char* shared) {
    auto* values = reinterpret_cast<float*>(shared);
    if (p.n != 1) copy_async_4(values + lane(), in<float>(p) + lane());
    if (p.n == 0) copy_async_commit();
    if (p.n == 2) copy_async_wait<0>();
    out<float>(p)[lane()] = values[lane()];
  }
};

// n = 0: past the end of shared memory; 1: before it; 2: not aligned.
struct Outside {
  static constexpr int kThreads = 32;
  static TFORMER_DEVICE void run(const Buffers& p, char* shared) {
    const int64_t offset = p.n == 0 ? 512 - 8 : p.n == 1 ? -16 : 4;
    copy_async_16(shared + offset, p.in);
  }
};

// Blocks add to out (64) float one after the other, in the order of their tickets; then two int32, the turn and the
// ticket, 0 at first. The first one stores. Faults, by n. 1: nobody waits for the turn; 2: it is given before all have
// added.
struct Turns {
  static constexpr int kThreads = 64;
  static TFORMER_DEVICE void run(const Buffers& p, char* shared) {
    auto* sum = out<float>(p) + thread_index();
    auto *turn = out<int32_t>(p) + 64, *ticket = reinterpret_cast<int32_t*>(shared);
    if (thread_index() == 0) *ticket = take_ticket(turn + 1);
    sync_block();
    const int mine = *ticket;
    if (thread_index() == 0 && p.n != 1) wait_for_turn_of(turn, mine);
    sync_block();
    const float kinds[3] = {3e7f, 1.25f, -2.9e7f};
    const float x = kinds[mine % 3] + static_cast<float>(thread_index() + mine);
    if (thread_index() == 0 && p.n == 2) give_turn(turn, mine + 1);
    if (mine == 0) {
      *sum = x;
    } else {
      add_global(sum, x);
    }
    sync_block();
    if (thread_index() == 0 && p.n != 2) give_turn(turn, mine + 1);
  }
};

template <class Kernel>
Status run_kernel(const Buffers& p, int64_t blocks, size_t shared_bytes, void* stream) {
  return launch<Kernel>({blocks}, shared_bytes, {stream, 0}, p);
}

struct Named {
  const char* name;
  Status (*run)(const Buffers&, int64_t, size_t, void*);
};

constexpr Named kKernels[] = {
    {"multiply_bf16", run_kernel<Multiply<bf16>>},
    {"multiply_f16", run_kernel<Multiply<f16>>},
    {"multiply_tf32", run_kernel<MultiplyTf32>},
    {"load_matrices", run_kernel<LoadMatrices>},
    {"shuffle", run_kernel<Shuffle>},
    {"block_sum", run_kernel<BlockSum>},
    {"numbers", run_kernel<Numbers>},
    {"partial_copies", run_kernel<PartialCopies>},
    {"race", run_kernel<Race>},
    {"divergence", run_kernel<Divergence>},
    {"too_early", run_kernel<TooEarly>},
    {"outside", run_kernel<Outside>},
    {"turns", run_kernel<Turns>},
};

}  // namespace
}  // namespace tformer::gpu

// Runs the kernel of that name; -2 if there is none.
extern "C" __attribute__((visibility("default"))) int tformer_run_wrapper(const char* name, const void* in,
                                                                          const void* more, void* out, int64_t n,
                                                                          int64_t blocks, int64_t shared_bytes,
                                                                          void* stream) {
  for (const auto& kernel : tformer::gpu::kKernels) {
    const char *a = kernel.name, *b = name;
    while (*a && *a == *b) ++a, ++b;
    if (*a == *b) return kernel.run({in, more, out, n}, blocks, static_cast<size_t>(shared_bytes), stream);
  }
  return -2;
}
