// The Python module resnet_kernels._C: what was built, and the C++ and CUDA primitives the backends call.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "common/checks.h"
#include "cpu/conv.h"
#include "cpu/gated.h"
#include "cpu/gradients.h"
#include "cpu/max_pool.h"
#include "cpu/pool.h"
#include "cpu/reductions.h"

#ifdef RESNET_KERNELS_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/launchers.h"
#endif

namespace py = pybind11;
using resnet_kernels::Conv;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
#ifdef RESNET_KERNELS_CUDA
  info["cuda"] = CUDART_VERSION;
  info["archs"] = RESNET_KERNELS_ARCHS;
#else
  info["cuda"] = py::none();
  info["archs"] = "";
#endif
  return info;
}

// (tensor, mask, a, b, second, a2, mean, relu, centre) of an Operand.
using LazyTuple = std::tuple<at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>,
                             std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>, bool,
                             std::optional<at::Tensor>, std::optional<at::Tensor>, std::array<int64_t, 5>>;

resnet_kernels::Lazy lazy_of(const LazyTuple& t) {
  const auto some = [](const std::optional<at::Tensor>& value) { return value.value_or(at::Tensor()); };
  const auto& [kernel, stride, padding, H, W] = std::get<10>(t);
  return {std::get<0>(t),       some(std::get<1>(t)), some(std::get<2>(t)), some(std::get<3>(t)),
          some(std::get<4>(t)), some(std::get<5>(t)), some(std::get<6>(t)), std::get<7>(t),
          some(std::get<8>(t)), some(std::get<9>(t)), {kernel, stride, padding, H, W}};
}

// (y or None, the pair of reductions or None).
py::tuple bn_pass(const LazyTuple& x, const std::optional<at::Tensor>& shift, const std::optional<LazyTuple>& residual,
                        bool relu, const std::optional<LazyTuple>& kept, float threshold, bool store,
                        const std::optional<at::Tensor>& out, const std::string& reduce,
                        const std::optional<std::array<at::Tensor, 3>>& normalized) {
  using resnet_kernels::Reduce;
  resnet_kernels::Finish finish{shift.value_or(at::Tensor()), std::nullopt, relu, std::nullopt, threshold};
  if (residual) finish.residual = lazy_of(*residual);
  if (kept) finish.kept = lazy_of(*kept);
  const auto by = normalized ? Reduce::kNormalized : reduce == "stats" ? Reduce::kStats : Reduce::kNone;
  const auto n = normalized.value_or(std::array<at::Tensor, 3>());
  resnet_kernels::Passed passed;
  {
    py::gil_scoped_release unlocked;
    passed = resnet_kernels::cpu_pass(lazy_of(x), finish, store, out.value_or(at::Tensor()), by, n[0], n[1], n[2]);
  }
  const auto y = store ? py::cast(passed.y) : py::none();
  if (by == Reduce::kNone) return py::make_tuple(y, py::none());
  return py::make_tuple(y, py::make_tuple(passed.first, passed.second));
}

#ifdef RESNET_KERNELS_CUDA
resnet_kernels::Scalar scalar_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return resnet_kernels::Scalar::kFloat;
    case at::kHalf: return resnet_kernels::Scalar::kHalf;
    case at::kBFloat16: return resnet_kernels::Scalar::kBFloat16;
    default: TORCH_CHECK(false, "x: expected float32, float16 or bfloat16, got ", type);
  }
}

