// The per-channel algebra between a block's kernels, as defined in resnet_kernels/backends/algebra.py. W (K, J) is the
// weight of the block's last 1x1 convolution c = h W^T; mu and M2 are the moments of h; see finalize_* in contract.py
// for the rest.
//
//     table          elementwise over K: a = gamma*rstd, b = beta - mean*a, ...
//     bn_grad        elementwise over K
//     product        T = W M2, or B = -W^T (q W): a CTA owns a 64 x 64 tile, K steps of 16 through shared memory
//     product_table  mean = W mu, M2 = rowsum(T * W), and the table: a warp owns a channel
//     tail           dgamma = rstd (rowsum(G * W) - sg (mean - W centre)),  q = a rstd dgamma / M,  A = a W,
//                    dweight = a (G + sg (centre - mu)^T) - q T: a warp owns a channel
//     shift          v = -m1 A - (mu - centre) B with m1 = sg / M, from the rounded A and B: a CTA owns 16 columns
//
// Each is one launch. A product's table takes two launches and a tail's gradient four, because an element of T or B is
// complete only after its whole sum. Matrix products are fp32 FMA, whatever torch's TF32 flags say. Per-channel vectors
// are computed in fp64 and rounded once: an error in one of them is the same for every row and would not average out.
//
// Memory traffic: every matrix once per launch, from device memory or L2.
#pragma once

#include "cuda/api.h"
#include "cuda/elements.cuh"

