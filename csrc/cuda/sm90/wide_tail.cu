// Host side of wide_tail.cuh, called by tail.cu.
#include "cuda/sm90/wide_tail.cuh"

#include <stdexcept>

#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace resnet_kernels::sm90 {

void launch_wide_tail(const ResnetKernelsTail& c, cudaStream_t stream) {
  if (c.ahead_channels != kWideJ) throw std::runtime_error("expected 128 channels ahead");
  if (c.W > kWideColumns) throw std::runtime_error("expected at most 28 columns");
  if (c.K % kSlice) throw std::runtime_error("expected channels outside in multiples of 64");
  WideTailParams p{};
  p.rows = wide_rows(c.W), p.pitch = wide_pitch(c.W), p.parts = c.K / kSlice;
  p.tiles_of_image = (c.H + 2 * p.rows - 1) / (2 * p.rows), p.tiles = c.N * p.tiles_of_image;
  p.shift = c.shift, p.shift3 = c.shift3, p.shift1 = c.shift1;
  const int64_t W = c.W, HW = W * c.H;
  auto map = [&](const char* what, const void* data, int64_t channels, int rows) {
    return tiled_map<4>(what, c.half, data, {channels, W, c.H, c.N}, {channels, channels * W, channels * HW},
                        {kSlice, p.pitch, rows, 1});
  };
  p.x = map("x", c.x, kWideJ, 2 * p.rows + 2);
  p.residual = map("residual", c.residual, c.K, p.rows);
  p.y = map("y", c.y, c.K, p.rows);
  p.ahead = map("ahead", c.ahead, kWideJ, p.rows);
  p.w = tiled_map<3>("w", c.half, c.w, {kWideJ, 9, kWideJ}, {kWideJ, 9 * kWideJ}, {kSlice, 1, kWideJ});
  p.w3 = tiled_map<2>("w3", c.half, c.w3, {kWideJ, c.K}, {kWideJ}, {kSlice, kSlice});
  p.w1 = tiled_map<2>("w1", c.half, c.w1, {c.K, kWideJ}, {c.K}, {kSlice, kWideJ});
  const void* kernel = c.half ? reinterpret_cast<const void*>(&wide_tail_kernel<__half>)
                              : reinterpret_cast<const void*>(&wide_tail_kernel<__nv_bfloat16>);
  run(kernel, (p.tiles + 1) / 2, c.multiprocessors, kWideThreads, kWideSharedBytes, p, stream);
}

}  // namespace resnet_kernels::sm90
