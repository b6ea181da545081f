// Convolutions with their epilogue on a CPU, and residual blocks composed of them.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <string>
#include <vector>

namespace resnet_kernels {

struct Geometry {
  int64_t stride, padding, dilation, groups;
};

// What computes a convolution: oneDNN through ATen, or one of our own kernels (x86.h).
enum class Engine { kOneDnn, kDirect, kWinograd };

// A convolution ready to run: its weight times the batch norm's scale, in the engine's layout. Immutable, so threads may
// share it.
struct Conv {
  Engine engine;
  Geometry geometry;
  std::array<int64_t, 4> shape;  // (K, C/groups, R, S)
  at::Tensor packed;        // the weight in the engine's layout
  at::Tensor plain, scale;  // kWinograd only: the unpacked weight, for inputs that Winograd must not transform (x86.h)
  bool transposed = false;  // kWinograd only: `plain` is for a data gradient, its filters not yet rotated
};

// Packs weight (K, C/groups, R, S) times scale (K) for operands of `size` (N, C, H, W), in the weight's dtype.
// engine: "auto", "onednn", "direct" or "winograd". transposed: this convolution is the data gradient of another one, whose
// weight (C, K, R, S) is given; its filters are rotated by 180 degrees. geometry is then that of the data gradient, with
// stride 1 and one group.
Conv pack_conv(const at::Tensor& weight, const at::Tensor& scale, const Geometry& geometry,
               const std::vector<int64_t>& size, const std::string& engine, bool transposed = false);

// y = relu(scale * conv(x) + shift + residual), channels_last. scale, shift and residual are optional. With `overwrite` the
// result may reuse the residual's memory.
at::Tensor cpu_conv(const at::Tensor& x, const Conv& conv, const std::optional<at::Tensor>& shift,
                    const std::optional<at::Tensor>& residual, bool overwrite, bool relu,
                    const std::optional<at::Tensor>& scale = std::nullopt);

// A residual block: a chain of convolutions, each with shift and ReLU; the shortcut is added before the last ReLU.
// shortcut: "identity"; "projection", where the last of `convs` is the projection; "zero_pad", which subsamples x and
// appends zero channels. With `overwrite` the result may reuse x's memory.
at::Tensor cpu_residual_block(const at::Tensor& x, const std::vector<const Conv*>& convs,
                              const std::vector<at::Tensor>& shifts, const std::string& shortcut, bool overwrite);

}  // namespace resnet_kernels
