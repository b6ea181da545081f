// Max pooling and its gradient. A thread owns eight channels of one position of the result. In the gradient it gathers
// from all windows that contain its position, so there are no atomics.
//
// Memory traffic: x once (overlapping windows again from L1 and L2), y once, and one byte per element of the pooled
// map.
#pragma once

#include "cuda/api.h"
#include "cuda/elements.cuh"

namespace resnet_kernels {

constexpr int kPoolThreads = 256;

// A position of the result, its first channel, and the number of channels that remain.
struct Place {
  int n, h, w, c, left;
};

// The place of this thread's result in a map (N, height, width); beyond the map, n is N.
__device__ inline Place place(const ResnetKernelsPool& p, int height, int width) {
  const int vectors = (p.C + 7) / 8;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPoolThreads + threadIdx.x, row = i / vectors;
  const int64_t image = row / (static_cast<int64_t>(height) * width);
  const int within = static_cast<int>(row - image * height * width), c = static_cast<int>(i - row * vectors) * 8;
  return {static_cast<int>(image < p.N ? image : p.N), within / width, within % width, c, p.C - c};
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPoolThreads) max_pool_kernel(const __grid_constant__ ResnetKernelsPool p) {
  const Place at = place(p, p.P, p.Q);
  if (at.n == p.N) return;
  const int h0 = at.h * p.stride - p.padding, w0 = at.w * p.stride - p.padding;
  float best[8];
  int where[8];
  bool first = true;
  for (int r = 0; r < p.kernel; ++r) {
    for (int s = 0; s < p.kernel; ++s) {
      const int h = h0 + r, w = w0 + s;
      if (h < 0 || h >= p.H || w < 0 || w >= p.W) continue;
      const auto x = load<T, kAligned>(p.x.data, at.n * p.x.n + h * p.x.h + w * p.x.w + at.c, at.left);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float v = widen(x.v[k]);
        // A NaN exceeds everything, a former NaN too: the last one wins.
        if (first || v > best[k] || v != v) best[k] = v, where[k] = r * p.kernel + s;
      }
      first = false;
    }
  }
  Eight<T> y;
  const int64_t to = ((static_cast<int64_t>(at.n) * p.P + at.h) * p.Q + at.w) * p.C + at.c;
#pragma unroll
  for (int k = 0; k < 8; ++k) y.v[k] = narrow<T>(best[k]);
  store<T, kAligned>(p.y, to, at.left, y);
  if (!p.winners) return;
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (k < at.left) p.winners[to + k] = static_cast<uint8_t>(best[k] <= 0.f ? 255 : where[k]);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kPoolThreads) max_pool_grad_kernel(const __grid_constant__ ResnetKernelsPool p) {
  const Place at = place(p, p.H, p.W);
  if (at.n == p.N) return;
  const int h = at.h + p.padding, w = at.w + p.padding;
  // The first window, along one axis, that contains padded coordinate i.
  const auto first = [&](int i) { return i < p.kernel ? 0 : (i - p.kernel) / p.stride + 1; };
  float total[8] = {};
  for (int r = first(h); r < p.P && r * p.stride <= h; ++r) {
    for (int s = first(w); s < p.Q && s * p.stride <= w; ++s) {
      const int within = (h - r * p.stride) * p.kernel + w - s * p.stride;
      const auto* winners = p.winners + ((static_cast<int64_t>(at.n) * p.P + r) * p.Q + s) * p.C + at.c;
      const auto x = load<T, kAligned>(p.x.data, at.n * p.x.n + r * p.x.h + s * p.x.w + at.c, at.left);
      uint2 all = {};
      if constexpr (kAligned) all = *reinterpret_cast<const uint2*>(winners);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int winner = kAligned ? ((k < 4 ? all.x : all.y) >> (k % 4 * 8)) & 0xff : k < at.left ? winners[k] : 255;
        if (winner == within) total[k] += widen(x.v[k]);
      }
    }
  }
  Eight<T> y;
#pragma unroll
  for (int k = 0; k < 8; ++k) y.v[k] = narrow<T>(total[k]);
  store<T, kAligned>(p.y, ((static_cast<int64_t>(at.n) * p.H + at.h) * p.W + at.w) * p.C + at.c, at.left, y);
}

}  // namespace resnet_kernels
