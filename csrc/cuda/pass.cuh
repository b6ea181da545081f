// The memory-bound passes of training: elementwise over an (N, P, Q, C) map, with every operand transformation and
// epilogue fused, and optionally a per-channel reduction.
//
//     t = epilogue(x)    reduced: statistics of t  |  sum(t), sum(t * (normalized - mean))  |  mask bits, not (t <= 0)
//
// A CTA owns up to 32 vectors of eight channels and one part, `span` rows. A thread owns one vector and every `down`-th
// row of the part. It issues the loads of several rows before it waits for any, so that 32 KB or more per
// multiprocessor are in flight: at 4.3 TB/s and 700 ns of latency that is what copy speed takes. Per-channel vectors
// are read again from L1 for every few rows: in registers they would halve the number of resident threads. An absent
// feature costs a branch that is uniform over the grid.
//
// Statistics: Welford's update per thread, then Chan's formula, first over the rows of the CTA's threads (store_part)
// and then over the parts (merge_kernel), always in the same order. No atomics.
//
// Memory traffic: x, its second tensor and mask, the residual and its mask, `normalized` and the epilogue's mask are
// read once (a mask that is a tensor is mostly one of the others, and then comes from L1); y is written once if it is
// wanted; mask bits take one bit per element; a reduction takes 8 bytes per channel and part.
#pragma once

#include <cmath>

#include "cuda/api.h"
#include "cuda/elements.cuh"
#include "cuda/instructions.cuh"
#include "cuda/lanes.cuh"

namespace resnet_kernels {

enum Reduce { kNothing, kStats, kSums, kBits };
enum MaskKind { kNoMask, kMaskBits, kMaskBytes, kMaskTensor };

constexpr int kThreads = 256;
constexpr int kMostAcross = 32;

// How a CTA's threads cover vectors of channels and rows: `across` vectors side by side, `down` rows at a time. tiles:
// CTAs that share the channels of one part.
struct Layout {
  int across, down, tiles;

  __host__ __device__ explicit Layout(int C) {
    const int vectors = (C + 7) / 8;
    tiles = (vectors + kMostAcross - 1) / kMostAcross;
    across = (vectors + tiles - 1) / tiles;
    down = kThreads / across;
  }
};

// The plain pass on sm_100 and sm_103: the compiler spills 16-bit kernels at the 64 registers a thread that four resident
// blocks leave.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr int kPlainResident = 3;
#else
constexpr int kPlainResident = 4;
#endif

// Blocks of a multiprocessor, and rows of a thread that it loads at a time: what registers hold without spilling.
// kFull: with a second tensor or a residual.
template <int kReduce, bool kAligned, bool kFull>
constexpr int kResident = !kAligned || kReduce == kStats || kReduce == kSums ? 2
                          : kFull || kReduce == kBits                        ? 3
                                                                             : kPlainResident;
template <typename T, int kReduce, bool kFull>
__host__ __device__ constexpr int rows_at_once() {
  constexpr int kBytes = kFull ? 2 : kReduce == kStats ? 10 : kReduce == kSums ? 6 : 4;
  return kBytes < sizeof(T) ? 1 : kBytes / static_cast<int>(sizeof(T));
}

// An image, row and column of the map.
struct Position {
  int n, h, w;
};

// Position of row m of the map. Dense views (not `mapped`) need no divisions: w counts all rows.
__device__ inline Position position(const ResnetKernelsPass& p, uint32_t m) {
  if (!p.mapped) return {0, 0, static_cast<int>(m)};
  const uint32_t line = m / static_cast<uint32_t>(p.Q), image = line / static_cast<uint32_t>(p.P);
  return {static_cast<int>(image), static_cast<int>(line - image * p.P), static_cast<int>(m - line * p.Q)};
}

__device__ inline int64_t offset(const ResnetKernelsView& view, const Position& at) {
  return at.n * view.n + at.h * view.h + at.w * view.w;
}

// With `spread` > 1 the residual is zero-inserted: whether it has a value at this position of the map, and the value's
// position in the residual.
__device__ inline bool has_residual(const ResnetKernelsPass& p, const Position& at) {
  return p.spread == 1 || (at.h % p.spread == 0 && at.w % p.spread == 0);
}
__device__ inline Position residual_position(const ResnetKernelsPass& p, const Position& at) {
  return p.spread == 1 ? at : Position{at.n, at.h / p.spread, at.w / p.spread};
}

template <typename T>
__device__ inline float rounded(float v) {
  return widen(narrow<T>(v));
}

template <typename T>
__device__ inline void widened(const Eight<T>& x, float (&t)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) t[k] = widen(x.v[k]);
}

