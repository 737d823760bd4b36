#include "asynchronous.h"

#include <algorithm>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <unordered_map>

namespace tformer::gpu::emulation {
namespace {

constexpr int kRegisters = 65536;                      // of a multiprocessor
constexpr int kColumns = kBoxColumns;                  // of a box
constexpr uint64_t kBarrierMark = 0x6d62617272696572;  // what a barrier's bytes hold
constexpr int64_t kMostBytes = (1 << 20) - 1;          // that a barrier counts

// ---- Barriers. ----

struct Phases {
  int arrivals, missing;
  int64_t bytes;
  int phase;
  Sleepers sleepers;
};

// ---- Copies. ----

struct Box {
  char* shared;
  MapFields map;
  int at[4];
  void* barrier;
};

// A copy out of shared memory: it reads its source at some step, and writes at a later one.
struct Sent {
  Site site;
  char* global;
  char* shared;
  bool add;
  std::vector<char> bytes;  // as they were when it was asked for
  bool was_read = false, was_written = false;
};

// A thread's copies out of shared memory in groups, oldest first; the last one is open.
struct SentGroups {
  std::deque<std::vector<std::shared_ptr<Sent>>> groups{1};
};

// ---- Products. ----

// The accumulator of one product shape: 16 rows of a warp, in the registers of its lanes.
struct Accumulator {
  int n;
  float* lanes[kWarp][2];
  std::vector<float> values;  // (16, n)
  int running = 0;            // products that add to it
};

struct Product {
  Site site;
  std::shared_ptr<Accumulator> d;
  ProductLane lanes[kWarp];
  int warp;
  std::vector<uint16_t> a, b;  // as they lay when it began
};

struct WarpProducts {
  std::deque<std::vector<Product>> groups;  // oldest first; the last one is open
  std::map<float*, std::shared_ptr<Accumulator>> accumulators;
  bool fenced = false;
  uint64_t history = 0;  // of what the whole warpgroup has to do alike
  int registers = 0, wanted = 0;
};

}  // namespace

struct Asynchronous {
  std::unordered_map<void*, Phases> barriers;
  std::vector<Box> boxes;
  std::vector<std::shared_ptr<Sent>> sent;  // not yet written
  std::map<int, SentGroups> groups;         // of a thread
  Sleepers for_sent;
  std::vector<WarpProducts> warps;
  int free_registers;
  Sleepers for_registers;
};

namespace {

Asynchronous* used = nullptr;
int64_t moved = 0;

WarpProducts& own() { return used->warps[static_cast<size_t>(running.thread / kWarp)]; }

void remember(uint64_t what) {
  uint64_t& history = own().history;
  history = (history ^ what) * 0x9e3779b97f4a7c15 + (history >> 29);
}

Phases& phases_of(const Site& site, void* barrier) {
  check_shared(site, barrier, 8, 8);
  const auto found = used->barriers.find(barrier);
  if (found == used->barriers.end()) fail(site, "there is no barrier, or not yet");
  if (same_bits<uint64_t>(barrier) != kBarrierMark) fail(site, "something else was written where the barrier is");
  return found->second;
}

// Ends the phase if nothing is missing.
void look(Phases& phases) {
  if (phases.missing || phases.bytes) return;
  ++phases.phase;
  phases.missing = phases.arrivals;
  wake(phases.sleepers);
}

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ---- The operands of products: where an element is. Canonical Layouts with the 128-byte swizzle. ----

struct Matrix {
  uint32_t begin, leading, stride;

