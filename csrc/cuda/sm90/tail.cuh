// The tail of a bottleneck of 64 channels, with the first convolution of the next block, for sm_90a:
//
//   h = relu(conv3x3(x, w) + shift), rounded            64 channels, only ever in registers
//   y = relu(h w3^T + shift3 + residual), rounded       256 channels
//   ahead = relu(y w1^T + shift1)                       64 or 128 channels
//
// A persistent kernel, one CTA per multiprocessor, with all weights resident in shared memory. A tile is a pair of
// output rows; its four input rows (the halo) are loaded once, W + 2 columns each from column -1, with zeros outside
// the map. In shared memory the rows follow each other, so the A operand of a tap is the same matrix begun (W + 2) * r
// + s rows further on: nine taps are nine descriptors. (A swizzled matrix may begin at any row, because the swizzle
// goes by address.) A wgmma makes 64 positions of a row, of which W are kept.
//
// Warp-specialized, three warp groups:
//
//   producer, warp 0     Loads the weights once, then each tile's halo (one stage: barriers full and empty).
//   producer, warps 2-3  One per consumer warp group: loads the residual, 64 channels a step, into a ring of results
//                        buffers (StepBarriers in handover.cuh), and stores y and ahead from the same buffers.
//   consumers            Two warp groups, one output row each. h and each slice of 64 channels of y become the next
//                        product's A operand straight from the registers of the last.
//
// Memory traffic: x once from device memory (each row twice from L2), residual once, y and ahead once; the weights once
// per multiprocessor.
#pragma once

#include "cuda/sm90/handover.cuh"
#include "cuda/sm90/tail.h"

namespace resnet_kernels::sm90 {

template <class T, int kAhead>
struct Tail {
  static constexpr int kParts = kTailK / kSlice;           // slices of y, 64 channels each
  static constexpr int kSteps = kParts + kAhead / kSlice;  // steps of the results ring, per output row
  static constexpr int kBuffers = tail_buffers(kAhead);    // results buffers of a consumer warp group
  static constexpr int kTapBytes = 64 * kRow, kPartBytes = kAhead * kRow;

  struct Barriers {
    // The weights have landed; the halo has landed; both consumers have read the halo.
    uint64_t weights, full, empty;
    StepBarriers<kBuffers> steps[2];  // of each consumer warp group
  };
  static_assert(sizeof(Barriers) <= 256);

  // Addresses in shared memory.
  struct Shared {
    uint32_t w, w3, w1, halo, buffers;
    __device__ explicit Shared(uint32_t base)
        : w(base),
          w3(w + kTailWeights),
          w1(w3 + kTailWeights3),
          halo(w1 + kParts * kPartBytes),
          buffers(halo + kTailHalo) {}
    __device__ uint32_t of(int group) const { return buffers + group * kBuffers * kTailBuffer; }
    __device__ uint32_t end() const { return of(2); }
  };

  // The operands' producer. It loads the weights before await_previous, to overlap with the end of the preceding
  // kernel, which must not write them.
  static __device__ void move_operands(const TailParams& p, const Shared& at, Barriers& barriers) {
    BytesBarrier::arrive_and_expect_tx(&barriers.weights, kTailWeights + kTailWeights3 + kParts * kPartBytes);
    for (int tap = 0; tap < 9; ++tap)
      cute::SM90_TMA_LOAD_3D::copy(&p.w, &barriers.weights, kNoHint, pointer(at.w + tap * kTapBytes), 0, tap, 0);
    for (int part = 0; part < kParts; ++part) {
      cute::SM90_TMA_LOAD_2D::copy(&p.w3, &barriers.weights, kNoHint, pointer(at.w3 + part * kTapBytes), 0, part * 64);
      cute::SM90_TMA_LOAD_2D::copy(&p.w1, &barriers.weights, kNoHint, pointer(at.w1 + part * kPartBytes), part * 64, 0);
    }
    uint32_t phase = 1;
    await_previous();
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      Barrier::wait(&barriers.empty, phase);
      phase ^= 1;
      BytesBarrier::arrive_and_expect_tx(&barriers.full, 4 * (p.W + 2) * kRow);
      cute::SM90_TMA_LOAD_4D::copy(&p.x, &barriers.full, kNoHint, pointer(at.halo), 0, -1, tile % p.pairs * 2 - 1,
                                   tile / p.pairs);
    }
  }