__device__ inline void masked(uint32_t keep, float (&t)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) t[k] = keep >> k & 1 ? t[k] : 0.f;
}

__device__ inline uint32_t bits_of(const ResnetKernelsMask& mask, const Position& at, int c) {
  return static_cast<const uint8_t*>(mask.view.data)[offset(mask.view, at) + c / 8];
}

// Return the mask of eight channels: bit k says whether channel c + k is kept.
template <typename T, bool kAligned>
__device__ inline uint32_t kept_bits(const ResnetKernelsMask& mask, const Position& at, int c, int left) {
  if (mask.kind == kMaskBits) return bits_of(mask, at, c);
  const int64_t row = offset(mask.view, at);
  uint32_t keep = 0;
  if (mask.kind == kMaskBytes) {
    const auto* bytes = static_cast<const uint8_t*>(mask.view.data) + row + c;
    if constexpr (kAligned) {
      const uint2 all = *reinterpret_cast<const uint2*>(bytes);
#pragma unroll
      for (int k = 0; k < 8; ++k) keep |= ((((k < 4 ? all.x : all.y) >> (k % 4 * 8)) & 0xff) != 0) << k;
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) keep |= (k < left && bytes[k] != 0) << k;
    }
    return keep;
  }
  float t[8];
  widened(load<T, kAligned>(mask.view.data, row + c, left), t);
  if (mask.a) {
    const auto a = per_channel<kAligned>(mask.a, c, left), b = per_channel<kAligned>(mask.b, c, left);
#pragma unroll
    for (int k = 0; k < 8; ++k) t[k] = rounded<T>(fmaf(a.v[k], t[k], b.v[k]));
  }
  // A NaN is kept.
#pragma unroll
  for (int k = 0; k < 8; ++k) keep |= !(t[k] <= 0.f) << k;
  return keep;
}

// Apply an operand's transformation to t, which holds its (masked) tensor: affine, second tensor, ReLU, rounding or
// centre.
template <typename T, bool kAligned, bool kSecond>
__device__ inline void apply(const ResnetKernelsOperand& o, const Eight<T>& second, int c, int left, float (&t)[8]) {
  if (o.a) {
    const auto a = per_channel<kAligned>(o.a, c, left);
    Eight<float> b = {};
    if (o.b) b = per_channel<kAligned>(o.b, c, left);
#pragma unroll
    for (int k = 0; k < 8; ++k) t[k] = fmaf(a.v[k], t[k], b.v[k]);
  }
  if (kSecond && o.second.data) {
    const auto a = per_channel<kAligned>(o.a2, c, left), mean = per_channel<kAligned>(o.mean, c, left);
#pragma unroll
    for (int k = 0; k < 8; ++k) t[k] = fmaf(a.v[k], widen(second.v[k]) - mean.v[k], t[k]);
  }
  if (o.relu) {
#pragma unroll
    for (int k = 0; k < 8; ++k) t[k] = relu(t[k]);
  }
  if constexpr (sizeof(T) < 4) {
    if (o.rounds) {
#pragma unroll
      for (int k = 0; k < 8; ++k) t[k] = rounded<T>(t[k]);
    }
  } else if (o.centre) {
    const auto centre = per_channel<kAligned>(o.centre, c, left);
#pragma unroll
    for (int k = 0; k < 8; ++k) t[k] -= centre.v[k];
  }
}

// A thread's partial reduction of eight channels over its rows. Statistics: `one` is the running mean, `two` the sum of
// squared deviations. Sums: `one` is sum(t), `two` sum(t * off).
template <int kReduce>
struct Totals {
  float one[8] = {}, two[8] = {}, rows = 0;

  __device__ void add(const float (&t)[8], const float (&off)[8]) {
    rows += 1;
    const float share = 1.f / rows;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if constexpr (kReduce == kStats) {
        const float d = t[k] - one[k];
        one[k] = fmaf(d, share, one[k]);
        two[k] = fmaf(d, t[k] - one[k], two[k]);
      } else {
        one[k] += t[k];
        two[k] = fmaf(t[k], off[k], two[k]);
      }
    }
  }
};

