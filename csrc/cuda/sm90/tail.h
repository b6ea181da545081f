// The tail of a bottleneck of 64 channels, for sm_90a: kernel parameters and shared memory sizes, without device code.
#pragma once

#include <cuda.h>

namespace resnet_kernels::sm90 {

struct TailParams {
  // x, residual, y, ahead as (N, H, W, channels); w (64, 9, 64), w3 (256, 64), w1 (ahead's channels, 256).
  CUtensorMap x, w, w3, w1, residual, y, ahead;
  const float *shift, *shift3, *shift1;
  int tiles, pairs, W;  // tiles: pairs of rows in all; pairs: pairs of rows of an image
};

constexpr int kTailThreads = 384;
constexpr int kTailJ = 64, kTailK = 256, kTailColumns = 56;  // channels inside and outside; maximum map width
// Bytes of shared memory: the weights of the 3x3 and of w3, the x halo of one tile, one results buffer.
constexpr int kTailWeights = 9 * 64 * 128, kTailWeights3 = kTailK * 128;
constexpr int kTailHalo = 4 * (kTailColumns + 2) * 128, kTailBuffer = kTailColumns * 128;

// Results buffers per consumer warp group: as many as fit beside the weights.
constexpr int tail_buffers(int ahead) { return ahead == 64 ? 4 : 2; }

constexpr int tail_shared_bytes(int ahead) {
  return kTailWeights + kTailWeights3 + ahead * kTailK * 2 + kTailHalo + 2 * tail_buffers(ahead) * kTailBuffer + 256 +
         1024;
}
static_assert(tail_shared_bytes(64) <= 227 * 1024 && tail_shared_bytes(128) <= 227 * 1024);

}  // namespace resnet_kernels::sm90
