// A linear layer of few rows on the CPU: tensors to parameters, columns to threads.
#include "../host/tensors.h"
#include "isa.h"
#include "parallel.h"

namespace tformer {
namespace {

constexpr int64_t kMostRows = 64;  // so many have room for their sums

// Each column of weights whose rows lie along K is a stretch of memory of its own: a task is a few of them.
void along_K(const LinearParams& p, double bytes) {
  constexpr int64_t kColumns = 32;
  const CpuKernels& kernels = cpu_kernels();
  parallel_tasks((p.N + kColumns - 1) / kColumns, bytes, Share::kNeighbours, [&](int64_t n, TaskTaker&) {
    kernels.linear_few_rows(p, 0, n * kColumns, std::min((n + 1) * kColumns, p.N));
  });
}

// Of others each row is, so a task is some rows: whole ones, where that makes enough tasks for all threads. How many
// rows make a part is a function of sizes alone, since it shows in the sums: so many that all sums together are few
// bytes beside the weights. Which columns go together does not show.
void along_N(LinearParams& p, double bytes) {
  constexpr int64_t kParts = 8, kPartBytes = 1 << 17, kBytesOverSums = 16, kUnit = 64, kLeastColumns = 256;
  const int64_t weights = static_cast<int64_t>(bytes), sums = p.M * p.N * static_cast<int64_t>(sizeof(float));
  const int64_t most = std::min({weights / kPartBytes, weights / (kBytesOverSums * sums), kParts});
  const int64_t wanted = std::max<int64_t>(most, 1);
  p.part_rows = ((p.K + wanted - 1) / wanted + 3) / 4 * 4;
  const int64_t parts = (p.K + p.part_rows - 1) / p.part_rows;
  const int64_t blocks = (2 * thread_count() + parts - 1) / parts;
  const int64_t columns = std::max(((p.N + blocks - 1) / blocks + kUnit - 1) / kUnit * kUnit, kLeastColumns);
  const int64_t across = (p.N + columns - 1) / columns;
  p.parts = static_cast<float*>(ThreadScratch::get(static_cast<size_t>(parts * p.M * p.N) * sizeof(float)));
  const CpuKernels& kernels = cpu_kernels();
  parallel_tasks(parts * across, bytes, Share::kNeighbours, [&](int64_t n, TaskTaker&) {
    const int64_t begin = n % across * columns;
    kernels.linear_few_rows(p, n / across, begin, std::min(begin + columns, p.N));
  });
  kernels.norm_sum(DType::f32, p.parts, parts, p.M * p.N, p.dtype, p.y);
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
  check(p.weight_stride[0] == 1 || p.weight_stride[1] == 1, "weight: expected a stride of 1");
  if (bias.has_value()) {
    check(bias->dim() == 1 && bias->size(0) == p.N && bias->is_contiguous() && bias->scalar_type() == x.scalar_type(),
          "bias: expected a contiguous vector of N elements of the dtype of x");
    p.bias = bias->const_data_ptr();
  }
  Sizes sizes = sizes_of(x, x.dim() - 1);
  sizes.push_back(p.N);
  Tensor y = empty(sizes, x.scalar_type(), x);
  p.y = y.mutable_data_ptr();
  if (p.M == 0 || p.N == 0) return y;
  check(p.K > 0 && p.M <= kMostRows, "x: expected 1 to ", kMostRows, " rows of at least one element");

  const double bytes = static_cast<double>(p.N) * static_cast<double>(p.K) * element_bytes(x.scalar_type());
  p.weight_stride[1] == 1 ? along_K(p, bytes) : along_N(p, bytes);
  return y;
}

Tensor empty_matrix(Tensor like, int64_t rows, int64_t columns, ScalarType dtype) {
  check(rows >= 0 && columns >= 0, "rows, columns: expected 0 or more");
  return empty({rows, columns}, dtype, like);
}

}  // namespace
}  // namespace tformer

STABLE_TORCH_LIBRARY_IMPL(tformer_ext, CPU, m) {
  m.impl("_linear_few_rows", TORCH_BOX(&tformer::linear_few_rows));
  m.impl("_empty_matrix", TORCH_BOX(&tformer::empty_matrix));
}
