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
};

// A kernel's tile of kRows positions per warp group x kColumns output channels. In turn: each of the two consumer warp
// groups has tiles of its own, one multiplies while the other stores; else both share a tile of 2 * kRows positions.
struct TileShape {
  int rows, columns, stages;
  bool in_turn;

  constexpr int positions() const { return rows * (in_turn ? 1 : 2); }
};

constexpr int kConvThreads = 384;

// Bytes of shared memory: operands' ring, a buffer of the tile's results per warp group, barriers, and what aligns
// them.
constexpr int shared_bytes(TileShape t) {
  return t.stages * (t.positions() + t.columns) * 128 + 2 * t.rows * t.columns * 2 + 256 + 1024;
}

}  // namespace resnet_kernels::sm90
