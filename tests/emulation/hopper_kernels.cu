// As wrapper_kernels.cu, for the wrappers of gpu/hopper.h.
#include <gpu/hopper.h>

namespace tformer::gpu {
namespace {

struct MappedBuffers {
  TensorMap in, more;
  void* out;
  int64_t n;
};

// Shared memory: two operands of up to 256 rows of 128 bytes in up to 4 boxes, then barriers.
constexpr int kOperandBytes = 64 << 10;
constexpr size_t kSharedBytes = 1024 + 2 * kOperandBytes + 64;

struct Operands {
  char *a, *b;
  Mbarrier* barriers;

  TFORMER_DEVICE explicit Operands(char* shared)
      : a(align_shared(shared, 1024)), b(a + kOperandBytes), barriers(reinterpret_cast<Mbarrier*>(b + kOperandBytes)) {}
  TFORMER_DEVICE void init(int count, int arrivals) const {
    if (thread_index() == 0) {
      for (int n = 0; n < count; ++n) mbarrier_init(&barriers[n], arrivals);
      mbarrier_publish();
    }
    sync_block();
  }
  // `boxes` boxes of `rows` rows next to each other.
  TFORMER_DEVICE void load(char* to, const TensorMap& map, int boxes, int rows) const {
    if (thread_index() == 0) {
      mbarrier_arrive_expect(&barriers[0], boxes * rows * kBoxRowBytes);
      for (int n = 0; n < boxes; ++n) {
        tensor_load(to + n * rows * kBoxRowBytes, &map, n * kBoxColumns, 0, 0, 0, &barriers[0]);
      }
    }
  }
};

// in (2, 3, 70, 72) in boxes of 32 rows; out: shared memory after the copies of rows 50 to 81, columns 0 to 127.
struct Boxes {
  static constexpr int kThreads = 128;
  static TFORMER_DEVICE void run(const MappedBuffers& p, char* shared) {
    const Operands at(shared);
    at.init(1, 1);
    constexpr int kBytes = 32 * kBoxRowBytes;
    if (thread_index() == 64) {
      mbarrier_arrive_expect(&at.barriers[0], 2 * kBytes);
      for (int n = 0; n < 2; ++n) tensor_load(at.a + n * kBytes, &p.in, 64 * n, 50, 2, 1, &at.barriers[0]);
    }
    mbarrier_wait(&at.barriers[0], 0);
    for (int n = 16 * thread_index(); n < 2 * kBytes; n += 16 * kThreads) {
      store_16(static_cast<char*>(p.out) + n, load_16(at.a + n));
    }
  }
};

template <int kN>
TFORMER_DEVICE float* out_at(const MappedBuffers& p, int r, int c) {
  const int row = 16 * warp() + lane() / 4 + 8 * r, column = c / 2 * 8 + 2 * (lane() % 4) + c % 2;
  return static_cast<float*>(p.out) + row * kN + column;
}

// d, when its product is made, to out.
template <int kN>
TFORMER_DEVICE void finish_product(const MappedBuffers& p, float (&d)[2][kN / 4]) {
  wgmma_commit();
  wgmma_wait<0>();
  hold(d);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int c = 0; c < kN / 4; ++c) *out_at<kN>(p, r, c) = d[r][c];
  }
}

// out (64, kN) float += in (64, 64) more (kN, 64) transposed; without the sum before where n is 1. Both in one box.
template <class T, int kN>
struct MultiplyShared {
  static constexpr int kThreads = 128;
  static TFORMER_DEVICE void run(const MappedBuffers& p, char* shared) {
    const Operands at(shared);
    at.init(1, 2);
    at.load(at.a, p.in, 1, 64);
    at.load(at.b, p.more, 1, kN);
    float d[2][kN / 4];
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kN / 4; ++c) d[r][c] = *out_at<kN>(p, r, c);
    }
    mbarrier_wait(&at.barriers[0], 0);
    hold(d);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      Wgmma<T, kN>::shared(d, matrix_descriptor(at.a + 32 * k, 16, 1024), matrix_descriptor(at.b + 32 * k, 16, 1024),
                           k > 0 || p.n != 1);
    }
    finish_product<kN>(p, d);
  }
};

