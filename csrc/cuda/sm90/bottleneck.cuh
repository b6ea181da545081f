// A bottleneck of 64 channels for sm_90a:
//
//   a = relu(x w1^T + shift1), rounded                  256 channels to 64, or with a projection 64 to 64
//   h = relu(conv3x3(a, w) + shift), rounded            64 channels, only ever in registers
//   y = relu(h w3^T + shift3 + x), rounded              256 channels; or x wp^T in place of x
//
// All weights stay in shared memory (136 or 144 KB). A block goes down a strip of an image's rows, two at a time: output row 2n
// belongs to the first of two warp groups, 2n + 1 to the second. Rows of a lie in a ring of five, W + 2 columns each,
// whose first and last are zeros for good; the nine taps are nine addresses, as in tail.cuh. Each row of a is made once,
// in order: row 2n + 2 by the first warp group before it convolves row 2n, row 2n + 3 by the second before row 2n + 1.
// So the second wants what the first makes in the same round, the first what the second made in the round before: they
// run half a round apart, and one multiplies while the other stores. Rows outside the map are zeros. A row takes the
// place of the one five before: who makes it has convolved what is four before, and seen that the row before it was made,
// by one who had convolved what is five before.
//
// x streams through a ring, 64 channels of a row an item, in the order in which rows of a are made; two rows later it
// comes again, from L2, as the residual, into the buffers where y takes its place, or for the projection, into one of its
// own.
//
// Moves: x and y once, and x once more from L2; with several strips an image, two rows of x a strip besides; the weights
// once per multiprocessor.
#pragma once

#include "cuda/sm90/bottleneck.h"
#include "cuda/sm90/handover.cuh"

namespace resnet_kernels::sm90 {

template <class T, bool kProjection>
struct WholeBottleneck {
  static constexpr BottleneckShape kShape{kProjection};
  static constexpr int kSlices = kShape.slices(), kParts = kBottleneckK / kSlice;  // of x, of y
  static constexpr int kSlots = kShape.slots(), kBuffers = kShape.buffers();
  static constexpr int kTapBytes = 64 * kRow;

  struct Barriers {
    uint64_t weights;
    uint64_t brought[kSlots], multiplied[kSlots];  // of x
    uint64_t made[kRowsOfA];                       // of a
    uint64_t there[2], projected[2];               // of x, for a warp group's projection
    StepBarriers<kBuffers> steps[2];               // of the warp groups
  };
  static_assert(sizeof(Barriers) <= 256);

  struct Shared {
    uint32_t w, w3, w1, wp, a, slots, projected, buffers;
    __device__ explicit Shared(uint32_t base)
        : w(base),
          w3(w + 9 * kTapBytes),
          w1(w3 + kParts * kTapBytes),
          wp(w1 + kSlices * kTapBytes),
          a(base + kShape.weights()),
          slots(a + kBottleneckA),
          projected(slots + kSlots * kBottleneckItem),
          buffers(projected + 2 * kShape.projected() * kBottleneckItem) {}
    // Operands of 64 rows, of which the last lie in what is behind: never last.
    __device__ uint32_t x_of(int group) const { return projected + group * kBottleneckItem; }
    __device__ uint32_t of(int group) const { return buffers + group * kBuffers * kBottleneckItem; }
    __device__ uint32_t end() const { return of(2); }
  };

  struct Strip {
    int n, first, pairs;  // the image, the first output row, and of rows
    __device__ Strip(const BottleneckParams& p, int strip)
        : n(strip / p.strips_of_image),
          first(strip % p.strips_of_image * p.rows),
          pairs(((p.H - first < p.rows ? p.H - first : p.rows) + 1) / 2) {}
    // What rows of a there are: -1 to this.
    __device__ int last() const { return 2 * pairs; }
    __device__ bool in_map(const BottleneckParams& p, int row) const { return first + row >= 0 && first + row < p.H; }
  };

