// The Python module resnet_kernels._C: build information, and the C++ primitives of the backend `cpu`. The CUDA primitives
// are in the same library, behind a C interface (cuda/api.h).
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "common/checks.h"
#include "cpu/conv.h"
#include "cpu/gated.h"
#include "cpu/gradients.h"
#include "cpu/max_pool.h"
#include "cpu/memory_pool.h"
#include "cpu/reductions.h"

#ifdef RESNET_KERNELS_CUDA
#include <cuda_runtime_api.h>
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

// An Operand from Python: (tensor, mask, a, b, second, a2, mean, relu, centre, winners, (kernel, stride, padding, H, W)).
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

// Returns (y, or None without `store`; the pair of reductions, or None).
py::tuple bn_pass(const LazyTuple& x, const std::optional<at::Tensor>& shift, const std::optional<LazyTuple>& residual,
                        bool relu, const std::optional<LazyTuple>& mask, float threshold, bool store,
                        const std::optional<at::Tensor>& out, const std::string& reduce,
                        const std::optional<std::array<at::Tensor, 3>>& normalized) {
  using resnet_kernels::Reduce;
  resnet_kernels::PassEpilogue epilogue{shift.value_or(at::Tensor()), std::nullopt, relu, std::nullopt, threshold};
  if (residual) epilogue.residual = lazy_of(*residual);
  if (mask) epilogue.mask = lazy_of(*mask);
  const auto by = normalized ? Reduce::kNormalized : reduce == "stats" ? Reduce::kStats : Reduce::kNone;
  const auto n = normalized.value_or(std::array<at::Tensor, 3>());
  resnet_kernels::PassResult result;
  {
    py::gil_scoped_release unlocked;
    result = resnet_kernels::cpu_pass(lazy_of(x), epilogue, store, out.value_or(at::Tensor()), by, n[0], n[1], n[2]);
  }
  const auto y = store ? py::cast(result.y) : py::none();
  if (by == Reduce::kNone) return py::make_tuple(y, py::none());
  return py::make_tuple(y, py::make_tuple(result.first, result.second));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info);
  py::class_<Conv>(m, "Conv", py::module_local()).def_property_readonly("engine", [](const Conv& conv) {
    return std::array{"onednn", "direct", "winograd"}[static_cast<int>(conv.engine)];
  });
  m.def("pack_conv", [](const at::Tensor& weight, const at::Tensor& scale, const std::array<int64_t, 4>& g,
                        const std::vector<int64_t>& size, const std::string& engine, bool transposed) {
    py::gil_scoped_release unlocked;
    return resnet_kernels::pack_conv(weight, scale, {g[0], g[1], g[2], g[3]}, size, engine, transposed);
  }, py::arg("weight"), py::arg("scale"), py::arg("geometry"), py::arg("size"), py::arg("engine"), py::arg("transposed") = false);
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
}
