// Sums over parts: a block owns 32 elements, eight lanes each take every eighth part.
#pragma once

namespace resnet_kernels {

constexpr int kMergeThreads = 256, kMergeChannels = 32, kMergeLanes = kMergeThreads / kMergeChannels;

// The sum of a value per lane for each of the block's elements, in the order of the lanes.
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
