// The tail of a bottleneck of 128 channels, for sm_90a: kernel parameters and shared memory sizes, without device code.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/sm90/api.h"
#include "cuda/sm90/index.h"

namespace resnet_kernels::sm90 {

struct WideTailParams {
  // x, residual, y, ahead as (N, H, W, channels); w (128, 9, 128), w3 (K, 128), w1 (128, K).
  CUtensorMap x, w, w3, w1, residual, y, ahead;
  const float *shift, *shift3, *shift1;
  int tiles, tiles_of_image, rows, pitch, parts;  // rows: output rows of half a tile; parts: slices of 64 channels of y
};

constexpr int kWideThreads = 384;
constexpr int kWideJ = 128;  // channels inside and ahead
// Per consumer warp group: slots of the weights' ring, and results buffers.
constexpr int kWideSlots = 2, kWideBuffers = 4;

// Bytes: 64 channels of the x halo, a slot of weights, a results buffer, all of one warp group.
constexpr int kWideHaloSlice = kWideHalo * kRow, kWideSlot = kWideJ * kRow, kWideBuffer = kWidePositions * kRow;
constexpr int kWideBytesOfGroup =
    kWideJ / kSlice * kWideHaloSlice + kWideSlots * kWideSlot + kWideBuffers * kWideBuffer;
constexpr int kWideSharedBytes = 2 * kWideBytesOfGroup + 256 + 1024;
static_assert(kWideSharedBytes <= 227 * 1024);
// h takes the place of x.
static_assert(2 * kWidePositions <= kWideHalo);

void launch_wide_tail(const ResnetKernelsTail&, cudaStream_t);

}  // namespace resnet_kernels::sm90
