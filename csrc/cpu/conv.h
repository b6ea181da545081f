// Convolutions through oneDNN, as ATen exposes it, and the residual blocks made of them.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <vector>

namespace resnet_kernels {

struct Geometry {
  int64_t stride, padding, dilation, groups;
};

// y = relu(conv(x, weight) + shift + residual). Any of shift and residual may be absent. `weight` is plain or packed
// by mkldnn::_reorder_convolution_weight. With `overwrite` the result takes the residual's memory.
at::Tensor cpu_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& shift,
                    const std::optional<at::Tensor>& residual, bool overwrite, bool relu, const Geometry& geometry);

// A chain of convolutions, each with shift and ReLU, the last with the shortcut added before its ReLU. For
// shortcut = "projection" the last weight is the projection's. "zero_pad" subsamples x and appends zero channels.
at::Tensor cpu_residual_block(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                              const std::vector<at::Tensor>& shifts, const std::vector<Geometry>& geometries,
                              const std::string& shortcut, bool overwrite);

}  // namespace resnet_kernels
