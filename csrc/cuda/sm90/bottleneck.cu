#include "cuda/sm90/bottleneck.cuh"

#include <cuda_runtime_api.h>

#include "cuda/sm90/api.h"
#include "cuda/sm90/call.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace resnet_kernels::sm90 {
namespace {

void launch(const ResnetKernelsBottleneck& c, cudaStream_t stream) {
  if (c.W > kBottleneckColumns) throw std::runtime_error("expected at most 56 columns");
  BottleneckParams p{};
  p.rows = rows_of_strip(c.N, c.H, c.multiprocessors);
  p.strips_of_image = (c.H + p.rows - 1) / p.rows, p.strips = c.N * p.strips_of_image;
  p.H = c.H, p.W = c.W;
  p.shift1 = c.shift1, p.shift = c.shift, p.shift3 = c.shift3;
  const int64_t K = kBottleneckK, W = c.W, HW = W * c.H;
  auto map = [&](const char* what, const void* data) {
    return tiled_map<4>(what, c.half, data, {K, W, c.H, c.N}, {K, K * W, K * HW}, {kSlice, c.W, 1, 1});
  };
  p.x = map("x", c.x), p.y = map("y", c.y);
  p.w1 = tiled_map<2>("w1", c.half, c.w1, {kBottleneckK, kBottleneckJ}, {kBottleneckK}, {kSlice, kBottleneckJ});
  p.w = tiled_map<3>("w", c.half, c.w, {kBottleneckJ, 9, kBottleneckJ}, {kBottleneckJ, 9 * kBottleneckJ},
                     {kSlice, 1, kBottleneckJ});
  p.w3 = tiled_map<2>("w3", c.half, c.w3, {kBottleneckJ, kBottleneckK}, {kBottleneckJ}, {kSlice, kSlice});
  const void* kernel = c.half ? reinterpret_cast<const void*>(&bottleneck_kernel<__half>)
                              : reinterpret_cast<const void*>(&bottleneck_kernel<__nv_bfloat16>);
  run(kernel, p.strips, c.multiprocessors, kBottleneckThreads, kBottleneckSharedBytes, p, stream);
}

}  // namespace
}  // namespace resnet_kernels::sm90

extern "C" const char* resnet_kernels_sm90_bottleneck(const ResnetKernelsBottleneck* call, void* stream) {
  return resnet_kernels::sm90::told("sm90 bottleneck",
                                    [&] { resnet_kernels::sm90::launch(*call, static_cast<cudaStream_t>(stream)); });
}
