#include "emulator.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "asynchronous.h"
#include "fibre.h"
#include "guarded_memory.h"

namespace tformer::gpu::emulation {

Running running;
unsigned char poison = 0xff;

namespace {

constexpr int kBarriers = 16;
constexpr uint32_t kAll = ~0u;
constexpr int kMostTogether = 3;  // blocks that run at a time

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid_bytes;
};

struct Thread {
  Fibre fibre;
  Site site;                              // where it waits
  void* operand;                          // of its meeting
  std::vector<std::vector<Copy>> copies;  // groups, oldest first; the last one is open

  void reset() {
    site = {nullptr, nullptr, 0};
    copies.assign(1, {});
  }
};

struct Warp {
  uint32_t ready = kAll, ended = 0, meeting = 0;  // a bit for each lane
};

struct Barrier {
  int expected = 0, arrived = 0;
  Site site{};
  std::vector<int> waiting;  // threads
};

struct Block {
  Body body;
  const void* params;
  int threads;
  char* shared;
  size_t shared_bytes;
  int first;  // of its threads in the pool
  int64_t index[3];
  uint32_t shared_address;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  Sleepers watching;  // global memory, for another block to write there
  AsynchronousPointer beside;
  bool stays;  // one warp runs as long as it can
  int warp = 0;
  std::string failure;

  Thread& thread(int n) const;

  bool holds(const void* address, size_t bytes) const {
    const auto* at = static_cast<const char*>(address);
    return at >= shared && at + bytes <= shared + shared_bytes;
  }
};

std::mutex mutex;  // launches take turns
std::string message;
size_t most_shared_bytes = kMostSharedBytes;
std::mt19937_64 random_order;
int64_t launched = 0;  // blocks
std::vector<std::unique_ptr<Thread>> pool;
Block* block = nullptr;         // that of the running thread
std::vector<Block*> residents;  // all that run at the time

Thread& Block::thread(int n) const { return *pool[static_cast<size_t>(first + n)]; }
Thread& current() { return block->thread(running.thread); }

std::string text_of(const Site& site) {
  std::ostringstream text;
  const char* file = std::strrchr(site.file, '/');
  text << site.name << " (" << (file ? file + 1 : site.file) << ":" << site.line << ")";
  return text.str();
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && !std::strcmp(a.name, b.name) && !std::strcmp(a.file, b.file);
}

void thread_main() {
  Thread& me = current();
  const int index = running.thread;
  try {
    block->body(block->params, block->shared);
  } catch (const Failure& failure) {
    block->failure = failure.message;
  }
  block->warps[static_cast<size_t>(index / kWarp)].ended |= 1u << index % kWarp;
  for (;;) me.fibre.leave();
}

// Leaves the running thread until somebody has made it ready.
void wait() { current().fibre.leave(); }

// Where the threads of the block are that have not ended, for a block in which none can go on.
std::string stuck_threads() {
  std::vector<std::pair<std::string, std::vector<int>>> places;
  for (int n = 0; n < block->threads; ++n) {
    const bool ended = block->warps[static_cast<size_t>(n / kWarp)].ended >> n % kWarp & 1;
    const std::string place = ended ? "ended" : "at " + text_of(block->thread(n).site);
    const auto found = std::find_if(places.begin(), places.end(), [&](const auto& p) { return p.first == place; });
    if (found == places.end()) {
      places.push_back({place, {n}});
    } else {
      found->second.push_back(n);
    }
  }
  std::ostringstream text;
  text << "the threads of a block wait for each other:";
  for (const auto& [place, threads] : places) {
    text << " " << threads.size() << " of them (the first is " << threads.front() << ") " << place << ";";
  }
  return text.str();
}

enum class Turn { ran, stuck, ended };

// One warp of the block goes on for a while, or what runs beside it does. Warps go on in an order drawn anew after each
// meeting, or one warp as long as it can: both find races.
Turn take_turn() {
  std::vector<int> able;
  bool finished = true;
  for (int w = 0; w < static_cast<int>(block->warps.size()); ++w) {
    if (block->warps[static_cast<size_t>(w)].ready) able.push_back(w);
    finished = finished && block->warps[static_cast<size_t>(w)].ended == kAll;
  }
  if (finished) {
    block->failure = end_asynchronous();
    return Turn::ended;
  }
  // what goes on in the background may happen at any time, and must where nothing else can
  if (asynchronous_work() && (able.empty() || random_order() % 4 == 0)) {
    block->failure = asynchronous_step();
    return Turn::ran;
  }
  if (able.empty()) return Turn::stuck;
  int& warp = block->warp;
  if (!block->stays || std::find(able.begin(), able.end(), warp) == able.end()) {
    warp = able[random_order() % able.size()];
  }
  Warp& lanes = block->warps[static_cast<size_t>(warp)];
  const uint64_t draw = random_order();
  const auto step = static_cast<int>(draw % kWarp) | 1, first = static_cast<int>(draw >> 8) % kWarp;
  for (int n = 0; n < kWarp && block->failure.empty(); ++n) {
    const int lane = (first + n * step) & (kWarp - 1);
    if (!(lanes.ready >> lane & 1)) continue;
    lanes.ready &= ~(1u << lane);
    running.thread = warp * kWarp + lane;
    current().fibre.enter();
  }
  return Turn::ran;
}

// Shared memory at the end of its pages, so that the access after it ends the process, and what aligning leaves over is
// watched.
class SharedMemory {
 public:
  static constexpr size_t kAlign = 128;