// out (64, kN) = in (64, 64), transposed if kAcross, times more (64, kN), in boxes of 64 columns.
template <class T, int kN, bool kAcross>
struct MultiplyDown {
  static constexpr int kThreads = 128;
  static TFORMER_DEVICE void run(const MappedBuffers& p, char* shared) {
    const Operands at(shared);
    at.init(1, 2);
    at.load(at.a, p.in, 1, 64);
    at.load(at.b, p.more, kN / kBoxColumns, 64);
    float d[2][kN / 4];
    mbarrier_wait(&at.barriers[0], 0);
    const uint64_t a = matrix_descriptor(at.a, 64 * kBoxRowBytes, 1024);
    const uint64_t b = matrix_descriptor(at.b, 64 * kBoxRowBytes, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int from = 16 * k * kBoxRowBytes;
      if constexpr (kAcross) {
        Wgmma<T, kN>::across(d, advance(a, from), advance(b, from), k > 0);
      } else {
        Wgmma<T, kN>::down(d, advance(a, 32 * k), advance(b, from), k > 0);
      }
    }
    finish_product<kN>(p, d);
  }
};

// Blocks add to out (64) float one after the other, in the order of their tickets; then two int32, the turn and the
// ticket, 0 at first. The first one stores. Faults, by n. 1: nobody waits for the turn; 2: the turn is given before the
// sums are there; 3: the next sums come before the last ones were read.
struct Chain {
  static constexpr int kThreads = 32, kBlocks = 12;
  static TFORMER_DEVICE void run(const MappedBuffers& p, char* shared) {
    auto* values = reinterpret_cast<float*>(shared);
    auto* sums = static_cast<float*>(p.out);
    auto* turn = static_cast<int32_t*>(p.out) + 64;
    const int ticket = shuffle_index(lane() == 0 ? take_ticket(turn + 1) : 0, 0);
    const float kinds[3] = {3e7f, 1.25f, -2.9e7f};
    for (int n = lane(); n < 64; n += kThreads) values[n] = kinds[ticket % 3] + static_cast<float>(n + ticket);
    fence_async_proxy();
    sync_warp();
    if (lane() == 0) {
      if (p.n != 1) wait_for_turn_of(turn, ticket);
      fence_async_proxy_global();
      if (ticket == 0) {
        bulk_store(sums, values, 256);
      } else {
        bulk_add(sums, values, 256);
      }
      bulk_commit();
      if (p.n != 3) bulk_wait_read<0>();
      values[7] = 1;
      if (p.n != 2) bulk_wait<0>();
      fence_async_proxy_global();
      give_turn(turn, ticket + 1);
      bulk_wait<0>();
    }
    sync_warp();
  }
};

// out (64, kHalves kN) = x more (32, kHalves kN), where x is (64, 32) with x[i][k] = 1 if k = i % 32, else 2 where
// k = 0: more in boxes of 64 columns.
template <class T, int kN, int kHalves>
struct MultiplyRegisters {
  static constexpr int kThreads = 128, kColumns = kN * kHalves, kBoxes = kColumns / kBoxColumns;
  static TFORMER_DEVICE void run(const MappedBuffers& p, char* shared) {
    const Operands at(shared);
    at.init(1, 1);
    at.load(at.b, p.more, kBoxes, 32);
    uint32_t a[2][4];
    const auto x = [](int i, int k) { return k == i % 32 ? 1.0f : k == 0 ? 2.0f : 0.0f; };
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = 16 * warp() + lane() / 4 + 8 * (r % 2), column = 16 * k + 2 * (lane() % 4) + 8 * (r / 2);
        a[k][r] = pack_two<T>(x(row, column), x(row, column + 1));
      }
    }
    float d[2][kColumns / 4];
    mbarrier_wait(&at.barriers[0], 0);
    const uint64_t b = matrix_descriptor(at.b, 32 * kBoxRowBytes, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint64_t from = advance(b, 16 * k * kBoxRowBytes);
      Wgmma<T, kN>::template registers<0>(d, a[k], from, k > 0);
      if constexpr (kHalves == 2) {
        const uint64_t right = advance(from, kBoxes / 2 * 32 * kBoxRowBytes);
        Wgmma<T, kN>::template registers<kN / 4>(d, a[k], right, k > 0);
      }
    }
    finish_product<kColumns>(p, d);
    hold(a);
  }
};

