// Residual LayerNorm / RMSNorm on the CPU: tensors to parameters, rows to threads.
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

void check_rows(const Tensor& t, const char* name, int64_t M, int64_t N) {
  check(t.dim() == 2 && t.size(0) == M && t.size(1) == N && (N == 1 || t.stride(1) == 1 || t.numel() == 0), name,
        ": expected (rows, width) with a last stride of 1");
}

// weight or bias in the arithmetic type: they are read by every row, so converting them once is free.
std::optional<Tensor> parameter(const OptionalTensor& t, const char* name, int64_t N, DType dtype) {
  if (!t.has_value()) return std::nullopt;
  check(t->dim() == 1 && t->size(0) == N && t->is_contiguous(), name, ": expected a contiguous vector of the width");
  if (t->scalar_type() == accumulator_type(dtype)) return t;
  return torch::stable::to(*t, accumulator_type(dtype));
}

void set_common(NormParams& p, const Tensor& x, ScalarType sum_dtype, double dropout_p, const OptionalTensor& seed,
                bool rms) {
  p.M = x.size(0), p.N = x.size(1);
  p.dtype = dtype_of(x, "x");
  p.sum_dtype = sum_dtype == x.scalar_type() ? p.dtype : DType::f32;
  const bool narrow = p.dtype == DType::bf16 || p.dtype == DType::f16;
  check(p.dtype != DType::boolean && (sum_dtype == x.scalar_type() || (narrow && sum_dtype == ScalarType::Float)),
        "sum_dtype: expected the dtype of x, or float32 beside a 16-bit x");
  check(dropout_p >= 0 && dropout_p <= 1, "dropout_p: expected 0 to 1");
  p.dropout_p = dropout_p;
  p.dropout_seed = seed_of(seed, dropout_p);
  p.rms = rms;
}

double cost_of(const NormParams& p) { return 32.0 * static_cast<double>(p.M) * static_cast<double>(p.N); }

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_forward(Tensor x, OptionalTensor residual,
                                                                 OptionalTensor weight, OptionalTensor bias,
                                                                 OptionalTensor dropout_seed, double eps,
                                                                 double dropout_p, bool rms, bool save_sum,
                                                                 ScalarType sum_dtype) {
  NormParams p{};
  check(x.dim() == 2, "x: expected 2 dimensions");
  set_common(p, x, sum_dtype, dropout_p, dropout_seed, rms);
  check_rows(x, "x", p.M, p.N);
  p.x = x.const_data_ptr(), p.x_stride = x.stride(0), p.eps = eps;
  if (residual.has_value()) {
    check_rows(*residual, "residual", p.M, p.N);
    check(residual->scalar_type() == sum_dtype, "residual: expected dtype sum_dtype");
    p.residual = residual->const_data_ptr(), p.residual_stride = residual->stride(0);
  }
  const auto wide_weight = parameter(weight, "weight", p.N, p.dtype), wide_bias = parameter(bias, "bias", p.N, p.dtype);
  p.weight = pointer<void>(wide_weight), p.bias = pointer<void>(wide_bias);
  const ScalarType statistics = accumulator_type(p.dtype);
  Tensor y = empty({p.M, p.N}, x.scalar_type(), x);
  Tensor sum = save_sum ? empty({p.M, p.N}, sum_dtype, x) : empty({0}, sum_dtype, x);
  Tensor mean = empty({rms ? 0 : p.M}, statistics, x), rstd = empty({p.M}, statistics, x);
  p.y = y.mutable_data_ptr(), p.rstd = rstd.mutable_data_ptr();
  if (save_sum) p.sum = sum.mutable_data_ptr();
  if (!rms) p.mean = mean.mutable_data_ptr();

  if (p.N > 0) {
    const CpuKernels& kernels = cpu_kernels();
    const int64_t rows = rows_per_chunk(p.M), chunks = (p.M + rows - 1) / rows;
    parallel_tasks(chunks, cost_of(p), [&](int64_t n) {
      kernels.norm_forward(p, n * rows, std::min((n + 1) * rows, p.M), ThreadScratch::get(kernels.norm_scratch(p)));
    });
  } else {
    torch::stable::zero_(rstd);
    torch::stable::zero_(mean);
  }
  return {y, sum, mean, rstd};
}

// Partials (chunks, N) added in order.
template <class Real>
void sum_partials(const Real* partial, int64_t chunks, int64_t N, Real* out) {
  for (int64_t c = 0; c < N; ++c) {
    double sum = 0;
    for (int64_t n = 0; n < chunks; ++n) sum += static_cast<double>(partial[n * N + c]);
    out[c] = static_cast<Real>(sum);
  }
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
  check(grad_y.dim() == 2 && grad_y.scalar_type() == x_dtype, "grad_y: expected 2 dimensions and the dtype of x");
  set_common(p, grad_y, sum.scalar_type(), dropout_p, dropout_seed, rms);
  check_rows(grad_y, "grad_y", p.M, p.N);
  check_rows(sum, "sum", p.M, p.N);
  const ScalarType statistics = accumulator_type(p.dtype);
  check(rstd.numel() == p.M && rstd.scalar_type() == statistics && rstd.is_contiguous(), "rstd: expected (rows)");
  check(rms || (mean.numel() == p.M && mean.scalar_type() == statistics && mean.is_contiguous()),
        "mean: expected (rows)");
  check(!residual_dtype || *residual_dtype == sum.scalar_type(), "residual_dtype: expected the dtype of sum");
  p.saved = sum.const_data_ptr(), p.saved_stride = sum.stride(0);
  p.grad_y = grad_y.const_data_ptr(), p.grad_y_stride = grad_y.stride(0);
  p.mean = rms ? nullptr : const_cast<void*>(mean.const_data_ptr());
  p.rstd = const_cast<void*>(rstd.const_data_ptr());
  if (grad_sum.has_value()) {
    check_rows(*grad_sum, "grad_sum", p.M, p.N);
    check(grad_sum->scalar_type() == sum.scalar_type(), "grad_sum: expected the dtype of sum");
    p.grad_sum = grad_sum->const_data_ptr(), p.grad_sum_stride = grad_sum->stride(0);
  }
  const auto wide_weight = parameter(weight, "weight", p.N, p.dtype);
  p.weight = pointer<void>(wide_weight);

  // Without dropout both gradients are the same numbers: one tensor serves where it also has the right dtype.
  const bool apart = residual_dtype && (dropout_p > 0 || *residual_dtype != x_dtype);
  Tensor grad_x = empty({p.M, p.N}, x_dtype, grad_y);
  Tensor grad_residual = apart ? empty({p.M, p.N}, *residual_dtype, grad_y) : empty({0}, x_dtype, grad_y);
  p.grad_x = grad_x.mutable_data_ptr();
  if (apart) p.grad_residual = grad_residual.mutable_data_ptr();
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
  m.impl("_residual_norm_backward", TORCH_BOX(&tformer::residual_norm_backward));
}
