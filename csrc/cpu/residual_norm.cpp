// Residual LayerNorm / RMSNorm on the CPU: tensors to parameters, rows to threads.
#include <initializer_list>
#include <memory>
#include <tuple>

#include "../host/norm_arguments.h"
#include "cache_sizes.h"
#include "isa.h"
#include "parallel.h"

namespace tformer {
namespace {

// Rows that share one partial of the gradients of weight and bias: at most 64 partials, at least 16 rows and some 16000
// elements (4 microseconds) in each, so that small calls do not spend their time on partials. A function of sizes
// alone, since it shows in the rounding.
int64_t rows_per_chunk(int64_t M, int64_t N) {
  constexpr int64_t kChunks = 64, kRows = 16, kElements = 1 << 14;
  return std::max({(M + kChunks - 1) / kChunks, kRows, kElements / std::max<int64_t>(N, 1)});
}

// How many rows before it is read forward asks for a row of x and residual. The hardware fetches ahead by itself, but
// not beyond a page, so a page is the distance. What may lie in the second-level cache needs no asking: M, none.
int64_t rows_ahead(const NormParams& p, size_t element) {
  constexpr int64_t kPage = 4096;
  const int64_t row = p.N * static_cast<int64_t>(element);
  return static_cast<size_t>(p.M * row) < cache_sizes().second ? p.M : 1 + kPage / (row + 1);
}

// Of one element of each.
size_t bytes_of(std::initializer_list<const Tensor*> tensors, std::initializer_list<const OptionalTensor*> optional) {
  size_t bytes = 0;
  for (const Tensor* t : tensors) bytes += t->element_size();
  for (const OptionalTensor* t : optional) bytes += t->has_value() ? (*t)->element_size() : 0;
  return bytes;
}

// Whether the results go past the caches: as whole lines, and only with what is read (`read`: bytes of one column).
bool writes_around_cache(const NormParams& p, size_t read, std::initializer_list<const Tensor*> results) {
  constexpr size_t kLine = 64;
  size_t total = static_cast<size_t>(p.M) * static_cast<size_t>(p.N) * read;
  for (const Tensor* t : results) {
    const size_t row = static_cast<size_t>(p.N) * t->element_size();
    if (t->numel() == 0) continue;
    if (row % kLine != 0 || reinterpret_cast<uintptr_t>(t->const_data_ptr()) % kLine != 0) return false;
    total += static_cast<size_t>(p.M) * row;
  }
  return exceeds_caches(total);
}

// Whether backward asks for the lines of its results before it writes them: a store that waits for its line holds up
// those behind it. What may lie in the second-level cache needs no asking; 16-bit rows with dropout wait for
// arithmetic, not for memory.
bool fetches_results(const NormParams& p, size_t element) {
  const bool by_arithmetic = element == 2 && p.dropout_p > 0;
  return !p.around_cache && !by_arithmetic && static_cast<size_t>(p.M * p.N) * element >= cache_sizes().second;
}

double cost_of(const NormParams& p) { return 32.0 * static_cast<double>(p.M) * static_cast<double>(p.N); }

void set_weight(NormParams& p, const OptionalTensor& weight) {
  check_parameter(weight, "weight", p);
  if (weight.has_value()) p.weight = weight->const_data_ptr(), p.weight_dtype = dtype_of(*weight, "weight");
}

// The parameters of a forward pass.
struct NormInputs {
  ScalarType sum_dtype;
  NormParams p;

