// conv_act for sm_90a: y = relu(scale * conv(x, w) + conv1x1(x2, w2) + shift + residual) on channels_last 16-bit
// tensors, as an implicit GEMM of M = N*P*Q output positions by K output channels. K extent: taps x input channels, in
// steps of one tap and one slice of 64 channels, then the slices of the second product.
//
// A persistent kernel: one CTA per multiprocessor walks over tiles, output channels fastest, so that x is still in L2
// for the next channel tile. Warp-specialized, three warp groups:
//
//   producer, warp 0     One thread loads slices of 64 channels of x and w by TMA into a ring of kStages stages, all
//                        taps of a slice before the next slice. x comes by im2col TMA: the engine walks a tile's output
//                        positions over rows and images, and fills in zeros outside the map. Barriers full (bytes) and
//                        empty guard a stage.
//   producer, warps 2-3  One per consumer warp group: loads the residual's tile into that group's results buffer during
//                        the mainloop, and stores the result from the same buffer. Barriers loaded and ready guard the
//                        buffer.
//   consumers            Two warp groups. Mainloop: wgmma from shared memory, fp32 accumulators in registers. Epilogue:
//                        scale, shift, residual, ReLU and one rounding, in place in the results buffer.
//
// The reducing tiles extend the epilogue. Statistics: mean and sum of squared deviations per channel of the rounded
// result, merged over a warp's rows by shuffles (statistics.h) and over the warps through shared memory. Sums: the
// buffer holds z, the input of a batch norm, which is not added; it decides where the result is kept (the ReLU's mask)
// and multiplies it. This is the gradient through a batch norm and its ReLU.
//
// In turn (ping-pong, see TileShape): a consumer warp group starts its mainloop when the other has issued its last
// wgmma, so tensor cores overlap with epilogues. The `turn` barriers also keep a warp group from waiting on a stage's
// barrier two phases ahead, which parity could not tell apart.
//
// Memory traffic: x once from device memory, and from L2 once per tap and tile of output channels; w once per tile of
// positions, from L2; residual and y once; a reduction 8 bytes per channel and tile.
#pragma once

#include "cuda/sm90/conv_act_tiles.h"
#include "cuda/sm90/hopper.cuh"
#include "cuda/sm90/statistics.h"

namespace resnet_kernels::sm90 {

template <class T, int kRows, int kColumns, int kStages, bool kInTurn, Reduce kReduce>
struct ConvAct {
  static constexpr TileShape kShape{kRows, kColumns, kStages, kInTurn, kReduce};
  static constexpr int kPositions = kShape.positions();
  // A stage: the A tile (positions x 64 channels of x), then the B tile (output channels x 64 channels of w).
  static constexpr int kABytes = kPositions * kRow, kBBytes = kColumns * kRow, kStageBytes = kABytes + kBBytes;
  // A results buffer: the tile in slices of 64 channels, kRows rows of 128 bytes each.
  static constexpr int kChunkBytes = kRows * kRow, kBufferBytes = kColumns / kSlice * kChunkBytes;
  // wgmma's M is 64: a warp group's rows are kParts sets of accumulators.
  static constexpr int kParts = kRows / 64;
  // arrivals that pass the turn, one per warp; without turns nobody waits
  static constexpr int kPasses = kInTurn ? kWarpGroup / 32 : 1;

  struct Barriers {
    // Of the operands' ring: the stage's TMA bytes have landed; its consumers have read it.
    uint64_t full[kStages], empty[kStages];
    uint64_t turn[2];    // this warp group may run its mainloop
    uint64_t loaded[2];  // this warp group's results buffer holds the residual, or is free
    uint64_t ready[2];   // this warp group's results buffer holds the result
  };
  static_assert(sizeof(Barriers) <= 256);
  static_assert(shared_bytes(kShape) <= 227 * 1024);
  // In store_reduced one thread merges the four warps' partial results of a channel.
  static_assert(kReduce == Reduce::kNothing || (kInTurn && kColumns <= kWarpGroup));

