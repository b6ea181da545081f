// Convolutions with their epilogue on a CPU, and the residual blocks made of them.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <string>
#include <vector>

namespace resnet_kernels {

struct Geometry {
  int64_t stride, padding, dilation, groups;
};

// What computes a convolution: oneDNN through ATen, or one of ours (x86.h).
enum class Engine { kOneDnn, kDirect, kWinograd };

// A convolution ready to run: its weight, with the batch norm's scale in it, as the engine wants it. Never changes,
// so threads may share it.
struct Conv {
  Engine engine;
  Geometry geometry;
  std::array<int64_t, 4> shape;  // (K, C/groups, R, S)
  at::Tensor packed;
  at::Tensor plain, scale;  // the weight as it came, for Winograd on inputs that are not all moderate, else undefined
  bool turned = false;
};

// Packs weight (K, C/groups, R, S) times scale (K) for operands of `size` (N, C, H, W), in the weight's dtype.
// engine: "auto", "onednn", "direct" or "winograd". turned: weight is (C, K, R, S), of the convolution whose data gradient
// this is; geometry is that of the gradient, of stride 1 and one group.
Conv pack_conv(const at::Tensor& weight, const at::Tensor& scale, const Geometry& geometry,
               const std::vector<int64_t>& size, const std::string& engine, bool turned = false);

// y = relu(scale * conv(x) + shift + residual), channels_last. Any of scale, shift and residual may be absent. With
// `overwrite` the result may take the residual's memory.
at::Tensor cpu_conv(const at::Tensor& x, const Conv& conv, const std::optional<at::Tensor>& shift,
                    const std::optional<at::Tensor>& residual, bool overwrite, bool relu,
                    const std::optional<at::Tensor>& scale = std::nullopt);

// A chain of convolutions, each with shift and ReLU, the last with the shortcut added before its ReLU. For
// shortcut = "projection" the last of `convs` is the projection. "zero_pad" subsamples x and appends zero channels.
at::Tensor cpu_residual_block(const at::Tensor& x, const std::vector<const Conv*>& convs,
                              const std::vector<at::Tensor>& shifts, const std::string& shortcut, bool overwrite);

}  // namespace resnet_kernels
