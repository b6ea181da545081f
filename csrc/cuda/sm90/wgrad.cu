// Host side of wgrad.cuh.
#include "cuda/sm90/wgrad.cuh"

#include <cuda_runtime_api.h>

#include "cuda/sm90/api.h"
#include "cuda/sm90/call.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace resnet_kernels::sm90 {
namespace {

constexpr WgradShape kTwo{2, 6}, kThree{3, 5};

template <class T>
const void* kernel_of(int columns) {
  return columns == kTwo.columns ? reinterpret_cast<const void*>(&wgrad_kernel<T, kTwo.columns, kTwo.stages>)
                                 : reinterpret_cast<const void*>(&wgrad_kernel<T, kThree.columns, kThree.stages>);
}

void launch(const ResnetKernelsWgrad& c, cudaStream_t stream) {
  if (c.columns != kTwo.columns && c.columns != kThree.columns)
    throw std::runtime_error("expected 2 or 3 columns, got " + std::to_string(c.columns));
  const WgradShape shape = c.columns == kTwo.columns ? kTwo : kThree;
  WgradParams p{};
  p.P = output_size(c.H, c.R, c.stride, c.padding, c.dilation);
  p.Q = output_size(c.W, c.S, c.stride, c.padding, c.dilation);
  p.M = c.N * p.P * p.Q, p.span = c.span, p.K = c.K, p.C = c.C;
  p.stride = c.stride, p.padding = c.padding, p.dilation = c.dilation, p.S = c.S;
  p.slices = (c.C + kSlice - 1) / kSlice, p.all_slices = p.slices * c.R * c.S;
  p.k_tiles = (c.K + kWgradRows - 1) / kWgradRows;
  const int c_tiles = (p.all_slices + shape.columns - 1) / shape.columns;
  p.upper = c.upper, p.parts = c.parts, p.sums = c.sums;
  if (p.upper && shape.columns * kSlice != kWgradRows) throw std::runtime_error("moments are of square tiles");
  p.parts_there = (p.M + c.span - 1) / c.span;
  p.units = (p.upper ? p.k_tiles * (p.k_tiles + 1) / 2 : p.k_tiles * c_tiles) * p.parts_there;
  const bool half = c.half;
  p.g = im2col_map("g", half, c.g, {c.N, p.P, p.Q, c.K}, {c.g_strides[0], c.g_strides[1], c.g_strides[2]}, 1, 0, 0, 0,
                   kWgradPositions);
  p.x = im2col_map("x", half, c.x, {c.N, c.H, c.W, c.C}, {c.x_strides[0], c.x_strides[1], c.x_strides[2]}, c.stride,
                   c.padding, c.dilation * (c.S - 1), c.dilation * (c.R - 1), kWgradPositions);
  run(half ? kernel_of<__half>(c.columns) : kernel_of<__nv_bfloat16>(c.columns), p.units, c.multiprocessors,
      kWgradThreads, wgrad_shared_bytes(shape), p, stream);
}

}  // namespace
}  // namespace resnet_kernels::sm90

extern "C" const char* resnet_kernels_sm90_wgrad(const ResnetKernelsWgrad* call, void* stream) {
  return resnet_kernels::sm90::told("sm90 wgrad",
                                    [&] { resnet_kernels::sm90::launch(*call, static_cast<cudaStream_t>(stream)); });
}
