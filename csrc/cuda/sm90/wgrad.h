// Weight gradients and second moments for sm_90a: kernel parameters and shared memory sizes, without device code.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/sm90/index.h"

namespace resnet_kernels::sm90 {

struct WgradParams {
  CUtensorMap g, x;  // im2col maps: one copy is 64 channels of 64 output positions
  float* parts;      // (parts, K, taps, C)
  float* sums;       // (parts, K), the sums of g; null: not wanted
  // units of work (tiles x parts), and the number of parts
  int units, parts_there;
  int M, span, K, C, P, Q;
  int stride, padding, dilation, S, slices;  // slices: of one tap's channels
  int all_slices, k_tiles;                   // all_slices: of all taps; k_tiles: tiles along K
  bool upper;                                // second moments, x is g: tiles below the diagonal are skipped
};

constexpr int kWgradThreads = 384;
constexpr int kWgradRows = 128;      // channels of g in a tile: 64 for each of two consumer warp groups
constexpr int kWgradPositions = 64;  // output positions in a stage
constexpr int kWgradSliceBytes = kWgradPositions * kRow;
constexpr int kWgradOnesBytes = 8 * 16 * 2;

// columns: slices of 64 channels of x in a tile; stages of the pipeline.
struct WgradShape {
  int columns, stages;
};
constexpr int wgrad_stage_bytes(WgradShape s) { return (kWgradRows / kSlice + s.columns) * kWgradSliceBytes; }
constexpr int wgrad_shared_bytes(WgradShape s) {
  return s.stages * wgrad_stage_bytes(s) + kWgradOnesBytes + 256 + 1024;
}

}  // namespace resnet_kernels::sm90