  Matrix(const Site& site, uint64_t descriptor)
      : begin(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) fail(site, "the descriptor's swizzle is not that of 128 bytes");
    if (descriptor >> 49 & 7) fail(site, "the descriptor has a base offset");
    if ((begin & 0x380) != 0) fail(site, "the matrix does not begin with the first of 8 rows");
  }
  // Row i, column k < 16; rows along memory.
  uint32_t by_rows(int i, int k) const {
    return swizzled(begin + static_cast<uint32_t>(i / 8) * stride +
                    static_cast<uint32_t>(i % 8 * kBoxRowBytes + 2 * k));
  }
  // Row k < 16, column j; rows of 64 columns along memory.
  uint32_t by_columns(int k, int j) const {
    return swizzled(begin + static_cast<uint32_t>(j / kColumns) * leading + static_cast<uint32_t>(k / 8) * stride +
                    static_cast<uint32_t>(k % 8 * kBoxRowBytes + 2 * (j % kColumns)));
  }
};

// 8 elements next to each other, which the swizzle keeps together.
void read_eight(const Site& site, uint32_t address, uint16_t* to) {
  const char* at = shared_at(address);
  check_shared(site, at, 16, 16);
  std::memcpy(to, at, 16);
}

// rows x 16 from `row0` on, or 16 x rows, as they lie: `across` tells which.
void read_matrix(const Site& site, const Matrix& matrix, bool across, int row0, int rows, uint16_t* to) {
  for (int n = 0; n < rows * 2; ++n) {
    const uint32_t at =
        across ? matrix.by_columns(n / (rows / 8), row0 + n % (rows / 8) * 8) : matrix.by_rows(row0 + n / 2, n % 2 * 8);
    read_eight(site, at, to + 8 * n);
  }
}

// a as the warp's lanes hold it, or out of shared memory; b.
void read_operands(const Product& p, std::vector<uint16_t>& a, std::vector<uint16_t>& b) {
  const ProductLane& first = p.lanes[0];
  a.resize(16 * 16), b.resize(static_cast<size_t>(16 * first.n));
  if (first.a) {
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + 8 * (r % 2), column = 2 * (lane % 4) + 8 * (r / 2);
        for (int e = 0; e < 2; ++e) {
          a[static_cast<size_t>(16 * row + column + e)] = static_cast<uint16_t>(p.lanes[lane].a[r] >> 16 * e);
        }
      }
    }
  } else {
    read_matrix(p.site, Matrix(p.site, first.rows), first.a_across, 16 * (p.warp % 4), 16, a.data());
  }
  read_matrix(p.site, Matrix(p.site, first.columns), first.b_across, 0, first.n, b.data());
}

// f(a lane's register, the element of the accumulator that it holds).
template <class F>
void for_registers_of(Accumulator& d, F&& f) {
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int r = 0; r < 2; ++r) {
      for (int c = 0; c < d.n / 4; ++c) {
        const int row = lane / 4 + 8 * r, column = c / 2 * 8 + 2 * (lane % 4) + c % 2;
        f(d.lanes[lane][r][c], d.values[static_cast<size_t>(row * d.n + column)]);
      }
    }
  }
}

// Arithmetic would change it: if a NaN it signals.
uint32_t register_poison() { return static_cast<uint32_t>(poison) << 24 | 0xa5a5a5; }

void begin_product(Product& p) {
  WarpProducts& mine = used->warps[static_cast<size_t>(p.warp)];
  const ProductLane& first = p.lanes[0];
  auto& d = mine.accumulators[first.d[0]];
  if (!d) {
    d = std::make_shared<Accumulator>();
    d->n = first.n;
    d->values.resize(static_cast<size_t>(16 * first.n));
    for (int lane = 0; lane < kWarp; ++lane) std::copy(p.lanes[lane].d, p.lanes[lane].d + 2, d->lanes[lane]);
    for_registers_of(*d, [](float& held, float& value) {
      value = held;
      const uint32_t bits = register_poison();
      std::memcpy(&held, &bits, sizeof held);
    });
  }
  if (d->n != first.n) fail(p.site, "products of different shapes add to the same registers");
  ++d->running;
  p.d = d;
  read_operands(p, p.a, p.b);
  mine.groups.back().push_back(std::move(p));
}

