// A memory pool for activations, gradients, and weights packed for one call. (Max pooling is in max_pool.h.)
//
// A batch of activations is tens of megabytes. malloc maps that much anew on every call, and the kernel zeroes it page by
// page: 5 % of a ResNet-50's forward pass (Zen 3, 2 cores). Freed blocks stay here for the next tensor of about their size.
#pragma once

#include <ATen/ATen.h>

namespace resnet_kernels {

// Returns an uninitialised channels_last tensor (N, C, H, W). Its memory returns to the pool when the last reference is
// dropped, on any thread.
at::Tensor allocate_nhwc(at::IntArrayRef sizes, const at::TensorOptions& options);

// Returns the bytes of free blocks in the pool; at most kPoolBytes.
int64_t pool_bytes();
constexpr int64_t kPoolBytes = 1024ll << 20;

}  // namespace resnet_kernels
