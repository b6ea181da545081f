// Merging per-channel statistics (mean, M2 = sum of squared deviations) of groups of rows: arithmetic and lane indices
// of conv_act.cuh's statistics epilogue. Free of CUDA, so that tests/hopper_index.cpp checks it on the host.
#pragma once

#include "cuda/sm90/index.h"

namespace resnet_kernels::sm90 {

// Number of rows before `left` that a warp owns: of each of the `parts` groups of 64 rows, warp w of the warp group
// owns 16, from 16 * w on.
RESNET_KERNELS_BOTH constexpr int rows_of_warp(int left, int warp, int parts) {
  int rows = 0;
  for (int part = 0; part < parts; ++part) {
    const int there = left - 64 * part - 16 * warp;
    rows += there < 0 ? 0 : there < 16 ? there : 16;
  }
  return rows;
}

// Chan, Golub and LeVeque's formula for merging the statistics of `more` rows into those of `rows`; it never subtracts
// large sums. The factors depend on the row counts only and are shared by all channels.
struct Merge {
  float share, cross;
  Merge() = default;
  RESNET_KERNELS_BOTH Merge(float rows, float more) {
    const float total = rows + more;
    share = total > 0 ? more / total : 0.f, cross = rows * share;
  }
  RESNET_KERNELS_BOTH void operator()(float& mean, float& M2, float mean_of_more, float M2_of_more) const {
    const float delta = mean_of_more - mean;
    M2 += M2_of_more + delta * delta * cross;
    mean += delta * share;
  }
};

// A reduce-scatter over eight lanes of a warp (lane offsets 4, 8 and 16), which hold 16 channels each of different
// rows. In each of three rounds a lane keeps half of its channels, gives the other half to its partner and merges what
// the partner gives, until it holds two channels of all rows. Of 64 channels, lane l begins with channels 8 (j / 2) + 2
// (l % 4) + j % 2, j < 16, and ends with 2 l and 2 l + 1.

// One round, lane's side: of the first 2 * kLeft values of v, move the half that is kept to the front and the other
// half to `given`.
template <int kLeft>
RESNET_KERNELS_BOTH void halve(float (&v)[16], float (&given)[kLeft], unsigned lane) {
  const bool upper = lane & (2 * kLeft);
  for (int j = 0; j < kLeft; ++j) {
    given[j] = upper ? v[j] : v[j + kLeft];
    v[j] = upper ? v[j + kLeft] : v[j];
  }
}

}  // namespace resnet_kernels::sm90