  explicit SharedMemory(size_t bytes)
      : bytes_(bytes),
        rounded_((bytes + kAlign - 1) / kAlign * kAlign),
        memory_(rounded_, GuardedMemory::Guard::after) {}

  char* begin() const { return memory_.end() - rounded_; }
  void poison() const { std::memset(begin(), emulation::poison, rounded_); }
  bool rest_is_untouched() const {
    return std::all_of(begin() + bytes_, memory_.end(),
                       [](char c) { return static_cast<unsigned char>(c) == emulation::poison; });
  }

 private:
  size_t bytes_, rounded_;
  GuardedMemory memory_;
};

// A place for a block: what a multiprocessor has for it.
struct Place {
  SharedMemory shared;
  std::unique_ptr<Block> holds;

  explicit Place(size_t bytes) : shared(bytes) {}
};

void enter(Block& of) {
  block = &of;
  std::copy(of.index, of.index + 3, running.block);
  use_asynchronous(of.beside.get());
}

void start_block(Place& place, int first, int64_t index, Body body, const void* params, int threads, size_t bytes) {
  const auto address = static_cast<uint32_t>(1024 + SharedMemory::kAlign * (random_order() % 8));
  const int64_t x = running.blocks[0], y = running.blocks[1];
  place.holds.reset(new Block{body,
                              params,
                              threads,
                              place.shared.begin(),
                              bytes,
                              first,
                              {index % x, index / x % y, index / x / y},
                              address,
                              {},
                              {},
                              {},
                              make_asynchronous(threads),
                              random_order() % 2 == 0,
                              0,
                              {}});
  place.holds->warps.resize(static_cast<size_t>(threads / kWarp));
  place.shared.poison();
  for (int n = 0; n < threads; ++n) {
    place.holds->thread(n).reset();
    place.holds->thread(n).fibre.start(&thread_main, n, poison);
  }
  residents.push_back(place.holds.get());
}

// Why the launch fails, once a block has or waits for what no block can give it.
std::string failure_of(const Block& failed) {
  std::ostringstream text;
  text << "block (" << failed.index[0] << ", " << failed.index[1] << ", " << failed.index[2] << "): ";
  text << (failed.failure.empty() ? stuck_threads() : failed.failure);
  return text.str();
}

std::string run_places(std::vector<std::unique_ptr<Place>>& places, const std::vector<int64_t>& order, Body body,
                       const void* params, int threads, size_t bytes) {
  for (size_t begun = 0;;) {
    for (size_t n = 0; n < places.size(); ++n) {
      if (places[n]->holds || begun == order.size()) continue;
      start_block(*places[n], static_cast<int>(n) * threads, order[begun++], body, params, threads, bytes);
    }
    if (residents.empty()) return {};
    size_t turn = random_order() % places.size(), tried = 0;
    for (Turn took = Turn::stuck; took == Turn::stuck; turn = (turn + 1) % places.size(), ++tried) {
      Place& place = *places[turn];
      if (tried == places.size()) return enter(*residents[0]), failure_of(*residents[0]);
      if (!place.holds) continue;
      enter(*place.holds);
      took = take_turn();
      if (!block->failure.empty()) return failure_of(*block);
      if (took != Turn::ended) continue;
      if (!place.shared.rest_is_untouched()) return "a kernel wrote past its shared memory";
      residents.erase(std::find(residents.begin(), residents.end(), block));
      place.holds.reset();
    }
  }
}

// Blocks in any order, a few at a time.
std::string run_blocks(Body body, const void* params, Grid grid, int threads, size_t shared_bytes) {
  std::vector<int64_t> order(static_cast<size_t>(grid.x * grid.y * grid.z));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_order);
  running.blocks[0] = grid.x, running.blocks[1] = grid.y, running.blocks[2] = grid.z;
  std::vector<std::unique_ptr<Place>> places(std::min<size_t>(1 + random_order() % kMostTogether, order.size()));
  for (auto& place : places) place = std::make_unique<Place>(shared_bytes);
  while (pool.size() < places.size() * static_cast<size_t>(threads)) pool.push_back(std::make_unique<Thread>());
  std::string failure = run_places(places, order, body, params, threads, shared_bytes);
  residents.clear();
  block = nullptr;
  return failure;
}

}  // namespace

Status run(Body body, const void* params, Grid grid, int threads, size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return kSuccess;
  if (grid.x < 0 || grid.y < 0 || grid.z < 0 || grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff) {
    message = "the grid is larger than a GPU allows";
  } else if (shared_bytes > most_shared_bytes) {
    message = "more shared memory than a block may have on this device";
  } else {
    launched += grid.x * grid.y * grid.z;
    message = run_blocks(body, params, grid, threads, shared_bytes);
  }
  return message.empty() ? kSuccess : kFailed;
}

