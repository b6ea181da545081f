// Chooses the engine of a convolution, and runs the convolutions of a residual block in order.
//
// After a oneDNN convolution the ReLU is a separate pass over the result, which is still in cache. oneDNN's fused ReLU is
// max(x, 0) with its operands in the order that turns NaN into 0, which would hide a diverged model.
#include "cpu/conv.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include "common/checks.h"
#include "cpu/x86.h"
#include "cpu/memory_pool.h"

namespace resnet_kernels {
namespace {

std::vector<int64_t> both_dimensions(int64_t value) { return {value, value}; }

// Calls a torch operator by name with boxed arguments, so that this source builds against every torch whose operator has
// the same arguments.
at::Tensor call(const c10::OperatorHandle& op, torch::jit::Stack stack) {
  op.callBoxed(stack);
  return std::move(stack.front()).toTensor();
}

at::Tensor onednn_pack(const at::Tensor& weight, const Geometry& g, const std::vector<int64_t>& size) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_reorder_convolution_weight", "");
  return call(op, {weight, both_dimensions(g.padding), both_dimensions(g.stride), both_dimensions(g.dilation), g.groups, size});
}

at::Tensor onednn_conv(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& shift,
                       const Geometry& g) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise", "");
  return call(op, {x, weight, shift, both_dimensions(g.padding), both_dimensions(g.stride), both_dimensions(g.dilation), g.groups, "none",
                   c10::List<std::optional<at::Scalar>>(), c10::IValue()});
}

// sum += conv(x, weight) + shift, in place.
void onednn_conv_onto(const at::Tensor& sum, const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& shift, const Geometry& g) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise_", "binary");
  call(op, {sum, x, weight, shift, both_dimensions(g.padding), both_dimensions(g.stride), both_dimensions(g.dilation), g.groups, "add",
            c10::IValue(), c10::IValue(), c10::List<std::optional<at::Scalar>>(), c10::IValue()});
}

int64_t output_size(int64_t size, int64_t kernel, const Geometry& g) {
  return (size + 2 * g.padding - g.dilation * (kernel - 1) - 1) / g.stride + 1;
}

std::vector<int64_t> output_sizes(const at::Tensor& x, const Conv& conv) {
  const auto& [K, C, R, S] = conv.shape;
  return {x.size(0), K, output_size(x.size(2), R, conv.geometry), output_size(x.size(3), S, conv.geometry)};
}

// Returns why one of our own engines cannot compute this convolution, or "" if it can.
std::string why_not(Engine engine, const at::Tensor& weight, const Geometry& g) {
  const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
  if (!x86_runs()) return "expected a processor with AVX2 and FMA";
  if (weight.scalar_type() != at::kFloat) return "expected float32 weights";
  if (g.groups != 1 || K % 16 != 0) return "expected one group and output channels a multiple of 16";
  if (engine == Engine::kWinograd && (R != 3 || S != 3 || g.stride != 1 || g.dilation != 1 || g.padding != 1 || C % 8 != 0))
    return "expected a 3x3 filter of stride 1, padding 1, dilation 1 over channels a multiple of 8";
  return "";
}

Engine preferred_engine(const at::Tensor& weight, const Geometry& g) {
  if (why_not(Engine::kWinograd, weight, g).empty()) return Engine::kWinograd;
  return why_not(Engine::kDirect, weight, g).empty() ? Engine::kDirect : Engine::kOneDnn;
}

// Returns whether the convolution reads only the centre of its filter: a map of one pixel, padded to keep its size. A 1x1
// convolution by the centre is then the same sum. Winograd's transforms would err twice as much and compute 16 products.
bool reads_centre_alone(const at::Tensor& weight, const Geometry& g, const std::vector<int64_t>& size) {
  const int64_t R = weight.size(2), S = weight.size(3);
  return size.size() == 4 && size[2] == 1 && size[3] == 1 && R == S && R % 2 == 1 && R > 1 && g.padding == g.dilation * (R / 2);
}

// weight * scale per output channel, computed in fp32 and rounded once.
at::Tensor folded(const at::Tensor& weight, const at::Tensor& scale) {
  return weight.to(at::kFloat).mul(scale.reshape({-1, 1, 1, 1})).to(weight.scalar_type());
}

}  // namespace

Conv pack_conv(const at::Tensor& original, const at::Tensor& scale, const Geometry& g, const std::vector<int64_t>& size,
               const std::string& name, bool transposed) {
  at::AutoDispatchBelowADInplaceOrView guard;
  RK_CHECK_EQ(original.dim(), 4, "weight: dimensions");
  TORCH_CHECK(!transposed || (g.stride == 1 && g.groups == 1), "geometry: expected stride 1 and one group with a transposed weight, got stride ",
              g.stride, " and ", g.groups, " groups");
  if (name == "auto" && reads_centre_alone(original, g, size)) {
    const int64_t centre = original.size(2) / 2;
    const auto pointwise = original.narrow(2, centre, 1).narrow(3, centre, 1).contiguous();
    return pack_conv(pointwise, scale, {1, 0, 1, g.groups}, size, name, transposed);
  }
  const auto weight = transposed ? original.transpose(0, 1) : original;
  TORCH_CHECK(name == "auto" || name == "onednn" || name == "direct" || name == "winograd",
              "engine: expected auto, onednn, direct or winograd, got ", name);
  check_cpu(weight, "weight");
  check_per_channel(scale, weight.size(0), "scale");
  Engine engine = name == "direct" ? Engine::kDirect : name == "winograd" ? Engine::kWinograd : Engine::kOneDnn;
  if (name == "auto") engine = preferred_engine(weight, g);
  Conv conv{engine, g, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, {}, {}, {}, false};
  if (engine == Engine::kOneDnn) {
    conv.packed = onednn_pack(folded(transposed ? weight.flip({2, 3}).contiguous() : weight, scale), g, size);
    return conv;
  }
  const auto reason = why_not(engine, weight, g);
  TORCH_CHECK(reason.empty(), "engine ", name, ": ", reason, ", got a weight of ", weight.sizes());
  conv.packed = x86_pack(original, scale, engine == Engine::kWinograd, transposed);
  // A weight with NaN, Inf or huge values would spread them over its transform.
  if (engine == Engine::kWinograd && name == "auto" && !x86_all_moderate(conv.packed)) {
    conv.engine = Engine::kDirect;
    conv.packed = x86_pack(original, scale, false, transposed);
  } else if (engine == Engine::kWinograd) {
    conv.plain = weight;
    conv.transposed = transposed;
    conv.scale = scale;
  }
  return conv;
}

