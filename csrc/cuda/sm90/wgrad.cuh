// Weight gradients of convolutions, and second moments, for sm_90a: sums over output positions of outer products.
//
//   parts (part, k, tap, c) = sum over the part's positions m of g[m, k] * x[the input position of the tap at m, c]
//   sums (part, k) = sum over the part's positions m of g[m, k]
//
// A GEMM whose K extent is the positions, split-K over parts. A unit of work is one tile and one part: 128 channels of
// g by 2 or 3 slices of 64 channels of x, of one tap or of several. A persistent kernel: one CTA per multiprocessor
// takes units in turn, all tiles of a part after each other, so that g and x are still in L2. Warp-specialized, three
// warp groups:
//
//   producer    One thread loads 64 positions of each slice of g and x into a stage of the ring (barriers full, empty),
//               both by im2col TMA: any filter, stride, dilation, any view.
//   consumers   Two warp groups of 64 channels of g each, wgmma with both operands transposed (MN-major): in memory
//               channels are contiguous, and the reduction runs over positions. Tensor cores truncate as they
//               accumulate, so the sum of each 128 positions is added in fp32 to a second set of accumulators. The sums
//               of g are a product with ones.
//
// Slices beyond the channels are neither loaded nor stored: stale data there only reaches accumulators that are never
// stored.
//
// Memory traffic: g and x once from device memory; from L2, g once per tile of x's slices, and x once per tile of g's
// channels and tap; parts written once.
#pragma once

#include "cuda/sm90/hopper.cuh"
#include "cuda/sm90/wgrad.h"

namespace resnet_kernels::sm90 {

template <class T, int kColumns, int kStages>
struct Wgrad {
  static constexpr WgradShape kShape{kColumns, kStages};
  static constexpr int kStageBytes = wgrad_stage_bytes(kShape), kGSlices = kWgradRows / kSlice;
  static constexpr int kN = kColumns * kSlice;  // N of a wgmma
  static constexpr int kFlush = 2;              // stages between flushes, 128 positions together
  static_assert(wgrad_shared_bytes(kShape) <= 227 * 1024);

  struct Barriers {
    uint64_t full[kStages], empty[kStages];
  };
  static_assert(sizeof(Barriers) <= 256);

  // A unit of work: its tile, its part, and the number of mainloop steps.
  struct Unit {
    int part, k0, slice0, g_slices, x_slices, first, steps;
    __device__ Unit(const WgradParams& p, int unit) {
      const int tiles = p.units / p.parts_there, tile = unit % tiles;
      part = unit / tiles;
      const UpperTile upper(p.upper ? tile : 0);
      k0 = (p.upper ? upper.row : tile % p.k_tiles) * kWgradRows;
      slice0 = (p.upper ? upper.column : tile / p.k_tiles) * kColumns;
      g_slices = at_most(kGSlices, (p.K - k0 + kSlice - 1) / kSlice);
      x_slices = at_most(kColumns, p.all_slices - slice0);
      first = part * p.span;
      steps = (at_most(p.span, p.M - first) + kWgradPositions - 1) / kWgradPositions;
    }
    static __device__ int at_most(int most, int n) { return n < most ? n : most; }
  };

  // The producer: fills the ring for all units of this CTA, by one thread.
  static __device__ void move(const WgradParams& p, uint32_t ring, Barriers& barriers) {
    Ring<kStages> at;
    await_previous();
    for (int i = blockIdx.x; i < p.units; i += gridDim.x) {
      const Unit unit(p, i);
      for (int step = 0; step < unit.steps; ++step) {
        const Position from(unit.first + step * kWgradPositions, p.P, p.Q);
        Barrier::wait(&barriers.empty[at.slot], at.phase ^ 1);
        uint64_t* const full = &barriers.full[at.slot];
        BytesBarrier::arrive_and_expect_tx(full, (unit.g_slices + unit.x_slices) * kWgradSliceBytes);
        uint32_t to = ring + at.slot * kStageBytes;
        for (int j = 0; j < unit.g_slices; ++j)
          cute::SM90_TMA_LOAD_IM2COL_4D::copy(&p.g, full, pointer(to + j * kWgradSliceBytes), unit.k0 + j * kSlice,
                                              from.q, from.i, from.n, uint16_t{0}, uint16_t{0});
        to += kGSlices * kWgradSliceBytes;
        for (int j = 0; j < unit.x_slices; ++j) {
          const int slice = unit.slice0 + j, tap = slice / p.slices;
          cute::SM90_TMA_LOAD_IM2COL_4D::copy(
              &p.x, full, pointer(to + j * kWgradSliceBytes), slice % p.slices * kSlice,
              from.q * p.stride - p.padding, from.i * p.stride - p.padding, from.n,
              static_cast<uint16_t>(tap % p.S * p.dilation), static_cast<uint16_t>(tap / p.S * p.dilation));
        }
        at.advance();
      }
    }
  }

