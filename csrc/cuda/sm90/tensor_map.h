// Tensor maps (TMA descriptors), encoded on the host. The driver's functions are looked up by name, so that the library
// loads on machines without a driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace resnet_kernels::sm90 {

template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const auto error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess)
    throw std::runtime_error(std::string("the CUDA driver has no ") + name + ": " + cudaGetErrorString(error));
  return reinterpret_cast<Function>(found);
}

inline void check(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("no tensor map of ") + what + " (CUDA driver error " +
                             std::to_string(static_cast<int>(result)) + ")");
}

inline CUtensorMapDataType type_of(bool half) {
  return half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// A tiled map. sizes: innermost dimension first; strides: of the other dimensions, in elements; box: what one copy
// brings. Out of bounds, loads give zeros and stores write nothing.
template <size_t kRank>
CUtensorMap tiled_map(const char* what, bool half, const void* data, std::array<int64_t, kRank> sizes,
                      std::array<int64_t, kRank - 1> strides, std::array<int, kRank> box,
                      CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  CUtensorMap map;
  cuuint64_t dims[kRank], bytes[kRank];
  cuuint32_t boxes[kRank], steps[kRank];
  for (size_t i = 0; i < kRank; ++i) {
    dims[i] = sizes[i], boxes[i] = box[i], steps[i] = 1;
    if (i + 1 < kRank) bytes[i] = strides[i] * 2;
  }
  check(encode(&map, type_of(half), kRank, const_cast<void*>(data), dims, bytes, boxes, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        what);
  return map;
}

// An im2col map of x (N, H, W, C): one copy brings 64 channels of `positions` consecutive output positions, for the tap
// given by the copy's offsets. reach: dilation * (filter size - 1). The box of top-left input positions has its lower
// corner at -padding and its upper at padding - reach; outside the map are zeros.
inline CUtensorMap im2col_map(const char* what, bool half, const void* data, std::array<int64_t, 4> nhwc,
                              std::array<int64_t, 3> strides, int stride, int padding, int reach_w, int reach_h,
                              int positions) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  CUtensorMap map;
  const auto [N, H, W, C] = nhwc;
  const cuuint64_t dims[4] = {cuuint64_t(C), cuuint64_t(W), cuuint64_t(H), cuuint64_t(N)};
  const cuuint64_t bytes[3] = {cuuint64_t(strides[2]) * 2, cuuint64_t(strides[1]) * 2, cuuint64_t(strides[0]) * 2};
  const int lower[2] = {-padding, -padding}, upper[2] = {padding - reach_w, padding - reach_h};
  const cuuint32_t steps[4] = {1, cuuint32_t(stride), cuuint32_t(stride), 1};
  check(encode(&map, type_of(half), 4, const_cast<void*>(data), dims, bytes, lower, upper, 64, positions, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        what);
  return map;
}

// A map of x (N, H, W, 4), contiguous, as rows of 2 * W elements of 4 bytes (half a pixel): one copy brings `elements`
// of one row, unswizzled.
inline CUtensorMap row_map(const char* what, const void* data, int N, int H, int W, int elements) {
  static const auto encode = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  CUtensorMap map;
  const cuuint64_t dims[3] = {cuuint64_t(2 * W), cuuint64_t(H), cuuint64_t(N)};
  const cuuint64_t bytes[2] = {cuuint64_t(W) * 8, cuuint64_t(W) * H * 8};
  const cuuint32_t box[3] = {cuuint32_t(elements), 1, 1}, steps[3] = {1, 1, 1};
  check(encode(&map, CU_TENSOR_MAP_DATA_TYPE_INT32, 3, const_cast<void*>(data), dims, bytes, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        what);
  return map;
}

}  // namespace resnet_kernels::sm90