  // The tiles of a consumer warp group: all of the CTA's tiles, or in turn every other one.
  static __device__ int first_tile(int group) { return blockIdx.x + (kInTurn ? group * gridDim.x : 0); }
  static __device__ int next_tile(int tile) { return tile + (kInTurn ? 2 : 1) * gridDim.x; }

  // The operands' producer: fills the ring for all tiles of this CTA, by one thread.
  static __device__ void move_operands(const ConvParams& p, uint32_t ring, Barriers& barriers) {
    Ring<kStages> at;
    await_previous();
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      const int k0 = tile % p.k_tiles * kColumns, m0 = tile / p.k_tiles * kPositions;
      const Position first(m0, p.P, p.Q);
      auto bring = [&](const CUtensorMap& x, const CUtensorMap& w, int stride, int padding, int c, int r, int s,
                       int tap) {
        Barrier::wait(&barriers.empty[at.slot], at.phase ^ 1);
        uint64_t* const full = &barriers.full[at.slot];
        BytesBarrier::arrive_and_expect_tx(full, kStageBytes);
        const uint32_t a = ring + at.slot * kStageBytes;
        im2col(x, full, a, c, first.q * stride - padding, first.i * stride - padding, first.n, s, r);
        cute::SM90_TMA_LOAD_3D::copy(&w, full, kNoHint, pointer(a + kABytes), c, tap, k0);
        at.advance();
      };
      for (int slice = 0; slice < p.slices; ++slice)
        for (int tap = 0; tap < p.taps; ++tap)
          bring(p.x, p.w, p.stride, p.padding, slice * kSlice, tap / p.S * p.dilation, tap % p.S * p.dilation, tap);
      for (int slice = 0; slice < p.slices2; ++slice) bring(p.x2, p.w2, 1, 0, slice * kSlice, 0, 0, 0);
    }
  }

  static __device__ void im2col(const CUtensorMap& map, uint64_t* barrier, uint32_t to, int c, int w, int h, int n,
                                int s, int r) {
    cute::SM90_TMA_LOAD_IM2COL_4D::copy(&map, barrier, pointer(to), c, w, h, n, static_cast<uint16_t>(s),
                                        static_cast<uint16_t>(r));
  }

  // A results producer: moves one consumer warp group's residuals in and results out, by one thread.
  static __device__ void move_results(const ConvParams& p, uint32_t buffer, Barriers& barriers, int group) {
    uint64_t* const loaded = &barriers.loaded[group];
    uint32_t phase = 0;
    await_previous();
    for (int tile = first_tile(group); tile < p.tiles; tile = next_tile(tile)) {
      const int k0 = tile % p.k_tiles * kColumns;
      const int m0 = tile / p.k_tiles * kPositions + (kInTurn ? 0 : group * kRows);
      if (p.residual_there) {
        BytesBarrier::arrive_and_expect_tx(loaded, kBufferBytes);
#pragma unroll 1
        for (int i = 0; i < kColumns / kSlice; ++i)
          cute::SM90_TMA_LOAD_2D::copy(&p.residual, loaded, kNoHint, pointer(buffer + i * kChunkBytes), k0 + i * kSlice,
                                       m0);
      } else {
        Barrier::arrive(loaded);
      }
      Barrier::wait(&barriers.ready[group], phase);
      phase ^= 1;
#pragma unroll 1
      for (int i = 0; i < kColumns / kSlice; ++i)
        cute::SM90_TMA_STORE_2D::copy(&p.y, pointer(buffer + i * kChunkBytes), k0 + i * kSlice, m0);
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();  // the store has read the buffer
    }
    await_stores();  // all stores have been written to global memory
  }

