// Our own fp32 convolutions and gradients for x86-64 processors with AVX2 or AVX-512: a direct convolution, and Winograd's
// F(2x2, 3x3) for 3x3 filters of stride 1. Both apply scale, shift, residual and ReLU in registers. All activations are
// NHWC in memory.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace resnet_kernels {

// Whether this processor (and ATEN_CPU_CAPABILITY) has AVX2, so that the functions below can run.
bool x86_runs();

// Packs weight (K, C, R, S) times scale (K) into panels of 16 output channels: [K/16][R*S][C][16]. For Winograd
// [K/16][16][C][16], the transform of each filter, computed in double. Requires K % 16 == 0, and C % 8 == 0 for Winograd.
// transposed: the weight is (C, K, R, S) and each filter is rotated by 180 degrees, as a data gradient needs it.
// only_taps: the taps to pack, in order; empty: all of them.
at::Tensor x86_pack(const at::Tensor& weight, const at::Tensor& scale, bool winograd, bool transposed = false,
                     const std::vector<int64_t>& only_taps = {});

// Filter size and geometry of a convolution of one group.
struct Window {
  int64_t R, S, stride, padding, dilation;
};

// y = relu(scale * conv(x, weight) + shift + residual). scale, shift and residual may be null; residual may be y's memory.
void x86_direct(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* scale,
                 const float* shift, const float* residual, bool relu, const Window& window);
void x86_winograd(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* scale,
                   const float* shift, const float* residual, bool relu);

// dx (N, C, H, W) from g (N, K, P, Q) and weight (K, C, R, S), for any stride s: s^2 convolutions of stride 1, one for each
// residue (row mod s, column mod s) of dx's positions. C is a multiple of 16.
void x86_data_grad(const at::Tensor& dx, const at::Tensor& g, const at::Tensor& weight, const Window& window);

// dweight (K, C) = g^T x over M rows. g (M, K) and x (M, C) are contiguous; K and C are multiples of 16. sums: null, or where
// to store the K sums of g over its rows. If g is x, only half of the symmetric product is computed. The result does not
// depend on the number of threads.
void x86_wgrad(float* dweight, const float* g, const float* x, float* sums, int64_t M, int64_t K, int64_t C);
// dweight (K, R, S, C) of a convolution from g (N, K, P, Q) and x (N, C, H, W); K and C are multiples of 16.
void x86_conv_wgrad(const at::Tensor& dweight, const at::Tensor& g, const at::Tensor& x, const Window& window);
// dweight (K, 3, 3, C) of a 3x3 convolution of stride 1 and padding 1, by the transpose of Winograd's F(2x2, 3x3); K and C
// are multiples of 16.
void x86_winograd_wgrad(const at::Tensor& dweight, const at::Tensor& g, const at::Tensor& x);

// Whether every element is finite and below 1e37 in magnitude, so that sums of a few of them are finite too. Otherwise
// Winograd's transform would put NaN or Inf where a direct convolution has none.
bool x86_all_moderate(const at::Tensor& x);

}  // namespace resnet_kernels
