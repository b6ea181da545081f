// y = relu(scale * x + shift + residual) over NHWC activations.
//
// One thread owns 16 bytes of channels: the grid strides by whole rows, so that a thread meets the same channels
// again and keeps their scale and shift in registers. 16-byte loads and stores keep enough bytes in flight to run at
// copy speed. Traffic: reads x (and residual) once, writes y once. Rows whose channels are not a multiple of the
// vector width, or tensors off a 16-byte boundary, take the same code with a width of one element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T v[kWidth];
};

// `step`, the number of threads in the grid, is a multiple of `vectors_per_row`.
template <typename T, int kWidth>
__global__ void bn_pass_kernel(T* __restrict__ y, const T* __restrict__ x, const float* __restrict__ scale,
                               const float* __restrict__ shift, const T* __restrict__ residual, bool relu,
                               int64_t vectors, int vectors_per_row) {
  using V = Vector<T, kWidth>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int c0 = static_cast<int>(first % vectors_per_row) * kWidth;
  float a[kWidth], b[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    a[k] = scale ? scale[c0 + k] : 1.f;
    b[k] = shift ? shift[c0 + k] : 0.f;
  }
  for (int64_t i = first; i < vectors; i += step) {
    const V in = reinterpret_cast<const V*>(x)[i];
    V add;
    if (residual) add = reinterpret_cast<const V*>(residual)[i];
    V out;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      float t = fmaf(a[k], widen(in.v[k]), b[k]);
      if (residual) t += widen(add.v[k]);
      // Written as a selection and not fmaxf, which would turn NaN into 0.
      out.v[k] = narrow<T>(relu && t <= 0.f ? 0.f : t);
    }
    reinterpret_cast<V*>(y)[i] = out;
  }
}

}  // namespace resnet_kernels