namespace resnet_kernels {

constexpr int kFinalizeThreads = 256, kWarp = 32, kWarps = kFinalizeThreads / kWarp;
constexpr int kTile = 64, kStep = 16, kPerThread = 4;
constexpr int kColumns = 16, kShiftThreads = 1024, kShiftLanes = kShiftThreads / kColumns;

__device__ inline void store_table(float* table, int64_t K, int64_t k, double mean, double M2, double gamma,
                                   double beta, double rows, double least, double eps) {
  const double rstd = 1. / sqrt(M2 / rows + eps);
  const float a = static_cast<float>(gamma * rstd);
  table[k] = a;
  // From the rounded a, which is the one that the epilogues use.
  table[K + k] = static_cast<float>(beta - mean * a);
  table[2 * K + k] = static_cast<float>(mean);
  table[3 * K + k] = static_cast<float>(rstd);
  table[4 * K + k] = static_cast<float>(M2 / least);
}

__global__ void __launch_bounds__(kFinalizeThreads) table_kernel(const __grid_constant__ ResnetKernelsTable p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kFinalizeThreads + threadIdx.x;
  if (k < p.K) store_table(p.table, p.K, k, p.mean[k], p.M2[k], p.gamma[k], p.beta[k], p.rows, p.least, p.eps);
}

__global__ void __launch_bounds__(kFinalizeThreads) bn_grad_kernel(const __grid_constant__ ResnetKernelsBnGrad p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kFinalizeThreads + threadIdx.x;
  if (k >= p.K) return;
  const double a = p.a[k], rstd = p.rstd[k];
  p.be[k] = static_cast<float>(-a * rstd * p.dgamma[k] / p.rows);
  p.shift[k] = static_cast<float>(-a * p.dbeta[k] / p.rows);
}

template <typename T>
__device__ inline float element(const void* matrix, int row, int column, int rows, int columns) {
  if (row >= rows || column >= columns) return 0.f;
  return widen(static_cast<const T*>(matrix)[static_cast<int64_t>(row) * columns + column]);
}

// kSquare: B (J, J) = -W^T (q W) in T. Otherwise product (K, J) = W M2 in fp32. A thread owns 4 x 4 accumulators.
template <typename T, bool kSquare>
__global__ void __launch_bounds__(kFinalizeThreads)
    product_kernel(const __grid_constant__ ResnetKernelsProduct p, const float* q, void* B) {
  __shared__ float left[kStep][kTile + 1], right[kStep][kTile];
  const int height = kSquare ? p.J : p.K, depth = kSquare ? p.K : p.J, across = (p.J + kTile - 1) / kTile;
  const int row0 = blockIdx.x / across * kTile, column0 = blockIdx.x % across * kTile;
  const int row = threadIdx.x / 16 * kPerThread, column = threadIdx.x % 16 * kPerThread;
  float total[kPerThread][kPerThread] = {};
  for (int d0 = 0; d0 < depth; d0 += kStep) {
    for (int i = threadIdx.x; i < kStep * kTile; i += kFinalizeThreads) {
      const int d = i / kTile, j = i % kTile;
      if constexpr (kSquare) {
        const float scale = d0 + d < p.K ? q[d0 + d] : 0.f;
        left[d][j] = element<T>(p.weight, d0 + d, row0 + j, p.K, p.J);
        right[d][j] = scale * element<T>(p.weight, d0 + d, column0 + j, p.K, p.J);
      } else {
        left[i % kStep][i / kStep] = element<T>(p.weight, row0 + i / kStep, d0 + i % kStep, p.K, p.J);
        right[d][j] = element<float>(p.M2, d0 + d, column0 + j, p.J, p.J);
      }
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kStep; ++d)
#pragma unroll
      for (int r = 0; r < kPerThread; ++r)
#pragma unroll
        for (int c = 0; c < kPerThread; ++c) total[r][c] = fmaf(left[d][row + r], right[d][column + c], total[r][c]);
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kPerThread; ++r)
#pragma unroll
    for (int c = 0; c < kPerThread; ++c) {
      if (row0 + row + r >= height || column0 + column + c >= p.J) continue;
      const int64_t at = static_cast<int64_t>(row0 + row + r) * p.J + column0 + column + c;
      if constexpr (kSquare) static_cast<T*>(B)[at] = narrow<T>(-total[r][c]);
      else p.product[at] = total[r][c];
    }
}

// Return the sum over the warp, in every lane.
__device__ inline double over_warp(double v) {
#pragma unroll
  for (int across = kWarp / 2; across > 0; across /= 2) v += __shfl_xor_sync(~0u, v, across);
  return v;
}

template <typename T>
__global__ void __launch_bounds__(kFinalizeThreads)
    product_table_kernel(const __grid_constant__ ResnetKernelsProductTable p) {
  const int k = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (k >= p.of.K) return;
  const int J = p.of.J;
  const T* weight = static_cast<const T*>(p.of.weight) + static_cast<int64_t>(k) * J;
  const float* product = p.of.product + static_cast<int64_t>(k) * J;
  double mean = 0, M2 = 0;
  for (int j = threadIdx.x % kWarp; j < J; j += kWarp) {
    const double w = widen(weight[j]);
    mean += w * p.of.mu[j], M2 += w * product[j];
  }
  mean = over_warp(mean), M2 = over_warp(M2);
  // M2 is not formed from squares, so rounding can leave a zero variance slightly negative. A NaN passes through.
  if (M2 < 0) M2 = 0;
  if (threadIdx.x % kWarp == 0)
    store_table(p.table, p.of.K, k, mean, M2, p.gamma[k], p.beta[k], p.of.rows, p.least, p.eps);
}

template <typename T>
__global__ void __launch_bounds__(kFinalizeThreads) tail_kernel(const __grid_constant__ ResnetKernelsTailGrad p) {
  const int k = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp, J = p.of.J;
  if (k >= p.of.K) return;
  const int64_t row = static_cast<int64_t>(k) * J;
  const T* weight = static_cast<const T*>(p.of.weight) + row;
  double along = 0, centred = 0;
  for (int j = lane; j < J; j += kWarp) {
    const double w = widen(weight[j]);
    along += w * p.G[row + j];
    if (p.centre) centred += w * p.centre[j];
  }
  const double sg = p.sg[k], a = p.a[k], rstd = p.rstd[k];
  const double dgamma = rstd * (over_warp(along) - sg * (p.mean[k] - over_warp(centred)));
  const double q = a * rstd * dgamma / p.of.rows;
  if (lane == 0) p.dgamma[k] = static_cast<float>(dgamma), p.q[k] = static_cast<float>(q);
  for (int j = lane; j < J; j += kWarp) {
    const double off = p.of.mu[j] - (p.centre ? static_cast<double>(p.centre[j]) : 0.);
    p.dweight[row + j] = static_cast<float>(a * (p.G[row + j] - sg * off) - q * p.of.product[row + j]);
    static_cast<T*>(p.A)[row + j] = narrow<T>(p.a[k] * widen(weight[j]));
  }
}

template <typename T>
__global__ void __launch_bounds__(kShiftThreads) shift_kernel(const __grid_constant__ ResnetKernelsTailGrad p) {
  __shared__ double sums[kShiftThreads];
  const int J = p.of.J, j = blockIdx.x * kColumns + threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  double v = 0;
  for (int k = lane; j < J && k < p.of.K; k += kShiftLanes)
    v -= p.sg[k] / p.of.rows * widen(static_cast<const T*>(p.A)[static_cast<int64_t>(k) * J + j]);
  for (int i = lane; j < J && i < J; i += kShiftLanes) {
    const double off = p.of.mu[i] - (p.centre ? static_cast<double>(p.centre[i]) : 0.);
    v -= off * widen(static_cast<const T*>(p.B)[static_cast<int64_t>(i) * J + j]);
  }
  sums[threadIdx.x] = v;
  __syncthreads();
  if (lane > 0 || j >= J) return;
  for (int other = 1; other < kShiftLanes; ++other) v += sums[other * kColumns + threadIdx.x];
  p.v[j] = static_cast<float>(v);
}

}  // namespace resnet_kernels
