// The tail of a block whose branch is gated per image and channel (squeeze-and-excitation) or per image (stochastic
// depth), and its gradient: a pass each over channels_last maps in fp32, bf16 or fp16, computed in fp32.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>

namespace resnet_kernels {

// y = relu(gate * z + shortcut). z, shortcut: (N, C, H, W); gate: (N, C) fp32, absent: ones.
at::Tensor cpu_gated(const at::Tensor& z, const std::optional<at::Tensor>& gate,
                     const std::optional<at::Tensor>& shortcut, bool relu);

// With g = dy where not (y <= 0), without y dy itself: {g * gate, the sums of g * z over each map (N, C) in fp32, g}; what
// is not wanted is undefined. z is read for the sums alone. Sums are of 8 rows in fp32, then in fp64, and do not depend
// on the number of threads.
std::array<at::Tensor, 3> cpu_gated_grad(const at::Tensor& dy, const std::optional<at::Tensor>& y,
                                         const std::optional<at::Tensor>& z, const std::optional<at::Tensor>& gate,
                                         const std::array<bool, 3>& wanted);

}  // namespace resnet_kernels