  // The mainloop of one tile: d = the sum over all steps. One wgmma batch stays in flight: a stage is released when the
  // batch after its own has been issued. In turn, passes the turn after the last batch and skips the ring past the
  // other warp group's tile.
  static __device__ void multiply_tile(const ConvParams& p, float (&d)[kParts][kColumns / 2], uint32_t ring,
                                       Barriers& barriers, Ring<kStages>& at, int group) {
    const int steps = p.taps * p.slices + p.slices2;
    int released = at.slot;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      Barrier::wait(&barriers.full[at.slot], at.phase);
      const uint32_t stage = ring + at.slot * kStageBytes;
      const uint64_t a = swizzled_matrix(stage + (kInTurn ? 0 : group * kRows * kRow));
      const uint64_t b = swizzled_matrix(stage + kABytes);
#pragma unroll
      for (auto& part : d) keep(part);
      begin_products();
#pragma unroll
      for (int k = 0; k < kSlice / 16; ++k)
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          multiply<T, kColumns>(d[part], a + part * (64 * kRow / 16) + k * kNextProduct, b + k * kNextProduct,
                                step > 0 || k > 0);
      end_products();
      if (step > 0) {
        await_products<1>();
        if (threadIdx.x % kWarpGroup == 0) Barrier::arrive(&barriers.empty[released]);
      }
      released = at.slot;
      at.advance();
    }
    if constexpr (kInTurn) {
      // Every warp arrives for itself. With a single step nothing has been awaited here, so a warp that had not yet
      // seen its own turn would find it passed on and back, and would wait forever.
      if (threadIdx.x % 32 == 0) Barrier::arrive(&barriers.turn[group ^ 1]);
      at.advance(steps);  // skip the steps of the other warp group's tile
    }
    await_products<0>();
#pragma unroll
    for (auto& part : d) keep(part);
    if (threadIdx.x % kWarpGroup == 0) Barrier::arrive(&barriers.empty[released]);
  }

  // The epilogue of a tile without sums. left: valid rows of the tile (positions before M). reduced: the warp group's
  // reduction memory, (4, kColumns).
  static __device__ void finish(const ConvParams& p, float (&d)[kParts][kColumns / 2], uint32_t buffer, int k0,
                                int left, float2* reduced) {
    const int t = threadIdx.x % kWarpGroup;
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      const int column = k0 + 8 * i + 2 * (t % 4);
      const bool inside = column < p.K;  // K is a multiple of 8
      const float2 one{1.f, 1.f}, zero{0.f, 0.f};
      const float2 a = p.scale && inside ? __ldg(reinterpret_cast<const float2*>(p.scale + column)) : one;
      const float2 b = p.shift && inside ? __ldg(reinterpret_cast<const float2*>(p.shift + column)) : zero;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 64 * part + 16 * (t / 32) + t % 32 / 4 + 8 * half;
          const uint32_t address = buffer + i / 8 * kChunkBytes + swizzled(row, i % 8) + t % 4 * 4;
          float2 v{fmaf(a.x, d[part][4 * i + 2 * half], b.x), fmaf(a.y, d[part][4 * i + 2 * half + 1], b.y)};
          if (p.residual_there) {
            const float2 r = Pair<T>::widen(load_shared(address));
            v.x += r.x, v.y += r.y;
          }
          if (p.relu) v = relu(v);
          const uint32_t narrow = Pair<T>::narrow(v);
          store_shared(address, narrow);
          if constexpr (kReduce == Reduce::kStatistics) {
            const float2 rounded = Pair<T>::widen(narrow);
            d[part][4 * i + 2 * half] = rounded.x, d[part][4 * i + 2 * half + 1] = rounded.y;
          }
        }
    }
    if constexpr (kReduce == Reduce::kStatistics) take_statistics(d, left, reduced + t / 32 * kColumns);
  }

  // The epilogue of a sums tile. Rows from `left` on are masked but not summed.
  static __device__ void finish_sums(const ConvParams& p, float (&d)[kParts][kColumns / 2], uint32_t buffer, int k0,
                                     int left, float2* reduced) {
    const int t = threadIdx.x % kWarpGroup;
    const uint32_t masks = bring_masks(p, k0, reduced);
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      const uint32_t at = masks + (8 * i + 2 * (t % 4)) * 16;
      const float4 x = load_shared_four(at), y = load_shared_four(at + 16);  // of two channels: shift, a, b, centre
      float2 sum{0.f, 0.f}, product{0.f, 0.f};
#pragma unroll
      for (int part = 0; part < kParts; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 64 * part + accumulator_row(t, half);
          const uint32_t address = buffer + i / 8 * kChunkBytes + swizzled(row, i % 8) + t % 4 * 4;
          const float2 z = Pair<T>::widen(load_shared(address));
          const float2 v{d[part][4 * i + 2 * half] + x.x, d[part][4 * i + 2 * half + 1] + y.x};
          const uint32_t narrow = Pair<T>::narrow(kept(v, z, {x.y, y.y}, {x.z, y.z}));
          store_shared(address, narrow);
          if (row < left) {
            const float2 rounded = Pair<T>::widen(narrow);
            sum.x += rounded.x, sum.y += rounded.y;
            product.x = fmaf(rounded.x, z.x - x.w, product.x);
            product.y = fmaf(rounded.y, z.y - y.w, product.y);
          }
        }
      // These accumulators are no longer needed: they carry the thread's partial sums to take_sums.
      d[0][4 * i] = sum.x, d[0][4 * i + 1] = sum.y, d[0][4 * i + 2] = product.x, d[0][4 * i + 3] = product.y;
    }
    take_sums(d[0], reduced + t / 32 * kColumns);
  }

  // Load the tile's masks into shared memory, behind the reduction's values, and return their address.
  static __device__ uint32_t bring_masks(const ConvParams& p, int k0, float2* reduced) {
    float4* const masks = reinterpret_cast<float4*>(reduced + 4 * kColumns);
    const int t = threadIdx.x % kWarpGroup;
    if (t < kColumns && k0 + t < p.K) masks[t] = __ldg(p.masks + k0 + t);
    cutlass::arch::NamedBarrier::sync(kWarpGroup, threadIdx.x / kWarpGroup - 1);
    return cute::cast_smem_ptr_to_uint(masks);
  }

  // Return v where relu(a * z + b), rounded, is positive or NaN, else 0.
  static __device__ float2 kept(float2 v, float2 z, float2 a, float2 b) {
    const float2 h = Pair<T>::widen(Pair<T>::narrow(relu(float2{fmaf(a.x, z.x, b.x), fmaf(a.y, z.y, b.y)})));
    return {h.x <= 0.f ? 0.f : v.x, h.y <= 0.f ? 0.f : v.y};
  }

  // Reduce a thread's partial sums to its warp's: on entry d[4 * i + j] holds the sum of channel j of the i-th eight,
  // and d[4 * i + 2 + j] that of the products.
  static __device__ void take_sums(const float (&d)[kColumns / 2], float2* of_warp) {
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (int slice = 0; slice < kColumns / kSlice; ++slice) {
      float sum[16], product[16];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int at = 4 * (8 * slice + j / 2) + j % 2;
        sum[j] = d[at], product[j] = d[at + 2];
      }
      add_lanes<8>(sum, lane), add_lanes<8>(product, lane);
      add_lanes<4>(sum, lane), add_lanes<4>(product, lane);
      add_lanes<2>(sum, lane), add_lanes<2>(product, lane);
      reinterpret_cast<float4*>(of_warp + slice * kSlice)[lane] = {sum[0], product[0], sum[1], product[1]};
    }
  }

  template <int kLeft>
  static __device__ void add_lanes(float (&v)[16], unsigned lane) {
    float given[kLeft];
    halve<kLeft>(v, given, lane);
#pragma unroll
    for (int j = 0; j < kLeft; ++j) v[j] += __shfl_xor_sync(~0u, given[j], 2 * kLeft);
  }

  // A warp's statistics of its rows before `left`, from the rounded values in d: mean and M2 of each channel to
  // of_warp.
  static __device__ void take_statistics(const float (&d)[kParts][kColumns / 2], int left, float2* of_warp) {
    const unsigned lane = threadIdx.x % 32;
    float there[kParts][2], rows = 0;
#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        there[part][half] = 64 * part + accumulator_row(threadIdx.x % kWarpGroup, half) < left ? 1.f : 0.f;
        rows += there[part][half];
      }
    const float share = rows > 0 ? 1.f / rows : 0.f;
    Merge merges[3];
