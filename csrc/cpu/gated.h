// The pass that ends a block whose branch is gated per image and channel (squeeze-and-excitation) or per image (stochastic
// depth), and its gradient. Both read and write channels_last maps in fp32, bf16 or fp16 once, and compute in fp32.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>

namespace resnet_kernels {

// y = relu(gate * z + shortcut). z, shortcut: (N, C, H, W). gate: (N, C) fp32, contiguous. An absent gate counts as one, an
// absent shortcut as zero.
at::Tensor cpu_gated(const at::Tensor& z, const std::optional<at::Tensor>& gate,
                     const std::optional<at::Tensor>& shortcut, bool relu);

// Returns {dz = g * gate, dgate = sum of g * z over each map (N, C) in fp32, g}, where g = dy where not (y <= 0), else 0;
// without y, g = dy. Results that are not `wanted` are undefined. z is needed for dgate only. dgate sums 8 rows in fp32 and
// those sums in fp64, in an order that does not depend on the number of threads.
std::array<at::Tensor, 3> cpu_gated_grad(const at::Tensor& dy, const std::optional<at::Tensor>& y,
                                         const std::optional<at::Tensor>& z, const std::optional<at::Tensor>& gate,
                                         const std::array<bool, 3>& wanted);

}  // namespace resnet_kernels
