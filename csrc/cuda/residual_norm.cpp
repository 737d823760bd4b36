// Residual LayerNorm / RMSNorm on CUDA: tensors to parameters, launches.
#include "residual_norm.h"

#include <tuple>

#include "../host/norm_arguments.h"
#include "runtime.h"

namespace tformer {
namespace {

// A parameter and what it points to.
struct Parameter {
  std::optional<Tensor> tensor;
  NormVector vector{nullptr, DType::f32};

  Parameter(const OptionalTensor& t, const char* name, const NormParams& p) : tensor(t) {
    check_parameter(t, name, p);
    if (!t.has_value()) return;
    if (t->scalar_type() != scalar_type_of(p.dtype) && t->scalar_type() != accumulator_type(p.dtype)) {
      tensor = torch::stable::to(*t, accumulator_type(p.dtype));
    }
    vector = {tensor->const_data_ptr(), dtype_of(*tensor, name)};
  }
};

NormCall call_of(const NormParams& p, const Parameter& weight, const NormVector& bias) {
  check(p.N <= 1 << 30, "x: expected at most 2^30 columns");
  NormCall call{};
  call.p = p, call.weight = weight.vector, call.bias = bias;
  call.dropout = dropout_params(p.dropout_p, p.dropout_seed);
  return call;
}

void check_same_device(const Tensor& x, std::initializer_list<const OptionalTensor*> others) {
  for (const OptionalTensor* t : others) {
    check(!t->has_value() || ((*t)->is_cpu() == x.is_cpu() && (*t)->get_device_index() == x.get_device_index()),
          "expected all tensors on one device");
  }
}

void run_forward(const NormParams& p, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias) {
  const Parameter for_weight(weight, "weight", p), for_bias(bias, "bias", p);
  if (p.N == 0 || p.M == 0) return;
  const gpu::OnDevice on(x);
  const NormCall call = call_of(p, for_weight, for_bias.vector);
  gpu::check_launch(launch_norm_forward(call, {on.device().multiprocessors, on.device().shared_bytes}, on.stream()),
                    "residual_norm_forward");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_forward(Tensor x, OptionalTensor residual,
                                                                 OptionalTensor weight, OptionalTensor bias,
                                                                 OptionalTensor dropout_seed, double eps,
                                                                 double dropout_p, bool rms, bool save_sum,
                                                                 std::optional<ScalarType> wanted_dtype) {
  check_same_device(x, {&residual, &weight, &bias});
  const ScalarType sum_dtype = sum_dtype_of(x, residual, wanted_dtype);
  NormParams p = norm_forward_params(x, residual, dropout_seed, eps, dropout_p, rms, sum_dtype);
  NormOutputs out(p, x, sum_dtype, save_sum);
  run_forward(p, x, weight, bias);
  if (p.N == 0) {
    torch::stable::zero_(out.rstd);
    torch::stable::zero_(out.mean);
  }
  return {out.y, out.sum, out.mean, out.rstd};
}

Tensor residual_norm_inference(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
                               double eps, bool rms) {
  check_same_device(x, {&residual, &weight, &bias});
  NormParams p = norm_forward_params(x, residual, std::nullopt, eps, 0, rms, sum_dtype_of(x, residual, std::nullopt));
  Tensor y = empty(sizes_of(x, x.dim()), x.scalar_type(), x);
  p.y = y.mutable_data_ptr();
  run_forward(p, x, weight, bias);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_backward(Tensor grad_y, OptionalTensor grad_sum, Tensor sum,
                                                                  Tensor mean, Tensor rstd, OptionalTensor weight,
                                                                  OptionalTensor dropout_seed, double dropout_p,
                                                                  bool rms, ScalarType x_dtype,
                                                                  std::optional<ScalarType> residual_dtype,
                                                                  std::optional<ScalarType> bias_dtype) {
  const OptionalTensor saved = sum, of_mean = mean, of_rstd = rstd;
  check_same_device(grad_y, {&grad_sum, &saved, &of_mean, &of_rstd, &weight});
  NormParams p =
      norm_backward_params(grad_y, grad_sum, sum, mean, rstd, dropout_seed, dropout_p, rms, x_dtype, residual_dtype);
  const Parameter for_weight(weight, "weight", p);
  NormGradients gradients(p, grad_y, x_dtype, residual_dtype);
  Tensor grad_weight = weight ? empty({p.N}, weight->scalar_type(), grad_y) : empty({0}, x_dtype, grad_y);
  Tensor grad_bias = bias_dtype ? empty({p.N}, *bias_dtype, grad_y) : empty({0}, x_dtype, grad_y);
  if (p.M == 0 || p.N == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {gradients.x, gradients.residual, grad_weight, grad_bias};
  }

  const gpu::OnDevice on(grad_y);
  const NormDevice device{on.device().multiprocessors, on.device().shared_bytes};
  const Sizes partials{most_norm_partials(device), p.N};
  std::optional<Tensor> partial_weight, partial_bias;
  NormSums sums{};
  if (weight) {
    partial_weight = empty(partials, accumulator_type(p.dtype), grad_y);
    p.partial_weight = partial_weight->mutable_data_ptr();
    sums.out[0] = grad_weight.mutable_data_ptr(), sums.dtype[0] = dtype_of(grad_weight, "weight");
  }
  if (bias_dtype) {
    partial_bias = empty(partials, accumulator_type(p.dtype), grad_y);
    p.partial_bias = partial_bias->mutable_data_ptr();
    sums.out[1] = grad_bias.mutable_data_ptr(), sums.dtype[1] = dtype_of(grad_bias, "bias");
  }
  const NormCall call = call_of(p, for_weight, {nullptr, DType::f32});
  gpu::check_launch(launch_norm_backward(call, device, sums, on.stream()), "residual_norm_backward");
  return {gradients.x, gradients.residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace tformer

STABLE_TORCH_LIBRARY_IMPL(TFORMER_NAMESPACE, TFORMER_CUDA_KEY, m) {
  m.impl("_residual_norm_forward", TORCH_BOX(&tformer::residual_norm_forward));
  m.impl("_residual_norm_inference", TORCH_BOX(&tformer::residual_norm_inference));
  m.impl("_residual_norm_backward", TORCH_BOX(&tformer::residual_norm_backward));
}
