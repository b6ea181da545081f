// Max pooling over NHWC activations, fp32 and bf16.
#pragma once

#include <ATen/ATen.h>

namespace resnet_kernels {

// y = max over kernel x kernel windows of relu(x), padding -inf; NaN wins, as in torch.
at::Tensor cpu_max_pool_relu(const at::Tensor& x, int64_t kernel, int64_t stride, int64_t padding);

}  // namespace resnet_kernels
