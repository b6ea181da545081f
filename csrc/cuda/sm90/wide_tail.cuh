// The end of a bottleneck of 128 channels, and the beginning of the next, for sm_90a:
//
//   h = relu(conv3x3(x, w) + shift), rounded            128 channels, only ever in shared memory
//   y = relu(h w3^T + shift3 + residual), rounded       K channels
//   ahead = relu(y w1^T + shift1)                       128 channels
//
// The weights do not fit beside it (557 KB for K = 512): they stream from L2. Each of two warp groups has a tile of its
// own and all that goes with it: so many output rows of a map as make twice 64 positions, W + 2 columns a row, whose
// last two are computed and not kept. The rows of x that they see are brought once, zeros outside the map; the nine taps
// are nine addresses of them, as in tail.cuh. h takes their place. Then y, 64 channels and 64 positions at a time, each
// the next product's operand straight from registers, while residuals come ahead into the buffers where y replaces them.
//
// Weights are 16 KB an item through a ring, each used for all of a tile's positions: 18 of the 3x3, then for part n of y
// those that make it (64 x 128) and those that it is multiplied by (128 x 64).
//
// A tile's first half wants tensor cores, its second memory. So the second warp group begins when the first has made its
// h, and one multiplies while the other stores.
//
// Moves: x once (its rows (rows + 1) / rows times from L2), residual once, y and ahead once; all weights once per tile
// from L2.
#pragma once

#include "cuda/sm90/handover.cuh"
#include "cuda/sm90/wide_tail.h"

namespace resnet_kernels::sm90 {

template <class T>
struct WideTail {
  static constexpr int kSlices = kWideJ / kSlice;
  static constexpr int kSliceOfHalf = kWidePositions * kRow;  // of h: 64 positions, 64 channels

  struct OfGroup {
    uint64_t full, empty;                                  // of x
    uint64_t brought[kWideSlots], multiplied[kWideSlots];  // of weights
    StepBarriers<kWideBuffers> steps;
  };
  struct Barriers {
    OfGroup groups[2];
    uint64_t second_begins;
  };
  static_assert(sizeof(Barriers) <= 256);

  // Of a warp group.
  struct Shared {
    uint32_t halo, slots, buffers;
    __device__ Shared(uint32_t base, int group)
        : halo(base + group * kWideBytesOfGroup),
          slots(halo + kSlices * kWideHaloSlice),
          buffers(slots + kWideSlots * kWideSlot) {}
  };

  static __device__ int first_tile(int group) { return blockIdx.x + group * gridDim.x; }
  static __device__ int next_tile(int tile) { return tile + 2 * gridDim.x; }

  static __device__ void move_operands(const WideTailParams& p, const Shared& at, Barriers& barriers, int group) {
    OfGroup& mine = barriers.groups[group];
    Ring<kWideSlots> item;
    auto bring = [&](auto copy) {
      Barrier::wait(&mine.multiplied[item.slot], item.phase ^ 1);
      BytesBarrier::arrive_and_expect_tx(&mine.brought[item.slot], kWideSlot);
      copy(&mine.brought[item.slot], at.slots + item.slot * kWideSlot);
      item.advance();
    };
    uint32_t phase = 1;
    await_previous();
    if (group == 1) Barrier::wait(&barriers.second_begins, 0);
    for (int tile = first_tile(group); tile < p.tiles; tile = next_tile(tile)) {
      Barrier::wait(&mine.empty, phase);
      phase ^= 1;
      BytesBarrier::arrive_and_expect_tx(&mine.full, kSlices * p.pitch * (2 * p.rows + 2) * kRow);
      for (int slice = 0; slice < kSlices; ++slice)
        cute::SM90_TMA_LOAD_4D::copy(&p.x, &mine.full, kNoHint, pointer(at.halo + slice * kWideHaloSlice),
                                     slice * kSlice, -1, tile % p.tiles_of_image * 2 * p.rows - 1,
                                     tile / p.tiles_of_image);
      for (int slice = 0; slice < kSlices; ++slice)
        for (int tap = 0; tap < 9; ++tap)
          bring([&](uint64_t* brought, uint32_t slot) {
            cute::SM90_TMA_LOAD_3D::copy(&p.w, brought, kNoHint, pointer(slot), slice * kSlice, tap, 0);
          });
      for (int part = 0; part < p.parts; ++part) {
        bring([&](uint64_t* brought, uint32_t slot) {
          for (int slice = 0; slice < kSlices; ++slice)
            cute::SM90_TMA_LOAD_2D::copy(&p.w3, brought, kNoHint, pointer(slot + slice * kSlice * kRow), slice * kSlice,
                                         part * kSlice);
        });
        bring([&](uint64_t* brought, uint32_t slot) {
          cute::SM90_TMA_LOAD_2D::copy(&p.w1, brought, kNoHint, pointer(slot), part * kSlice, 0);
        });
      }
    }
  }

