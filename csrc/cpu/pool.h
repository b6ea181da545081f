// Memory of activations, gradients and of weights packed for one call, kept between calls.
//
// A batch of activations is tens of megabytes, which malloc maps afresh and the kernel zeroes page by page on every
// call: 5 % of a ResNet-50's forward (Zen 3, 2 cores). Blocks freed here wait for the next tensor of their size.
#pragma once

#include <ATen/ATen.h>

namespace resnet_kernels {

// An uninitialised channels_last tensor. Its memory goes back to the pool with its last reference, from any thread.
at::Tensor pooled_nhwc(at::IntArrayRef sizes, const at::TensorOptions& options);

// Bytes waiting in the pool; at most kPoolBytes.
int64_t pool_bytes();
constexpr int64_t kPoolBytes = 1024ll << 20;

}  // namespace resnet_kernels
