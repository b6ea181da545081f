// A bottleneck's last 1x1 with the first 1x1 of the next block, for sm_90a: kernel parameters and shared memory sizes,
// without device code.
#pragma once

#include <cuda.h>

namespace resnet_kernels::sm90 {

struct PairParams {
  CUtensorMap x, residual, y, ahead;  // (M, channels)
  CUtensorMap w3, w1;                 // (K, J) and (ahead's channels, K)
  const float *shift3, *shift1;
  int tiles, parts;  // tiles of 128 positions; parts: slices of 64 channels of y
};

// Channels inside (J) and of the next block's first convolution; stages of x; slots of the weights' ring; results
// buffers of a consumer warp group.
struct PairShape {
  int inside, ahead, tiles, slots, buffers;
};

constexpr int kPairThreads = 384, kPairRows = 128, kPairBuffer = 64 * 128;

constexpr int pair_tile_bytes(PairShape s) { return kPairRows * s.inside * 2; }
constexpr int pair_slot_bytes(PairShape s) { return 64 * 2 * (s.inside > s.ahead ? s.inside : s.ahead); }
constexpr int pair_shared_bytes(PairShape s) {
  return s.tiles * pair_tile_bytes(s) + s.slots * pair_slot_bytes(s) + 2 * s.buffers * kPairBuffer + 256 + 1024;
}

}  // namespace resnet_kernels::sm90
