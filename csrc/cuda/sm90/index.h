// Index arithmetic of the sm_90a kernels: swizzle, pipeline state, accumulator layout, taps and strips. Free of CUDA,
// so that tests/hopper_index.cpp checks it on the host.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RESNET_KERNELS_BOTH __host__ __device__
#else
#define RESNET_KERNELS_BOTH
#endif

namespace resnet_kernels::sm90 {

// Bytes of a row in shared memory, the span of the 128-byte swizzle: one slice of 64 channels of 16 bits.
constexpr int kRow = 128;
constexpr int kSlice = 64;

// Byte offset, from a multiple of 1024, at which TMA's 128-byte swizzle puts 16-byte chunk j of a row.
RESNET_KERNELS_BOTH constexpr uint32_t swizzled(int row, int j) { return row * kRow + ((j ^ row % 8) * 16); }

// Pipeline state: the stage (slot) that step n of a ring of kStages buffers uses, and the parity of the mbarrier phase
// to wait for. A consumer waits for `phase` on a full barrier, a producer for `phase ^ 1` on an empty one, which passes
// at once in the first round.
template <int kStages>
struct Ring {
  int slot = 0;
  uint32_t phase = 0;
  RESNET_KERNELS_BOTH void advance(int steps = 1) {
    slot += steps;
    // Divide before the remainder: a jump may pass several rounds of the ring.
    phase ^= (slot / kStages) & 1;
    slot %= kStages;
  }
};

// wgmma's accumulator layout. Of 64 rows, thread t of the warp group holds two (half 0 and 1); of each group of eight
// columns it holds two, from accumulator_column on.
RESNET_KERNELS_BOTH constexpr int accumulator_row(unsigned t, int half) {
  return 16 * (t / 32) + t % 32 / 4 + 8 * half;
}
RESNET_KERNELS_BOTH constexpr unsigned accumulator_column(unsigned t) { return 2 * (t % 4); }

// Output position m of a P x Q map: image n, row i, column q; columns vary fastest.
struct Position {
  int n, i, q;
  RESNET_KERNELS_BOTH Position(int m, int P, int Q) {
    const int row = m / Q;
    q = m % Q, i = row % P, n = row / P;
  }
};

// The tap-as-address trick: in shared memory input rows of `pitch` columns follow each other, so the A operand of tap
// (r, s) of a 3x3 for an output row is the same matrix, begun at this many rows (positions). tap = 3 * r + s.
RESNET_KERNELS_BOTH constexpr int tap_column(int output_row, int tap, int pitch) {
  return (output_row + tap / 3) * pitch + tap % 3;
}

// The wide tail (128 channels, wide_tail.cuh): maximum map width; positions of half a tile, hence of one results
// buffer; and positions of the x halo in shared memory, which is what the taps of a tile may read.
constexpr int kWideColumns = 28, kWidePositions = 64, kWideHalo = 192;
// Positions from one halo row to the next: the map's W columns and one column of zeros on either side.
constexpr int wide_pitch(int W) { return W + 2; }
// Output rows of half a tile.
constexpr int wide_rows(int W) { return kWidePositions / wide_pitch(W); }

// The whole bottleneck (bottleneck.cuh): its two consumer warp groups alternate in making rows of a, the output of the
// first 1x1, in a ring of kRowsOfA rows. A strip of output rows 0 to rows - 1 needs rows -1 to rows of a. RowOfA gives
// a row's slot and mbarrier parity; begun: the number of rows of a that earlier strips of this CTA made.
constexpr int kRowsOfA = 5;
struct RowOfA {
  int slot;
  uint32_t phase;
  RESNET_KERNELS_BOTH RowOfA(int begun, int row)
      : slot((begun + row + 1) % kRowsOfA), phase((begun + row + 1) / kRowsOfA & 1) {}
};
// Output rows of a strip, always even: minimizes (rounds of CTAs) * (rows of a per strip), so that the last round is
// nearly full and few halo rows are computed twice.
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

// Tile number t of the n (n + 1) / 2 tiles on and above the diagonal of a symmetric matrix of n x n tiles.
struct UpperTile {
  int row, column;
  RESNET_KERNELS_BOTH explicit UpperTile(int t) {
    column = 0;
    while ((column + 1) * (column + 2) / 2 <= t) ++column;
    row = t - column * (column + 1) / 2;
  }
};

}  // namespace resnet_kernels::sm90