  // Steps of a tile: of y each half of part 0, of part 1, ...; of what is ahead both slices of a half, of the other.
  static __device__ void move_results(const WideTailParams& p, const Shared& at, Barriers& barriers, int group) {
    const int first = first_tile(group), every = 2 * gridDim.x;
    const int tiles = first < p.tiles ? (p.tiles - first + every - 1) / every : 0;
    const int of_y = 2 * p.parts, steps = of_y + 2 * kSlices;
    auto of = [&](int step, auto use) {
      const int tile = first + step / steps * every, s = step % steps;
      const bool ahead = s >= of_y;
      const int slice = ahead ? (s - of_y) % kSlices : s / 2, half = ahead ? (s - of_y) / kSlices : s % 2;
      use(ahead, slice * kSlice, (tile % p.tiles_of_image * 2 + half) * p.rows, tile / p.tiles_of_image);
    };
    auto load = [&](int step, int buffer, uint64_t* loaded) {
      of(step, [&](bool ahead, int k, int h, int n) {
        if (ahead) {
          Barrier::arrive(loaded);
        } else {
          BytesBarrier::arrive_and_expect_tx(loaded, p.rows * p.pitch * kRow);
          cute::SM90_TMA_LOAD_4D::copy(&p.residual, loaded, kOnce, pointer(at.buffers + buffer * kWideBuffer), k, 0, h,
                                       n);
        }
      });
    };
    auto store = [&](int step, int buffer) {
      of(step, [&](bool ahead, int k, int h, int n) {
        cute::SM90_TMA_STORE_4D::copy(ahead ? &p.ahead : &p.y, pointer(at.buffers + buffer * kWideBuffer), k, 0, h, n);
      });
    };
    await_previous();
    move_steps(tiles * steps, barriers.groups[group].steps, load, store);
  }

  static __device__ void release(uint64_t& barrier) {
    if (threadIdx.x % kWarpGroup == 0) Barrier::arrive(&barrier);
  }

  // h, in place of what it is made of.
  static __device__ void convolve(const WideTailParams& p, const Shared& at, OfGroup& mine, Ring<kWideSlots>& item,
                                  int group) {
    // Zeros: of what is read without having been written the compiler takes it that it lives since the tile before.
    float d[2][kWideJ / 2]{};
    const uint64_t half_further = p.rows * p.pitch * kRow / 16;
    int released = item.slot;
#pragma unroll 1
    for (int step = 0; step < kSlices * 9; ++step) {
      Barrier::wait(&mine.brought[item.slot], item.phase);
      const uint64_t a =
          swizzled_matrix(at.halo + step / 9 * kWideHaloSlice + tap_column(0, step % 9, p.pitch) * kRow);
      const uint64_t b = swizzled_matrix(at.slots + item.slot * kWideSlot);
#pragma unroll
      for (auto& half : d) keep(half);
      begin_products();
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          multiply<T, kWideJ>(d[half], a + half * half_further + k * kNextProduct, b + k * kNextProduct, true);
      end_products();
      if (step > 0) {
        await_products<1>();
        release(mine.multiplied[released]);
      }
      released = item.slot;
      item.advance();
    }
    await_products<0>();
#pragma unroll
    for (auto& half : d) keep(half);
    release(mine.multiplied[released]);
    // Other warps' products read what this one is to overwrite.
    cutlass::arch::NamedBarrier::sync(kWarpGroup, group);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      const Shift shift(p.shift + slice * kSlice);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = first_row_at(at.halo + (half * kSlices + slice) * kSliceOfHalf);
        const float (&of_slice)[32] = reinterpret_cast<const float (&)[32]>(d[half][32 * slice]);
#pragma unroll
        for (int of_two = 0; of_two < 2; ++of_two)
#pragma unroll
          for (int i = 0; i < 8; ++i)
            store_shared(place(row, i, of_two), Pair<T>::narrow(relu(shifted(of_slice, i, of_two, shift.of[i]))));
      }
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(kWarpGroup, group);
  }

