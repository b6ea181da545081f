// max_pool3x3/2(relu(conv7x7/2(x) + shift)) of an image with 4 channels in memory (the last zero in x or in w), for
// sm_90a. The convolution's map, four times the result, never exists.
//
// wgmma makes im2col for nothing. Without swizzle a tile is made of bricks of 8 rows of 16 bytes, one after the other. A
// pixel has 8 bytes and the convolution's stride is 2, so that next to each other in an input row, 16 bytes apart, lie
// what successive output columns see: 8 output columns by 2 pixels are a brick, the next 2 pixels a brick that begins
// 16 bytes later. So a row of the filter (a zero weight and 7 pixels) is two products, whose operand is the input row as
// it is in memory, from 4 pixels left of the image: a brick begins at a multiple of 16 bytes.
//
// D (64 channels x 112 columns) = w x: weights in registers, the whole time. A warp group goes down a strip of an image,
// two convolution rows for each pooled row, whose maximum with the row before it is in registers; columns meet by one
// shuffle. One warp per warp group brings input rows, two at a time, each once per strip.
//
// Moves: x once (and 7 rows twice per strip, from L2), y once.
#pragma once

#include "cuda/sm90/hopper.cuh"
#include "cuda/sm90/stem.h"

namespace resnet_kernels::sm90 {

// NaN wins.
__device__ inline float max_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}

template <class T>
struct Stem {
  static constexpr int kValues = kStemColumns / 2;  // of D that a thread holds
  static constexpr int kProducts = 14;              // 7 rows of the filter, 8 pixels of 4 channels, by 16

  struct Barriers {
    uint64_t full[2][kStemStages], empty[2][kStemStages];
  };
  static_assert(sizeof(Barriers) <= 256);

  struct Strip {
    int n, first, rows;  // image, pooled rows
    __device__ Strip(const StemParams& p, int index) : n(index / p.strips), first(index % p.strips * kStemRows) {
      rows = min(kStemRows, p.PP - first);
    }
    // Convolution rows 2 * first - 1 and on: one more than two for each pooled row.
    __device__ int steps() const { return 2 * rows + 1; }
  };

  static __device__ int first_strip(int group) { return 2 * blockIdx.x + group; }

  static __device__ void move_rows(const StemParams& p, uint32_t ring, uint64_t* full, uint64_t* empty, int group) {
    Ring<kStemStages> at;
    await_previous();
    for (int index = first_strip(group); index < p.images * p.strips; index += 2 * gridDim.x) {
      const Strip strip(p, index);
      // A convolution row sees 7 input rows, of which the last is in the fourth stage.
      for (int stage = 0; stage < strip.steps() + 3; ++stage) {
        Barrier::wait(&empty[at.slot], at.phase ^ 1);
        BytesBarrier::arrive_and_expect_tx(&full[at.slot], kStemStageBytes);
        const int h = 2 * (2 * strip.first - 1) - 3 + 2 * stage;
        for (int part = 0; part < 4; ++part)
          cute::SM90_TMA_LOAD_3D::copy(&p.x, &full[at.slot],
                                       static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
                                       __cvta_shared_to_generic(ring + at.slot * kStemStageBytes + part * kStemCopyBytes),
                                       -2 * 4 + part % 2 * (kStemCopyBytes / 4), h + part / 2, strip.n);
        at.advance();
      }
    }
  }

  // Bricks 16 bytes apart along the pixels, 128 along the columns.
  static __device__ uint64_t columns(uint32_t address) {
    return uint64_t{128 / 16} << 32 | uint64_t{1} << 16 | (address & 0x3FFFF) >> 4;
  }

