// Max pooling with a ReLU over NHWC activations, fp32 and bf16.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <utility>

namespace resnet_kernels {

// y = max over kernel x kernel windows of relu(x). Padding counts as -inf, and NaN is the greatest value, as in torch.
at::Tensor cpu_max_pool_relu(const at::Tensor& x, int64_t kernel, int64_t stride, int64_t padding);

// y = max over windows of relu(a*x + b), with a and b per channel, or of relu(x) if both are absent; fp32 only. Returns
// (y, winners): winners is uint8 of y's sizes, the position of each maximum within its window, counted row by row. The
// first of several equal maxima wins. kNoWinner (cpu/reductions.h) where y <= 0.
std::pair<at::Tensor, at::Tensor> cpu_max_pool_relu_winners(const at::Tensor& x, const std::optional<at::Tensor>& a,
                                                          const std::optional<at::Tensor>& b, int64_t kernel,
                                                          int64_t stride, int64_t padding);

}  // namespace resnet_kernels
