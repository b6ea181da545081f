// Host side of tail.cuh; calls with 128 channels go to wide_tail.cu.
#include "cuda/sm90/tail.cuh"

#include <cuda_runtime_api.h>

#include "cuda/sm90/api.h"
#include "cuda/sm90/call.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"
#include "cuda/sm90/wide_tail.h"

namespace resnet_kernels::sm90 {
namespace {

const void* kernel(bool half, int ahead) {
  if (ahead == 64)
    return half ? reinterpret_cast<const void*>(&tail_kernel<__half, 64>)
                : reinterpret_cast<const void*>(&tail_kernel<__nv_bfloat16, 64>);
  return half ? reinterpret_cast<const void*>(&tail_kernel<__half, 128>)
              : reinterpret_cast<const void*>(&tail_kernel<__nv_bfloat16, 128>);
}

void launch(const ResnetKernelsTail& c, cudaStream_t stream) {
  if (c.J == kWideJ) return launch_wide_tail(c, stream);
  if (c.J != kTailJ || c.K != kTailK)
    throw std::runtime_error("there is none of " + std::to_string(c.J) + " channels inside and " + std::to_string(c.K) +
                             " outside");
  if (c.W > kTailColumns) throw std::runtime_error("expected at most 56 columns");
  if (c.ahead_channels != 64 && c.ahead_channels != 128) throw std::runtime_error("expected 64 or 128 channels ahead");
  TailParams p{};
  p.pairs = (c.H + 1) / 2, p.tiles = c.N * p.pairs, p.W = c.W;
  p.shift = c.shift, p.shift3 = c.shift3, p.shift1 = c.shift1;
  const int64_t W = c.W, HW = W * c.H;
  auto map = [&](const char* what, const void* data, int64_t channels, int columns, int rows) {
    return tiled_map<4>(what, c.half, data, {channels, W, c.H, c.N}, {channels, channels * W, channels * HW},
                        {64, columns, rows, 1});
  };
  p.x = map("x", c.x, kTailJ, c.W + 2, 4);
  p.residual = map("residual", c.residual, kTailK, c.W, 1);
  p.y = map("y", c.y, kTailK, c.W, 1);
  p.ahead = map("ahead", c.ahead, c.ahead_channels, c.W, 1);
  p.w = tiled_map<3>("w", c.half, c.w, {64, 9, 64}, {64, 9 * 64}, {64, 1, 64});
  p.w3 = tiled_map<2>("w3", c.half, c.w3, {64, kTailK}, {64}, {64, 64});
  p.w1 = tiled_map<2>("w1", c.half, c.w1, {kTailK, c.ahead_channels}, {kTailK}, {64, c.ahead_channels});
  run(kernel(c.half, c.ahead_channels), p.tiles, c.multiprocessors, kTailThreads, tail_shared_bytes(c.ahead_channels),
      p, stream);
}

}  // namespace
}  // namespace resnet_kernels::sm90

extern "C" const char* resnet_kernels_sm90_tail(const ResnetKernelsTail* call, void* stream) {
  return resnet_kernels::sm90::told("sm90 tail",
                                    [&] { resnet_kernels::sm90::launch(*call, static_cast<cudaStream_t>(stream)); });
}
