// fp32 convolutions of our own for processors with AVX2 or AVX-512:
// a direct one, and Winograd's F(2x2, 3x3) for 3x3 of stride 1. Both finish in registers: shift, residual, ReLU.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace resnet_kernels {

// Whether this processor runs them.
bool x86_runs();

// weight (K, C, R, S) times scale (K) -> [K/16][R*S][C][16], or for Winograd [K/16][16][C][16], the transform of
// each filter, computed in double. K % 16 == 0, and C % 8 == 0 for Winograd. turned: weight is (C, K, R, S) and each
// filter is turned round, as a data gradient wants it. some: those taps alone, in that order.
at::Tensor x86_pack(const at::Tensor& weight, const at::Tensor& scale, bool winograd, bool turned = false,
                     const std::vector<int64_t>& some = {});

struct Window {
  int64_t R, S, stride, padding, dilation;
};

// y = relu(scale * conv(x, weight) + shift + residual) on NHWC fp32; scale, shift and residual may be null, residual may
// be y.
void x86_direct(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* scale,
                 const float* shift, const float* residual, bool relu, const Window& window);
void x86_winograd(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* scale,
                   const float* shift, const float* residual, bool relu);

// dx (N, C, H, W) from g (N, K, P, Q) and weight (K, C, R, S), any stride: as many convolutions of stride 1 as dx has kinds of
// positions. C a multiple of 16.
void x86_data_grad(const at::Tensor& dx, const at::Tensor& g, const at::Tensor& weight, const Window& window);

// dweight (K, C) = g^T x over M rows; g (M, K) and x (M, C) contiguous, K and C multiples of 16. sums: null, or K sums over
// the rows of g. Where g is x, half of the work. As many threads as there are, the same result.
void x86_wgrad(float* dweight, const float* g, const float* x, float* sums, int64_t M, int64_t K, int64_t C);
// The weight gradient (K, R, S, C) of a convolution; g and x NHWC, channels multiples of 16.
void x86_conv_wgrad(const at::Tensor& dweight, const at::Tensor& g, const at::Tensor& x, const Window& window);
// The weight gradient (K, 3, 3, C) of a 3x3 convolution of stride 1 and padding 1 by F(2x2, 3x3), transposed: g and x
// NHWC, channels multiples of 16.
void x86_winograd_wgrad(const at::Tensor& dweight, const at::Tensor& g, const at::Tensor& x);

// Whether every element is finite, and small enough for sums of a few of them to be: what F(2x2, 3x3) needs to put
// no NaN where there was none.
bool x86_all_moderate(const at::Tensor& x);

}  // namespace resnet_kernels
