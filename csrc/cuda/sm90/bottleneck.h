// A bottleneck of 64 channels for sm_90a, seen from the host.
#pragma once

#include <cuda.h>

#include "cuda/sm90/index.h"

namespace resnet_kernels::sm90 {

struct BottleneckParams {
  CUtensorMap x, y;       // (N, H, W, 256)
  CUtensorMap w1, w, w3;  // (64, 256), (64, 9, 64) and (256, 64)
  const float *shift1, *shift, *shift3;
  int strips, strips_of_image, rows, H, W;  // rows: of a strip, an even number
};

constexpr int kBottleneckThreads = 384;
constexpr int kBottleneckJ = 64, kBottleneckK = 256, kBottleneckColumns = 56;  // inside, outside; columns at most
constexpr int kBottleneckSlots = 3, kBottleneckBuffers = 2;  // of x; of a warp group's results

constexpr int kBottleneckWeights1 = kBottleneckK * kRow, kBottleneckWeights = 9 * 64 * kRow,
              kBottleneckWeights3 = kBottleneckK * kRow, kBottleneckItem = kBottleneckColumns * kRow;
// Rows of a, and what a product of 64 positions reads beyond the last; in multiples of 1024 bytes.
constexpr int kBottleneckA = (kRowsOfA * (kBottleneckColumns + 2) + 14) / 8 * 8 * kRow;
constexpr int kBottleneckSharedBytes = kBottleneckWeights1 + kBottleneckWeights + kBottleneckWeights3 + kBottleneckA +
                                       (kBottleneckSlots + 2 * kBottleneckBuffers) * kBottleneckItem + 256 + 1024;
static_assert(kBottleneckSharedBytes <= 227 * 1024);

}  // namespace resnet_kernels::sm90
