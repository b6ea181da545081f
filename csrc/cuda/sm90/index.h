// Which element lies where: what the kernels for sm_90a compute of indices, on the host as well, where tests run it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RESNET_KERNELS_BOTH __host__ __device__
#else
#define RESNET_KERNELS_BOTH
#endif

namespace resnet_kernels::sm90 {

// Bytes of a row in shared memory: 64 channels of 16 bits, which is what a swizzle of 128 bytes spans.
constexpr int kRow = 128;
constexpr int kSlice = 64;

// Where the copy engine puts 16-byte chunk j of a row, in bytes from a multiple of 1024.
RESNET_KERNELS_BOTH constexpr uint32_t swizzled(int row, int j) { return row * kRow + ((j ^ row % 8) * 16); }

// Of a ring of kStages buffers: which one step n uses, and the parity of the phase of its barriers.
template <int kStages>
struct Ring {
  int slot = 0;
  uint32_t phase = 0;
  RESNET_KERNELS_BOTH void advance(int steps = 1) {
    slot += steps;
    // Both at once: steps may pass several rounds.
    phase ^= (slot / kStages) & 1;
    slot %= kStages;
  }
};

// Thread t of a warp group holds of 64 rows of accumulators number `half` (0, 1) of two, and of each eight columns two.
RESNET_KERNELS_BOTH constexpr int accumulator_row(unsigned t, int half) {
  return 16 * (t / 32) + t % 32 / 4 + 8 * half;
}
RESNET_KERNELS_BOTH constexpr unsigned accumulator_column(unsigned t) { return 2 * (t % 4); }

// Output position m, counted over columns, rows, images.
struct Position {
  int n, i, q;
  RESNET_KERNELS_BOTH Position(int m, int P, int Q) {
    const int row = m / Q;
    q = m % Q, i = row % P, n = row / P;
  }
};

// Where what a tap (r, s) of a 3x3 sees of an output row begins, where input rows lie `pitch` columns after each other.
RESNET_KERNELS_BOTH constexpr int tap_column(int output_row, int tap, int pitch) {
  return (output_row + tap / 3) * pitch + tap % 3;
}

// Of the tail of 128 channels: columns of a row at most, positions of half a tile and so of a buffer, and columns of x
// that its taps may see, in rows after each other.
constexpr int kWideColumns = 28, kWidePositions = 64, kWideHalo = 192;
// Rows lie so far after each other: what lies left and right of a map is there once.
constexpr int wide_pitch(int W) { return W + 2; }
// Output rows of half a tile.
constexpr int wide_rows(int W) { return kWidePositions / wide_pitch(W); }

// Of a whole bottleneck: two warp groups make rows of a, what its first convolution makes of x, in turn, into a ring of
// kRowsOfA. A strip of output rows 0 to rows - 1 needs those from -1 to rows; `begun`: how many were made before it.
constexpr int kRowsOfA = 5;
struct RowOfA {
  int slot;
  uint32_t phase;
  RESNET_KERNELS_BOTH RowOfA(int begun, int row)
      : slot((begun + row + 1) % kRowsOfA), phase((begun + row + 1) / kRowsOfA & 1) {}
};
// Rows of a strip, so that the last round of blocks is nearly full and little is computed twice. An even number.
inline int rows_of_strip(int N, int H, int multiprocessors) {
  int best = 0;
  int64_t least = 0;
  for (int strips = 1; strips <= (H + 1) / 2; ++strips) {
    const int rows = (H + 2 * strips - 1) / (2 * strips) * 2;
    const int64_t rounds = (int64_t{N} * ((H + rows - 1) / rows) + multiprocessors - 1) / multiprocessors;
    const int64_t time = rounds * (rows + 2);
    if (best == 0 || time < least) best = rows, least = time;
  }
  return best;
}

// Of tiles of a symmetric matrix of n x n, those on and above the diagonal, number t of n (n + 1) / 2.
struct UpperTile {
  int row, column;
  RESNET_KERNELS_BOTH explicit UpperTile(int t) {
    column = 0;
    while ((column + 1) * (column + 2) / 2 <= t) ++column;
    row = t - column * (column + 1) / 2;
  }
};

}  // namespace resnet_kernels::sm90