void end_product(const Product& p) {
  std::vector<uint16_t> a, b;
  read_operands(p, a, b);
  if (a != p.a || b != p.b) fail(p.site, "an operand was overwritten before the product was waited for");
  Accumulator& d = *p.d;
  const ProductLane& first = p.lanes[0];
  if (!first.accumulate) std::fill(d.values.begin(), d.values.end(), 0.0f);
  std::vector<float> wide_a(16 * 16), wide_b(b.size());  // (16, 16), (16, n)
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      wide_a[static_cast<size_t>(16 * i + k)] =
          first.wide(a[static_cast<size_t>(first.a_across ? 16 * k + i : 16 * i + k)]);
    }
  }
  for (int k = 0; k < 16; ++k) {
    for (int j = 0; j < d.n; ++j) {
      wide_b[static_cast<size_t>(k * d.n + j)] =
          first.wide(b[static_cast<size_t>(first.b_across ? k * d.n + j : 16 * j + k)]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    float* row = &d.values[static_cast<size_t>(i * d.n)];
    for (int k = 0; k < 16; ++k) {
      const float x = wide_a[static_cast<size_t>(16 * i + k)], *y = &wide_b[static_cast<size_t>(k * d.n)];
      for (int j = 0; j < d.n; ++j) row[j] += x * y[j];
    }
  }
  if (--d.running) return;
  for_registers_of(d, [&](float& held, float& value) {
    if (same_bits<uint32_t>(&held) != register_poison())
      fail(p.site, "a register was written while products add to it");
    held = value;
  });
  used->warps[static_cast<size_t>(p.warp)].accumulators.erase(first.d[0]);
}

}  // namespace

// ---- The block's life. ----

void DeleteAsynchronous::operator()(Asynchronous* what) const { delete what; }

AsynchronousPointer make_asynchronous(int threads) {
  AsynchronousPointer made(new Asynchronous);
  const int each = std::min(kRegisters / threads / 8 * 8, 248);
  made->free_registers = 0;  // what is left of the multiprocessor is not the block's
  made->warps.resize(static_cast<size_t>(threads / kWarp));
  for (WarpProducts& warp : made->warps) warp.groups.resize(1), warp.registers = each;
  return made;
}

void use_asynchronous(Asynchronous* what) { used = what; }

int64_t moved_boxes() { return moved; }

bool asynchronous_work() { return !used->boxes.empty() || !used->sent.empty(); }

namespace {

std::string land_box(size_t which) {
  ++moved;
  const Box box = used->boxes[which];
  used->boxes.erase(used->boxes.begin() + static_cast<int64_t>(which));
  const auto& [data, sizes, strides, rows] = box.map;
  for (int r = 0; r < rows; ++r) {
    const int64_t at[3] = {box.at[1] + r, box.at[2], box.at[3]};
    bool there = box.at[0] >= 0;
    int64_t offset = 2 * box.at[0];
    for (int d = 0; d < 3; ++d) there = there && at[d] >= 0 && at[d] < sizes[d + 1], offset += at[d] * strides[d];
    const int64_t columns = there ? std::clamp<int64_t>(sizes[0] - box.at[0], 0, kColumns) : 0;
    uint16_t row[kColumns] = {};
    if (columns) std::memcpy(row, data + offset, static_cast<size_t>(2 * columns));
    const uint32_t to = shared_address(box.shared) + static_cast<uint32_t>(r * kBoxRowBytes);
    for (uint32_t n = 0; n < kBoxRowBytes; n += 16) std::memcpy(shared_at(swizzled(to + n)), row + n / 2, 16);
  }
  const auto found = used->barriers.find(box.barrier);
  found->second.bytes -= int64_t{kBoxRowBytes} * rows;
  if (found->second.bytes < -kMostBytes) return "a barrier counts more bytes than it can";
  look(found->second);
  return {};
}

// Reads the source, and another time writes.
std::string further(size_t which) {
  Sent& copy = *used->sent[which];
  if (!copy.was_read) {
    copy.was_read = true;
    if (std::memcmp(copy.shared, copy.bytes.data(), copy.bytes.size()) != 0) {
      return std::string(copy.site.name) + ": its source was overwritten before it was read";
    }
  } else {
    copy.was_written = true;
    for (size_t n = 0; n < copy.bytes.size(); n += copy.add ? sizeof(float) : copy.bytes.size()) {
      if (copy.add) {
        const float sum = same_bits<float>(copy.global + n) + same_bits<float>(&copy.bytes[n]);
        std::memcpy(copy.global + n, &sum, sizeof sum);
      } else {
        std::memcpy(copy.global, copy.bytes.data(), copy.bytes.size());
      }
    }
    used->sent.erase(used->sent.begin() + static_cast<int64_t>(which));
  }
  wake(used->for_sent);
  return {};
}

}  // namespace