  static __device__ void consume(const WideTailParams& p, const Shared& at, Barriers& barriers, int group) {
    OfGroup& mine = barriers.groups[group];
    Steps<kWideBuffers, kWideBuffer> steps(mine.steps, at.buffers);
    Ring<kWideSlots> item;
    const int kept = p.rows * p.pitch;
    const uint64_t h = swizzled_matrix(at.halo);
    uint32_t phase = 0;
#pragma unroll 1
    for (int tile = first_tile(group); tile < p.tiles; tile = next_tile(tile)) {
      Barrier::wait(&mine.full, phase);
      phase ^= 1;
      convolve(p, at, mine, item, group);
      if (group == 0 && tile == first_tile(0)) release(barriers.second_begins);
      float ahead[2][kWideJ / 2]{};
      int held = 0;  // the slot of the second product that is not yet awaited
#pragma unroll 1
      for (int part = 0; part < p.parts; ++part) {
        const uint64_t w3 = swizzled_matrix(at.slots + item.slot * kWideSlot);
        const int of_w3 = item.slot;
        const Shift shift(p.shift3 + part * kSlice);
        Barrier::wait(&mine.brought[item.slot], item.phase);
        item.advance();
        const uint64_t w1 = swizzled_matrix(at.slots + item.slot * kWideSlot);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float d[32];
          keep(d);
          begin_products();
#pragma unroll
          for (int slice = 0; slice < kSlices; ++slice)
#pragma unroll
            for (int k = 0; k < 4; ++k)
              multiply<T, kSlice>(d, h + (half * kSlices + slice) * (kSliceOfHalf / 16) + k * kNextProduct,
                                  w3 + slice * (kSlice * kRow / 16) + k * kNextProduct, slice > 0 || k > 0);
          end_products();
          await_products<0>();
          keep(d);
          if (half == 0 && part > 0) release(mine.multiplied[held]);
          if (half == 1) release(mine.multiplied[of_w3]);
          if (half == 1 && part == p.parts - 1) release(mine.empty);
          uint32_t y[4][4];
          finish_part<T>(d, shift, steps.buffer(), kept, y);
          steps.next();
          if (half == 0) Barrier::wait(&mine.brought[item.slot], item.phase);
          keep(ahead[half]);
          begin_products();
#pragma unroll
          for (int k = 0; k < 4; ++k)
            multiply<T, kWideJ>(ahead[half], y[k], w1 + k * kNextProduct, true);
          end_products();
        }
        held = item.slot;
        item.advance();
      }
      await_products<0>();
#pragma unroll
      for (auto& half : ahead) keep(half);
      release(mine.multiplied[held]);
#pragma unroll
      for (auto& half : ahead) finish_last<T, kWideJ>(half, p.shift1, kept, steps);
    }
  }

  static __device__ void run(const WideTailParams& p) {
    extern __shared__ uint8_t memory[];
    const uint32_t base = cute::cast_smem_ptr_to_uint(memory), aligned = (base + 1023) / 1024 * 1024;
    Barriers& barriers = *reinterpret_cast<Barriers*>(memory + (aligned + 2 * kWideBytesOfGroup - base));
    if (threadIdx.x == 0) {
      for (OfGroup& group : barriers.groups) {
        Barrier::init(&group.full, 1);
        Barrier::init(&group.empty, 1);
        for (int i = 0; i < kWideSlots; ++i) {
          Barrier::init(&group.brought[i], 1);
          Barrier::init(&group.multiplied[i], 1);
        }
        group.steps.init();
      }
      Barrier::init(&barriers.second_begins, 1);
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    let_next_begin();
    if (threadIdx.x < kWarpGroup) {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      const int warp = threadIdx.x / 32, group = warp % 2;
      if (threadIdx.x % 32 == 0) {
        if (warp < 2)
          move_operands(p, Shared(aligned, group), barriers, group);
        else
          move_results(p, Shared(aligned, group), barriers, group);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<232>();
      const int group = threadIdx.x / kWarpGroup - 1;
      consume(p, Shared(aligned, group), barriers, group);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kWideThreads, 1) wide_tail_kernel(const __grid_constant__ WideTailParams p) {
  WideTail<T>::run(p);
}

}  // namespace resnet_kernels::sm90
