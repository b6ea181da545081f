// oneDNN does the arithmetic; here are the order of the calls and the memory they share.
//
// ReLU runs as a pass of its own over the result while it is in cache. oneDNN's fused ReLU is max(x, 0) with the
// operands in the order that turns NaN into 0, which would hide a diverged model; the pass costs about 3 % of a
// ResNet-50 (Zen 3, 2 cores).
#include "cpu/conv.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "common/checks.h"

namespace resnet_kernels {
namespace {

std::vector<int64_t> twice(int64_t value) { return {value, value}; }

// Called by name and boxed, so that one source builds against every torch whose schema has these arguments.
at::Tensor call(const c10::OperatorHandle& op, torch::jit::Stack stack) {
  op.callBoxed(stack);
  return std::move(stack.front()).toTensor();
}

at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& shift,
                    const Geometry& g) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise", "");
  return call(op, {x, weight, shift, twice(g.padding), twice(g.stride), twice(g.dilation), g.groups, "none",
                   c10::List<std::optional<at::Scalar>>(), c10::IValue()});
}

void convolve_onto(const at::Tensor& sum, const at::Tensor& x, const at::Tensor& weight,
                   const std::optional<at::Tensor>& shift, const Geometry& g) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise_", "binary");
  call(op, {sum, x, weight, shift, twice(g.padding), twice(g.stride), twice(g.dilation), g.groups, "add",
            c10::IValue(), c10::IValue(), c10::List<std::optional<at::Scalar>>(), c10::IValue()});
}

int64_t output_size(int64_t size, int64_t kernel, const Geometry& g) {
  return (size + 2 * g.padding - g.dilation * (kernel - 1) - 1) / g.stride + 1;
}

at::Tensor zero_padded(const at::Tensor& x, at::IntArrayRef sizes, int64_t stride) {
  auto out = at::empty(sizes, x.options().memory_format(at::MemoryFormat::ChannelsLast)).zero_();
  out.narrow(1, 0, x.size(1)).copy_(x.slice(2, 0, std::nullopt, stride).slice(3, 0, std::nullopt, stride));
  return out;
}

}  // namespace

at::Tensor cpu_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& shift,
                    const std::optional<at::Tensor>& residual, bool overwrite, bool relu, const Geometry& g) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check_nhwc(x, "x");
  RK_CHECK_EQ(x.size(1), weight.size(1) * g.groups, "x: channels");
  const std::vector<int64_t> sizes = {x.size(0), weight.size(0), output_size(x.size(2), weight.size(2), g),
                                      output_size(x.size(3), weight.size(3), g)};
  at::Tensor y;
  if (residual.has_value()) {
    check_nhwc(*residual, "residual");
    RK_CHECK_EQ(residual->sizes(), at::IntArrayRef(sizes), "residual: sizes");
    y = overwrite ? *residual : residual->clone();
    if (y.numel() > 0) convolve_onto(y, x, weight, shift, g);
  } else if (x.size(0) == 0) {
    y = at::empty(sizes, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  } else {
    y = convolve(x, weight, shift, g);
  }
  return relu ? at::relu_(y) : y;
}

at::Tensor cpu_residual_block(const at::Tensor& x, const std::vector<at::Tensor>& weights,
                              const std::vector<at::Tensor>& shifts, const std::vector<Geometry>& geometries,
                              const std::string& shortcut, bool overwrite) {
  const bool projection = shortcut == "projection";
  const size_t last = weights.size() - (projection ? 2 : 1);
  at::Tensor h = x;
  for (size_t i = 0; i < last; ++i)
    h = cpu_conv(h, weights[i], shifts[i], std::nullopt, false, true, geometries[i]);
  at::Tensor residual = x;
  if (projection) {
    residual = cpu_conv(x, weights.back(), shifts.back(), std::nullopt, false, false, geometries.back());
  } else if (shortcut == "zero_pad") {
    int64_t stride = 1;
    for (size_t i = 0; i <= last; ++i) stride *= geometries[i].stride;
    const auto& g = geometries[last];
    residual = zero_padded(x, {h.size(0), weights[last].size(0), output_size(h.size(2), weights[last].size(2), g),
                               output_size(h.size(3), weights[last].size(3), g)}, stride);
  }
  return cpu_conv(h, weights[last], shifts[last], residual, overwrite || shortcut != "identity", true,
                  geometries[last]);
}

}  // namespace resnet_kernels
