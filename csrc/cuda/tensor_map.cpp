#include "gpu/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime.h>

namespace tformer::gpu {
namespace {

// The driver's function, asked for through the runtime: nothing is linked against the driver, which a machine without a
// GPU lacks.
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error == cudaSuccess && found == cudaDriverEntryPointSuccess) return reinterpret_cast<Encode>(function);
  cudaGetLastError();  // told by the caller, not by the next launch
  return nullptr;
}

}  // namespace

Status encode_tensor_map(TensorMap& map, const void* data, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                         int rows) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  static const Encode encode = find_encode();
  if (encode == nullptr) return cudaErrorNotSupported;
  constexpr int kRank = 4;
  cuuint64_t size[kRank], stride_bytes[kRank - 1];
  for (int d = 0; d < kRank; ++d) size[d] = static_cast<cuuint64_t>(sizes[d]);
  for (int d = 0; d + 1 < kRank; ++d) stride_bytes[d] = static_cast<cuuint64_t>(strides[d]) * 2;
  const cuuint32_t box[kRank] = {kBoxColumns, static_cast<cuuint32_t>(rows), 1, 1}, steps[kRank] = {1, 1, 1, 1};
  // bits are copied, so any type of 16 bits does
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16, kRank, const_cast<void*>(data), size,
             stride_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? kSuccess : static_cast<Status>(cudaErrorInvalidValue);
}

}  // namespace tformer::gpu