void set_most_shared_bytes(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  most_shared_bytes = bytes;
}

void set_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(mutex);
  random_order.seed(seed);
}

int64_t launched_blocks() {
  const std::lock_guard<std::mutex> lock(mutex);
  return launched;
}

const char* last_error() { return message.c_str(); }

Status refuse(const char* why) {
  const std::lock_guard<std::mutex> lock(mutex);
  message = why;
  return kFailed;
}

void fail(const Site& site, const char* what) {
  throw Failure{"thread " + std::to_string(running.thread) + " at " + text_of(site) + ": " + what};
}

void meet_warp(const Site& site, void* operand, Act act) {
  const int first = running.thread / kWarp * kWarp;
  Warp& warp = block->warps[static_cast<size_t>(first / kWarp)];
  Thread& me = current();
  me.site = site, me.operand = operand;
  if (warp.meeting) {
    const Thread& other = block->thread(first + __builtin_ctz(warp.meeting));
    if (!same(other.site, site)) {
      const std::string what = "the lanes of its warp diverge, others are at " + text_of(other.site);
      fail(site, what.c_str());
    }
  }
  warp.meeting |= 1u << (running.thread - first);
  if (warp.meeting != kAll) return wait();
  void* operands[kWarp];
  for (int n = 0; n < kWarp; ++n) operands[n] = block->thread(first + n).operand;
  act(operands);
  warp.meeting = 0;
  warp.ready = kAll;
  wait();  // who came last shall not always go on first
}

namespace {

// Whether all have come with this thread.
bool comes_to(const Site& site, int id, int count) {
  Barrier& barrier = block->barriers[id];
  current().site = site;
  const int expected = id == 0 ? block->threads : count;
  if (barrier.arrived) {
    if (barrier.expected != expected) fail(site, "threads meet at one barrier with different counts");
    if (id == 0 && !same(barrier.site, site)) {
      const std::string what = "the threads of the block diverge, others are at " + text_of(barrier.site);
      fail(site, what.c_str());
    }
  }
  barrier.expected = expected, barrier.site = site;
  if (++barrier.arrived < expected) return false;
  barrier.arrived = 0;
  wake(barrier.waiting);
  return true;
}

}  // namespace

void meet_block(const Site& site, int id, int count) {
  block->barriers[id].waiting.push_back(running.thread);
  comes_to(site, id, count);
  wait();
}

void arrive_at_block(const Site& site, int id, int count) { comes_to(site, id, count); }

void sleep(const Site& site, Sleepers& sleepers) {
  current().site = site;
  sleepers.push_back(running.thread);
  wait();
}

void wake(Sleepers& sleepers) {
  for (int n : sleepers) block->warps[static_cast<size_t>(n / kWarp)].ready |= 1u << n % kWarp;
  sleepers.clear();
}

void watch(const Site& site) { sleep(site, block->watching); }

void wake_watchers() {
  Block* const own = block;
  for (Block* other : residents) {
    block = other;
    wake(other->watching);
  }
  block = own;
}

void wait_for_value(const Site& site, const int32_t* at, int32_t value) {
  while (*at != value) watch(site);
}

void publish_value(const Site& site, int32_t* at, int32_t value) {
  check_aligned(site, at, 4);
  *at = value;
  wake_watchers();
}

uint64_t draw() { return random_order(); }

uint32_t shared_address(const void* shared) {
  return block->shared_address + static_cast<uint32_t>(static_cast<const char*>(shared) - block->shared);
}
char* shared_at(uint32_t address) { return block->shared + (static_cast<int64_t>(address) - block->shared_address); }

void check_aligned(const Site& site, const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment) fail(site, "its address is not aligned");
}

void check_shared(const Site& site, const void* address, size_t bytes, size_t alignment) {
  if (!block->holds(address, bytes)) fail(site, "its address is outside shared memory");
  check_aligned(site, address, alignment);
}

// The bytes arrive as late as they may: until then there is poison.
void copy_async(const Site& site, void* shared, const void* global, int bytes, int valid_bytes) {
  check_shared(site, shared, static_cast<size_t>(bytes), static_cast<size_t>(bytes));
  check_aligned(site, global, static_cast<size_t>(bytes));
  if (valid_bytes < 0 || valid_bytes > bytes) fail(site, "valid_bytes is out of range");
  std::memset(shared, poison, static_cast<size_t>(bytes));
  current().copies.back().push_back({shared, global, bytes, valid_bytes});
}

void commit_copies() { current().copies.emplace_back(); }

void wait_for_copies(int pending) {
  auto& groups = current().copies;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.shared, 0, static_cast<size_t>(copy.bytes));
      if (copy.valid_bytes) std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid_bytes));
    }
    groups.erase(groups.begin());
  }
}

}  // namespace tformer::gpu::emulation
