// Max pooling over NHWC activations, fp32 and bf16.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <utility>

namespace resnet_kernels {

// y = max over kernel x kernel windows of relu(x), padding -inf; NaN wins, as in torch.
at::Tensor cpu_max_pool_relu(const at::Tensor& x, int64_t kernel, int64_t stride, int64_t padding);

// The same of a*x + b per channel (fp32; or of x, both undefined), and which element of its window, row by row, each
// maximum was: uint8, of several the first, kNoWinner (cpu/reductions.h) where y <= 0.
std::pair<at::Tensor, at::Tensor> cpu_max_pool_relu_winners(const at::Tensor& x, const std::optional<at::Tensor>& a,
                                                          const std::optional<at::Tensor>& b, int64_t kernel,
                                                          int64_t stride, int64_t padding);

}  // namespace resnet_kernels
