// The Python module resnet_kernels._C: what was built, and the C++ and CUDA primitives the backends call.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "common/checks.h"
#include "cpu/conv.h"
#include "cpu/passes.h"
#include "cpu/pool.h"

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
                        const std::vector<int64_t>& size, const std::string& engine) {
    py::gil_scoped_release unlocked;
    return resnet_kernels::pack_conv(weight, scale, {g[0], g[1], g[2], g[3]}, size, engine);
  });
  m.def("conv", &resnet_kernels::cpu_conv, py::call_guard<py::gil_scoped_release>());
  m.def("residual_block", &resnet_kernels::cpu_residual_block, py::call_guard<py::gil_scoped_release>());
  m.def("pool_bytes", &resnet_kernels::pool_bytes);
  m.def("bn_pass", &resnet_kernels::cpu_bn_pass, py::call_guard<py::gil_scoped_release>());
  m.def("max_pool_relu", &resnet_kernels::cpu_max_pool_relu, py::call_guard<py::gil_scoped_release>());
#ifdef RESNET_KERNELS_CUDA
  m.def("cuda_bn_pass", &cuda_bn_pass, py::call_guard<py::gil_scoped_release>());
#endif
}