std::string asynchronous_step() {
  const size_t boxes = used->boxes.size(), which = draw() % (boxes + used->sent.size());
  return which < boxes ? land_box(which) : further(which - boxes);
}

std::string end_asynchronous() {
  if (asynchronous_work()) return "a copy is on its way when the block ends";
  for (const auto& [at, phases] : used->barriers) {
    if (phases.bytes) return "bytes that were announced at a barrier have not come, or others have";
  }
  for (size_t n = 0; n < used->warps.size(); ++n) {
    const WarpProducts& warp = used->warps[n];
    if (warp.groups.size() > 1 || !warp.groups.back().empty()) return "a warp ends with products that run";
    if (warp.history != used->warps[n / 4 * 4].history) return "the warps of a warpgroup did not do the same";
  }
  return {};
}

// ---- What gpu/hopper.h asks for. ----

void init_barrier(const Site& site, void* barrier, int arrivals) {
  check_shared(site, barrier, 8, 8);
  if (arrivals < 1 || arrivals > kMostBytes) fail(site, "arrivals are 1 to 2^20 - 1");
  if (!used->barriers.emplace(barrier, Phases{arrivals, arrivals, 0, 0, {}}).second)
    fail(site, "there is a barrier already");
  std::memcpy(barrier, &kBarrierMark, sizeof kBarrierMark);
}

void arrive(const Site& site, void* barrier, int bytes) {
  Phases& phases = phases_of(site, barrier);
  phases.bytes += bytes;
  if (bytes < 0 || phases.bytes > kMostBytes) fail(site, "a barrier counts up to 2^20 - 1 bytes");
  if (--phases.missing < 0) fail(site, "more arrivals than the phase has");
  look(phases);
}

void wait_for_phase(const Site& site, void* barrier, int parity) {
  if (parity != 0 && parity != 1) fail(site, "parity is 0 or 1");
  while ((phases_of(site, barrier).phase & 1) == parity) sleep(site, phases_of(site, barrier).sleepers);
}

void load_box(const Site& site, void* shared, const TensorMap* map, const int (&at)[4], void* barrier) {
  check_aligned(site, map, 64);
  const auto fields = same_bits<MapFields>(map);
  const size_t bytes = static_cast<size_t>(kBoxRowBytes * fields.rows);
  check_shared(site, shared, bytes, 1);
  if (shared_address(shared) % 1024) fail(site, "the box is not at a multiple of 1024");
  phases_of(site, barrier);
  std::memset(shared, poison, bytes);
  used->boxes.push_back({static_cast<char*>(shared), fields, {at[0], at[1], at[2], at[3]}, barrier});
}

void send(const Site& site, void* global, const void* shared, int bytes, bool add) {
  if (bytes <= 0 || bytes % 16) fail(site, "bytes are a multiple of 16");
  check_shared(site, shared, static_cast<size_t>(bytes), 16);
  check_aligned(site, global, 16);
  const auto* from = static_cast<const char*>(shared);
  auto copy = std::make_shared<Sent>(Sent{site, static_cast<char*>(global), const_cast<char*>(from), add, {}});
  copy->bytes.assign(from, from + bytes);
  used->sent.push_back(copy);
  used->groups[running.thread].groups.back().push_back(copy);
}

