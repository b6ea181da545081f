// Weight gradients and second moments for sm_90a, seen from the host.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/sm90/index.h"

namespace resnet_kernels::sm90 {

struct WgradParams {
  CUtensorMap g, x;  // by im2col: slices of 64 channels of 64 output positions
  float* parts;      // (parts, K, taps, C)
  float* sums;       // (parts, K), of g; null: not wanted
  int units, parts_there;
  int M, span, K, C, P, Q;
  int stride, padding, dilation, S, slices;  // of a tap's channels
  int all_slices, k_tiles;                   // of all taps; tiles of K
  bool upper;                                // x is g: tiles below the diagonal are left out
};

constexpr int kWgradThreads = 384;
constexpr int kWgradRows = 128;       // channels of g in a tile: 64 for each of two warp groups
constexpr int kWgradPositions = 64;   // in a stage
constexpr int kWgradSliceBytes = kWgradPositions * kRow;
constexpr int kWgradOnesBytes = 8 * 16 * 2;

// columns: slices of 64 channels of x in a tile.
struct WgradShape {
  int columns, stages;
};
constexpr int wgrad_stage_bytes(WgradShape s) { return (kWgradRows / kSlice + s.columns) * kWgradSliceBytes; }
constexpr int wgrad_shared_bytes(WgradShape s) {
  return s.stages * wgrad_stage_bytes(s) + kWgradOnesBytes + 256 + 1024;
}

}  // namespace resnet_kernels::sm90
