// The driver's functions that encode tensor maps, with the driver's checks.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <deque>
#include <cstring>

#include "cuda/sm90/copy_engine.h"

namespace emulation {
namespace {

std::deque<TensorMap> maps;

bool fits(const TensorMap& m) {
  bool well = reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
  for (int i = 0; i < m.rank; ++i) well = well && m.sizes[i] > 0 && m.sizes[i] <= int64_t{1} << 32;
  for (int i = 1; i < m.rank; ++i) well = well && m.strides[i] % 16 == 0 && m.strides[i] < int64_t{1} << 40;
  return well;
}

CUresult keep(CUtensorMap* to, const TensorMap& m) {
  if (!fits(m)) return CUDA_ERROR_INVALID_VALUE;
  maps.push_back(m);
  const TensorMap* kept = &maps.back();
  std::memset(to, 0, sizeof(*to));
  std::memcpy(to, &kept, sizeof(kept));
  return CUDA_SUCCESS;
}

TensorMap common(CUtensorMapDataType type, int rank, void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                 CUtensorMapSwizzle swizzle) {
  TensorMap m{};
  m.data = static_cast<uint8_t*>(data), m.rank = rank;
  m.bytes = type == CU_TENSOR_MAP_DATA_TYPE_INT32 ? 4 : 2;
  m.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  for (int i = 0; i < rank; ++i) m.sizes[i] = sizes[i], m.strides[i] = i == 0 ? m.bytes : strides[i - 1];
  return m;
}

CUresult encode_tiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  TensorMap m = common(type, rank, data, sizes, strides, swizzle);
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (box[i] < 1 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    m.box[i] = box[i];
  }
  const int row = m.box[0] * m.bytes;
  if (row % 16 || (m.swizzled && row > 128)) return CUDA_ERROR_INVALID_VALUE;
  return keep(to, m);
}

CUresult encode_im2col(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                       const cuuint64_t* strides, const int* lower, const int* upper, cuuint32_t channels,
                       cuuint32_t pixels, const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  TensorMap m = common(type, rank, data, sizes, strides, swizzle);
  if (rank != 4 || channels > 256 || pixels > 1024) return CUDA_ERROR_INVALID_VALUE;
  m.im2col = true, m.box[0] = channels, m.box[1] = pixels;
  for (int i = 0; i < 2; ++i) {
    if (lower[i] < -128 || lower[i] > 127 || upper[i] < -128 || upper[i] > 127 || steps[i + 1] < 1 || steps[i + 1] > 8)
      return CUDA_ERROR_INVALID_VALUE;
    m.lower[i] = lower[i], m.upper[i] = upper[i], m.steps[i] = steps[i + 1];
  }
  return keep(to, m);
}

}  // namespace
}  // namespace emulation

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = std::strcmp(name, "cuTensorMapEncodeTiled") == 0 ? reinterpret_cast<void*>(&emulation::encode_tiled)
                                                               : reinterpret_cast<void*>(&emulation::encode_im2col);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return "an emulated CUDA error"; }
}
