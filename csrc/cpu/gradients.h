// Which engine computes a weight gradient on a CPU.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <utility>

#include "cpu/conv.h"

namespace resnet_kernels {

// dL/dweight (K, C/groups, R, S) fp32 of a convolution of NHWC fp32 operands g (N, K, P, Q) and x (N, C, H, W), and, with
// `sums`, the sum of g per channel.
std::pair<at::Tensor, at::Tensor> cpu_wgrad(const at::Tensor& g, const at::Tensor& x, int64_t R, int64_t S,
                                            const Geometry& geometry, bool sums);

// dL/dx (N, C, H, W) from g (N, K, P, Q) and weight (K, C/groups, R, S), for any stride and groups.
at::Tensor cpu_data_grad(const at::Tensor& g, const at::Tensor& weight, int64_t H, int64_t W, const Geometry& geometry);

// h^T h over the rows of h (N, J, P, Q): (J, J).
at::Tensor cpu_second_moments(const at::Tensor& h);

}  // namespace resnet_kernels
