// Residual LayerNorm / RMSNorm on the CPU: tensors to parameters, rows to threads.
#include <fstream>
#include <initializer_list>
#include <string>
#include <tuple>

#include "../host/norm_arguments.h"
#include "isa.h"
#include "parallel.h"

namespace tformer {
namespace {

// Rows that share one partial of the gradients of weight and bias: at most 64 partials, at least 16 rows in each.
int64_t rows_per_chunk(int64_t M) {
  constexpr int64_t kChunks = 64, kRows = 16;
  return std::max((M + kChunks - 1) / kChunks, kRows);
}

// Bytes of the last-level cache that this process sees; 32 MiB where the system does not tell. From sysfs: the C
// library's sysconf adds up the caches of a whole package, also in a virtual machine that has a part of one of them.
size_t last_level_cache() {
  static const size_t bytes = [] {
    size_t largest = 0, size = 0;
    for (int index = 0; index < 8; ++index) {
      std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/size");
      char unit = 0;
      if (file >> size >> unit) largest = std::max(largest, size << (unit == 'M' ? 20 : 10));
    }
    return largest > 0 ? largest : size_t{32} << 20;
  }();
  return bytes;
}

// Whether the results had better not go through the caches: the end of them would throw out the beginning, and a store
// past the caches need not read the line first.
bool writes_around_cache(const NormParams& p, std::initializer_list<const Tensor*> results) {
  constexpr size_t kLine = 64;
  size_t total = 0;
  for (const Tensor* t : results) {
    const size_t row = static_cast<size_t>(p.N) * t->element_size();
    if (t->numel() == 0) continue;
    if (row % kLine != 0 || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % kLine != 0) return false;
    total += static_cast<size_t>(p.M) * row;
  }
  return total >= last_level_cache();
}

// weight or bias in the arithmetic type: they are read by every row, so converting them once is free.
std::optional<Tensor> parameter(const OptionalTensor& t, const char* name, const NormParams& p) {
  check_parameter(t, name, p);
  if (!t.has_value() || t->scalar_type() == accumulator_type(p.dtype)) return t;
  return torch::stable::to(*t, accumulator_type(p.dtype));
}

double cost_of(const NormParams& p) { return 32.0 * static_cast<double>(p.M) * static_cast<double>(p.N); }

// The parameters of a forward pass, and what they point to.
struct NormInputs {
  ScalarType sum_dtype;
  NormParams p;
  std::optional<Tensor> weight, bias;

  NormInputs(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& given_weight,
             const OptionalTensor& given_bias, const OptionalTensor& dropout_seed, double eps, double dropout_p,
             bool rms, std::optional<ScalarType> wanted_dtype)
      : sum_dtype(sum_dtype_of(x, residual, wanted_dtype)),
        p(norm_forward_params(x, residual, dropout_seed, eps, dropout_p, rms, sum_dtype)),
        weight(parameter(given_weight, "weight", p)),
        bias(parameter(given_bias, "bias", p)) {
    p.weight = pointer<void>(weight), p.bias = pointer<void>(bias);
  }
};

void run_forward(const NormParams& p) {
  if (p.N == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  const int64_t rows = rows_per_chunk(p.M), chunks = (p.M + rows - 1) / rows;
  parallel_tasks(chunks, cost_of(p), [&](int64_t n) {
    kernels.norm_forward(p, n * rows, std::min((n + 1) * rows, p.M), ThreadScratch::get(kernels.norm_scratch(p)));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_forward(Tensor x, OptionalTensor residual,
                                                                 OptionalTensor weight, OptionalTensor bias,
                                                                 OptionalTensor dropout_seed, double eps,
                                                                 double dropout_p, bool rms, bool save_sum,
                                                                 std::optional<ScalarType> wanted_dtype) {
  NormInputs inputs(x, residual, weight, bias, dropout_seed, eps, dropout_p, rms, wanted_dtype);
  NormParams& p = inputs.p;
  NormOutputs out(p, x, inputs.sum_dtype, save_sum);
  p.around_cache = writes_around_cache(p, {&out.y, &out.sum});
  run_forward(p);
  if (p.N == 0) {
    torch::stable::zero_(out.rstd);
    torch::stable::zero_(out.mean);
  }
  return {out.y, out.sum, out.mean, out.rstd};
}

Tensor residual_norm_inference(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
                               double eps, bool rms) {
  NormInputs inputs(x, residual, weight, bias, std::nullopt, eps, 0, rms, std::nullopt);
  Tensor y = empty(sizes_of(x, x.dim()), x.scalar_type(), x);
  inputs.p.y = y.mutable_data_ptr();
  inputs.p.around_cache = writes_around_cache(inputs.p, {&y});
  run_forward(inputs.p);
  return y;
}

Tensor summed(const Tensor& partial, DType dtype, ScalarType type) {
  const int64_t chunks = partial.size(0), N = partial.size(1);
  Tensor out = empty({N}, partial.scalar_type(), partial);
  cpu_kernels().norm_sum(dtype, partial.const_data_ptr(), chunks, N, out.mutable_data_ptr());
  return type == out.scalar_type() ? out : torch::stable::to(out, type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_backward(Tensor grad_y, OptionalTensor grad_sum, Tensor sum,
                                                                  Tensor mean, Tensor rstd, OptionalTensor weight,
                                                                  OptionalTensor dropout_seed, double dropout_p,
                                                                  bool rms, ScalarType x_dtype,
                                                                  std::optional<ScalarType> residual_dtype,
                                                                  std::optional<ScalarType> bias_dtype) {
  NormParams p =
      norm_backward_params(grad_y, grad_sum, sum, mean, rstd, dropout_seed, dropout_p, rms, x_dtype, residual_dtype);
  const ScalarType statistics = accumulator_type(p.dtype);
  const auto wide_weight = parameter(weight, "weight", p);
  p.weight = pointer<void>(wide_weight);
  NormGradients gradients(p, grad_y, x_dtype, residual_dtype);
  p.around_cache = writes_around_cache(p, {&gradients.x, &gradients.residual});
  p.chunk_rows = rows_per_chunk(p.M);
  const int64_t chunks = (p.M + p.chunk_rows - 1) / p.chunk_rows;
  Tensor partial_weight = empty({weight ? chunks : 0, p.N}, statistics, grad_y);
  Tensor partial_bias = empty({bias_dtype ? chunks : 0, p.N}, statistics, grad_y);
  if (weight) p.partial_weight = partial_weight.mutable_data_ptr();
  if (bias_dtype) p.partial_bias = partial_bias.mutable_data_ptr();

  if (p.N > 0) {
    const CpuKernels& kernels = cpu_kernels();
    parallel_tasks(chunks, cost_of(p),
                   [&](int64_t n) { kernels.norm_backward(p, n, ThreadScratch::get(kernels.norm_scratch(p))); });
  }
  Tensor grad_weight = weight ? summed(partial_weight, p.dtype, weight->scalar_type()) : empty({0}, x_dtype, grad_y);
  Tensor grad_bias = bias_dtype ? summed(partial_bias, p.dtype, *bias_dtype) : empty({0}, x_dtype, grad_y);
  return {gradients.x, gradients.residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tformer

STABLE_TORCH_LIBRARY_IMPL(tformer_ext, CPU, m) {
  m.impl("_residual_norm_forward", TORCH_BOX(&tformer::residual_norm_forward));
  m.impl("_residual_norm_inference", TORCH_BOX(&tformer::residual_norm_inference));
  m.impl("_residual_norm_backward", TORCH_BOX(&tformer::residual_norm_backward));
}
