// Runs a kernel's blocks on the host, one to three at a time, their threads as fibres. What the threads of a block do
// together (barriers, shuffles, mma) is a meeting: the last one to come does it for all.
//
// The order is drawn from a seed: of the blocks and how many of them run at a time, of the warps between meetings, of
// the lanes in a warp. A kernel whose result depends on it has a race. Shared memory and the fibres' stacks hold poison
// when a block begins. Errors of the kernel (a meeting not all come to, an address outside shared memory or
// not aligned) end the launch with a message that names the place.
#pragma once

#include <gpu/launch.h>
#include <gpu/types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace tformer::gpu::emulation {

struct Site {
  const char* name;  // of the wrapper
  const char* file;
  int line;
};

// What the running thread may ask of its block. There is one launch at a time.
struct Running {
  int thread;
  int64_t block[3], blocks[3];
};
extern Running running;

constexpr Status kFailed = -1;
constexpr size_t kMostSharedBytes = size_t{163} << 10;          // of a block on sm_80
constexpr size_t kMostSharedBytesOfHopper = size_t{227} << 10;  // on sm_90

// body(params, shared) for every thread of every block.
using Body = void (*)(const void* params, char* shared);
Status run(Body body, const void* params, Grid grid, int threads, size_t shared_bytes);

// What the next launches may have of shared memory.
void set_most_shared_bytes(size_t bytes);
// The order of the next launches.
void set_seed(uint64_t seed);
// Of all launches so far.
int64_t launched_blocks();
// Why the last launch of this process failed.
const char* last_error();
// kFailed, for that reason, before a launch.
Status refuse(const char* why);

// The lanes of the running thread's warp meet; operands[n] is lane n's. Returns when `act` has run.
using Act = void (*)(void* const (&operands)[kWarp]);
void meet_warp(const Site& site, void* operand, Act act);
// `count` threads meet at barrier `id`; 0 is that of the whole block.
void meet_block(const Site& site, int id, int count);
// The running thread counts among those that meet, and does not wait for them.
void arrive_at_block(const Site& site, int id, int count);

// Waiting for something else: the running thread sleeps until somebody wakes it, and then looks again.
using Sleepers = std::vector<int>;
void sleep(const Site& site, Sleepers& sleepers);
void wake(Sleepers& sleepers);

// The running thread waits for a word of global memory: until some thread of any block calls wake_watchers.
void watch(const Site& site);
void wake_watchers();
void wait_for_value(const Site& site, const int32_t* at, int32_t value);
void publish_value(const Site& site, int32_t* at, int32_t value);

// What memory and registers hold, byte by byte, before they are written: 0xff, NaN, or 0x49, a number. A NaN may lead a
// kernel to compute a row again, which hides where it came from.
extern unsigned char poison;

// A number that belongs to the order of things, drawn from the seed.
uint64_t draw();
// Shared memory by its address on a GPU: 0 is not in it, and its beginning is a multiple of 128 only.
uint32_t shared_address(const void* shared);
char* shared_at(uint32_t address);

// Background copies of the running thread.
void copy_async(const Site& site, void* shared, const void* global, int bytes, int valid_bytes);
void commit_copies();
void wait_for_copies(int pending);

// Fails the launch unless address is a multiple of `alignment` and, for shared ones, within shared memory.
void check_shared(const Site& site, const void* address, size_t bytes, size_t alignment);
void check_aligned(const Site& site, const void* address, size_t alignment);
[[noreturn]] void fail(const Site& site, const char* what);

template <class T>
T same_bits(const void* from) {
  T to;
  std::memcpy(&to, from, sizeof(T));
  return to;
}

}  // namespace tformer::gpu::emulation
