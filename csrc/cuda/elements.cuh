// Vectors of eight channels, the unit of every memory access of the passes. With kAligned, 16-bit types use one 16-byte
// access and fp32 two. Without it (the channel count is no multiple of eight, or memory is not 16-byte aligned) the
// same code accesses single elements and skips those at or beyond `left`, the number of channels that remain.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/instructions.cuh"

namespace resnet_kernels {

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ inline T narrow(float v);
template <>
__device__ inline float narrow<float>(float v) { return v; }
template <>
__device__ inline __half narrow<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

template <typename T>
struct alignas(16) Eight {
  T v[8];
};

template <typename T, bool kAligned>
__device__ inline Eight<T> load(const void* data, int64_t at, int left) {
  Eight<T> out;
  const T* p = static_cast<const T*>(data) + at;
  if constexpr (kAligned) {
    uint4 words[sizeof(out) / 16];
#pragma unroll
    for (unsigned i = 0; i < sizeof(out) / 16; ++i) words[i] = reinterpret_cast<const uint4*>(p)[i];
    memcpy(&out, words, sizeof(out));
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) out.v[k] = k < left ? p[k] : narrow<T>(0.f);
  }
  return out;
}

template <typename T, bool kAligned>
__device__ inline void store(void* data, int64_t at, int left, const Eight<T>& values) {
  T* p = static_cast<T*>(data) + at;
  if constexpr (kAligned) {
    uint4 words[sizeof(values) / 16];
    memcpy(words, &values, sizeof(values));
#pragma unroll
    for (unsigned i = 0; i < sizeof(values) / 16; ++i) reinterpret_cast<uint4*>(p)[i] = words[i];
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (k < left) p[k] = values.v[k];
  }
}

// Eight entries of a per-channel vector that no kernel writes at the same time. Read through the read-only path
// (ld.global.nc) so that it stays in L1: a thread reads it again for every row.
template <bool kAligned>
__device__ inline Eight<float> per_channel(const float* p, int c, int left) {
  Eight<float> out;
  if constexpr (kAligned) {
    const auto* from = reinterpret_cast<const float4*>(p + c);
    const float4 low = __ldg(from), high = __ldg(from + 1);
    memcpy(out.v, &low, 16), memcpy(out.v + 4, &high, 16);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) out.v[k] = k < left ? __ldg(p + c + k) : 0.f;
  }
  return out;
}

}  // namespace resnet_kernels
