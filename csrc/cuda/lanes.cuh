// The second stage of the two-stage reductions: a CTA owns 32 elements, and for each of them eight threads ("lanes"
// here, not lanes of a warp) each sum every eighth part. The order is fixed, so results are deterministic.
#pragma once

namespace resnet_kernels {

constexpr int kMergeThreads = 256, kMergeChannels = 32, kMergeLanes = kMergeThreads / kMergeChannels;

// Return, to every thread, the sum over the eight lanes of its element, added in lane order.
__device__ inline double over_lanes(double mine) {
  __shared__ double values[kMergeThreads];
  __syncthreads();
  values[threadIdx.x] = mine;
  __syncthreads();
  double total = 0;
  for (int lane = 0; lane < kMergeLanes; ++lane) total += values[lane * kMergeChannels + threadIdx.x % kMergeChannels];
  return total;
}

}  // namespace resnet_kernels