  static __device__ void move_operands(const BottleneckParams& p, const Shared& at, Barriers& barriers) {
    await_previous();  // who may have made the weights
    BytesBarrier::arrive_and_expect_tx(&barriers.weights, kShape.weights());
    for (int tap = 0; tap < 9; ++tap)
      cute::SM90_TMA_LOAD_3D::copy(&p.w, &barriers.weights, kNoHint, pointer(at.w + tap * kTapBytes), 0, tap, 0);
    for (int part = 0; part < kParts; ++part) {
      cute::SM90_TMA_LOAD_2D::copy(&p.w3, &barriers.weights, kNoHint, pointer(at.w3 + part * kTapBytes), 0, part * 64);
      if constexpr (kProjection)
        cute::SM90_TMA_LOAD_2D::copy(&p.wp, &barriers.weights, kNoHint, pointer(at.wp + part * kTapBytes), 0,
                                     part * 64);
    }
    for (int slice = 0; slice < kSlices; ++slice)
      cute::SM90_TMA_LOAD_2D::copy(&p.w1, &barriers.weights, kNoHint, pointer(at.w1 + slice * kTapBytes), slice * 64,
                                   0);
    Ring<kSlots> item;
    for (int i = blockIdx.x; i < p.strips; i += gridDim.x) {
      const Strip strip(p, i);
      for (int row = -1; row <= strip.last(); ++row) {
        if (!strip.in_map(p, row)) continue;
        for (int slice = 0; slice < kSlices; ++slice) {
          Barrier::wait(&barriers.multiplied[item.slot], item.phase ^ 1);
          uint64_t* const brought = &barriers.brought[item.slot];
          BytesBarrier::arrive_and_expect_tx(brought, p.W * kRow);
          cute::SM90_TMA_LOAD_4D::copy(&p.x, brought, kNoHint, pointer(at.slots + item.slot * kBottleneckItem),
                                       slice * kSlice, 0, strip.first + row, strip.n);
          item.advance();
        }
      }
    }
  }

  // x of output rows, as the projection sees it.
  static __device__ void move_projected(const BottleneckParams& p, const Shared& at, Barriers& barriers) {
    uint32_t phase = 1;
    await_previous();
    for (int i = blockIdx.x; i < p.strips; i += gridDim.x) {
      const Strip strip(p, i);
      for (int row = 0; row < strip.last(); ++row) {
        const int group = row % 2;
        Barrier::wait(&barriers.projected[group], phase);
        BytesBarrier::arrive_and_expect_tx(&barriers.there[group], p.W * kRow);
        cute::SM90_TMA_LOAD_4D::copy(&p.x, &barriers.there[group], kOnce, pointer(at.x_of(group)), 0, 0,
                                     strip.first + row, strip.n);
        phase ^= group;
      }
    }
  }

  // Which strip the next residual, or the next result, is of.
  struct Place {
    int strip, step = 0;
    template <class Use>
    __device__ void next(const BottleneckParams& p, int group, Use use) {
      const Strip of(p, strip);
      use(step % kParts * kSlice, of.first + step / kParts * 2 + group, of.n);
      if (++step == of.pairs * kParts) step = 0, strip += gridDim.x;
    }
  };

  static __device__ void move_results(const BottleneckParams& p, const Shared& at, Barriers& barriers, int group) {
    Place loads{static_cast<int>(blockIdx.x)}, stores{static_cast<int>(blockIdx.x)};
    int steps = 0;
    for (int i = blockIdx.x; i < p.strips; i += gridDim.x) steps += Strip(p, i).pairs * kParts;
    const uint32_t buffers = at.of(group);
    auto load = [&](int, int buffer, uint64_t* loaded) {
      if constexpr (kProjection)
        Barrier::arrive(loaded);
      else
        loads.next(p, group, [&](int k, int h, int n) {
          BytesBarrier::arrive_and_expect_tx(loaded, p.W * kRow);
          cute::SM90_TMA_LOAD_4D::copy(&p.x, loaded, kOnce, pointer(buffers + buffer * kBottleneckItem), k, 0, h, n);
        });
    };
    auto store = [&](int, int buffer) {
      stores.next(p, group, [&](int k, int h, int n) {
        cute::SM90_TMA_STORE_4D::copy(&p.y, pointer(buffers + buffer * kBottleneckItem), k, 0, h, n);
      });
    };
    await_previous();
    move_steps(steps, barriers.steps[group], load, store);
  }

