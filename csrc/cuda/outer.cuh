// Sums over rows of outer products: weight gradients of 1x1 convolutions, and the second moments of an activation.
//
//     result (K, C) = sum of g^T x        moments: mean = sum of h / M,  M2 = sum of (h - mean)^T (h - mean)
//
// A GEMM whose K extent is the rows M: g (M, K) and x (M, C) are row-major, so both operands are transposed. A CTA owns
// a tile (64 x 64 or 128 x 128) of the result and one part, `span` rows; the grid is tiles x parts (split-K).
//
// Mainloop, 16 bits: a multistage cp.async pipeline of 4 stages, each 32 rows of both operands, three steps ahead;
// every thread is producer and consumer, and one __syncthreads per step guards the stage that is refilled. Fragments
// come by ldmatrix.trans and are multiplied by mma.sync m16n8k16. In a row the 16-byte chunks are XOR-swizzled by row %
// 8, so that the eight rows of a column that ldmatrix reads lie in different banks. Tensor cores truncate as they
// accumulate, so every 128 rows the accumulators are added to a second, fp32 set. Column sums of g are a product with
// ones, shared out among the warps that hold the same rows of g. fp32 multiplies by FMA.
//
// A second launch adds the parts in index order, in fp64, so results are deterministic. Moments are centred about each
// part's own mean and merged by Chan's formula; their matrix is symmetric, and only tiles on and above the diagonal are
// computed. Operands are plain tensors: a lazy operand is materialized once before (fp32 moments subtract the mean
// there, too).
//
// Memory traffic: g once per tile of C and x once per tile of K, mostly from L2 after the first read; the (parts, K, C)
// fp32 partial sums written and read once, mostly in L2; the result once.
#pragma once

#include "cuda/api.h"
#include "cuda/elements.cuh"
#include "cuda/instructions.cuh"
#include "cuda/lanes.cuh"

namespace resnet_kernels {

constexpr int kStepRows = 32, kStages = 4, kFlushRows = 128;

// A CTA's tile: kTile x kTile of the result for 2 x (kTile / 32) warps, of which each owns kTile / 2 rows x 32 columns.
template <int kTile>
struct Tile {
  static constexpr int kColumns = kTile / 32, kThreads = 2 * kColumns * 32, kFragments = kTile / 2 / 16;
  static constexpr int kChunks = kTile / 8;             // 16-byte chunks in a row of an operand
  static constexpr int kBytes = kStepRows * kTile * 2;  // of one operand in one stage
  static constexpr int kSharedBytes = kStages * 2 * kBytes;
  static_assert(kFragments == kColumns, "each warp of a row of tiles multiplies one of its fragments by ones");
};

// The address of 16-byte chunk `index` of `row` of an operand's stage, swizzled.
template <int kTile>
__device__ inline char* chunk(char* operand, int row, int index) {
  return operand + (row * Tile<kTile>::kChunks + (index ^ row % 8)) * 16;
}

// The prologue's and mainloop's load: rows m0 to m0 + 31 of `data` (M, C), channels c0 to c0 + kTile - 1, into one
// operand of a stage. Rows from `last` on and channels from C on become zeros.
template <typename T, int kTile, bool kAligned>
__device__ inline void bring(char* operand, const void* data, int64_t m0, int64_t last, int c0, int C) {
#pragma unroll
  for (int i = 0; i < kStepRows * Tile<kTile>::kChunks / Tile<kTile>::kThreads; ++i) {
    const int at = i * Tile<kTile>::kThreads + threadIdx.x;
    const int row = at / Tile<kTile>::kChunks, index = at % Tile<kTile>::kChunks, c = c0 + index * 8;
    char* to = chunk<kTile>(operand, row, index);
    const bool there = m0 + row < last && c < C;
    if constexpr (kAligned) {
      copy_async(to, static_cast<const T*>(data) + (there ? (m0 + row) * C + c : 0), there);
    } else {
      const auto values = load<T, false>(data, (m0 + row) * C + c, there ? C - c : 0);
      memcpy(to, &values, 16);
    }
  }
}

template <typename T, int kTile, bool kAligned>
__global__ void __launch_bounds__(Tile<kTile>::kThreads) outer_kernel(const __grid_constant__ ResnetKernelsOuter p) {
  using Shape = Tile<kTile>;
  const int k_tiles = (p.K + kTile - 1) / kTile, c_tiles = (p.C + kTile - 1) / kTile;
  const int tile = blockIdx.x % (k_tiles * c_tiles), part = blockIdx.x / (k_tiles * c_tiles);
  const int k0 = tile % k_tiles * kTile, c0 = tile / k_tiles * kTile;
  if (p.moments && k0 > c0) return;
  const bool sums = p.sum_parts && (p.moments ? k0 == c0 : c0 == 0);
  const int64_t first = part * p.span, last = first + p.span < p.M ? first + p.span : p.M;
  const int steps = static_cast<int>((last - first + kStepRows - 1) / kStepRows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = warp % Shape::kColumns, warp_k = warp / Shape::kColumns * (kTile / 2), warp_c = column * 32;
  char* const shared = shared_memory();

  const auto start = [&](int step) {
    char* stage = shared + step % kStages * 2 * Shape::kBytes;
    if (step < steps) {
      bring<T, kTile, kAligned>(stage, p.g, first + step * kStepRows, last, k0, p.K);
      bring<T, kTile, kAligned>(stage + Shape::kBytes, p.x, first + step * kStepRows, last, c0, p.C);
    }
    // An empty group is committed as well, so that the count in wait_copies stays right at the end.
    commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) start(step);

  float total[Shape::kFragments][4][4] = {}, some[Shape::kFragments][4][4] = {};
  float total_sum[4] = {}, some_sum[4] = {};
  uint32_t ones[2];
  const T pair[2] = {narrow<T>(1.f), narrow<T>(1.f)};
  memcpy(&ones[0], pair, 4), ones[1] = ones[0];
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    // Refill the stage of the step before: every thread passed the barrier above after reading it.
    start(step + kStages - 1);
    char* const g = shared + step % kStages * 2 * Shape::kBytes;
    char* const x = g + Shape::kBytes;
#pragma unroll
    for (int row = 0; row < kStepRows; row += 16) {
      uint32_t a[Shape::kFragments][4], b[2][4];
#pragma unroll
      for (int i = 0; i < Shape::kFragments; ++i)
        load_transposed(a[i], chunk<kTile>(g, row + lane / 16 * 8 + lane % 8, warp_k / 8 + i * 2 + lane / 8 % 2));
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_transposed(b[j], chunk<kTile>(x, row + lane / 8 % 2 * 8 + lane % 8, warp_c / 8 + j * 2 + lane / 16));
#pragma unroll
      for (int i = 0; i < Shape::kFragments; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t half[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma<T>(some[i][j], a[i], half);
        }
        if (sums && i == column) mma<T>(some_sum, a[i], ones);
      }
    }
    if ((step + 1) % (kFlushRows / kStepRows) == 0 || step + 1 == steps) {
#pragma unroll
      for (int i = 0; i < Shape::kFragments; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) total[i][j][e] += some[i][j][e], some[i][j][e] = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) total_sum[e] += some_sum[e], some_sum[e] = 0;
    }
  }
  wait_copies<0>();