  // The convolution's row whose first input rows are in the stage `at`.
  static __device__ void convolve(float (&d)[kValues], const uint32_t (&w)[kProducts][4], uint32_t ring,
                                  const Ring<kStemStages>& at) {
    keep(d);
    begin_products();
#pragma unroll
    for (int r = 0; r < 7; ++r) {
      const int slot = (at.slot + r / 2) % kStemStages;
      const uint64_t b = columns(ring + slot * kStemStageBytes + r % 2 * kStemRowBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        multiply<T, kStemColumns>(d, w[2 * r + half], b + half * kNextProduct, r > 0 || half > 0);
    }
    end_products();
    await_products<0>();
    keep(d);
  }

  // Into the buffer, (PQ, 64) swizzled: the maximum of rows m and d, and of columns 2q - 1 to 2q + 1; shift, ReLU.
  static __device__ void pool(const float (&m)[kValues], const float (&d)[kValues], bool below, const StemParams& p,
                              const float (&shift)[2], uint32_t buffer) {
    const int t = threadIdx.x % kWarpGroup, lane = t % 32, q4 = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float before = -INFINITY;  // column 8 * i - 1, in the last lane of four
#pragma unroll
      for (int i = 0; i < kStemColumns / 8; ++i) {
        float v[2];
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int j = 4 * i + 2 * half + odd;
          v[odd] = below ? max_nan(m[j], d[j]) : m[j];
          if (8 * i + 2 * q4 + odd >= p.Q) v[odd] = -INFINITY;
        }
        const float left = __shfl_sync(~0u, q4 == 3 ? before : v[1], (lane & ~3) | ((lane + 3) & 3));
        before = v[1];
        const float y = relu(max_nan(max_nan(v[0], v[1]), left) + shift[half]);
        const int q = 4 * i + q4, k = 16 * (t / 32) + lane / 4 + 8 * half;
        const uint32_t address = buffer + q * kRow + ((k / 8 ^ q % 8) * 16) + k % 8 * 2;
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(Pair<T>::narrow(y)) : "memory");
      }
    }
  }

  static __device__ void consume(const StemParams& p, uint32_t ring, uint32_t buffer, uint64_t* full, uint64_t* empty,
                                 int group) {
    const int t = threadIdx.x % kWarpGroup, lane = t % 32, k = 16 * (t / 32) + lane / 4;
    uint32_t w[kProducts][4];
#pragma unroll
    for (int i = 0; i < kProducts; ++i)
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const int row = k + part % 2 * 8, column = 16 * i + part / 2 * 8 + 2 * (lane % 4);
        const T* const taps = static_cast<const T*>(p.w) + row * 224 + column - 4;
        w[i][part] = column % 32 < 4 ? 0 : __ldg(reinterpret_cast<const uint32_t*>(taps));
      }
    const float shift[2] = {p.shift[k], p.shift[k + 8]};
    Ring<kStemStages> at;
    auto release = [&] {
      if (t == 0) Barrier::arrive(&empty[at.slot]);
      at.advance();
    };
    for (int index = first_strip(group); index < p.images * p.strips; index += 2 * gridDim.x) {
      const Strip strip(p, index);
      float m[kValues], d[kValues];
      auto row = [&](float(&to)[kValues], int stages) {
        for (int stage = 0; stage < stages; ++stage) {
          auto ahead = at;
          ahead.advance(4 - stages + stage);
          Barrier::wait(&full[ahead.slot], ahead.phase);
        }
        convolve(to, w, ring, at);
        release();
      };
      row(m, 4);
      if (strip.first == 0)
#pragma unroll
        for (float& v : m) v = -INFINITY;
#pragma unroll 1
      for (int i = 0; i < strip.rows; ++i) {
        row(d, 1);
#pragma unroll
        for (int j = 0; j < kValues; ++j) m[j] = max_nan(m[j], d[j]);
        row(d, 1);
        const int pooled = strip.first + i;
        // The buffer is free when what it held has been read.
        if (t == 0) cute::tma_store_wait<0>();
        cutlass::arch::NamedBarrier::arrive_and_wait(kWarpGroup, group);
        pool(m, d, 2 * pooled + 1 < p.P, p, shift, buffer);
        cutlass::arch::fence_view_async_shared();
        cutlass::arch::NamedBarrier::arrive_and_wait(kWarpGroup, group);
        if (t == 0) {
          cute::SM90_TMA_STORE_3D::copy(&p.y, __cvta_shared_to_generic(buffer), 0, 0, strip.n * p.PP + pooled);
          cute::tma_store_arrive();
        }
#pragma unroll
        for (int j = 0; j < kValues; ++j) m[j] = d[j];
      }
      for (int stage = 0; stage < 3; ++stage) release();
    }
    if (t == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }

  static __device__ void run(const StemParams& p) {
    extern __shared__ uint8_t memory[];
    const uint32_t base = cute::cast_smem_ptr_to_uint(memory), buffers = (base + 1023) / 1024 * 1024;
    const uint32_t rings = buffers + 2 * kStemBufferBytes;
    Barriers& barriers = *reinterpret_cast<Barriers*>(memory + (rings + 2 * kStemStages * kStemStageBytes - base));
    if (threadIdx.x == 0) {
      for (int group = 0; group < 2; ++group)
        for (int i = 0; i < kStemStages; ++i) {
          Barrier::init(&barriers.full[group][i], 1);
          Barrier::init(&barriers.empty[group][i], 1);
        }
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    let_next_begin();
    if (threadIdx.x < kWarpGroup) {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      const int warp = threadIdx.x / 32;
      if (threadIdx.x % 32 == 0 && warp < 2)
        move_rows(p, rings + warp * kStemStages * kStemStageBytes, barriers.full[warp], barriers.empty[warp], warp);
    } else {
      cutlass::arch::warpgroup_reg_alloc<232>();
      const int group = threadIdx.x / kWarpGroup - 1;
      consume(p, rings + group * kStemStages * kStemStageBytes, buffers + group * kStemBufferBytes,
              barriers.full[group], barriers.empty[group], group);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kStemThreads, 1) stem_kernel(const __grid_constant__ StemParams p) {
  Stem<T>::run(p);
}

}  // namespace resnet_kernels::sm90
