// The last 1x1 convolution of a bottleneck with the first 1x1 of the next block, for sm_90a:
//
//   y = relu(x w3^T + shift3 + residual), rounded       J channels to K
//   ahead = relu(y w1^T + shift1)                       K channels to J1
//
// A persistent kernel, one CTA per multiprocessor. A tile is 128 positions, 64 for each of two consumer warp groups,
// with all channels of x in shared memory and all channels of ahead in accumulators. y is made 64 channels (a part) at
// a time; each part, rounded, is the A operand of the second product straight from registers.
//
// Warp-specialized, three warp groups:
//
//   producer, warp 0     Loads x into kTiles stages (barriers full, empty), and the weights into a ring of kSlots slots
//                        (barriers brought, multiplied) that both consumers share. For part n of y, item 2n of the ring
//                        is the rows of w3 that make it (64 x J), item 2n + 1 the columns of w1 that multiply it (J1 x
//                        64).
//   producer, warps 2-3  One per consumer warp group: residuals in and results out through kBuffers buffers
//                        (handover.cuh).
//   consumers            Two warp groups, 64 positions each.
//
// Memory traffic: x and residual once, y and ahead once; all weights once per 128 positions, from L2. y is not read
// back; only the next block reads it, as its residual.
#pragma once

#include "cuda/sm90/handover.cuh"
#include "cuda/sm90/pair.h"

namespace resnet_kernels::sm90 {

template <class T, int kInside, int kAhead, int kTiles, int kSlots, int kBuffers>
struct TwoConvs {
  static constexpr PairShape kShape{kInside, kAhead, kTiles, kSlots, kBuffers};
  static_assert(pair_shared_bytes(kShape) <= 227 * 1024);
  static constexpr int kTileBytes = pair_tile_bytes(kShape), kSlotBytes = pair_slot_bytes(kShape);
  static constexpr int kSliceBytes = kPairRows * kRow;
  struct Barriers {
    uint64_t full[kTiles], empty[kTiles];          // stages of x: the bytes have landed; both consumers have read them
    uint64_t brought[kSlots], multiplied[kSlots];  // slots of weights, likewise
    StepBarriers<kBuffers> steps[2];
  };
  static_assert(sizeof(Barriers) <= 256);

  // The operands' producer: x of each tile, then the weights of each part of y.
  static __device__ void move_operands(const PairParams& p, uint32_t tiles, uint32_t slots, Barriers& barriers) {
    Ring<kTiles> at;
    Ring<kSlots> item;
    await_previous();
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      Barrier::wait(&barriers.empty[at.slot], at.phase ^ 1);
      BytesBarrier::arrive_and_expect_tx(&barriers.full[at.slot], kTileBytes);
      for (int i = 0; i < kInside / kSlice; ++i)
        cute::SM90_TMA_LOAD_2D::copy(&p.x, &barriers.full[at.slot], kOnce,
                                     pointer(tiles + at.slot * kTileBytes + i * kSliceBytes), i * kSlice,
                                     tile * kPairRows);
      at.advance();
      auto bring = [&](int bytes, auto copy) {
        Barrier::wait(&barriers.multiplied[item.slot], item.phase ^ 1);
        BytesBarrier::arrive_and_expect_tx(&barriers.brought[item.slot], bytes);
        copy(&barriers.brought[item.slot], slots + item.slot * kSlotBytes);
        item.advance();
      };
      for (int part = 0; part < p.parts; ++part) {
        bring(kInside * kRow, [&](uint64_t* brought, uint32_t slot) {
          for (int i = 0; i < kInside / kSlice; ++i)
            cute::SM90_TMA_LOAD_2D::copy(&p.w3, brought, kNoHint, pointer(slot + i * 64 * kRow), i * kSlice, part * 64);
        });
        bring(kAhead * kRow, [&](uint64_t* brought, uint32_t slot) {
          cute::SM90_TMA_LOAD_2D::copy(&p.w1, brought, kNoHint, pointer(slot), part * 64, 0);
        });
      }
    }
  }

