// Weight gradients, data gradients and second moments on a CPU. All tensors are fp32; activations are channels_last.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <utility>

#include "cpu/conv.h"

namespace resnet_kernels {

// Returns dL/dweight (K, C/groups, R, S) from g = dL/dconv (N, K, P, Q) and the convolution's operand x (N, C, H, W), and
// with `sums` the sum of g per channel (K), else an undefined tensor.
std::pair<at::Tensor, at::Tensor> cpu_wgrad(const at::Tensor& g, const at::Tensor& x, int64_t R, int64_t S,
                                            const Geometry& geometry, bool sums);

// Returns dL/dx (N, C, H, W) from g = dL/dconv (N, K, P, Q) and weight (K, C/groups, R, S), for any stride and groups.
at::Tensor cpu_data_grad(const at::Tensor& g, const at::Tensor& weight, int64_t H, int64_t W, const Geometry& geometry);

// Returns h^T h (J, J), summed over the N*P*Q rows of h (N, J, P, Q).
at::Tensor cpu_second_moments(const at::Tensor& h);

}  // namespace resnet_kernels