  float* const result = p.parts + static_cast<int64_t>(part) * p.K * p.C;
#pragma unroll
  for (int i = 0; i < Shape::kFragments; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int k = k0 + warp_k + i * 16 + lane / 4 + e / 2 * 8;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = c0 + warp_c + j * 8 + lane % 4 * 2 + e % 2;
        if (k < p.K && c < p.C) result[static_cast<int64_t>(k) * p.C + c] = total[i][j][e];
      }
      // The product with ones has eight equal columns: one lane of four stores.
      if (sums && i == column && lane % 4 == 0 && e % 2 == 0 && k < p.K)
        p.sum_parts[static_cast<int64_t>(part) * p.K + k] = total_sum[e];
    }
  }
}

constexpr int kFmaTile = 64, kFmaThreads = 256;

// The fp32 kernel, by FMA: a CTA owns a 64 x 64 tile, a thread 4 x 4 of it.
__global__ void __launch_bounds__(kFmaThreads) outer_fma_kernel(const __grid_constant__ ResnetKernelsOuter p) {
  __shared__ float g[kStepRows][kFmaTile], x[kStepRows][kFmaTile];
  const int k_tiles = (p.K + kFmaTile - 1) / kFmaTile, c_tiles = (p.C + kFmaTile - 1) / kFmaTile;
  const int tile = blockIdx.x % (k_tiles * c_tiles), part = blockIdx.x / (k_tiles * c_tiles);
  const int k0 = tile % k_tiles * kFmaTile, c0 = tile / k_tiles * kFmaTile;
  if (p.moments && k0 > c0) return;
  const bool sums = p.sum_parts && (p.moments ? k0 == c0 : c0 == 0) && threadIdx.x < kFmaTile;
  const int64_t first = part * p.span, last = first + p.span < p.M ? first + p.span : p.M;
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  float total[4][4] = {}, some[4][4] = {}, total_sum = 0, some_sum = 0;
  for (int64_t m0 = first; m0 < last; m0 += kStepRows) {
    for (int i = threadIdx.x; i < kStepRows * kFmaTile; i += kFmaThreads) {
      const int r = i / kFmaTile, c = i % kFmaTile;
      const bool there = m0 + r < last;
      g[r][c] = there && k0 + c < p.K ? static_cast<const float*>(p.g)[(m0 + r) * p.K + k0 + c] : 0.f;
      x[r][c] = there && c0 + c < p.C ? static_cast<const float*>(p.x)[(m0 + r) * p.C + c0 + c] : 0.f;
    }
    __syncthreads();
#pragma unroll 8
    for (int r = 0; r < kStepRows; ++r) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = g[r][row + i], b[i] = x[r][column + i];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) some[i][j] = fmaf(a[i], b[j], some[i][j]);
      if (sums) some_sum += g[r][threadIdx.x];
    }
    __syncthreads();
    if ((m0 - first + kStepRows) % kFlushRows == 0 || m0 + kStepRows >= last) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) total[i][j] += some[i][j], some[i][j] = 0;
      total_sum += some_sum, some_sum = 0;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int k = k0 + row + i, c = c0 + column + j;
      if (k < p.K && c < p.C) p.parts[(static_cast<int64_t>(part) * p.K + k) * p.C + c] = total[i][j];
    }
  const int k = k0 + static_cast<int>(threadIdx.x);
  if (sums && k < p.K) p.sum_parts[static_cast<int64_t>(part) * p.K + k] = total_sum;
}