// Merge the CTA's threads through shared memory, and store its part. rows: the part's number of rows; thread row r
// owned rows r, r + down, r + 2 * down, ...
template <int kReduce>
__device__ inline void store_part(const ResnetKernelsPass& p, const Layout& layout, const Totals<kReduce>& mine,
                                  int tile, int64_t part, int rows, bool active) {
  __shared__ float one[kThreads * 8], two[kThreads * 8];
  const int width = layout.across * 8;
  if (active) {
#pragma unroll
    for (int k = 0; k < 8; ++k) one[threadIdx.x * 8 + k] = mine.one[k], two[threadIdx.x * 8 + k] = mine.two[k];
  }
  __syncthreads();
  const int c = tile * width + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= width || c >= p.C) return;
  const int down = rows < layout.down ? rows : layout.down;
  // In fp64, as many rows share this sum: a thousandth of the additions of the pass.
  double first = 0, second = 0;
  const auto count = [&](int r) { return static_cast<double>((rows - r + layout.down - 1) / layout.down); };
  for (int r = 0; r < down; ++r) {
    first += one[r * width + threadIdx.x] * (kReduce == kStats ? count(r) : 1.);
    if constexpr (kReduce == kSums) second += two[r * width + threadIdx.x];
  }
  if constexpr (kReduce == kStats) {
    first /= rows;
    for (int r = 0; r < down; ++r) {
      const double off = one[r * width + threadIdx.x] - first;
      second += two[r * width + threadIdx.x] + count(r) * off * off;
    }
  }
  const int64_t parts = (p.M + p.span - 1) / p.span;
  p.parts[part * p.C + c] = static_cast<float>(first);
  p.parts[(parts + part) * p.C + c] = static_cast<float>(second);
}

