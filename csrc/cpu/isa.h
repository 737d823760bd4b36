// The CPU kernels of one instruction set as a table of function pointers, and the choice between tables.
//
// cpu/kernels/kernels.cpp is compiled once per instruction set ("ISA"), each time in a namespace of its own,
// and exports one table. Nothing else of those objects is visible, so code compiled for an ISA that this CPU
// lacks can only be reached through a table that is never chosen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tformer {

enum class DType : int32_t;
struct AttentionParams;
struct AttentionTask;
struct NextTask;
struct NormParams;
struct LinearParams;
struct CrossEntropyParams;

// Every *_scratch function gives the bytes that one thread's `scratch` must hold for these parameters.
struct CpuKernels {
  const char* name;
  int vector_bytes;
  bool splits;  // attention has products of float32 and float16 from bfloat16 slices

  void (*attention_forward)(const AttentionParams&, const AttentionTask&, const NextTask&, void* scratch);
  void (*attention_merge)(const AttentionParams&, const AttentionTask&, void* scratch);
  size_t (*attention_forward_scratch)(const AttentionParams&, const AttentionTask&);
  // the part of the sinks' gradient that comes from one (batch, head)
  double (*attention_sink_gradient)(const AttentionParams&, int64_t b, int64_t h);
  void (*attention_backward)(const AttentionParams&, const AttentionTask&, const NextTask&, void* scratch);
  size_t (*attention_backward_scratch)(const AttentionParams&, const AttentionTask&);

  void (*norm_forward)(const NormParams&, int64_t row_begin, int64_t row_end, void* scratch);
  void (*norm_backward)(const NormParams&, int64_t chunk, void* scratch);
  // partial (chunks, N), float or double for f64, summed over the chunks to out (N) of out_dtype
  void (*norm_sum)(DType, const void* partial, int64_t chunks, int64_t N, DType out_dtype, void* out);
  size_t (*norm_scratch)(const NormParams&);

  // columns [begin, end) of y; of weights with rows along N those of one part
  void (*linear_few_rows)(const LinearParams&, int64_t part, int64_t begin, int64_t end);

  void (*cross_entropy_forward)(const CrossEntropyParams&, int64_t row_begin, int64_t row_end);
  void (*cross_entropy_backward)(const CrossEntropyParams&, int64_t row_begin, int64_t row_end);

  // Do so many rounds of nothing but arithmetic and give the number of operations: see kernels/ceilings.h.
  double (*fma_operations)(DType, int64_t rounds);
  double (*exp_operations)(DType, int64_t rounds);
};

// The table in force. An op reads it once per call, so a change of ISA never splits a call.
const CpuKernels& cpu_kernels();

// Names, least capable first: what this binary contains, and what of it this CPU can run.
std::vector<std::string> built_cpu_isas();
std::vector<std::string> supported_cpu_isas();

// Chooses an ISA for the calls that follow, in any thread. Throws std::invalid_argument, listing the
// supported ones, for a name that is unknown, not built or not supported by this CPU; the message begins
// with `source`.
void set_cpu_isa(const std::string& name, const std::string& source = "set_cpu_isa");

// Chooses the ISA named by the environment variable TFORMER_CPU_ISA, or else the most capable supported one.
void set_cpu_isa_from_environment();

}  // namespace tformer