// Add the parts of result and, in the CTAs behind those of the result, the parts of sums. A CTA owns 32 elements.
__global__ void __launch_bounds__(kMergeThreads) add_parts_kernel(const __grid_constant__ ResnetKernelsOuter p) {
  const int64_t n = static_cast<int64_t>(p.K) * p.C, of_result = (n + kMergeChannels - 1) / kMergeChannels;
  const bool sums = blockIdx.x >= of_result;
  const int64_t element = (blockIdx.x - (sums ? of_result : 0)) * kMergeChannels + threadIdx.x % kMergeChannels;
  const int64_t size = sums ? p.K : n;
  const float* from = sums ? p.sum_parts : p.parts;
  const int parts = static_cast<int>((p.M + p.span - 1) / p.span), lane = threadIdx.x / kMergeChannels;
  double total = 0;
  for (int i = lane; element < size && i < parts; i += kMergeLanes) total += from[i * size + element];
  total = over_lanes(total);
  if (lane == 0 && element < size) (sums ? p.sums : p.result)[element] = static_cast<float>(total);
}

// Merge the parts' moments. A CTA owns row j and 32 columns c of M2, computes those with c >= j, and mirrors them.
__global__ void __launch_bounds__(kMergeThreads) merge_moments_kernel(const __grid_constant__ ResnetKernelsOuter p) {
  const int J = p.K, tiles = (J + kMergeChannels - 1) / kMergeChannels;
  const int j = blockIdx.x / tiles, c0 = blockIdx.x % tiles * kMergeChannels;
  if (c0 + kMergeChannels <= j) return;
  const int c = c0 + threadIdx.x % kMergeChannels, lane = threadIdx.x / kMergeChannels;
  const bool known = c < J;
  const int parts = static_cast<int>((p.M + p.span - 1) / p.span);
  double mean_j = 0, mean_c = 0;
  for (int i = lane; known && i < parts; i += kMergeLanes)
    mean_j += p.sum_parts[static_cast<int64_t>(i) * J + j], mean_c += p.sum_parts[static_cast<int64_t>(i) * J + c];
  mean_j = over_lanes(mean_j) / static_cast<double>(p.M);
  mean_c = over_lanes(mean_c) / static_cast<double>(p.M);
  const double span = static_cast<double>(p.span), rest = static_cast<double>(p.M - (parts - 1) * p.span);
  const double share = 1. / span, share_of_rest = 1. / rest;
  double M2 = 0;
  for (int i = lane; known && i < parts; i += kMergeLanes) {
    const bool whole = i + 1 < parts;
    const double rows = whole ? span : rest, own_share = whole ? share : share_of_rest;
    const double own_j = p.sum_parts[static_cast<int64_t>(i) * J + j] * own_share;
    const double own_c = p.sum_parts[static_cast<int64_t>(i) * J + c] * own_share;
    // Chan's formula: the deviations within the part about its own mean, then those of that mean from the mean of all
    // rows.
    M2 += p.parts[(static_cast<int64_t>(i) * J + j) * J + c] - rows * own_j * own_c;
    M2 += rows * (own_j - mean_j) * (own_c - mean_c);
  }
  M2 = over_lanes(M2);
  if (lane > 0 || !known) return;
  if (j == 0) p.sums[c] = static_cast<float>(mean_c);
  if (c < j) return;
  p.result[static_cast<int64_t>(j) * J + c] = p.result[static_cast<int64_t>(c) * J + j] = static_cast<float>(M2);
}

}  // namespace resnet_kernels