void commit_sent() { used->groups[running.thread].groups.emplace_back(); }

void wait_for_sent(const Site& site, int pending, bool reads) {
  auto& groups = used->groups[running.thread].groups;
  const auto done = [&] {
    for (int n = 0; n + 1 + pending < static_cast<int>(groups.size()); ++n) {
      for (const auto& copy : groups[static_cast<size_t>(n)]) {
        if (!(reads ? copy->was_read : copy->was_written)) return false;
      }
    }
    return true;
  };
  while (!done()) sleep(site, used->for_sent);
}

namespace {

// The four warps of a warpgroup have to be at the same place of the source.
void remember_once(const Site& site) {
  if (running.thread % kWarp == 0) remember(static_cast<uint64_t>(site.line));
}

}  // namespace

void change_registers(const Site& site, int count, bool more) {
  const auto give = [](void* const(&)[kWarp]) {
    WarpProducts& mine = own();
    if (mine.wanted <= mine.registers) {
      used->free_registers += (mine.registers - mine.wanted) * kWarp;
      mine.registers = mine.wanted;
      wake(used->for_registers);
    }
  };
  remember_once(site);
  if (running.thread % kWarp == 0) remember(static_cast<uint64_t>(count));
  WarpProducts& mine = own();
  if (more ? count < mine.registers : count > mine.registers) fail(site, "it is the other way round");
  mine.wanted = count;
  meet_warp(site, nullptr, give);
  while (mine.registers != count) {
    if (used->free_registers >= (count - mine.registers) * kWarp) {
      used->free_registers -= (count - mine.registers) * kWarp;
      mine.registers = count;
    } else {
      sleep(site, used->for_registers);
    }
  }
}

void fence_products(const Site& site) {
  remember_once(site);
  meet_warp(site, nullptr, [](void* const(&)[kWarp]) { own().fenced = true; });
}

void commit_products(const Site& site) {
  remember_once(site);
  meet_warp(site, nullptr, [](void* const(&)[kWarp]) { own().groups.emplace_back(); });
}

void wait_for_products(const Site& site, int pending) {
  remember_once(site);
  meet_warp(site, &pending, [](void* const(&operands)[kWarp]) {
    WarpProducts& mine = own();
    mine.fenced = false;  // registers may be touched now
    while (static_cast<int>(mine.groups.size()) - 1 > *static_cast<int*>(operands[0])) {
      for (const Product& p : mine.groups.front()) end_product(p);
      mine.groups.pop_front();
    }
  });
}

void start_product(const Site& site, ProductLane lane) {
  struct Issue {
    const Site* site;
    ProductLane lane;
  } mine{&site, lane};
  meet_warp(site, &mine, [](void* const(&operands)[kWarp]) {
    Product p{*static_cast<Issue*>(operands[0])->site, nullptr, {}, running.thread / kWarp, {}, {}};
    for (int n = 0; n < kWarp; ++n) p.lanes[n] = static_cast<Issue*>(operands[n])->lane;
    const ProductLane& first = p.lanes[0];
    for (const ProductLane& other : p.lanes) {
      const bool same = other.rows == first.rows && other.columns == first.columns && other.n == first.n &&
                        other.accumulate == first.accumulate && other.a_across == first.a_across;
      if (!same) fail(p.site, "the lanes of a warp give different descriptors");
    }
    if (!own().fenced) fail(p.site, "no wgmma_fence since registers could be written");
    const int kind = 4 * first.n + 2 * first.a_across + first.accumulate;
    for (uint64_t what : {first.rows, first.columns, static_cast<uint64_t>(kind)}) remember(what);
    begin_product(p);
  });
}

}  // namespace tformer::gpu::emulation