template <typename T, int kReduce, bool kAligned, bool kFull>
__global__ void __launch_bounds__(kThreads, kResident<kReduce, kAligned, kFull>)
    pass_kernel(const __grid_constant__ ResnetKernelsPass p) {
  constexpr int kCount = rows_at_once<T, kReduce, kFull>();
  const Layout layout(p.C);
  const int tile = blockIdx.x % layout.tiles;
  const int64_t part = blockIdx.x / layout.tiles, first = part * p.span;
  const int rows = static_cast<int>(p.M - first < p.span ? p.M - first : p.span);
  const int across = threadIdx.x % layout.across, down = threadIdx.x / layout.across;
  const int c = (tile * layout.across + across) * 8, left = p.C - c, left_residual = p.residual.channels - c;
  const bool active = down < layout.down && left > 0;
  Totals<kReduce> totals;
  for (int i = down; active && i < rows; i += kCount * layout.down) {
    Position at[kCount];
    Eight<T> x[kCount], second[kCount], normalized[kCount], residual[kCount];
    uint32_t bits[kCount];
    bool adds[kCount];  // whether the residual has values there
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      // The number of loads is fixed: beyond the part's end the last row is loaded again and its result dropped.
      const int row = i + r * layout.down < rows ? i + r * layout.down : rows - 1;
      at[r] = position(p, static_cast<uint32_t>(first + row));
      x[r] = load<T, kAligned>(p.x.view.data, offset(p.x.view, at[r]) + c, left);
      if (p.x.mask.kind == kMaskBits) bits[r] = bits_of(p.x.mask, at[r], c);
      if (kFull && p.x.second.data)
        second[r] = load<T, kAligned>(p.x.second.data, offset(p.x.second, at[r]) + c, left);
      if constexpr (kFull) {
        adds[r] = p.residual.view.data && left_residual > 0 && has_residual(p, at[r]);
        if (adds[r]) {
          const int64_t row = offset(p.residual.view, residual_position(p, at[r]));
          residual[r] = load<T, kAligned>(p.residual.view.data, row + c, left_residual);
        }
      }
      if (kReduce == kSums && p.normalized.data)
        normalized[r] = load<T, kAligned>(p.normalized.data, offset(p.normalized, at[r]) + c, left);
    }
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      if (i + r * layout.down >= rows) break;
      float t[8];
      widened(x[r], t);
      if (p.x.mask.kind == kMaskBits) masked(bits[r], t);
      else if (p.x.mask.kind != kNoMask) masked(kept_bits<T, kAligned>(p.x.mask, at[r], c, left), t);
      apply<T, kAligned, kFull>(p.x, second[r], c, left, t);
      if (p.shift) {
        const auto shift = per_channel<kAligned>(p.shift, c, left);
#pragma unroll
        for (int k = 0; k < 8; ++k) t[k] += shift.v[k];
      }
      if constexpr (kFull) {
        if (adds[r]) {
          float u[8];
          widened(residual[r], u);
          if (p.residual.mask.kind != kNoMask)
            masked(kept_bits<T, kAligned>(p.residual.mask, residual_position(p, at[r]), c, left_residual), u);
          apply<T, kAligned, false>(p.residual, {}, c, left_residual, u);
#pragma unroll
          for (int k = 0; k < 8; ++k)
            if (kAligned || k < left_residual) t[k] += u[k];
        }
      }
      if (p.relu) {
#pragma unroll
        for (int k = 0; k < 8; ++k) t[k] = relu(t[k]);
      }
      if (p.mask.kind != kNoMask) masked(kept_bits<T, kAligned>(p.mask, at[r], c, left), t);
      const int64_t m = first + i + r * layout.down;
      Eight<T> y;
#pragma unroll
      for (int k = 0; k < 8; ++k) y.v[k] = narrow<T>(t[k]), t[k] = widen(y.v[k]);
      if (p.y) store<T, kAligned>(p.y, m * p.C + c, left, y);
      if constexpr (kReduce == kStats) totals.add(t, t);
      if constexpr (kReduce == kSums) {
        float off[8] = {};
        if (p.normalized.data) {
          const auto mean = per_channel<kAligned>(p.mean, c, left);
#pragma unroll
          for (int k = 0; k < 8; ++k) off[k] = widen(normalized[r].v[k]) - mean.v[k];
        }
        totals.add(t, off);
      }
      if constexpr (kReduce == kBits) {
        uint32_t byte = 0;
#pragma unroll
        for (int k = 0; k < 8; ++k) byte |= ((kAligned || k < left) && !(t[k] <= 0.f)) << k;
        p.bits[m * ((p.C + 7) / 8) + c / 8] = static_cast<uint8_t>(byte);
      }
    }
  }
  if constexpr (kReduce == kStats || kReduce == kSums)
    store_part<kReduce>(p, layout, totals, tile, part, rows, active);
}

// Merge a pass's parts into its result. A CTA owns 32 channels, and reads 8 bytes per channel and part, the means twice
// for statistics. In fp64: an error in a mean would be the same for every row.
template <int kReduce>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ ResnetKernelsPass p) {
  const int c = blockIdx.x * kMergeChannels + threadIdx.x % kMergeChannels, lane = threadIdx.x / kMergeChannels;
  const bool known = c < p.C;
  const int parts = static_cast<int>((p.M + p.span - 1) / p.span);
  const float *one = p.parts + c, *two = one + static_cast<int64_t>(parts) * p.C;
  const auto rows = [&](int i) { return static_cast<double>(i + 1 < parts ? p.span : p.M - i * p.span); };
  double first = 0, second = 0;
  for (int i = lane; known && i < parts; i += kMergeLanes) {
    const double share = kReduce == kStats ? rows(i) : 1.;
    first += share * one[static_cast<int64_t>(i) * p.C];
    if constexpr (kReduce == kSums) second += two[static_cast<int64_t>(i) * p.C];
  }
  first = over_lanes(first);
  if constexpr (kReduce == kStats) {
    first /= static_cast<double>(p.M);
    for (int i = lane; known && i < parts; i += kMergeLanes) {
      const double off = one[static_cast<int64_t>(i) * p.C] - first;
      second += two[static_cast<int64_t>(i) * p.C] + rows(i) * off * off;
    }
  }
  second = over_lanes(second);
  if (lane > 0 || !known) return;
  p.first[c] = static_cast<float>(first);
  p.second[c] = static_cast<float>(kReduce == kSums && p.rstd ? second * p.rstd[c] : second);
}

}  // namespace resnet_kernels