#pragma unroll
    for (int round = 0; round < 3; ++round) {
      const float more = __shfl_xor_sync(~0u, rows, 16 >> round);
      merges[round] = Merge(rows, more);
      rows += more;
    }
#pragma unroll
    for (int slice = 0; slice < kColumns / kSlice; ++slice) {
      float mean[16], M2[16];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int column = 32 * slice + j / 2 * 4 + j % 2;  // index into the accumulators, at the thread's first row
        float sum = 0;
        M2[j] = 0;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int half = 0; half < 2; ++half) sum = fmaf(there[part][half], d[part][column + 2 * half], sum);
        mean[j] = sum * share;
#pragma unroll
        for (int part = 0; part < kParts; ++part)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float off = d[part][column + 2 * half] - mean[j];
            M2[j] = fmaf(there[part][half] * off, off, M2[j]);
          }
      }
      merge_lanes<8>(mean, M2, merges[0], lane);
      merge_lanes<4>(mean, M2, merges[1], lane);
      merge_lanes<2>(mean, M2, merges[2], lane);
      reinterpret_cast<float4*>(of_warp + slice * kSlice)[lane] = {mean[0], M2[0], mean[1], M2[1]};
    }
  }

  template <int kLeft>
  static __device__ void merge_lanes(float (&mean)[16], float (&M2)[16], const Merge& merge, unsigned lane) {
    float mean_given[kLeft], M2_given[kLeft];
    halve<kLeft>(mean, mean_given, lane);
    halve<kLeft>(M2, M2_given, lane);
#pragma unroll
    for (int j = 0; j < kLeft; ++j)
      merge(mean[j], M2[j], __shfl_xor_sync(~0u, mean_given[j], 2 * kLeft), __shfl_xor_sync(~0u, M2_given[j], 2 * kLeft));
  }

  // Merge the four warps' partial results, one thread per channel, and store the tile's part.
  static __device__ void store_reduced(const ConvParams& p, int tile, int left, const float2* reduced, int group) {
    cutlass::arch::NamedBarrier::sync(kWarpGroup, group);
    const int column = threadIdx.x % kWarpGroup, k = tile % p.k_tiles * kColumns + column;
    if (column >= kColumns || k >= p.K) return;
    float rows = 0, first = 0, second = 0;
#pragma unroll
    for (int warp = 0; warp < 4; ++warp) {
      const float2 of_warp = reduced[warp * kColumns + column];
      if constexpr (kReduce == Reduce::kSums) {
        first += of_warp.x, second += of_warp.y;
      } else {
        const float more = rows_of_warp(left, warp, kParts);
        Merge(rows, more)(first, second, of_warp.x, of_warp.y);
        rows += more;
      }
    }
    float* const to = p.parts + int64_t{tile / p.k_tiles} * p.K + k;
    to[0] = first;
    to[int64_t{p.tiles / p.k_tiles} * p.K] = second;
  }

  // A consumer warp group: mainloop and epilogue of each of its tiles.
  static __device__ void consume(const ConvParams& p, uint32_t ring, uint32_t buffer, Barriers& barriers,
                                 float2* reduced, int group) {
    const int steps = p.taps * p.slices + p.slices2;
    Ring<kStages> at;
    if (kInTurn && group == 1) at.advance(steps);
    uint32_t phase = 0;
    for (int tile = first_tile(group); tile < p.tiles; tile = next_tile(tile)) {
      float d[kParts][kColumns / 2];
      if (kInTurn) Barrier::wait(&barriers.turn[group], phase);
      multiply_tile(p, d, ring, barriers, at, group);
      Barrier::wait(&barriers.loaded[group], phase);
      const int left = p.M - tile / p.k_tiles * kPositions;
      if constexpr (kReduce == Reduce::kSums)
        finish_sums(p, d, buffer, tile % p.k_tiles * kColumns, left, reduced);
      else
        finish(p, d, buffer, tile % p.k_tiles * kColumns, left, reduced);
      cutlass::arch::fence_view_async_shared();  // makes the results visible to the TMA store
      // Before `ready`: a warp that passes the next `loaded` may overwrite the reduction memory read here.
      if constexpr (kReduce != Reduce::kNothing) store_reduced(p, tile, left, reduced, group);
      Barrier::arrive(&barriers.ready[group]);
      phase ^= 1;
    }
  }

  static __device__ void run(const ConvParams& p) {
    extern __shared__ uint8_t memory[];
    const uint32_t base = cute::cast_smem_ptr_to_uint(memory), ring = (base + 1023) / 1024 * 1024;
    const uint32_t buffers = ring + kStages * kStageBytes;
    uint8_t* const behind = memory + (buffers + 2 * kBufferBytes - base);
    Barriers& barriers = *reinterpret_cast<Barriers*>(behind);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        Barrier::init(&barriers.full[i], 1);
        Barrier::init(&barriers.empty[i], kInTurn ? 1 : 2);
      }
      for (int group = 0; group < 2; ++group) {
        Barrier::init(&barriers.turn[group], kPasses);
        Barrier::init(&barriers.loaded[group], 1);
        Barrier::init(&barriers.ready[group], kWarpGroup);
      }
      cutlass::arch::fence_barrier_init();
      for (int warp = 0; warp < kPasses; ++warp) Barrier::arrive(&barriers.turn[0]);
    }
    __syncthreads();
    let_next_begin();
    if (threadIdx.x < kWarpGroup) {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      const int warp = threadIdx.x / 32;
      if (threadIdx.x % 32 == 0) {
        if (warp == 0) move_operands(p, ring, barriers);
        if (warp >= 2) move_results(p, buffers + (warp - 2) * kBufferBytes, barriers, warp - 2);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<232>();
      const int group = threadIdx.x / kWarpGroup - 1;
      float2* const reduced = reinterpret_cast<float2*>(behind + 256 + group * reduced_bytes(kShape));
      consume(p, ring, buffers + group * kBufferBytes, barriers, reduced, group);
    }
  }
};

template <class T, int kRows, int kColumns, int kStages, bool kInTurn, Reduce kReduce>
__global__ void __launch_bounds__(kConvThreads, 1) conv_act_kernel(const __grid_constant__ ConvParams p) {
  ConvAct<T, kRows, kColumns, kStages, kInTurn, kReduce>::run(p);
}

template <class T, const TileShape& t>
const void* conv_act_pointer() {
  return reinterpret_cast<const void*>(&conv_act_kernel<T, t.rows, t.columns, t.stages, t.in_turn, t.reduce>);
}

// The content of a tile's file: its two kernels' pointers.
#define RESNET_KERNELS_CONV_TILE(NAME)                                                 \
  namespace resnet_kernels::sm90 {                                                     \
  const void* NAME##_bf16() { return conv_act_pointer<__nv_bfloat16, tiles::NAME>(); } \
  const void* NAME##_fp16() { return conv_act_pointer<__half, tiles::NAME>(); }        \
  }

}  // namespace resnet_kernels::sm90