at::Tensor cpu_conv(const at::Tensor& x, const Conv& conv, const std::optional<at::Tensor>& shift,
                    const std::optional<at::Tensor>& residual, bool overwrite, bool relu,
                    const std::optional<at::Tensor>& scale) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto& g = conv.geometry;
  check_cpu(x, "x");
  check_nhwc(x, "x");
  RK_CHECK_EQ(x.size(1), conv.shape[1] * g.groups, "x: channels");
  const auto sizes = output_sizes(x, conv);
  if (residual.has_value()) {
    check_nhwc(*residual, "residual");
    RK_CHECK_EQ(residual->sizes(), at::IntArrayRef(sizes), "residual: sizes");
  }
  const bool own_kernel = conv.engine == Engine::kDirect || (conv.engine == Engine::kWinograd && x86_all_moderate(x));
  if (own_kernel) {
    RK_CHECK_EQ(x.scalar_type(), at::kFloat, "x: dtype");
    if (shift.has_value()) check_per_channel(*shift, conv.shape[0], "shift");
    const auto y = residual.has_value() && overwrite ? *residual : allocate_nhwc(sizes, x.options());
    if (scale.has_value()) check_per_channel(*scale, conv.shape[0], "scale");
    const float* a = scale.has_value() ? scale->const_data_ptr<float>() : nullptr;
    const float* b = shift.has_value() ? shift->const_data_ptr<float>() : nullptr;
    const float* r = residual.has_value() ? residual->const_data_ptr<float>() : nullptr;
    if (conv.engine == Engine::kDirect)
      x86_direct(y, x, conv.packed, a, b, r, relu, {conv.shape[2], conv.shape[3], g.stride, g.padding, g.dilation});
    else
      x86_winograd(y, x, conv.packed, a, b, r, relu);
    return y;
  }
  if (scale.has_value()) {
    auto t = cpu_conv(x, conv, std::nullopt, std::nullopt, false, false, std::nullopt);
    t.mul_(scale->reshape({-1, 1, 1}));
    if (shift.has_value()) t.add_(shift->reshape({-1, 1, 1}));
    if (residual.has_value()) t.add_(*residual);
    return relu ? at::relu_(t) : t;
  }
  // oneDNN, also for a Winograd convolution whose input Winograd must not transform.
  const auto plain = conv.transposed ? conv.plain.flip({2, 3}) : conv.plain;
  const auto weight = conv.engine == Engine::kWinograd ? folded(plain, conv.scale) : conv.packed;
  at::Tensor y;
  if (residual.has_value()) {
    y = overwrite ? *residual : residual->clone();
    if (y.numel() > 0) onednn_conv_onto(y, x, weight, shift, g);
  } else {
    y = x.size(0) == 0 ? allocate_nhwc(sizes, x.options()) : onednn_conv(x, weight, shift, g);
  }
  return relu ? at::relu_(y) : y;
}

at::Tensor cpu_residual_block(const at::Tensor& x, const std::vector<const Conv*>& convs,
                              const std::vector<at::Tensor>& shifts, const std::string& shortcut, bool overwrite) {
  const bool projection = shortcut == "projection";
  TORCH_CHECK(convs.size() >= (projection ? 3 : 2) && shifts.size() + projection == convs.size(),
              "residual block: expected at least two convolutions and a shift for each except the projection, got ",
              convs.size(), " convolutions and ", shifts.size(), " shifts");
  const size_t last = shifts.size() - 1;
  at::Tensor h = x;
  for (size_t i = 0; i < last; ++i) h = cpu_conv(h, *convs[i], shifts[i], std::nullopt, false, true);
  at::Tensor residual = x;
  if (projection) {
    residual = cpu_conv(x, *convs.back(), std::nullopt, std::nullopt, false, false);
  } else if (shortcut == "zero_pad") {
    int64_t stride = 1;
    for (const auto* conv : convs) stride *= conv->geometry.stride;
    residual = allocate_nhwc(output_sizes(h, *convs[last]), x.options()).zero_();
    residual.narrow(1, 0, x.size(1)).copy_(x.slice(2, 0, std::nullopt, stride).slice(3, 0, std::nullopt, stride));
  }
  return cpu_conv(h, *convs[last], shifts[last], residual, overwrite || shortcut != "identity", true);
}

}  // namespace resnet_kernels
