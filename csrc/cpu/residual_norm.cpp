// Residual LayerNorm / RMSNorm on the CPU: tensors to parameters, rows to threads.
#include <unistd.h>

#include <initializer_list>
#include <tuple>

#include "../host/tensors.h"
#include "isa.h"
#include "parallel.h"

namespace tformer {
namespace {

// Rows that share one partial of the gradients of weight and bias: at most 64 partials, at least 16 rows in each.
int64_t rows_per_chunk(int64_t M) {
  constexpr int64_t kChunks = 64, kRows = 16;
  return std::max((M + kChunks - 1) / kChunks, kRows);
}

// Bytes of the last-level cache; 32 MiB where the system does not tell.
size_t last_level_cache() {
  static const size_t bytes = [] {
    long size = -1;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    size = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return size > 0 ? static_cast<size_t>(size) : size_t{32} << 20;
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

// The stride of t's rows.
int64_t check_rows(const Tensor& t, const char* name, const NormParams& p) {
  const Matrix m = matrix_of(t, name);
  check(m.rows == p.M && m.width == p.N, name, ": expected ", p.M, " rows of ", p.N, ", got ", m.rows, " of ", m.width);
  return m.stride;
}

Sizes sizes_of(const Tensor& t, int64_t dims) {
  Sizes sizes(static_cast<size_t>(dims));
  for (int64_t d = 0; d < dims; ++d) sizes[static_cast<size_t>(d)] = t.size(d);
  return sizes;
}

// weight or bias in the arithmetic type: they are read by every row, so converting them once is free.
std::optional<Tensor> parameter(const OptionalTensor& t, const char* name, int64_t N, DType dtype) {
  if (!t.has_value()) return std::nullopt;
  check(t->dim() == 1 && t->size(0) == N && t->is_contiguous(), name, ": expected a contiguous vector of the width");
  check(dtype_of(*t, name) != DType::boolean, name, ": expected a floating dtype");
  if (t->scalar_type() == accumulator_type(dtype)) return t;
  return torch::stable::to(*t, accumulator_type(dtype));
}

void set_common(NormParams& p, const Tensor& x, ScalarType sum_dtype, double dropout_p, const OptionalTensor& seed,
                bool rms) {
  const Matrix rows = matrix_of(x, "x");
  p.M = rows.rows, p.N = rows.width;
  p.dtype = dtype_of(x, "x");
  p.sum_dtype = sum_dtype == x.scalar_type() ? p.dtype : DType::f32;
  const bool narrow = p.dtype == DType::bf16 || p.dtype == DType::f16;
  check(p.dtype != DType::boolean && (sum_dtype == x.scalar_type() || (narrow && sum_dtype == ScalarType::Float)),
        "sum_dtype: expected the dtype of x, or float32 beside a 16-bit x");
  check(dropout_p >= 0 && dropout_p <= 1, "dropout_p: expected 0 to 1");
  p.dropout_p = dropout_p;
  p.dropout_seed = seed_of(seed, dropout_p, x);
  p.rms = rms;
}

double cost_of(const NormParams& p) { return 32.0 * static_cast<double>(p.M) * static_cast<double>(p.N); }

// The inputs of a forward pass that live as long as the kernel reads them.
struct NormInputs {
  NormParams p{};
  ScalarType sum_dtype;
  std::optional<Tensor> weight, bias;

  NormInputs(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& given_weight,
             const OptionalTensor& given_bias, const OptionalTensor& dropout_seed, double eps, double dropout_p,
             bool rms, std::optional<ScalarType> wanted_dtype)
      : sum_dtype(wanted_dtype.value_or(residual.has_value() ? residual->scalar_type() : x.scalar_type())) {
    set_common(p, x, sum_dtype, dropout_p, dropout_seed, rms);
    p.x = x.const_data_ptr(), p.x_stride = check_rows(x, "x", p), p.eps = eps;
    if (residual.has_value()) {
      check(residual->scalar_type() == sum_dtype, "residual: expected dtype sum_dtype");
      p.residual = residual->const_data_ptr(), p.residual_stride = check_rows(*residual, "residual", p);
    }
    weight = parameter(given_weight, "weight", p.N, p.dtype), bias = parameter(given_bias, "bias", p.N, p.dtype);
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
  const ScalarType statistics = accumulator_type(p.dtype);
  const Sizes sizes = sizes_of(x, x.dim()), lead = sizes_of(x, x.dim() - 1);
  Tensor y = empty(sizes, x.scalar_type(), x);
  Tensor sum = empty(save_sum ? sizes : Sizes{0}, inputs.sum_dtype, x);
  Tensor mean = empty(rms ? Sizes{0} : lead, statistics, x), rstd = empty(lead, statistics, x);
  p.y = y.mutable_data_ptr(), p.rstd = rstd.mutable_data_ptr();
  if (save_sum) p.sum = sum.mutable_data_ptr();
  if (!rms) p.mean = mean.mutable_data_ptr();
  p.around_cache = writes_around_cache(p, {&y, &sum});
  run_forward(p);
  if (p.N == 0) {
    torch::stable::zero_(rstd);
    torch::stable::zero_(mean);
  }
  return {y, sum, mean, rstd};
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

// Partials (chunks, N) added in order.
template <class Real>
void sum_partials(const Real* partial, int64_t chunks, int64_t N, Real* out) {
  std::vector<double> sum(static_cast<size_t>(N));
  double* s = sum.data();
  for (int64_t n = 0; n < chunks; ++n, partial += N) {
    for (int64_t c = 0; c < N; ++c) s[c] += static_cast<double>(partial[c]);
  }
  for (int64_t c = 0; c < N; ++c) out[c] = static_cast<Real>(s[c]);
}

Tensor summed(const Tensor& partial, DType dtype, ScalarType type) {
  const int64_t chunks = partial.size(0), N = partial.size(1);
  Tensor out = empty({N}, partial.scalar_type(), partial);
  if (dtype == DType::f64) {
    sum_partials(static_cast<const double*>(partial.const_data_ptr()), chunks, N,
                 static_cast<double*>(out.mutable_data_ptr()));
  } else {
    sum_partials(static_cast<const float*>(partial.const_data_ptr()), chunks, N,
                 static_cast<float*>(out.mutable_data_ptr()));
  }
  return type == out.scalar_type() ? out : torch::stable::to(out, type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_backward(Tensor grad_y, OptionalTensor grad_sum, Tensor sum,
                                                                  Tensor mean, Tensor rstd, OptionalTensor weight,
                                                                  OptionalTensor dropout_seed, double dropout_p,
                                                                  bool rms, ScalarType x_dtype,
                                                                  std::optional<ScalarType> residual_dtype,
                                                                  std::optional<ScalarType> bias_dtype) {
  NormParams p{};
  check(grad_y.scalar_type() == x_dtype, "grad_y: expected the dtype of x");
  set_common(p, grad_y, sum.scalar_type(), dropout_p, dropout_seed, rms);
  const ScalarType statistics = accumulator_type(p.dtype);
  check(rstd.numel() == p.M && rstd.scalar_type() == statistics && rstd.is_contiguous(), "rstd: expected (rows)");
  check(rms || (mean.numel() == p.M && mean.scalar_type() == statistics && mean.is_contiguous()),
        "mean: expected (rows)");
  check(!residual_dtype || *residual_dtype == sum.scalar_type(), "residual_dtype: expected the dtype of sum");
  p.saved = sum.const_data_ptr(), p.saved_stride = check_rows(sum, "sum", p);
  p.grad_y = grad_y.const_data_ptr(), p.grad_y_stride = check_rows(grad_y, "grad_y", p);
  p.mean = rms ? nullptr : const_cast<void*>(mean.const_data_ptr());
  p.rstd = const_cast<void*>(rstd.const_data_ptr());
  if (grad_sum.has_value()) {
    check(grad_sum->scalar_type() == sum.scalar_type(), "grad_sum: expected the dtype of sum");
    p.grad_sum = grad_sum->const_data_ptr(), p.grad_sum_stride = check_rows(*grad_sum, "grad_sum", p);
  }
  const auto wide_weight = parameter(weight, "weight", p.N, p.dtype);
  p.weight = pointer<void>(wide_weight);

  // Without dropout both gradients are the same numbers: one tensor serves where it also has the right dtype.
  const bool apart = residual_dtype && (dropout_p > 0 || *residual_dtype != x_dtype);
  const Sizes sizes = sizes_of(grad_y, grad_y.dim());
  Tensor grad_x = empty(sizes, x_dtype, grad_y);
  Tensor grad_residual = apart ? empty(sizes, *residual_dtype, grad_y) : empty({0}, x_dtype, grad_y);
  p.grad_x = grad_x.mutable_data_ptr();
  if (apart) p.grad_residual = grad_residual.mutable_data_ptr();
  p.around_cache = writes_around_cache(p, {&grad_x, &grad_residual});
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
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tformer

STABLE_TORCH_LIBRARY_IMPL(tformer_ext, CPU, m) {
  m.impl("_residual_norm_forward", TORCH_BOX(&tformer::residual_norm_forward));
  m.impl("_residual_norm_inference", TORCH_BOX(&tformer::residual_norm_inference));
  m.impl("_residual_norm_backward", TORCH_BOX(&tformer::residual_norm_backward));
}
