// Tensors of a residual norm to NormParams, checked. Shared by all backends.
#pragma once

#include "tensors.h"

namespace tformer {

// The stride of t's rows.
inline int64_t check_rows(const Tensor& t, const char* name, const NormParams& p) {
  const Matrix m = matrix_of(t, name);
  check(m.rows == p.M && m.width == p.N, name, ": expected ", p.M, " rows of ", p.N, ", got ", m.rows, " of ", m.width);
  return m.stride;
}

inline void check_parameter(const OptionalTensor& t, const char* name, const NormParams& p) {
  if (!t.has_value()) return;
  check(t->dim() == 1 && t->size(0) == p.N && t->is_contiguous(), name, ": expected a contiguous vector of the width");
  check(dtype_of(*t, name) != DType::boolean, name, ": expected a floating dtype");
}

inline void set_norm_options(NormParams& p, const Tensor& x, ScalarType sum_dtype, double dropout_p,
                             const OptionalTensor& seed, bool rms) {
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

inline ScalarType sum_dtype_of(const Tensor& x, const OptionalTensor& residual, std::optional<ScalarType> wanted) {
  return wanted.value_or(residual.has_value() ? residual->scalar_type() : x.scalar_type());
}

// All but weight, bias and the outputs.
inline NormParams norm_forward_params(const Tensor& x, const OptionalTensor& residual,
                                      const OptionalTensor& dropout_seed, double eps, double dropout_p, bool rms,
                                      ScalarType sum_dtype) {
  NormParams p{};
  set_norm_options(p, x, sum_dtype, dropout_p, dropout_seed, rms);
  p.x = x.const_data_ptr(), p.x_stride = check_rows(x, "x", p), p.eps = eps;
  if (residual.has_value()) {
    check(residual->scalar_type() == sum_dtype, "residual: expected dtype sum_dtype");
    p.residual = residual->const_data_ptr(), p.residual_stride = check_rows(*residual, "residual", p);
  }
  return p;
}

// What a forward pass returns, uninitialised; p points to it.
struct NormOutputs {
  Tensor y, sum, mean, rstd;

  NormOutputs(NormParams& p, const Tensor& x, ScalarType sum_dtype, bool save_sum)
      : y(empty(sizes_of(x, x.dim()), x.scalar_type(), x)),
        sum(empty(save_sum ? sizes_of(x, x.dim()) : Sizes{0}, sum_dtype, x)),
        mean(empty(p.rms ? Sizes{0} : sizes_of(x, x.dim() - 1), accumulator_type(p.dtype), x)),
        rstd(empty(sizes_of(x, x.dim() - 1), accumulator_type(p.dtype), x)) {
    p.y = y.mutable_data_ptr(), p.rstd = rstd.mutable_data_ptr();
    if (save_sum) p.sum = sum.mutable_data_ptr();
    if (!p.rms) p.mean = mean.mutable_data_ptr();
  }
};

// All but weight, the partials and the outputs.
inline NormParams norm_backward_params(const Tensor& grad_y, const OptionalTensor& grad_sum, const Tensor& sum,
                                       const Tensor& mean, const Tensor& rstd, const OptionalTensor& dropout_seed,
                                       double dropout_p, bool rms, ScalarType x_dtype,
                                       std::optional<ScalarType> residual_dtype) {
  NormParams p{};
  check(grad_y.scalar_type() == x_dtype, "grad_y: expected the dtype of x");
  set_norm_options(p, grad_y, sum.scalar_type(), dropout_p, dropout_seed, rms);
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
  return p;
}

// The gradients of x and of the residual, uninitialised; p points to them. Without dropout both are the same numbers:
// one tensor serves where it also has the right dtype.
struct NormGradients {
  Tensor x, residual;

  NormGradients(NormParams& p, const Tensor& grad_y, ScalarType x_dtype, std::optional<ScalarType> residual_dtype)
      : NormGradients(p, grad_y, x_dtype, residual_dtype.value_or(x_dtype),
                      residual_dtype && (p.dropout_p > 0 || *residual_dtype != x_dtype)) {}

 private:
  NormGradients(NormParams& p, const Tensor& grad_y, ScalarType x_dtype, ScalarType residual_dtype, bool apart)
      : x(empty(sizes_of(grad_y, grad_y.dim()), x_dtype, grad_y)),
        residual(apart ? empty(sizes_of(grad_y, grad_y.dim()), residual_dtype, grad_y) : empty({0}, x_dtype, grad_y)) {
    p.grad_x = x.mutable_data_ptr();
    if (apart) p.grad_residual = residual.mutable_data_ptr();
  }
};

}  // namespace tformer