// One warp fetches the boxes of 8 rows of in (1, 1, n, 64) through two buffers, two warpgroups add them up: out (256
// threads) int32, each the sum over its column of 16 bits and over the rows.
struct Ring {
  static constexpr int kThreads = 384, kBytes = 8 * kBoxRowBytes;
  static TFORMER_DEVICE void run(const MappedBuffers& p, char* shared) {
    const Operands at(shared);
    Mbarrier *full = at.barriers, *empty = at.barriers + 2;
    if (thread_index() == 0) {
      for (int n = 0; n < 2; ++n) mbarrier_init(&full[n], 1), mbarrier_init(&empty[n], 8);
      mbarrier_publish();
    }
    sync_block();
    const int boxes = static_cast<int>(p.n) / 8;
    if (thread_index() < kWarpgroup) {
      fewer_registers<24>();
      if (warp() != 0) return;
      for (int n = 0; n < boxes; ++n) {
        mbarrier_wait(&empty[n & 1], n >> 1 & 1 ^ 1);
        if (lane() == 0) {
          mbarrier_arrive_expect(&full[n & 1], kBytes);
          tensor_load(at.a + (n & 1) * kBytes, &p.in, 0, 8 * n, 0, 0, &full[n & 1]);
        }
        sync_warp();
      }
      return;
    }
    more_registers<240>();
    const int group = thread_index() / kWarpgroup - 1;
    int sum = 0;
    if (group == 1) arrive_threads_of(1, 2 * kWarpgroup);
    for (int n = 0; n < boxes; ++n) {
      mbarrier_wait(&full[n & 1], n >> 1 & 1);
      sync_threads_of(1 + group, 2 * kWarpgroup);  // in turn
      const auto* rows = reinterpret_cast<const uint16_t*>(at.a + (n & 1) * kBytes);
      for (int row = 0; row < 8; ++row) sum += rows[64 * row + (thread_index() % 64 ^ 8 * row)];
      if (group == 0 || n + 1 < boxes) arrive_threads_of(2 - group, 2 * kWarpgroup);
      sync_warp();
      if (lane() == 0) mbarrier_arrive(&empty[n & 1]);
    }
    static_cast<int*>(p.out)[thread_index() - kWarpgroup] = sum;
  }
};

// Planted faults, by n. 0: nobody waits for the copies; 1: the next copy comes while a product reads; 2: a register is
// read, 3: written, while products add to it; 4: no wgmma_fence; 5: fewer bytes come than were announced; 6: a box at
// no multiple of 1024; 8: a left operand's register is written too early; 9: one warp makes another product; 10: the
// block ends with a copy on its way; 11: more arrivals than a phase has; 12: one warp waits elsewhere.
struct Faults {
  static constexpr int kThreads = 128;
  static TFORMER_DEVICE void run(const MappedBuffers& p, char* shared) {
    const int fault = static_cast<int>(p.n);
    const Operands at(shared);
    at.init(2, fault == 11 ? 1 : fault == 5 ? 3 : 2);
    if (fault == 6) at.load(at.a + 512, p.in, 1, 64);
    at.load(at.a, p.in, 1, 64);
    at.load(at.b, p.more, 1, 64);
    if (fault == 11) mbarrier_arrive(&at.barriers[1]), mbarrier_arrive(&at.barriers[1]);
    if (fault == 5 && thread_index() == 0) mbarrier_arrive_expect(&at.barriers[0], 16);
    if (fault == 10) return;
    if (fault != 0) mbarrier_wait(&at.barriers[0], 0);
    float d[2][16] = {};
    uint32_t a[4] = {};
    if (fault != 4) wgmma_fence();
    const uint64_t rows = matrix_descriptor(at.a, 16, 1024), columns = matrix_descriptor(at.b, 8192, 1024);
    if (fault == 8) {
      Wgmma<bf16, 64>::registers<0>(d, a, columns, true);
      a[1] = 7;
    } else {
      Wgmma<bf16, 64>::shared(d, fault == 9 && warp() == 2 ? advance(rows, 32) : rows, rows, true);
    }
    wgmma_commit();
    if (fault == 1 && thread_index() == 0) {
      mbarrier_arrive_expect(&at.barriers[1], 64 * kBoxRowBytes);
      tensor_load(at.a, &p.more, 0, 0, 0, 0, &at.barriers[1]);
    }
    sync_block();
    float seen = 0;
    if (fault == 2) seen = d[0][3];
    if (fault == 3) d[1][2] = 1;
    if (fault == 12 && warp() == 1) wgmma_wait<0>();
    wgmma_wait<0>();
    if (fault != 2) seen = d[0][3];
    static_cast<float*>(p.out)[thread_index()] = seen;
  }
};

