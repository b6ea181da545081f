// Statistics per channel of parts of the rows, merged: arithmetic and indices, on the host as well, where tests run
// them.
#pragma once

#include "cuda/sm90/index.h"

namespace resnet_kernels::sm90 {

// Of a warp's 16 rows in each 64 of `parts`, those before `left`.
RESNET_KERNELS_BOTH constexpr int rows_of_warp(int left, int warp, int parts) {
  int rows = 0;
  for (int part = 0; part < parts; ++part) {
    const int there = left - 64 * part - 16 * warp;
    rows += there < 0 ? 0 : there < 16 ? there : 16;
  }
  return rows;
}

// What of means and squared deviations is another part's, where rows of two parts merge: Chan, Golub and LeVeque's
// formula, which subtracts no large sums.
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

// Eight lanes of a warp, 4, 8 and 16 apart, have 16 channels each of rows of their own: pairs of channels of which they
// keep half and give half in every of three rounds, until each has two of all rows. Lane l then has channels 2 l and
// 2 l + 1 of 64, where before it had 8 (j / 2) + 2 (l % 4) + j % 2, j < 16.

// The first 2 * kLeft of v: what is kept moves to the front, the rest to `given`.
template <int kLeft>
RESNET_KERNELS_BOTH void halve(float (&v)[16], float (&given)[kLeft], unsigned lane) {
  const bool upper = lane & (2 * kLeft);
  for (int j = 0; j < kLeft; ++j) {
    given[j] = upper ? v[j] : v[j + kLeft];
    v[j] = upper ? v[j + kLeft] : v[j];
  }
}

}  // namespace resnet_kernels::sm90
