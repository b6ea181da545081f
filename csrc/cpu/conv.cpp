// Which engine computes a convolution, and the order and memory of a block's.
//
// After oneDNN, ReLU runs as a pass of its own over the result while it is in cache. oneDNN's fused ReLU is max(x, 0)
// with the operands in the order that turns NaN into 0, which would hide a diverged model.
#include "cpu/conv.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "common/checks.h"
#include "cpu/avx2.h"

namespace resnet_kernels {
namespace {

std::vector<int64_t> twice(int64_t value) { return {value, value}; }

// Called by name and boxed, so that one source builds against every torch whose schema has these arguments.
at::Tensor call(const c10::OperatorHandle& op, torch::jit::Stack stack) {
  op.callBoxed(stack);
  return std::move(stack.front()).toTensor();
}

at::Tensor onednn_pack(const at::Tensor& weight, const Geometry& g, const std::vector<int64_t>& size) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_reorder_convolution_weight", "");
  return call(op, {weight, twice(g.padding), twice(g.stride), twice(g.dilation), g.groups, size});
}

at::Tensor onednn_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& shift,
                       const Geometry& g) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise", "");
  return call(op, {x, weight, shift, twice(g.padding), twice(g.stride), twice(g.dilation), g.groups, "none",
                   c10::List<std::optional<at::Scalar>>(), c10::IValue()});
}

void onednn_conv_onto(const at::Tensor& sum, const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& shift, const Geometry& g) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise_", "binary");
  call(op, {sum, x, weight, shift, twice(g.padding), twice(g.stride), twice(g.dilation), g.groups, "add",
            c10::IValue(), c10::IValue(), c10::List<std::optional<at::Scalar>>(), c10::IValue()});
}

int64_t output_size(int64_t size, int64_t kernel, const Geometry& g) {
  return (size + 2 * g.padding - g.dilation * (kernel - 1) - 1) / g.stride + 1;
}

std::vector<int64_t> output_sizes(const at::Tensor& x, const Conv& conv) {
  const auto& [K, C, R, S] = conv.shape;
  return {x.size(0), K, output_size(x.size(2), R, conv.geometry), output_size(x.size(3), S, conv.geometry)};
}

at::Tensor empty_nhwc(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::empty(sizes, like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

Engine engine_for(const at::Tensor& weight, const Geometry& g, const std::vector<int64_t>& size) {
  const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
  const bool ours = avx2_preferred() && weight.scalar_type() == at::kFloat && g.groups == 1 && K % 16 == 0;
  if (ours && R == 1 && S == 1 && g.padding == 0) return Engine::kGemm;
  if (ours && R == 3 && S == 3 && g.stride == 1 && g.dilation == 1 && g.padding == 1 && C % 8 == 0)
    return Engine::kWinograd;
  return Engine::kOneDnn;
}

}  // namespace

Conv pack_conv(const at::Tensor& weight, const Geometry& g, const std::vector<int64_t>& size, const std::string& name) {
  TORCH_CHECK(name == "auto" || name == "onednn" || name == "gemm" || name == "winograd",
              "engine: expected auto, onednn, gemm or winograd, got ", name);
  Engine engine = name == "gemm" ? Engine::kGemm : name == "winograd" ? Engine::kWinograd : Engine::kOneDnn;
  if (name == "auto") engine = engine_for(weight, g, size);
  Conv conv{engine, g, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, {}, {}};
  if (engine == Engine::kGemm) {
    conv.packed = avx2_pack_1x1(weight);
  } else if (engine == Engine::kWinograd) {
    conv.packed = avx2_pack_3x3(weight);
    conv.plain = weight;
  } else {
    conv.packed = onednn_pack(weight, g, size);
  }
  return conv;
}

at::Tensor cpu_conv(const at::Tensor& x, const Conv& conv, const std::optional<at::Tensor>& shift,
                    const std::optional<at::Tensor>& residual, bool overwrite, bool relu) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto& g = conv.geometry;
  check_nhwc(x, "x");
  RK_CHECK_EQ(x.size(1), conv.shape[1] * g.groups, "x: channels");
  const auto sizes = output_sizes(x, conv);
  if (residual.has_value()) {
    check_nhwc(*residual, "residual");
    RK_CHECK_EQ(residual->sizes(), at::IntArrayRef(sizes), "residual: sizes");
  }
  const bool ours = conv.engine == Engine::kGemm || (conv.engine == Engine::kWinograd && avx2_all_moderate(x));
  if (ours) {
    RK_CHECK_EQ(x.scalar_type(), at::kFloat, "x: dtype");
    if (shift.has_value()) check_per_channel(*shift, conv.shape[0], "shift");
    const auto y = residual.has_value() && overwrite ? *residual : empty_nhwc(sizes, x);
    const float* b = shift.has_value() ? shift->const_data_ptr<float>() : nullptr;
    const float* r = residual.has_value() ? residual->const_data_ptr<float>() : nullptr;
    if (conv.engine == Engine::kGemm)
      avx2_conv_1x1(y, x, conv.packed, b, r, relu, g.stride);
    else
      avx2_conv_3x3(y, x, conv.packed, b, r, relu);
    return y;
  }
  const auto& weight = conv.engine == Engine::kWinograd ? conv.plain : conv.packed;
  at::Tensor y;
  if (residual.has_value()) {
    y = overwrite ? *residual : residual->clone();
    if (y.numel() > 0) onednn_conv_onto(y, x, weight, shift, g);
  } else {
    y = x.size(0) == 0 ? empty_nhwc(sizes, x) : onednn_conv(x, weight, shift, g);
  }
  return relu ? at::relu_(y) : y;
}

at::Tensor cpu_residual_block(const at::Tensor& x, const std::vector<const Conv*>& convs,
                              const std::vector<at::Tensor>& shifts, const std::string& shortcut, bool overwrite) {
  const bool projection = shortcut == "projection";
  const size_t last = convs.size() - (projection ? 2 : 1);
  at::Tensor h = x;
  for (size_t i = 0; i < last; ++i) h = cpu_conv(h, *convs[i], shifts[i], std::nullopt, false, true);
  at::Tensor residual = x;
  if (projection) {
    residual = cpu_conv(x, *convs.back(), shifts.back(), std::nullopt, false, false);
  } else if (shortcut == "zero_pad") {
    int64_t stride = 1;
    for (const auto* conv : convs) stride *= conv->geometry.stride;
    residual = empty_nhwc(output_sizes(h, *convs[last]), x).zero_();
    residual.narrow(1, 0, x.size(1)).copy_(x.slice(2, 0, std::nullopt, stride).slice(3, 0, std::nullopt, stride));
  }
  return cpu_conv(h, *convs[last], shifts[last], residual, overwrite || shortcut != "identity", true);
}

}  // namespace resnet_kernels
