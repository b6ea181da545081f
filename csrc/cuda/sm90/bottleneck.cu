// Host side of bottleneck.cuh.
#include "cuda/sm90/bottleneck.cuh"

#include <cuda_runtime_api.h>

#include "cuda/sm90/api.h"
#include "cuda/sm90/call.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace resnet_kernels::sm90 {
namespace {

const void* kernel(bool half, bool projection) {
  if (projection)
    return half ? reinterpret_cast<const void*>(&bottleneck_kernel<__half, true>)
                : reinterpret_cast<const void*>(&bottleneck_kernel<__nv_bfloat16, true>);
  return half ? reinterpret_cast<const void*>(&bottleneck_kernel<__half, false>)
              : reinterpret_cast<const void*>(&bottleneck_kernel<__nv_bfloat16, false>);
}

void launch(const ResnetKernelsBottleneck& c, cudaStream_t stream) {
  if (c.W > kBottleneckColumns) throw std::runtime_error("expected at most 56 columns");
  const BottleneckShape shape{c.wp != nullptr};
  BottleneckParams p{};
  p.rows = rows_of_strip(c.N, c.H, c.multiprocessors);
  p.strips_of_image = (c.H + p.rows - 1) / p.rows, p.strips = c.N * p.strips_of_image;
  p.H = c.H, p.W = c.W;
  p.shift1 = c.shift1, p.shift = c.shift, p.shift3 = c.shift3;
  const int C = shape.slices() * kSlice, J = kBottleneckJ, K = kBottleneckK;
  const int64_t W = c.W, H = c.H;
  auto map = [&](const char* what, const void* data, int64_t channels) {
    return tiled_map<4>(what, c.half, data, {channels, W, H, c.N}, {channels, channels * W, channels * W * H},
                        {kSlice, c.W, 1, 1});
  };
  auto matrix = [&](const char* what, const void* data, int64_t columns, int64_t rows) {
    return tiled_map<2>(what, c.half, data, {columns, rows}, {columns}, {kSlice, kSlice});
  };
  p.x = map("x", c.x, C), p.y = map("y", c.y, K);
  p.w1 = matrix("w1", c.w1, C, J), p.w3 = matrix("w3", c.w3, J, K);
  if (shape.projection) p.wp = matrix("wp", c.wp, C, K);
  p.w = tiled_map<3>("w", c.half, c.w, {J, 9, J}, {J, 9 * J}, {kSlice, 1, J});
  run(kernel(c.half, shape.projection), p.strips, c.multiprocessors, kBottleneckThreads, shape.shared_bytes(), p,
      stream);
}

}  // namespace
}  // namespace resnet_kernels::sm90

extern "C" const char* resnet_kernels_sm90_bottleneck(const ResnetKernelsBottleneck* call, void* stream) {
  return resnet_kernels::sm90::told("sm90 bottleneck",
                                    [&] { resnet_kernels::sm90::launch(*call, static_cast<cudaStream_t>(stream)); });
}
