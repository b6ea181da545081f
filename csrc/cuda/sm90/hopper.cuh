// Shared by the sm_90a kernels, on top of instructions.cuh: shared memory matrix descriptors for wgmma, and pairs of
// 16-bit values.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/sm90/index.h"
#include "cuda/sm90/instructions.cuh"

namespace resnet_kernels::sm90 {

// The descriptor of a K-major matrix with rows of 128 bytes and the 128-byte swizzle, as TMA writes it: 16-byte chunk j
// of row r is stored in place j ^ (r % 8), with r counted from a multiple of 1024 bytes. The hardware swizzles by
// address bits, so the matrix may begin at any row with base offset 0.
__device__ inline uint64_t swizzled_matrix(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{8 * kRow / 16} << 32, kUnused = 1 << 16;
  return kSwizzle128 | kEightRows | kUnused | ((address & 0x3FFFF) >> 4);
}

// Descriptor increment from one k-step of wgmma to the next: 16 channels, 32 bytes, along the rows.
constexpr uint64_t kNextProduct = 32 / 16;

// The descriptor of the same memory as an MN-major matrix: the reduction runs over rows (positions), 16 per wgmma, and
// channels are the result's rows or columns. slice: bytes from one slice of 64 channels to the next. Must begin at a
// multiple of 1024 bytes.
__device__ inline uint64_t transposed_matrix(uint32_t address, uint32_t slice) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{8 * kRow / 16} << 32;
  return kSwizzle128 | kEightRows | uint64_t{slice / 16} << 16 | ((address & 0x3FFFF) >> 4);
}

// Descriptor increment to the next 16 rows.
constexpr uint64_t kNextTransposed = 16 * kRow / 16;

__device__ inline float relu(float v) { return max_nan(v, 0.f); }

__device__ inline float2 relu(float2 v) { return {relu(v.x), relu(v.y)}; }

// Conversions of two 16-bit values packed in one register, adjacent in memory.
template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  __device__ static uint16_t narrow(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
  __device__ static uint32_t narrow(float2 v) {
    const __nv_bfloat162 pair = __float22bfloat162_rn(v);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static float2 widen(uint32_t v) { return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v)); }
  __device__ static uint32_t max_nan(uint32_t a, uint32_t b) { return max_nan_bf16x2(a, b); }
  static constexpr uint32_t kMinusInfinity = 0xFF80;
};
template <>
struct Pair<__half> {
  __device__ static uint16_t narrow(float v) { return __half_as_ushort(__float2half_rn(v)); }
  __device__ static uint32_t narrow(float2 v) {
    const __half2 pair = __float22half2_rn(v);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static float2 widen(uint32_t v) { return __half22float2(reinterpret_cast<const __half2&>(v)); }
  __device__ static uint32_t max_nan(uint32_t a, uint32_t b) { return max_nan_f16x2(a, b); }
  static constexpr uint32_t kMinusInfinity = 0xFC00;
};

}  // namespace resnet_kernels::sm90
