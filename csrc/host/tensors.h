// What host files need of tensors: checks, allocation, pointers. Only the stable ABI of LibTorch is used.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/block_cache.h"
#include "../params.h"

namespace tformer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The Python functions check their arguments first, with types and names; these checks guard memory when an operator
// is called directly.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "tformer_ext: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Bool:
      return DType::boolean;
    default:
      check(false, name, ": expected float64, float32, bfloat16, float16 or bool");
  }
  return DType::f32;
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return ScalarType::Double;
    case DType::bf16:
      return ScalarType::BFloat16;
    case DType::f16:
      return ScalarType::Half;
    case DType::boolean:
      return ScalarType::Bool;
    default:
      return ScalarType::Float;
  }
}

// The type of statistics and of accumulators kept between kernels.
inline ScalarType accumulator_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

using Sizes = std::vector<int64_t>;

// Of the first `dims` dimensions.
inline Sizes sizes_of(const Tensor& t, int64_t dims) {
  Sizes sizes(static_cast<size_t>(dims));
  for (int64_t d = 0; d < dims; ++d) sizes[static_cast<size_t>(d)] = t.size(d);
  return sizes;
}

inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t next = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = next;
    next *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

inline size_t element_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
    case ScalarType::Int:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      check(false, "element_bytes: a type that no operator makes");
  }
  return 0;
}

// Uninitialised, on the device of `like`. Large ones on the CPU come from the block cache.
inline Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType type, const Tensor& like) {
  if (like.is_cpu()) {
    size_t bytes = element_bytes(type);
    for (int64_t size : sizes) bytes *= static_cast<size_t>(size);
    if (void* data = BlockCache::instance().take(bytes)) {
      return torch::stable::from_blob(data, sizes, strides, like.device(), type,
                                      [bytes](void* block) { BlockCache::instance().give_back(block, bytes); });
    }
  }
  // Straight to the shim: the stable ops go through the dispatcher.
  AtenTensorHandle handle;
  const int32_t device_type = like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const Sizes& sizes, ScalarType type, const Tensor& like) {
  return empty_strided(sizes, contiguous_strides(sizes), type, like);
}

// Uninitialised 4-D tensor that lies in memory as `like` does: dimensions 0 to 2 by falling stride, the last innermost.
inline Tensor empty_in_order_of(const Tensor& like, const Sizes& sizes) {
  std::array<int, 3> order{0, 1, 2};
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return like.stride(a) > like.stride(b); });
  Sizes strides(4, 1);
  int64_t next = std::max<int64_t>(sizes[3], 1);
  for (int n = 2; n >= 0; --n) {
    strides[order[n]] = next;
    next *= std::max<int64_t>(sizes[order[n]], 1);
  }
  return empty_strided(sizes, strides, like.scalar_type(), like);
}

// (..., N) as rows of N elements, `stride` apart.
struct Matrix {
  int64_t rows, width, stride;
};

inline Matrix matrix_of(const Tensor& t, const char* name) {
  check(t.dim() > 0, name, ": expected at least one dimension");
  int64_t d = t.dim() - 1;
  Matrix m{1, t.size(d), t.size(d)};
  check(m.width <= 1 || t.stride(d) == 1 || t.numel() == 0, name, ": expected a last stride of 1");
  while (--d >= 0) {
    if (t.size(d) == 1) continue;
    if (m.rows == 1) m.stride = t.stride(d);
    check(t.stride(d) == m.stride * m.rows || t.numel() == 0, name, ": expected evenly spaced rows");
    m.rows *= t.size(d);
  }
  return m;
}

template <class T>
T* pointer(const OptionalTensor& t) {
  return t.has_value() ? static_cast<T*>(const_cast<void*>(t->const_data_ptr())) : nullptr;
}

// Read by the kernels, not here: on a GPU that would wait for it, and a captured graph would keep its value.
inline const int64_t* seed_of(const OptionalTensor& seed, double dropout_p, const Tensor& like) {
  if (dropout_p <= 0) return nullptr;
  check(seed.has_value() && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long &&
            seed->is_cpu() == like.is_cpu() && seed->get_device_index() == like.get_device_index(),
        "dropout_seed: expected an int64 tensor of one element beside the others with dropout_p > 0");
  return pointer<int64_t>(seed);
}

}  // namespace tformer