  NormInputs(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
             const OptionalTensor& dropout_seed, double eps, double dropout_p, bool rms,
             std::optional<ScalarType> wanted_dtype)
      : sum_dtype(sum_dtype_of(x, residual, wanted_dtype)),
        p(norm_forward_params(x, residual, dropout_seed, eps, dropout_p, rms, sum_dtype)) {
    p.rows_ahead = rows_ahead(p, x.element_size());
    set_weight(p, weight);
    check_parameter(bias, "bias", p);
    if (bias.has_value()) p.bias = bias->const_data_ptr(), p.bias_dtype = dtype_of(*bias, "bias");
  }
};

void run_forward(const NormParams& p) {
  if (p.N == 0) return;
  const CpuKernels& kernels = cpu_kernels();
  const int64_t rows = rows_per_chunk(p.M, p.N), chunks = (p.M + rows - 1) / rows;
  parallel_tasks(chunks, cost_of(p), Share::kNeighbours, [&](int64_t n, TaskTaker&) {
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
  p.around_cache = writes_around_cache(p, bytes_of({&x}, {&residual}), {&out.y, &out.sum});
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
  inputs.p.around_cache = writes_around_cache(inputs.p, bytes_of({&x}, {&residual}), {&y});
  run_forward(inputs.p);
  return y;
}

// The gradient of weight or bias from its partials, or an empty tensor where none is wanted.
Tensor summed(const NormParams& p, const char* partial, int64_t chunks, std::optional<ScalarType> type,
              ScalarType x_dtype, const Tensor& like) {
  if (!type) return empty({0}, x_dtype, like);
  Tensor out = empty({p.N}, *type, like);
  cpu_kernels().norm_sum(p.dtype, partial, chunks, p.N, dtype_of(out, "gradient"), out.mutable_data_ptr());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_backward(Tensor grad_y, OptionalTensor grad_sum, Tensor sum,
                                                                  Tensor mean, Tensor rstd, OptionalTensor weight,
                                                                  OptionalTensor dropout_seed, double dropout_p,
                                                                  bool rms, ScalarType x_dtype,
                                                                  std::optional<ScalarType> residual_dtype,
                                                                  std::optional<ScalarType> bias_dtype) {
  NormParams p =
      norm_backward_params(grad_y, grad_sum, sum, mean, rstd, dropout_seed, dropout_p, rms, x_dtype, residual_dtype);
  set_weight(p, weight);
  NormGradients gradients(p, grad_y, x_dtype, residual_dtype);
  p.around_cache = writes_around_cache(p, bytes_of({&grad_y, &sum}, {&grad_sum}), {&gradients.x, &gradients.residual});
  p.fetch_results = fetches_results(p, gradients.x.element_size());
  p.chunk_rows = rows_per_chunk(p.M, p.N);
  const int64_t chunks = (p.M + p.chunk_rows - 1) / p.chunk_rows;
  const size_t bytes = static_cast<size_t>(chunks * p.N) * element_bytes(accumulator_type(p.dtype));
  const std::unique_ptr<char[]> partials(new char[2 * bytes]);
  char *of_weight = partials.get(), *of_bias = of_weight + bytes;
  if (weight) p.partial_weight = of_weight;
  if (bias_dtype) p.partial_bias = of_bias;

  if (p.N > 0) {
    const CpuKernels& kernels = cpu_kernels();
    parallel_tasks(chunks, cost_of(p), Share::kNeighbours, [&](int64_t n, TaskTaker&) {
      kernels.norm_backward(p, n, ThreadScratch::get(kernels.norm_scratch(p)));
    });
  }
  std::optional<ScalarType> weight_dtype;
  if (weight) weight_dtype = weight->scalar_type();
  return {gradients.x, gradients.residual, summed(p, of_weight, chunks, weight_dtype, x_dtype, grad_y),
          summed(p, of_bias, chunks, bias_dtype, x_dtype, grad_y)};
}

}  // namespace
}  // namespace tformer

STABLE_TORCH_LIBRARY_IMPL(tformer_ext, CPU, m) {
  m.impl("_residual_norm_forward", TORCH_BOX(&tformer::residual_norm_forward));
  m.impl("_residual_norm_inference", TORCH_BOX(&tformer::residual_norm_inference));
  m.impl("_residual_norm_backward", TORCH_BOX(&tformer::residual_norm_backward));
}