// 512 registers a lane, as many as a multiprocessor has for 384 threads; the block has 504, which it was launched with.
struct TooManyRegisters {
  static constexpr int kThreads = 384;
  static TFORMER_DEVICE void run(const MappedBuffers& p, char*) {
    if (thread_index() < kWarpgroup) {
      fewer_registers<32>();
    } else {
      more_registers<240>();
    }
    static_cast<float*>(p.out)[thread_index() % kWarpgroup] = 1;
  }
};

template <class Kernel, int kBlocks = 1>
Status run_mapped(const MappedBuffers& p, void* stream) {
  return launch<Kernel>({kBlocks}, kSharedBytes, {stream, 0}, p);
}

struct Named {
  const char* name;
  Status (*run)(const MappedBuffers&, void*);
};

constexpr Named kKernels[] = {
    {"boxes", run_mapped<Boxes>},
    {"shared_bf16_32", run_mapped<MultiplyShared<bf16, 32>>},
    {"shared_bf16_64", run_mapped<MultiplyShared<bf16, 64>>},
    {"shared_bf16_80", run_mapped<MultiplyShared<bf16, 80>>},
    {"shared_bf16_112", run_mapped<MultiplyShared<bf16, 112>>},
    {"shared_f16_128", run_mapped<MultiplyShared<f16, 128>>},
    {"across_bf16_64", run_mapped<MultiplyDown<bf16, 64, true>>},
    {"across_bf16_128", run_mapped<MultiplyDown<bf16, 128, true>>},
    {"across_f16_128", run_mapped<MultiplyDown<f16, 128, true>>},
    {"down_bf16_64", run_mapped<MultiplyDown<bf16, 64, false>>},
    {"down_bf16_128", run_mapped<MultiplyDown<bf16, 128, false>>},
    {"down_f16_128", run_mapped<MultiplyDown<f16, 128, false>>},
    {"registers_bf16_64", run_mapped<MultiplyRegisters<bf16, 64, 1>>},
    {"registers_f16_128", run_mapped<MultiplyRegisters<f16, 128, 1>>},
    {"registers_bf16_256", run_mapped<MultiplyRegisters<bf16, 128, 2>>},
    {"ring", run_mapped<Ring>},
    {"chain", run_mapped<Chain, Chain::kBlocks>},
    {"faults", run_mapped<Faults>},
    {"too_many_registers", run_mapped<TooManyRegisters>},
};

}  // namespace
}  // namespace tformer::gpu

// Runs the kernel of that name; -2 if there is none. in and more: 16-bit tensors, contiguous, four sizes each from the
// innermost on, seen in boxes of so many rows.
extern "C" __attribute__((visibility("default"))) int tformer_run_hopper_wrapper(
    const char* name, const void* in, const int64_t* in_sizes, int64_t in_rows, const void* more,
    const int64_t* more_sizes, int64_t more_rows, void* out, int64_t n, void* stream) {
  using namespace tformer::gpu;
  const auto map = [](TensorMap& to, const void* data, const int64_t* s, int64_t rows) {
    const int64_t strides[3] = {s[0], s[0] * s[1], s[0] * s[1] * s[2]};
    return encode_tensor_map(to, data, {s[0], s[1], s[2], s[3]}, strides, static_cast<int>(rows));
  };
  MappedBuffers p{{}, {}, out, n};
  Status status = map(p.in, in, in_sizes, in_rows);
  if (status == kSuccess) status = map(p.more, more, more_sizes, more_rows);
  if (status != kSuccess) return status;
  for (const auto& kernel : kKernels) {
    const char *a = kernel.name, *b = name;
    while (*a && *a == *b) ++a, ++b;
    if (*a == *b) return kernel.run(p, stream);
  }
  return -2;
}
