// fp32 convolutions of our own for processors with AVX2 and no AVX-512, where oneDNN leaves a fifth of the peak:
// 1x1 as a matrix product, 3x3 of stride 1 by Winograd's F(2x2, 3x3). Both finish in registers: shift, residual, ReLU.
#pragma once

#include <ATen/ATen.h>

namespace resnet_kernels {

// Whether this processor runs them, and whether they were measured to be the better choice on such a one.
bool avx2_runs();
bool avx2_preferred();

// weight (K, C, 1, 1) -> [K/16][C][16]; (K, C, 3, 3) -> [K/16][16][C][16], Winograd's transform of it. K % 16 == 0,
// and C % 8 == 0 for 3x3.
at::Tensor avx2_pack_1x1(const at::Tensor& weight);
at::Tensor avx2_pack_3x3(const at::Tensor& weight);

// y = relu(conv(x, weight) + shift + residual) on NHWC fp32; shift and residual may be null, residual may be y.
void avx2_conv_1x1(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* shift,
                   const float* residual, bool relu, int64_t stride);
void avx2_conv_3x3(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* shift,
                   const float* residual, bool relu);

// Whether every element is finite, and small enough for sums of a few of them to be: what F(2x2, 3x3) needs to put
// no NaN where there was none.
bool avx2_all_moderate(const at::Tensor& x);

}  // namespace resnet_kernels
