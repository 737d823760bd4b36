// What runs beside the threads of a block on sm_90a: copies by the copy engine, barriers that count bytes, products of
// warpgroups, registers that change hands; and what blocks tell each other. gpu/hopper.h names it, emulator.cpp gives
// it its turns.
//
// A copy lands at some step after it was asked for, in any order. A product reads its operands while it runs: they have
// to be the same when it begins and when it is waited for, and its registers are poison meanwhile, which nobody
// may touch. So neither what comes too late nor what is overwritten too early can pass.
#pragma once

#include <gpu/tensor_map.h>

#include <memory>
#include <string>

#include "emulator.h"

namespace tformer::gpu::emulation {

// What fail() throws, out of the fibre.
struct Failure {
  std::string message;
};

// For emulator.cpp. Each block has such a thing; the functions below are about the one that is used at the time. Steps
// and the end return why the block fails, or nothing.
struct Asynchronous;
struct DeleteAsynchronous {
  void operator()(Asynchronous* what) const;
};
using AsynchronousPointer = std::unique_ptr<Asynchronous, DeleteAsynchronous>;
AsynchronousPointer make_asynchronous(int threads);
void use_asynchronous(Asynchronous* what);
bool asynchronous_work();
std::string asynchronous_step();
std::string end_asynchronous();
// Boxes that the copy engine has moved in this process.
int64_t moved_boxes();

// A TensorMap as encode_tensor_map of the emulation fills it.
struct MapFields {
  const char* data;
  int64_t sizes[4], strides[3];  // strides in bytes
  int rows;
};

void init_barrier(const Site& site, void* barrier, int arrivals);
void arrive(const Site& site, void* barrier, int bytes);
void wait_for_phase(const Site& site, void* barrier, int parity);
void load_box(const Site& site, void* shared, const TensorMap* map, const int (&at)[4], void* barrier);

// Copies out of shared memory, of the running thread, in groups as copy_async. add: to floats. A wait is for `reads`,
// that the source is done with, or for all.
void send(const Site& site, void* global, const void* shared, int bytes, bool add);
void commit_sent();
void wait_for_sent(const Site& site, int pending, bool reads);

// Words of global memory by which blocks wait for each other.
void change_registers(const Site& site, int count, bool more);

void fence_products(const Site& site);
void commit_products(const Site& site);
void wait_for_products(const Site& site, int pending);

// One lane's part of m64nNk16. a: four registers, or null where `rows` describes it. across: a column of a, a row of b
// lie along rows in memory.
struct ProductLane {
  float* d[2];  // n / 4 columns of its two rows
  const uint32_t* a;
  uint64_t rows, columns;  // descriptors of a, of b
  int n;
  bool accumulate, a_across, b_across;
  float (*wide)(uint16_t bits);
};
void start_product(const Site& site, ProductLane lane);

}  // namespace tformer::gpu::emulation
