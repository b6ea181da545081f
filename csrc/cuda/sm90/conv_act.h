// A convolution with everything around it, for sm_90a: what its tiles take, seen from the host.
#pragma once

#include <cuda.h>
#include <vector_types.h>

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
  // Where the tile sums: per channel shift, a, b and centre. What residual brings is z, a result is kept where relu(a * z
  // + b) is.
  const float4* masks;
  float* parts;  // (2, tiles of positions, K), of tiles that reduce
};

// What a tile makes of its result per channel: nothing, its mean and squared deviations, or its sum and that of its
// products with z - centre.
enum class Reduce { kNothing, kStatistics, kSums };

// A kernel's tile of kRows positions per warp group x kColumns output channels. In turn: each of the two consumer warp
// groups has tiles of its own, one multiplies while the other stores; else both share a tile of 2 * kRows positions.
// It reduces in turn only.
struct TileShape {
  int rows, columns, stages;
  bool in_turn;
  Reduce reduce;

  constexpr int positions() const { return rows * (in_turn ? 1 : 2); }
};

constexpr int kConvThreads = 384;

// Of a warp group: the two values of a channel in the rows of each of its four warps; masks, where it sums.
constexpr int reduced_bytes(TileShape t) {
  return t.reduce == Reduce::kNothing ? 0 : t.columns * (t.reduce == Reduce::kSums ? 4 * 8 + 16 : 4 * 8);
}

// Bytes of shared memory: operands' ring, a buffer of the tile's results per warp group, barriers, what warps have
// reduced, and what aligns them.
constexpr int shared_bytes(TileShape t) {
  return t.stages * (t.positions() + t.columns) * 128 + 2 * t.rows * t.columns * 2 + 256 + 2 * reduced_bytes(t) + 1024;
}

}  // namespace resnet_kernels::sm90