  // A results producer. Steps of a row: the slices of y, with the residual, then those of ahead, without one.
  static __device__ void move_results(const TailParams& p, uint32_t buffers, StepBarriers<kBuffers>& barriers,
                                      int group) {
    const int tiles = (p.tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / gridDim.x;
    auto of = [&](int step, auto use) {
      const int tile = blockIdx.x + step / kSteps * gridDim.x;
      use(step % kSteps * kSlice, tile % p.pairs * 2 + group, tile / p.pairs);
    };
    auto load = [&](int step, int buffer, uint64_t* loaded) {
      of(step, [&](int k, int h, int n) {
        if (k < kTailK) {
          BytesBarrier::arrive_and_expect_tx(loaded, p.W * kRow);
          cute::SM90_TMA_LOAD_4D::copy(&p.residual, loaded, kOnce, pointer(buffers + buffer * kTailBuffer), k, 0, h, n);
        } else {
          Barrier::arrive(loaded);
        }
      });
    };
    auto store = [&](int step, int buffer) {
      of(step, [&](int k, int h, int n) {
        const bool ahead = k >= kTailK;
        cute::SM90_TMA_STORE_4D::copy(ahead ? &p.ahead : &p.y, pointer(buffers + buffer * kTailBuffer),
                                      ahead ? k - kTailK : k, 0, h, n);
      });
    };
    await_previous();
    move_steps(tiles * kSteps, barriers, load, store);
  }

  // A consumer warp group: one output row of each tile, through three chained products.
  static __device__ void consume(const TailParams& p, const Shared& at, Barriers& barriers, int group) {
    const int pitch = p.W + 2;
    Steps<kBuffers, kTailBuffer> steps(barriers.steps[group], at.of(group));
    Barrier::wait(&barriers.weights, 0);
    uint32_t phase = 0;
#pragma unroll 1
    for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      Barrier::wait(&barriers.full, phase);
      phase ^= 1;
      float d[32], ahead[kAhead / 2];
      keep(d);
      const Shift inner(p.shift);
      begin_products();
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const uint64_t a = swizzled_matrix(at.halo + tap_column(group, tap, pitch) * kRow);
        const uint64_t b = swizzled_matrix(at.w + tap * kTapBytes);
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply<T, 64>(d, a + k * kNextProduct, b + k * kNextProduct, tap > 0 || k > 0);
      }
      end_products();
      await_products<0>();
      keep(d);
      if (threadIdx.x % kWarpGroup == 0) Barrier::arrive(&barriers.empty);
      uint32_t h[4][4];
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) hand_over<T>(h, i, half, relu(shifted(d, i, half, inner.of[i])));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint64_t b = swizzled_matrix(at.w3 + part * kTapBytes);
        const Shift shift(p.shift3 + part * kSlice);
        keep(d);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply<T, 64>(d, h[k], b + k * kNextProduct, k > 0);
        end_products();
        await_products<0>();
        keep(d);
        uint32_t y[4][4];
        finish_part<T>(d, shift, steps.buffer(), p.W, y);
        steps.next();
        const uint64_t b1 = swizzled_matrix(at.w1 + part * kPartBytes);
        keep(ahead);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply<T, kAhead>(ahead, y[k], b1 + k * kNextProduct, part > 0 || k > 0);
        end_products();
      }
      await_products<0>();
      keep(ahead);
      finish_last<T, kAhead>(ahead, p.shift1, p.W, steps);
    }
  }

  static __device__ void run(const TailParams& p) {
    extern __shared__ uint8_t memory[];
    const uint32_t base = cute::cast_smem_ptr_to_uint(memory);
    const Shared at((base + 1023) / 1024 * 1024);
    Barriers& barriers = *reinterpret_cast<Barriers*>(memory + (at.end() - base));
    if (threadIdx.x == 0) {
      Barrier::init(&barriers.weights, 1);
      Barrier::init(&barriers.full, 1);
      Barrier::init(&barriers.empty, 2);
      for (auto& steps : barriers.steps) steps.init();
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    let_next_begin();
    if (threadIdx.x < kWarpGroup) {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      const int warp = threadIdx.x / 32;
      if (threadIdx.x % 32 == 0) {
        if (warp == 0) move_operands(p, at, barriers);
        if (warp >= 2) move_results(p, at.of(warp - 2), barriers.steps[warp - 2], warp - 2);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<232>();
      consume(p, at, barriers, threadIdx.x / kWarpGroup - 1);
    }
  }
};

template <class T, int kAhead>
__global__ void __launch_bounds__(kTailThreads, 1) tail_kernel(const __grid_constant__ TailParams p) {
  Tail<T, kAhead>::run(p);
}

}  // namespace resnet_kernels::sm90