  // A results producer. Steps of a tile: the parts of y, with the residual, then the slices of ahead, without one.
  static __device__ void move_results(const PairParams& p, uint32_t buffers, StepBarriers<kBuffers>& barriers,
                                      int group) {
    const int tiles = (p.tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / gridDim.x;
    const int steps = p.parts + kAhead / kSlice;
    auto of = [&](int step, auto use) {
      const int tile = blockIdx.x + step / steps * gridDim.x;
      use(step % steps, tile * kPairRows + group * 64);
    };
    auto load = [&](int step, int buffer, uint64_t* loaded) {
      of(step, [&](int part, int m) {
        if (part < p.parts) {
          BytesBarrier::arrive_and_expect_tx(loaded, kPairBuffer);
          cute::SM90_TMA_LOAD_2D::copy(&p.residual, loaded, kOnce, pointer(buffers + buffer * kPairBuffer),
                                       part * kSlice, m);
        } else {
          Barrier::arrive(loaded);
        }
      });
    };
    auto store = [&](int step, int buffer) {
      of(step, [&](int part, int m) {
        const bool ahead = part >= p.parts;
        cute::SM90_TMA_STORE_2D::copy(ahead ? &p.ahead : &p.y, pointer(buffers + buffer * kPairBuffer),
                                      (ahead ? part - p.parts : part) * kSlice, m);
      });
    };
    await_previous();
    move_steps(tiles * steps, barriers, load, store);
  }

  // A consumer warp group. The second product of a part stays in flight during the first product of the next part, and
  // its slot (`held`) is released after that.
  static __device__ void consume(const PairParams& p, uint32_t tiles, uint32_t slots, uint32_t buffers,
                                 Barriers& barriers, int group) {
    Steps<kBuffers, kPairBuffer> steps(barriers.steps[group], buffers);
    Ring<kTiles> at;
    Ring<kSlots> item;
    auto release = [&](uint64_t& barrier) {
      if (threadIdx.x % kWarpGroup == 0) Barrier::arrive(&barrier);
    };
#pragma unroll 1
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      float ahead[kAhead / 2];
      Barrier::wait(&barriers.full[at.slot], at.phase);
      const uint64_t x = swizzled_matrix(tiles + at.slot * kTileBytes + group * 64 * kRow);
      int held = 0;  // the slot of the second product that is in flight
#pragma unroll 1
      for (int part = 0; part < p.parts; ++part) {
        float d[32];
        Barrier::wait(&barriers.brought[item.slot], item.phase);
        const uint64_t w3 = swizzled_matrix(slots + item.slot * kSlotBytes);
        const Shift shift(p.shift3 + part * kSlice);
        keep(d);
        begin_products();
#pragma unroll
        for (int i = 0; i < kInside / kSlice; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k)
            multiply<T, 64>(d, x + i * (kSliceBytes / 16) + k * kNextProduct,
                            w3 + i * (64 * kRow / 16) + k * kNextProduct, i > 0 || k > 0);
        end_products();
        await_products<0>();
        keep(d);
        release(barriers.multiplied[item.slot]);
        if (part > 0) release(barriers.multiplied[held]);
        if (part == p.parts - 1) release(barriers.empty[at.slot]);
        item.advance();
        uint32_t y[4][4];
        finish_part<T>(d, shift, steps.buffer(), 64, y);
        steps.next();
        Barrier::wait(&barriers.brought[item.slot], item.phase);
        const uint64_t w1 = swizzled_matrix(slots + item.slot * kSlotBytes);
        keep(ahead);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply<T, kAhead>(ahead, y[k], w1 + k * kNextProduct, part > 0 || k > 0);
        end_products();
        held = item.slot;
        item.advance();
      }
      await_products<0>();
      keep(ahead);
      release(barriers.multiplied[held]);
      at.advance();
      finish_last<T, kAhead>(ahead, p.shift1, 64, steps);
    }
  }

  static __device__ void run(const PairParams& p) {
    extern __shared__ uint8_t memory[];
    const uint32_t base = cute::cast_smem_ptr_to_uint(memory), tiles = (base + 1023) / 1024 * 1024;
    const uint32_t slots = tiles + kTiles * kTileBytes, buffers = slots + kSlots * kSlotBytes;
    Barriers& barriers = *reinterpret_cast<Barriers*>(memory + (buffers + 2 * kBuffers * kPairBuffer - base));
    if (threadIdx.x == 0) {
      for (int i = 0; i < kTiles; ++i) {
        Barrier::init(&barriers.full[i], 1);
        Barrier::init(&barriers.empty[i], 2);
      }
      for (int i = 0; i < kSlots; ++i) {
        Barrier::init(&barriers.brought[i], 1);
        Barrier::init(&barriers.multiplied[i], 2);
      }
      for (auto& steps : barriers.steps) steps.init();
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    let_next_begin();
    if (threadIdx.x < kWarpGroup) {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      const int warp = threadIdx.x / 32;
      if (threadIdx.x % 32 == 0) {
        if (warp == 0) move_operands(p, tiles, slots, barriers);
        if (warp >= 2)
          move_results(p, buffers + (warp - 2) * kBuffers * kPairBuffer, barriers.steps[warp - 2], warp - 2);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<232>();
      const int group = threadIdx.x / kWarpGroup - 1;
      consume(p, tiles, slots, buffers + group * kBuffers * kPairBuffer, barriers, group);
    }
  }
};

template <class T, int kInside, int kAhead, int kTiles, int kSlots, int kBuffers>
__global__ void __launch_bounds__(kPairThreads, 1) pair_kernel(const __grid_constant__ PairParams p) {
  TwoConvs<T, kInside, kAhead, kTiles, kSlots, kBuffers>::run(p);
}

}  // namespace resnet_kernels::sm90
