// A convolution with everything around it, for sm_90a: what its tiles take, seen from the host.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace resnet_kernels::sm90 {

// What a launch is given: passed by value, so that the copy engine reads the maps from constant memory.
struct ConvParams {
  // x and x2 by im2col: slices of 64 channels of a tile's output positions; w, w2 (K, taps, C); residual, y (M, K).
  CUtensorMap x, w, x2, w2, residual, y;
  const float* scale;  // null: 1
  const float* shift;  // null: 0
  int tiles, k_tiles;  // in all; of output channels
  int M, K, P, Q;
  int stride, padding, dilation, S, taps, slices;
  int slices2;  // of the second product; 0: there is none
  bool residual_there, relu;
  float* parts;  // means (tiles of positions, K), then squared deviations; where the tile has statistics
};

// A kernel's tile of kRows positions per warp group x kColumns output channels. In turn: each of the two consumer warp
// groups has tiles of its own, one multiplies while the other stores; else both share a tile of 2 * kRows positions.
// Statistics: of the result's values in the tile, per channel; in turn only.
struct TileShape {
  int rows, columns, stages;
  bool in_turn, statistics;

  constexpr int positions() const { return rows * (in_turn ? 1 : 2); }
};

constexpr int kConvThreads = 384;

// Of a warp group: mean and squared deviations of a channel in the rows of each of its four warps.
constexpr int statistics_bytes(TileShape t) { return t.statistics ? 4 * t.columns * 8 : 0; }

// Bytes of shared memory: operands' ring, a buffer of the tile's results per warp group, barriers, what warps know of
// statistics, and what aligns them.
constexpr int shared_bytes(TileShape t) {
  return t.stages * (t.positions() + t.columns) * 128 + 2 * t.rows * t.columns * 2 + 256 + 2 * statistics_bytes(t) + 1024;
}

}  // namespace resnet_kernels::sm90