  // The mainloop of a unit: d = its sum over positions, flushed from `some` into d every 128 positions; with kSums,
  // sums likewise.
  template <bool kSums>
  static __device__ __forceinline__ void multiply_unit(const Unit& unit, float (&d)[kN / 2], float (&sums)[4],
                                                       uint32_t ring, uint64_t ones, Barriers& barriers,
                                                       Ring<kStages>& at, int group) {
#pragma unroll
    for (float& v : d) v = 0;
#pragma unroll
    for (float& v : sums) v = 0;
#pragma unroll 1
    for (int step = 0; step < unit.steps; step += kFlush) {
      float some[kN / 2], some_sums[4];
      const bool both = step + 1 < unit.steps;
      auto multiply_stage = [&](bool add) {
        Barrier::wait(&barriers.full[at.slot], at.phase);
        const uint32_t stage = ring + at.slot * kStageBytes;
        const uint64_t a = transposed_matrix(stage + group * kWgradSliceBytes, kWgradSliceBytes);
        const uint64_t b = transposed_matrix(stage + kGSlices * kWgradSliceBytes, kWgradSliceBytes);
        keep(some);
        if constexpr (kSums) keep(some_sums);
        begin_products();
#pragma unroll
        for (int k = 0; k < kWgradPositions / 16; ++k) {
          multiply_transposed<T, kN>(some, a + k * kNextTransposed, b + k * kNextTransposed, add || k > 0);
          if constexpr (kSums) multiply_by_ones<T>(some_sums, a + k * kNextTransposed, ones, add || k > 0);
        }
        end_products();
        at.advance();
      };
      const int slot = at.slot;
      multiply_stage(false);
      int last = slot;
      if (both) {
        last = at.slot;
        multiply_stage(true);
        await_products<1>();
        release(barriers, slot);
      }
      await_products<0>();
      keep(some);
      if constexpr (kSums) keep(some_sums);
      release(barriers, last);
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) d[i] += some[i];
      if constexpr (kSums)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += some_sums[i];
    }
  }

  static __device__ void release(Barriers& barriers, int slot) {
    if (threadIdx.x % kWarpGroup == 0) Barrier::arrive(&barriers.empty[slot]);
  }

  // The epilogue: write the warp group's accumulators to parts, from registers.
  static __device__ void store(const WgradParams& p, const Unit& unit, const float (&d)[kN / 2], int group) {
    const unsigned t = threadIdx.x % kWarpGroup;
    const int64_t columns = int64_t{p.all_slices / p.slices} * p.C;  // taps * C
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = unit.k0 + group * kSlice + accumulator_row(t, half);
      if (k >= p.K) continue;
      float* const row = p.parts + (int64_t{unit.part} * p.K + k) * columns;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const int slice = unit.slice0 + j;
        if (slice >= p.all_slices) continue;
        float* const to = row + int64_t{slice / p.slices} * p.C;
        const int c0 = slice % p.slices * kSlice + accumulator_column(t);
#pragma unroll
        for (int i = 0; i < kSlice / 8; ++i) {
          const int c = c0 + 8 * i;  // C is a multiple of 8
          const int at = 4 * (j * kSlice / 8 + i) + 2 * half;
          if (c < p.C) *reinterpret_cast<float2*>(to + c) = {d[at], d[at + 1]};
        }
      }
    }
  }

  static __device__ void store_sums(const WgradParams& p, const Unit& unit, const float (&sums)[4], int group) {
    const unsigned t = threadIdx.x % kWarpGroup;
    if (t % 4 != 0) return;  // the product with ones has eight equal columns: one lane of four stores
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int k = unit.k0 + group * kSlice + accumulator_row(t, half);
      if (k < p.K) p.sums[int64_t{unit.part} * p.K + k] = sums[2 * half];
    }
  }

  // A consumer warp group: mainloop and epilogue of each unit.
  static __device__ void consume(const WgradParams& p, uint32_t ring, uint64_t ones, Barriers& barriers, int group) {
    Ring<kStages> at;
    await_previous();  // before `parts` is written: an earlier kernel may still read it
    for (int i = blockIdx.x; i < p.units; i += gridDim.x) {
      const Unit unit(p, i);
      float d[kN / 2], sums[4];
      // Of all tiles with the same channels k, only one stores their sums.
      if (p.sums && unit.slice0 == (p.upper ? unit.k0 / kSlice : 0)) {
        multiply_unit<true>(unit, d, sums, ring, ones, barriers, at, group);
        store_sums(p, unit, sums, group);
      } else {
        multiply_unit<false>(unit, d, sums, ring, ones, barriers, at, group);
      }
      store(p, unit, d, group);
    }
  }

  // The descriptor of the 8 x 16 matrix of ones, without swizzle: two core matrices of 8 rows by 16 bytes.
  static __device__ uint64_t bricks(uint32_t address) {
    return uint64_t{kWgradOnesBytes / 2 / 16} << 16 | (address & 0x3FFFF) >> 4;
  }

  static __device__ void run(const WgradParams& p) {
    extern __shared__ uint8_t memory[];
    const uint32_t base = cute::cast_smem_ptr_to_uint(memory), ring = (base + 1023) / 1024 * 1024;
    const uint32_t ones = ring + kStages * kStageBytes;
    Barriers& barriers = *reinterpret_cast<Barriers*>(memory + (ones + kWgradOnesBytes - base));
    const uint32_t one = Pair<T>::narrow(float2{1.f, 1.f});
    for (int i = threadIdx.x; i < kWgradOnesBytes / 4; i += kWgradThreads) store_shared(ones + 4 * i, one);
    cutlass::arch::fence_view_async_shared();  // makes the ones visible to wgmma
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        Barrier::init(&barriers.full[i], 1);
        Barrier::init(&barriers.empty[i], 2);
      }
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    let_next_begin();
    if (threadIdx.x < kWarpGroup) {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      if (threadIdx.x == 0) move(p, ring, barriers);
    } else {
      cutlass::arch::warpgroup_reg_alloc<232>();
      consume(p, ring, bricks(ones), barriers, threadIdx.x / kWarpGroup - 1);
    }
  }
};

template <class T, int kColumns, int kStages>
__global__ void __launch_bounds__(kWgradThreads, 1) wgrad_kernel(const __grid_constant__ WgradParams p) {
  Wgrad<T, kColumns, kStages>::run(p);
}

}  // namespace resnet_kernels::sm90
