// A linear layer of few rows on the CPU: tensors to parameters, columns to threads.
#include "../host/tensors.h"
#include "isa.h"
#include "parallel.h"

namespace tformer {
namespace {

constexpr int64_t kMostRows = 64;  // so many have room for their sums

// Columns that a thread takes at a time. Of weights whose rows lie along K a few, since each column is a stretch of
// memory of its own; of others as many as possible, since each row is. Which columns go together does not show in sums.
int64_t columns_per_task(const LinearParams& p) {
  constexpr int64_t kColumns = 32, kLeast = 256;
  if (p.weight_stride[1] == 1) return kColumns;
  const int64_t share = (p.N + thread_count() - 1) / thread_count();
  return std::max(kLeast, (share + kColumns - 1) / kColumns * kColumns);
}

Tensor linear_few_rows(Tensor x, Tensor weight, OptionalTensor bias) {
  const Matrix rows = matrix_of(x, "x");
  check(weight.dim() == 2 && weight.size(1) == rows.width, "weight: expected (N, ", rows.width, ")");
  LinearParams p{};
  p.dtype = dtype_of(x, "x");
  p.M = rows.rows, p.N = weight.size(0), p.K = rows.width;
  check(p.dtype == DType::f32 || p.dtype == DType::bf16 || p.dtype == DType::f16,
        "x: expected float32, bfloat16 or float16");
  check(weight.scalar_type() == x.scalar_type(), "weight: expected the dtype of x");
  p.x = x.const_data_ptr(), p.x_stride = rows.stride;
  p.weight = weight.const_data_ptr();
  p.weight_stride[0] = weight.stride(0), p.weight_stride[1] = weight.stride(1);
  if (p.K == 1) p.weight_stride[1] = 1;
  check(p.weight_stride[0] == 1 || p.weight_stride[1] == 1 || p.N <= 1, "weight: expected a stride of 1");
  if (bias.has_value()) {
    check(bias->dim() == 1 && bias->size(0) == p.N && bias->is_contiguous() && bias->scalar_type() == x.scalar_type(),
          "bias: expected a contiguous vector of N elements of the dtype of x");
    p.bias = bias->const_data_ptr();
  }
  Sizes sizes(static_cast<size_t>(x.dim()), p.N);
  for (int64_t d = 0; d + 1 < x.dim(); ++d) sizes[static_cast<size_t>(d)] = x.size(d);
  Tensor y = empty(sizes, x.scalar_type(), x);
  p.y = y.mutable_data_ptr();
  if (p.M == 0 || p.N == 0) return y;
  check(p.K > 0 && p.M <= kMostRows, "x: expected 1 to ", kMostRows, " rows of at least one element");

  const CpuKernels& kernels = cpu_kernels();
  const int64_t step = columns_per_task(p);
  const double bytes = static_cast<double>(p.N) * static_cast<double>(p.K) * element_bytes(x.scalar_type());
  parallel_tasks((p.N + step - 1) / step, bytes, Share::kNeighbours,
                 [&](int64_t n, TaskTaker&) { kernels.linear_few_rows(p, n * step, std::min((n + 1) * step, p.N)); });
  return y;
}

}  // namespace
}  // namespace tformer

STABLE_TORCH_LIBRARY_IMPL(tformer_ext, CPU, m) { m.impl("_linear_few_rows", TORCH_BOX(&tformer::linear_few_rows)); }