at::Tensor cuda_bn_pass(const at::Tensor& x, const std::optional<at::Tensor>& scale,
                        const std::optional<at::Tensor>& shift, const std::optional<at::Tensor>& residual, bool relu) {
  TORCH_CHECK(x.is_cuda(), "x: expected a CUDA tensor, got one on ", x.device());
  resnet_kernels::check_nhwc(x, "x");
  const int64_t C = x.size(1);
  const auto per_channel = [&](const std::optional<at::Tensor>& t, const char* name) -> const float* {
    if (!t.has_value()) return nullptr;
    RK_CHECK_EQ(t->device(), x.device(), name);
    resnet_kernels::check_per_channel(*t, C, name);
    return t->const_data_ptr<float>();
  };
  if (residual.has_value()) {
    RK_CHECK_EQ(residual->device(), x.device(), "residual");
    RK_CHECK_EQ(residual->scalar_type(), x.scalar_type(), "residual: dtype");
    RK_CHECK_EQ(residual->sizes(), x.sizes(), "residual: sizes");
    resnet_kernels::check_nhwc(*residual, "residual");
  }
  const c10::cuda::CUDAGuard guard(x.device());
  auto y = at::empty_like(x);
  const auto error = resnet_kernels::bn_pass(
      scalar_of(x.scalar_type()), y.mutable_data_ptr(), x.const_data_ptr(), per_channel(scale, "scale"),
      per_channel(shift, "shift"), residual ? residual->const_data_ptr() : nullptr, relu, x.numel() / std::max<int64_t>(C, 1),
      C, c10::cuda::getCurrentCUDAStream());
  TORCH_CHECK(error == cudaSuccess, "bn_pass: ", cudaGetErrorString(error), " for x of sizes ", x.sizes());
  return y;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  py::class_<Conv>(m, "Conv", py::module_local()).def_property_readonly("engine", [](const Conv& conv) {
    return std::array{"onednn", "direct", "winograd"}[static_cast<int>(conv.engine)];
  });
  m.def("pack_conv", [](const at::Tensor& weight, const at::Tensor& scale, const std::array<int64_t, 4>& g,
                        const std::vector<int64_t>& size, const std::string& engine, bool turned) {
    py::gil_scoped_release unlocked;
    return resnet_kernels::pack_conv(weight, scale, {g[0], g[1], g[2], g[3]}, size, engine, turned);
  }, py::arg("weight"), py::arg("scale"), py::arg("geometry"), py::arg("size"), py::arg("engine"), py::arg("turned") = false);
  m.def("conv", &resnet_kernels::cpu_conv, py::arg("x"), py::arg("conv"), py::arg("shift"), py::arg("residual"),
        py::arg("overwrite"), py::arg("relu"), py::arg("scale") = py::none(), py::call_guard<py::gil_scoped_release>());
  m.def("residual_block", &resnet_kernels::cpu_residual_block, py::call_guard<py::gil_scoped_release>());
  m.def("pool_bytes", &resnet_kernels::pool_bytes);
  m.def("bn_pass", &bn_pass);
  m.def("subsampled", &resnet_kernels::cpu_subsampled, py::call_guard<py::gil_scoped_release>());
  m.def("wgrad", [](const at::Tensor& g, const at::Tensor& x, int64_t R, int64_t S, const std::array<int64_t, 4>& geometry,
                    bool sums) {
    std::pair<at::Tensor, at::Tensor> both;
    {
      py::gil_scoped_release unlocked;
      both = resnet_kernels::cpu_wgrad(g, x, R, S, {geometry[0], geometry[1], geometry[2], geometry[3]}, sums);
    }
    return py::make_tuple(both.first, sums ? py::cast(both.second) : py::none());
  });
  m.def("data_grad", [](const at::Tensor& g, const at::Tensor& weight, int64_t H, int64_t W, const std::array<int64_t, 4>& geometry) {
    py::gil_scoped_release unlocked;
    return resnet_kernels::cpu_data_grad(g, weight, H, W, {geometry[0], geometry[1], geometry[2], geometry[3]});
  });
  m.def("gated", &resnet_kernels::cpu_gated, py::call_guard<py::gil_scoped_release>());
  m.def("gated_grad", [](const at::Tensor& dy, const std::optional<at::Tensor>& y, const std::optional<at::Tensor>& z,
                         const std::optional<at::Tensor>& gate, const std::array<bool, 3>& wanted) {
    std::array<at::Tensor, 3> found;
    {
      py::gil_scoped_release unlocked;
      found = resnet_kernels::cpu_gated_grad(dy, y, z, gate, wanted);
    }
    const auto or_none = [](const at::Tensor& t) { return t.defined() ? py::cast(t) : py::none(); };
    return py::make_tuple(or_none(found[0]), or_none(found[1]), or_none(found[2]));
  });
  m.def("second_moments", &resnet_kernels::cpu_second_moments, py::call_guard<py::gil_scoped_release>());
  m.def("max_pool_relu", &resnet_kernels::cpu_max_pool_relu, py::call_guard<py::gil_scoped_release>());
  m.def("max_pool_relu_winners", &resnet_kernels::cpu_max_pool_relu_winners, py::call_guard<py::gil_scoped_release>());
#ifdef RESNET_KERNELS_CUDA
  m.def("cuda_bn_pass", &cuda_bn_pass, py::call_guard<py::gil_scoped_release>());
#endif
}
