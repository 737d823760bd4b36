// Cross entropy of logits on the CPU: tensors to parameters, rows to threads.
#include <tuple>

#include "../host/tensors.h"
#include "cache_sizes.h"
#include "isa.h"
#include "parallel.h"

namespace tformer {
namespace {

CrossEntropyParams params_of(const Tensor& input, const Tensor& target, int64_t ignore_index, double label_smoothing) {
  const Matrix rows = matrix_of(input, "input");
  CrossEntropyParams p{};
  p.dtype = dtype_of(input, "input");
  check(p.dtype != DType::boolean, "input: expected a floating dtype");
  p.M = rows.rows, p.N = rows.width;
  p.x = input.const_data_ptr(), p.x_stride = rows.stride;
  check(target.scalar_type() == ScalarType::Long && target.is_contiguous() && target.numel() == p.M,
        "target: expected a contiguous int64 tensor of an element for each row, ", p.M);
  p.target = static_cast<const int64_t*>(target.const_data_ptr());
  p.ignore_index = ignore_index;
  check(label_smoothing >= 0 && label_smoothing <= 1, "label_smoothing: expected 0 to 1");
  p.label_smoothing = label_smoothing;
  for (int64_t i = 0; i < p.M; ++i) {
    const int64_t t = p.target[i];
    check((t >= 0 && t < p.N) || t == ignore_index, "target: expected 0 to ", p.N - 1, " or ", ignore_index, ", got ",
          t);
  }
  return p;
}

// run(first row, end) for all rows, which are independent of each other.
template <class Run>
void for_rows(const CrossEntropyParams& p, const Run& run) {
  constexpr int64_t kElements = 1 << 14;
  constexpr double kCost = 32;
  const int64_t rows = std::max<int64_t>(kElements / std::max<int64_t>(p.N, 1), 1), tasks = (p.M + rows - 1) / rows;
  parallel_tasks(tasks, kCost * static_cast<double>(p.M) * static_cast<double>(p.N), Share::kNeighbours,
                 [&](int64_t n, TaskTaker&) { run(n * rows, std::min((n + 1) * rows, p.M)); });
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward(Tensor input, Tensor target, int64_t ignore_index,
                                                         double label_smoothing) {
  CrossEntropyParams p = params_of(input, target, ignore_index, label_smoothing);
  const ScalarType type = accumulator_type(p.dtype);
  const Sizes sizes = sizes_of(input, input.dim() - 1);
  Tensor loss = empty(sizes, type, input), highest = empty(sizes, type, input), sum = empty(sizes, type, input);
  p.loss = loss.mutable_data_ptr(), p.highest = highest.mutable_data_ptr(), p.sum = sum.mutable_data_ptr();
  const CpuKernels& kernels = cpu_kernels();
  for_rows(p, [&](int64_t begin, int64_t end) { kernels.cross_entropy_forward(p, begin, end); });
  return {loss, highest, sum};
}

// The gradient of input into p.grad_x, which may be input's own memory.
void write_gradient(CrossEntropyParams& p, const Tensor& grad_loss, const Tensor& highest, const Tensor& sum) {
  const auto check_rows = [&](const Tensor& t, const char* name) {
    check(t.scalar_type() == accumulator_type(p.dtype) && t.is_contiguous() && t.numel() == p.M, name,
          ": expected a contiguous tensor of an element for each row, of the type of loss");
  };
  check_rows(grad_loss, "grad_loss"), check_rows(highest, "highest"), check_rows(sum, "sum");
  p.grad_loss = grad_loss.const_data_ptr();
  p.highest = const_cast<void*>(highest.const_data_ptr()), p.sum = const_cast<void*>(sum.const_data_ptr());
  const CpuKernels& kernels = cpu_kernels();
  for_rows(p, [&](int64_t begin, int64_t end) { kernels.cross_entropy_backward(p, begin, end); });
}

Tensor cross_entropy_backward(Tensor grad_loss, Tensor input, Tensor target, Tensor highest, Tensor sum,
                              int64_t ignore_index, double label_smoothing) {
  CrossEntropyParams p = params_of(input, target, ignore_index, label_smoothing);
  Tensor grad = empty(sizes_of(input, input.dim()), input.scalar_type(), input);
  const size_t bytes = static_cast<size_t>(p.M) * static_cast<size_t>(p.N) * element_bytes(input.scalar_type());
  p.around_cache = exceeds_caches(2 * bytes);
  p.grad_x = grad.mutable_data_ptr(), p.grad_x_stride = p.N;
  write_gradient(p, grad_loss, highest, sum);
  return grad;
}

void cross_entropy_backward_in_place(Tensor grad_loss, Tensor input, Tensor target, Tensor highest, Tensor sum,
                                     int64_t ignore_index, double label_smoothing) {
  CrossEntropyParams p = params_of(input, target, ignore_index, label_smoothing);
  p.grad_x = input.mutable_data_ptr(), p.grad_x_stride = p.x_stride;
  write_gradient(p, grad_loss, highest, sum);
}

}  // namespace
}  // namespace tformer

STABLE_TORCH_LIBRARY_IMPL(tformer_ext, CPU, m) {
  m.impl("_cross_entropy_forward", TORCH_BOX(&tformer::cross_entropy_forward));
  m.impl("_cross_entropy_backward", TORCH_BOX(&tformer::cross_entropy_backward));
  m.impl("_cross_entropy_backward_", TORCH_BOX(&tformer::cross_entropy_backward_in_place));
}