  static __device__ void release(uint64_t& barrier) {
    if (threadIdx.x % kWarpGroup == 0) Barrier::arrive(&barrier);
  }

  // A warp group's, over all strips.
  struct Consumer {
    const BottleneckParams& p;
    const Shared& at;
    Barriers& barriers;
    const int group;
    Steps<kBuffers, kBottleneckItem> steps;
    Ring<kSlots> item;
    int begun = 0;
    uint32_t phase = 0;  // of what the projection sees

    __device__ Consumer(const BottleneckParams& p, const Shared& at, Barriers& barriers, int group)
        : p(p), at(at), barriers(barriers), group(group), steps(barriers.steps[group], at.of(group)) {}

    // Row of a. The row before is the other warp group's, and so are its items, which come first: with neither brought nor
    // multiplied a slot's phase could be taken for that of two rounds before.
    __device__ void make(const Strip& strip, int row) {
      const RowOfA to(begun, row);
      if (row >= 0) {
        const RowOfA before(begun, row - 1);
        Barrier::wait(&barriers.made[before.slot], before.phase);
      }
      const uint32_t place0 = at.a + swizzled(to.slot * (p.W + 2) + 1 + first_row(), 0) + threadIdx.x % 4 * 4;
      uint32_t narrow[2][8]{};
      if (strip.in_map(p, row)) {
        float d[32];
        const Shift shift(p.shift1);
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
          Barrier::wait(&barriers.brought[item.slot], item.phase);
          const uint64_t x = swizzled_matrix(at.slots + item.slot * kBottleneckItem);
          const uint64_t w1 = swizzled_matrix(at.w1 + slice * kTapBytes);
          keep(d);
          begin_products();
#pragma unroll
          for (int k = 0; k < 4; ++k)
            multiply<T, 64>(d, x + k * kNextProduct, w1 + k * kNextProduct, slice > 0 || k > 0);
          end_products();
          await_products<0>();
          keep(d);
          release(barriers.multiplied[item.slot]);
          item.advance();
        }
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int i = 0; i < 8; ++i) narrow[half][i] = Pair<T>::narrow(relu(shifted(d, i, half, shift.of[i])));
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (first_row() + 8 * half < p.W)
#pragma unroll
          for (int i = 0; i < 8; ++i) store_shared(place(place0, i, half), narrow[half][i]);
      cutlass::arch::fence_view_async_shared();
      Barrier::arrive(&barriers.made[to.slot]);
    }

    // The items of a row that the other warp group makes, if there is one.
    __device__ void pass_over(const Strip& strip, int row) {
      if (row <= strip.last() && strip.in_map(p, row)) item.advance(kSlices);
    }

