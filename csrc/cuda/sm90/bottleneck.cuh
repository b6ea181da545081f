// A whole bottleneck of 64 inner channels, for sm_90a:
//
//   a = relu(x w1^T + shift1), rounded                  256 channels to 64, or with a projection 64 to 64
//   h = relu(conv3x3(a, w) + shift), rounded            64 channels, only ever in registers
//   y = relu(h w3^T + shift3 + x), rounded              256 channels; with a projection x wp^T instead of x
//
// A persistent kernel, one CTA per multiprocessor, with all weights (136 or 144 KB) resident in shared memory. A unit
// of work is a strip of an image's rows. The CTA walks down it two output rows at a time: row 2n belongs to the first
// of two consumer warp groups, row 2n + 1 to the second.
//
// Rows of a are in a ring of five, W + 2 columns each, whose first and last columns stay zero; the nine taps are nine
// descriptors, as in tail.cuh. Each row of a is made once, in order: row 2n + 2 by the first warp group before it
// convolves row 2n, row 2n + 3 by the second before row 2n + 1. So the second needs what the first makes in the same
// round, and the first what the second made in the round before: they run half a round apart, and one multiplies while
// the other stores. Rows outside the map are zeros.
//
// Why five rows need no `empty` barriers: row r of a overwrites row r - 5, which output rows r - 6 to r - 4 read. The
// warp group that makes row r has itself convolved output rows r - 6 and r - 4. It has also waited for row r - 1 of a,
// whose maker had by then convolved output row r - 5.
//
// Warp-specialized, three warp groups:
//
//   producer, warp 0
//       The weights once; then x through a ring of items (64 channels of a row; barriers brought, multiplied), in the
//       order in which rows of a are made.
//   producer, warp 1
//       With a projection: x again, from L2, two rows later, into a buffer per consumer warp group (there, projected).
//   producer, warps 2-3
//       One per consumer warp group: with the identity, x again, from L2, as the residual, into the results buffers
//       where y replaces it (handover.cuh); and y out of them.
//   consumers
//       Two warp groups as above. Barriers made guard the rows of a.
//
// Memory traffic: x and y once, and x once more from L2; with several strips per image, two more rows of x per strip;
// the weights once per multiprocessor.
#pragma once

#include "cuda/sm90/bottleneck.h"
#include "cuda/sm90/handover.cuh"

namespace resnet_kernels::sm90 {

template <class T, bool kProjection>
struct WholeBottleneck {
  static constexpr BottleneckShape kShape{kProjection};
  static constexpr int kSlices = kShape.slices(), kParts = kBottleneckK / kSlice;  // slices of x; slices of y
  static constexpr int kSlots = kShape.slots(), kBuffers = kShape.buffers();
  static constexpr int kTapBytes = 64 * kRow;

  struct Barriers {
    uint64_t weights;                              // the weights have landed
    uint64_t brought[kSlots], multiplied[kSlots];  // of x's ring: landed; read
    uint64_t made[kRowsOfA];                       // of each slot of the ring of a: made, by all 128 threads
    uint64_t there[2], projected[2];               // of x for a warp group's projection: landed; read
    StepBarriers<kBuffers> steps[2];               // of each consumer warp group
  };
  static_assert(sizeof(Barriers) <= 256);

  // Addresses in shared memory.
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
    // A wgmma reads 64 rows and a buffer has W: the rest lies in whatever follows. Neither is last in shared memory, so
    // that this is always inside it.
    __device__ uint32_t x_of(int group) const { return projected + group * kBottleneckItem; }
    __device__ uint32_t of(int group) const { return buffers + group * kBuffers * kBottleneckItem; }
    __device__ uint32_t end() const { return of(2); }
  };

  struct Strip {
    int n, first, pairs;  // image, first output row, number of row pairs
    __device__ Strip(const BottleneckParams& p, int strip)
        : n(strip / p.strips_of_image),
          first(strip % p.strips_of_image * p.rows),
          pairs(((p.H - first < p.rows ? p.H - first : p.rows) + 1) / 2) {}
    // The last row of a that the strip needs; the first is -1.
    __device__ int last() const { return 2 * pairs; }
    __device__ bool in_map(const BottleneckParams& p, int row) const { return first + row >= 0 && first + row < p.H; }
  };

  // The operands' producer: the weights, then x for the rows of a.
  static __device__ void move_operands(const BottleneckParams& p, const Shared& at, Barriers& barriers) {
    await_previous();  // the preceding kernel may have written the weights
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

  // The projection's producer: x of each output row.
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

  // An iterator over the steps (output row, slice of y) of a warp group, for its residuals or its results.
  struct Place {
    int strip, step = 0;
    template <class Use>
    __device__ void next(const BottleneckParams& p, int group, Use use) {
      const Strip of(p, strip);
      use(step % kParts * kSlice, of.first + step / kParts * 2 + group, of.n);
      if (++step == of.pairs * kParts) step = 0, strip += gridDim.x;
    }
  };

  // A results producer: x as residual in (identity only), y out.
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

  // A consumer warp group and its pipeline states, over all strips.
  struct Consumer {
    const BottleneckParams& p;
    const Shared& at;
    Barriers& barriers;
    const int group;
    Steps<kBuffers, kBottleneckItem> steps;
    Ring<kSlots> item;
    // Rows of a made before this strip.
    int begun = 0;
    uint32_t phase = 0;  // of `there`

    __device__ Consumer(const BottleneckParams& p, const Shared& at, Barriers& barriers, int group)
        : p(p), at(at), barriers(barriers), group(group), steps(barriers.steps[group], at.of(group)) {}

    // Make one row of a. First wait for the row before, which the other warp group makes from the items before these:
    // while those were neither brought nor multiplied, a slot's phase could be taken for that of two rounds before.
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

    // Skip the items of a row that the other warp group makes, if there is such a row.
    __device__ void pass_over(const Strip& strip, int row) {
      if (row <= strip.last() && strip.in_map(p, row)) item.advance(kSlices);
    }

    // One output row of the strip: the 3x3 from three rows of a, then y, 64 channels at a time.
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
        // The next row of a to make: 0, 2, ... by the first warp group, -1, 1, ... by the second.
        int next = -group;
        if (group == 0) pass_over(strip, -1);
#pragma unroll 1
        for (int row = group; row < last; row += 2) {
          // One row per round; two in the strip's first round.
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
    // Zero the ring of a: the columns left and right of the map stay zero.
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
