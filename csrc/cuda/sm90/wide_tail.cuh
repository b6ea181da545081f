// The tail of a bottleneck of 128 channels, with the first convolution of the next block, for sm_90a:
//
//   h = relu(conv3x3(x, w) + shift), rounded            128 channels, only ever in shared memory
//   y = relu(h w3^T + shift3 + residual), rounded       K channels
//   ahead = relu(y w1^T + shift1)                       128 channels
//
// The weights (557 KB for K = 512) do not fit into shared memory and are streamed from L2. A persistent kernel, one CTA
// per multiprocessor; each of two consumer warp groups has a tile, a weights' ring and buffers of its own. A tile is
// two halves of up to 64 positions: as many output rows as fit, W + 2 columns each, of which the last two are computed
// and dropped. The x rows that the tile sees (the halo) are loaded once, with zeros outside the map; nine taps are nine
// descriptors, as in tail.cuh. h overwrites the halo. Then y is made 64 channels (a part) and 64 positions at a time,
// each the A operand of the next product straight from registers.
//
// Weights pass through the ring in items of 16 KB, each used for all of a tile's positions: 18 for the 3x3 (9 taps x 2
// slices), then for part n of y the rows of w3 that make it (64 x 128) and the columns of w1 that multiply it (128 x
// 64).
//
// Warp-specialized, three warp groups:
//
//   producer, warps 0-1
//       One per consumer warp group: the x halo (one stage: full, empty) and the weights (brought, multiplied).
//   producer, warps 2-3
//       One per consumer warp group: residuals ahead of time into the results buffers, where y replaces them
//       (handover.cuh), and y and ahead out of them.
//   consumers
//       Two warp groups, a tile each.
//
// The 3x3 of a tile is bound by tensor cores, the rest by memory. So the second warp group begins when the first has
// made its h (second_begins), and one multiplies while the other stores.
//
// Memory traffic: x once from device memory (its rows (rows + 1) / rows times from L2), residual once, y and ahead
// once; all weights once per tile, from L2.
#pragma once

#include "cuda/sm90/handover.cuh"
#include "cuda/sm90/wide_tail.h"

namespace resnet_kernels::sm90 {

template <class T>
struct WideTail {
  static constexpr int kSlices = kWideJ / kSlice;
  static constexpr int kSliceOfHalf = kWidePositions * kRow;  // of h: 64 positions, 64 channels

  // Barriers of one consumer warp group and its two producers.
  struct OfGroup {
    uint64_t full, empty;                                  // the x halo has landed; has been read
    uint64_t brought[kWideSlots], multiplied[kWideSlots];  // a slot of weights has landed; has been read
    StepBarriers<kWideBuffers> steps;
  };
  struct Barriers {
    OfGroup groups[2];
    // The first warp group has made the h of its first tile.
    uint64_t second_begins;
  };
  static_assert(sizeof(Barriers) <= 256);

  // Addresses of a warp group's shared memory.
  struct Shared {
    uint32_t halo, slots, buffers;
    __device__ Shared(uint32_t base, int group)
        : halo(base + group * kWideBytesOfGroup),
          slots(halo + kSlices * kWideHaloSlice),
          buffers(slots + kWideSlots * kWideSlot) {}
  };

  static __device__ int first_tile(int group) { return blockIdx.x + group * gridDim.x; }
  static __device__ int next_tile(int tile) { return tile + 2 * gridDim.x; }

  // The operands' producer of one consumer warp group: the halo and the weights of each tile.
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

  // The results producer of one consumer warp group. Steps of a tile: both halves of part 0 of y, of part 1, ...; then
  // of ahead both slices of the first half, then of the second.
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

  // The 3x3: makes h, which overwrites the halo.
  static __device__ void convolve(const WideTailParams& p, const Shared& at, OfGroup& mine, Ring<kWideSlots>& item,
                                  int group) {
    // Initialized to zero and always accumulated: if the first product read uninitialized accumulators, the compiler
    // would take them to be live since the tile before.
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
    // Products of the other warps read the halo that this warp is about to overwrite.
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

  // A consumer warp group: per tile the 3x3, then for each part of y and each half its product, epilogue and the second
  // product.
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
      int held = 0;  // the slot of the second product that is in flight
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