    // Output row, of the strip.
    __device__ void convolve(int row) {
      float d[32];
      const Shift inner(p.shift);
      uint32_t of_row[3];
#pragma unroll
      for (int r = 0; r < 3; ++r) {
        const RowOfA from(begun, row + r - 1);
        Barrier::wait(&barriers.made[from.slot], from.phase);
        of_row[r] = at.a + from.slot * (p.W + 2) * kRow;
      }
      keep(d);
      begin_products();
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const uint64_t a = swizzled_matrix(of_row[tap / 3] + tap % 3 * kRow);
        const uint64_t b = swizzled_matrix(at.w + tap * kTapBytes);
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply<T, 64>(d, a + k * kNextProduct, b + k * kNextProduct, tap > 0 || k > 0);
      }
      end_products();
      await_products<0>();
      keep(d);
      uint32_t h[4][4];
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) hand_over<T>(h, i, half, relu(shifted(d, i, half, inner.of[i])));
      if constexpr (kProjection) Barrier::wait(&barriers.there[group], phase);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint64_t b = swizzled_matrix(at.w3 + part * kTapBytes);
        keep(d);
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; ++k) multiply<T, 64>(d, h[k], b + k * kNextProduct, k > 0);
        if constexpr (kProjection) {
          const uint64_t x = swizzled_matrix(at.x_of(group)), wp = swizzled_matrix(at.wp + part * kTapBytes);
#pragma unroll
          for (int k = 0; k < 4; ++k) multiply<T, 64>(d, x + k * kNextProduct, wp + k * kNextProduct, true);
        }
        end_products();
        await_products<0>();
        keep(d);
        if constexpr (kProjection) {
          if (part == kParts - 1) release(barriers.projected[group]), phase ^= 1;
          finish_last<T, 64>(d, p.shift3 + part * kSlice, p.W, steps);
        } else {
          uint32_t y[4][4];
          finish_part<T>(d, Shift(p.shift3 + part * kSlice), steps.buffer(), p.W, y);
          steps.next();
        }
      }
    }

    __device__ void run() {
      Barrier::wait(&barriers.weights, 0);
#pragma unroll 1
      for (int i = blockIdx.x; i < p.strips; i += gridDim.x) {
        const Strip strip(p, i);
        const int last = strip.last();
        // Of a: 0, 2, ... or -1, 1, ...
        int next = -group;
        if (group == 0) pass_over(strip, -1);
#pragma unroll 1
        for (int row = group; row < last; row += 2) {
          // One, but for the strip's first.
#pragma unroll 1
          for (; next <= last && next <= row + 2; next += 2) {
            make(strip, next);
            pass_over(strip, next + 1);
          }
          convolve(row);
        }
        begun += last + 2;
      }
    }
  };

  static __device__ void run(const BottleneckParams& p) {
    extern __shared__ uint8_t memory[];
    const uint32_t base = cute::cast_smem_ptr_to_uint(memory);
    const Shared at((base + 1023) / 1024 * 1024);
    Barriers& barriers = *reinterpret_cast<Barriers*>(memory + (at.end() - base));
    if (threadIdx.x == 0) {
      Barrier::init(&barriers.weights, 1);
      for (int i = 0; i < kSlots; ++i) {
        Barrier::init(&barriers.brought[i], 1);
        Barrier::init(&barriers.multiplied[i], 1);
      }
      for (uint64_t& made : barriers.made) Barrier::init(&made, kWarpGroup);
      for (int group = 0; group < 2; ++group) {
        Barrier::init(&barriers.there[group], 1);
        Barrier::init(&barriers.projected[group], 1);
        barriers.steps[group].init();
      }
      cutlass::arch::fence_barrier_init();
    }
    // Left and right of the map, for good.
    for (uint32_t i = threadIdx.x; i < kBottleneckA / 4; i += kBottleneckThreads) store_shared(at.a + 4 * i, 0u);
    cutlass::arch::fence_view_async_shared();
    __syncthreads();
    let_next_begin();
    if (threadIdx.x < kWarpGroup) {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      const int warp = threadIdx.x / 32;
      if (threadIdx.x % 32 == 0) {
        if (warp == 0) move_operands(p, at, barriers);
        if (kProjection && warp == 1) move_projected(p, at, barriers);
        if (warp >= 2) move_results(p, at, barriers, warp - 2);
      }
    } else {
      cutlass::arch::warpgroup_reg_alloc<232>();
      Consumer(p, at, barriers, threadIdx.x / kWarpGroup - 1).run();
    }
  }
};

template <class T, bool kProjection>
__global__ void __launch_bounds__(kBottleneckThreads, 1) bottleneck_kernel(const __grid_constant__ BottleneckParams p) {
  WholeBottleneck<T, kProjection>::run(p);
}

}  // namespace resnet_kernels::sm90
