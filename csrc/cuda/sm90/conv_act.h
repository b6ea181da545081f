// conv_act, a convolution with its whole epilogue, for sm_90a: kernel parameters, tile shapes and shared memory sizes,
// without device code.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include <cstdint>

namespace resnet_kernels::sm90 {

// The kernel's parameters, passed by value as a __grid_constant__, so that TMA reads the tensor maps from constant
// memory.
struct ConvParams {
  // x and x2 are im2col maps: one copy is a slice of 64 channels of a tile's output positions. w, w2 are (K, taps, C),
  // residual and y (M, K).
  CUtensorMap x, w, x2, w2, residual, y;
  const float* scale;  // null: 1
  const float* shift;  // null: 0
  int tiles, k_tiles;  // tiles in all; tiles along the output channels
  int M, K, P, Q;
  // taps = R * S; slices: of 64 input channels. The mainloop has taps * slices + slices2 steps.
  int stride, padding, dilation, S, taps, slices;
  int slices2;  // of the second product's input channels; 0: no second product
  bool residual_there, relu;
  // Sums tiles only: shift, a, b and centre per channel. `residual` is then z, and a result is kept where relu(a * z +
  // b) > 0 or NaN.
  const float4* masks;
  float* parts;  // (2, tiles of positions, K), written by tiles that reduce
};

// The per-channel reduction in a tile's epilogue: none, mean and sum of squared deviations, or the sum and the sum of
// products with z - centre.
enum class Reduce { kNothing, kStatistics, kSums };

// A tile shape: `rows` output positions per consumer warp group by `columns` output channels, and the pipeline's
// stages.
// - in_turn (ping-pong): each of the two consumer warp groups owns tiles of `rows` positions; one runs its mainloop
// while the other runs its epilogue.
// - not in_turn (cooperative): both share a tile of 2 * rows positions.
//
// Only in_turn tiles can reduce.
struct TileShape {
  int rows, columns, stages;
  bool in_turn;
  Reduce reduce;

  constexpr int positions() const { return rows * (in_turn ? 1 : 2); }
};

constexpr int kConvThreads = 384;

// Shared memory of one warp group's reduction: two values per channel and warp (four warps) and, for sums, the tile's
// masks.
constexpr int reduced_bytes(TileShape t) {
  return t.reduce == Reduce::kNothing ? 0 : t.columns * (t.reduce == Reduce::kSums ? 4 * 8 + 16 : 4 * 8);
}

// Dynamic shared memory: the operands' ring, one results buffer per consumer warp group, the mbarriers (256 bytes), the
// reductions, and slack to align the start to 1024 bytes.
constexpr int shared_bytes(TileShape t) {
  return t.stages * (t.positions() + t.columns) * 128 + 2 * t.rows * t.columns * 2 + 256 + 2 * reduced_bytes(t) + 1024;
}

}  // namespace resnet_kernels::sm90
