// Chooses what computes a gradient: our own kernels (x86.h), or torch's where channels, groups or the processor do not fit.
#include "cpu/gradients.h"

#include <ATen/ops/convolution_backward.h>

#include "common/checks.h"
#include "cpu/x86.h"
#include "cpu/memory_pool.h"
#include "cpu/reductions.h"

namespace resnet_kernels {
namespace {

// Whether our own kernels run: they read both operands in panels of 16 channels.
bool fits_panels(const at::Tensor& g, const at::Tensor& x) {
  return x86_runs() && g.size(1) % 16 == 0 && x.size(1) % 16 == 0;
}

}  // namespace

std::pair<at::Tensor, at::Tensor> cpu_wgrad(const at::Tensor& g, const at::Tensor& x, int64_t R, int64_t S,
                                            const Geometry& geo, bool sums) {
  at::AutoDispatchBelowADInplaceOrView guard;
  for (const auto& [t, name] : {std::pair(g, "g"), std::pair(x, "x")}) {
    check_cpu(t, name);
    check_nhwc(t, name);
    RK_CHECK_EQ(t.scalar_type(), at::kFloat, name);
  }
  const int64_t K = g.size(1), C = x.size(1);
  TORCH_CHECK(geo.groups > 0 && C % geo.groups == 0, "x: expected channels divisible by ", geo.groups, " groups, got ", C);
  for (const int64_t d : {2, 3})
    RK_CHECK_EQ(g.size(d), (x.size(d) + 2 * geo.padding - geo.dilation * ((d == 2 ? R : S) - 1) - 1) / geo.stride + 1, "g: map");
  RK_CHECK_EQ(g.size(0), x.size(0), "g: images");
  const bool pointwise = R == 1 && S == 1 && geo.stride == 1 && geo.padding == 0 && geo.groups == 1;
  const bool winograd = R == 3 && S == 3 && geo.stride == 1 && geo.padding == 1 && geo.dilation == 1 && geo.groups == 1;
  at::Tensor sum;
  if (pointwise && fits_panels(g, x)) {
    const auto dweight = allocate_nhwc({K, C, 1, 1}, x.options());
    if (sums) sum = at::empty({K}, x.options());
    x86_wgrad(dweight.mutable_data_ptr<float>(), g.const_data_ptr<float>(), x.const_data_ptr<float>(),
               sums ? sum.mutable_data_ptr<float>() : nullptr, g.numel() / K, K, C);
    return {dweight, sum};
  }
  // kNormalized also sums g; the other reduction is not used.
  if (sums) sum = cpu_pass(Lazy{g}, PassEpilogue{}, false, {}, Reduce::kNormalized, g, at::zeros({K}, g.options()), at::zeros({K}, g.options())).first;
  if (geo.groups == 1 && fits_panels(g, x)) {
    const auto dweight = allocate_nhwc({K, C, R, S}, x.options());
    // Winograd's transform would spread a NaN or Inf over a whole filter.
    if (winograd && x86_all_moderate(x) && x86_all_moderate(g)) x86_winograd_wgrad(dweight, g, x);
    else x86_conv_wgrad(dweight, g, x, {R, S, geo.stride, geo.padding, geo.dilation});
    return {dweight, sum};
  }
  // torch's kernels read grouped convolutions as NCHW whatever the layout, and give no gradient for an empty batch.
  const auto weight = at::empty({K, C / geo.groups, R, S}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (g.size(0) == 0) return {weight.zero_(), sum};
  const int64_t s[] = {geo.stride, geo.stride}, p[] = {geo.padding, geo.padding}, d[] = {geo.dilation, geo.dilation}, none[] = {0, 0};
  const auto grads = at::convolution_backward(g, x, weight, std::nullopt, s, p, d, false, none, geo.groups, {false, true, false});
  return {std::get<1>(grads), sum};
}

at::Tensor cpu_data_grad(const at::Tensor& g, const at::Tensor& weight, int64_t H, int64_t W, const Geometry& geo) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check_cpu(g, "g");
  check_nhwc(g, "g");
  RK_CHECK_EQ(g.scalar_type(), at::kFloat, "g: dtype");
  RK_CHECK_EQ(weight.scalar_type(), at::kFloat, "weight: dtype");
  RK_CHECK_EQ(g.size(1), weight.size(0), "g: channels");
  const int64_t C = weight.size(1) * geo.groups, R = weight.size(2), S = weight.size(3);
  const auto dx = allocate_nhwc({g.size(0), C, H, W}, g.options());
  if (x86_runs() && geo.groups == 1 && C % 16 == 0) {
    x86_data_grad(dx, g, weight, {R, S, geo.stride, geo.padding, geo.dilation});
    return dx;
  }
  if (g.size(0) == 0) return dx;
  const int64_t s[] = {geo.stride, geo.stride}, p[] = {geo.padding, geo.padding}, d[] = {geo.dilation, geo.dilation}, none[] = {0, 0};
  const auto grads = at::convolution_backward(g, dx, weight, std::nullopt, s, p, d, false, none, geo.groups, {true, false, false});
  return std::get<0>(grads).contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor cpu_second_moments(const at::Tensor& h) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check_cpu(h, "h");
  check_nhwc(h, "h");
  RK_CHECK_EQ(h.scalar_type(), at::kFloat, "h: dtype");
  const int64_t J = h.size(1);
  if (!fits_panels(h, h)) {
    // Products of at most max(64, J) rows, summed in fp64. One MKL product over all rows has up to 16 times the error,
    // visible in a variance that cancels, and its order of summation depends on the threads.
    const auto rows = h.permute({0, 2, 3, 1}).flatten(0, 2);
    const int64_t size = std::max<int64_t>(64, J), whole = rows.size(0) / size * size;
    const auto parts = rows.narrow(0, 0, whole).view({-1, size, J}), rest = rows.narrow(0, whole, rows.size(0) - whole);
    const auto sum = at::bmm(parts.transpose(1, 2), parts).sum({0}, false, at::kDouble);
    return sum.add_(at::mm(rest.t(), rest)).to(at::kFloat);
  }
  const auto M2 = at::empty({J, J}, h.options());
  const float* rows = h.const_data_ptr<float>();
  x86_wgrad(M2.mutable_data_ptr<float>(), rows, rows, nullptr, h.numel() / J, J, J);
  return M2;
}

}  // namespace resnet_kernels
