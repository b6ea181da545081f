// The stem for sm_90a: max_pool3x3/2(relu(conv7x7/2(x) + shift)) of an image with 4 channels in memory (the last one
// zero in x or in w). The convolution's map, four times the result, is never materialized.
//
// im2col costs nothing here. wgmma's layout without swizzle is made of core matrices of 8 rows by 16 bytes. A pixel has
// 8 bytes and the convolution's stride is 2, so what successive output columns see is 16 bytes apart in an input row: 8
// output columns by 2 pixels form a core matrix, and the next 2 pixels one that begins 16 bytes later. So a filter row
// (a zero weight and 7 pixels) is two wgmmas whose B operand is the input row as it lies in memory, from 4 pixels left
// of the image: a core matrix begins at a multiple of 16 bytes. (NaN times the zero weight is NaN: a NaN in the image
// can reach one pooled column further than it should.)
//
// D (64 channels x 112 columns) = w x, both operands from shared memory. Warp-specialized, four warp groups (512
// threads): one of producers, three of consumers. Each consumer warp group owns a contiguous share of the pooled rows
// of all images and walks down it, two convolution rows per pooled row; one multiplies while the others pool. Rows are
// pooled in registers, as packed pairs of columns; columns take one shuffle. One producer thread per consumer warp
// group loads input rows, two per stage, into that group's ring of kStemStages stages (barriers full, empty); each row
// is loaded once except where a share begins.
//
// Memory traffic: x once (and 7 rows twice per warp group, from L2), y once.
#pragma once

#include "cuda/sm90/hopper.cuh"
#include "cuda/sm90/stem.h"

namespace resnet_kernels::sm90 {

template <class T>
struct Stem {
  static constexpr int kValues = kStemColumns / 2;  // accumulators of a thread
  static constexpr int kPairs = kValues / 2;

  struct Barriers {
    uint64_t full[kStemGroups][kStemStages], empty[kStemGroups][kStemStages];
  };
  static_assert(sizeof(Barriers) <= kStemBarrierBytes);

  // Consecutive pooled rows of one image that a consumer warp group walks down.
  struct Strip {
    int n, first, rows;
    // Convolution rows of the strip, from 2 * first - 1 on: two for each pooled row, and one more.
    __device__ int steps() const { return 2 * rows + 1; }
  };

  // Call use(strip) for each strip of this warp group's share of all pooled rows.
  template <class Use>
  static __device__ void for_each_strip(const StemParams& p, int group, Use use) {
    const int64_t rows = int64_t{p.images} * p.PP, part = blockIdx.x * kStemGroups + group;
    const int64_t parts = int64_t{gridDim.x} * kStemGroups, end = rows * (part + 1) / parts;
    for (int64_t row = rows * part / parts; row < end;) {
      const int first = static_cast<int>(row % p.PP);
      const int64_t left = end - row;
      const Strip strip{static_cast<int>(row / p.PP), first,
                        static_cast<int>(left < p.PP - first ? left : p.PP - first)};
      use(strip);
      row += strip.rows;
    }
  }

  // The producer of one consumer warp group: loads input rows, two per stage, by one thread.
  static __device__ void move_rows(const StemParams& p, uint32_t ring, uint64_t* full, uint64_t* empty, int group) {
    Ring<kStemStages> at;
    await_previous();
    for_each_strip(p, group, [&](const Strip& strip) {
      // A convolution row reads 7 input rows: three stages and the first row of the fourth.
      for (int stage = 0; stage < strip.steps() + 3; ++stage) {
        Barrier::wait(&empty[at.slot], at.phase ^ 1);
        BytesBarrier::arrive_and_expect_tx(&full[at.slot], kStemStageBytes);
        const int h = 2 * (2 * strip.first - 1) - 3 + 2 * stage;
        for (int part = 0; part < 4; ++part)
          cute::SM90_TMA_LOAD_3D::copy(&p.x, &full[at.slot], kOnce,
                                       pointer(ring + at.slot * kStemStageBytes + part * kStemCopyBytes),
                                       -2 * 4 + part % 2 * (kStemCopyBytes / 4), h + part / 2, strip.n);
        at.advance();
      }
    });
  }

  // The descriptor of the B operand at an input row: no swizzle, core matrices 16 bytes apart along the K extent
  // (pixels) and 128 bytes apart along the output columns.
  static __device__ uint64_t columns(uint32_t address) {
    return uint64_t{128 / 16} << 32 | uint64_t{1} << 16 | (address & 0x3FFFF) >> 4;
  }

  // Load the weights (64, 7, 8, 4) into shared memory as the K-major A operand: rows of 64 of the 224 values, swizzled.
  // In each filter row a zero pixel comes first, and the eighth pixel of w is dropped.
  static __device__ void bring_weights(const T* w, uint32_t to) {
    for (int i = threadIdx.x - kWarpGroup; i < kStemChannels * 7 * 8; i += kStemGroups * kWarpGroup) {
      const int k = i / 56, pixel = i % 56, value = 4 * pixel;
      uint2 v{0, 0};
      if (pixel % 8) v = __ldg(reinterpret_cast<const uint2*>(w + k * 224 + value - 4));
      const uint32_t row = to + value / 64 * (kStemChannels * kRow) + k * kRow;
      const uint32_t address = row + (value % 64 / 8 ^ k % 8) * 16 + value % 8 * 2;
      store_shared(address, v);
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::arrive_and_wait(kStemGroups * kWarpGroup, kStemGroups);
  }

  // One convolution row: d = w x from the 7 input rows that begin in stage `at`.
  static __device__ __forceinline__ void convolve(float (&d)[kValues], uint32_t w, uint32_t ring,
                                                  const Ring<kStemStages>& at) {
    keep(d);
    begin_products();
#pragma unroll
    for (int r = 0; r < 7; ++r) {
      const int slot = (at.slot + r / 2) % kStemStages;
      const uint64_t b = columns(ring + slot * kStemStageBytes + r % 2 * kStemRowBytes);
      const uint64_t a = swizzled_matrix(w + r / 2 * (kStemChannels * kRow)) + r % 2 * 2 * kNextProduct;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        multiply<T, kStemColumns>(d, a + half * kNextProduct, b + half * kNextProduct, r > 0 || half > 0);
    }
    end_products();
    await_products<0>();
    keep(d);
  }

  // Add shift and round: pairs of columns [2 * i + half of the channel], -inf beyond the map's Q columns.
  static __device__ __forceinline__ void round(uint32_t (&v)[kPairs], const float (&d)[kValues],
                                               const float (&shift)[2], int Q) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      v[j] = Pair<T>::narrow(float2{d[2 * j] + shift[j % 2], d[2 * j + 1] + shift[j % 2]});
    if (Q < kStemColumns)
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const int column = j / 2 * 8 + threadIdx.x % 4 * 2;
        if (column >= Q) v[j] = v[j] & 0xFFFF0000 | Pair<T>::kMinusInfinity;
        if (column + 1 >= Q) v[j] = v[j] & 0xFFFF | Pair<T>::kMinusInfinity << 16;
      }
  }

  // m = max(m, v), NaN first.
  static __device__ __forceinline__ void raise(uint32_t (&m)[kPairs], const uint32_t (&v)[kPairs]) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) m[j] = Pair<T>::max_nan(m[j], v[j]);
  }

  // Pool the columns: the maximum of columns 2q - 1 to 2q + 1, with ReLU, into the results buffer, (PQ, 64) swizzled.
  static __device__ __forceinline__ void pool(const uint32_t (&m)[kPairs], uint32_t buffer) {
    const int t = threadIdx.x % kWarpGroup, lane = t % 32, q4 = lane % 4;
    // Column 8 * i - 1 of both channels, carried from one group of eight columns to the next in the last lane of four.
    uint32_t before = Pair<T>::kMinusInfinity * 0x10001;
#pragma unroll
    for (int i = 0; i < kStemColumns / 8; ++i) {
      const uint32_t even = __byte_perm(m[2 * i], m[2 * i + 1], 0x5410);
      const uint32_t odd = __byte_perm(m[2 * i], m[2 * i + 1], 0x7632);
      const uint32_t left = __shfl_sync(~0u, q4 == 3 ? before : odd, (lane & ~3) | ((lane + 3) & 3));
      before = odd;
      const uint32_t y = Pair<T>::max_nan(Pair<T>::max_nan(even, odd), Pair<T>::max_nan(left, 0));
      const int q = 4 * i + q4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = 16 * (t / 32) + lane / 4 + 8 * half;
        const uint32_t address = buffer + q * kRow + ((k / 8 ^ q % 8) * 16) + k % 8 * 2;
        store_shared(address, static_cast<uint16_t>(y >> 16 * half));
      }
    }
  }

  // A consumer warp group: convolve, pool and store each of its strips.
  static __device__ void consume(const StemParams& p, uint32_t w, uint32_t ring, uint32_t buffer, uint64_t* full,
                                 uint64_t* empty, int group) {
    const int t = threadIdx.x % kWarpGroup, k = 16 * (t / 32) + t % 32 / 4;
    bring_weights(static_cast<const T*>(p.w), w);
    const float shift[2] = {p.shift[k], p.shift[k + 8]};
    Ring<kStemStages> first, last;  // stages of the first and the last input rows of the next convolution row
    last.advance(3);
    auto release = [&] {
      if (t == 0) Barrier::arrive(&empty[first.slot]);
      first.advance();
      last.advance();
    };
    for_each_strip(p, group, [&](const Strip& strip) {
      uint32_t m[kPairs], v[kPairs];
      auto row = [&] {
        float d[kValues];
        Barrier::wait(&full[last.slot], last.phase);
        convolve(d, w, ring, first);
        release();
        round(v, d, shift, p.Q);
      };
      for (auto at = first; at.slot != last.slot; at.advance()) Barrier::wait(&full[at.slot], at.phase);
      row();
#pragma unroll
      for (int j = 0; j < kPairs; ++j) m[j] = strip.first > 0 ? v[j] : Pair<T>::kMinusInfinity * 0x10001;
#pragma unroll 1
      for (int i = 0; i < strip.rows; ++i) {
        const int pooled = strip.first + i;
        row();
        raise(m, v);
        row();
        if (2 * pooled + 1 < p.P) raise(m, v);
        if (t == 0) cute::tma_store_wait<0>();  // the previous store has read the buffer
        cutlass::arch::NamedBarrier::arrive_and_wait(kWarpGroup, group);
        pool(m, buffer);
        cutlass::arch::fence_view_async_shared();
        cutlass::arch::NamedBarrier::arrive_and_wait(kWarpGroup, group);
        if (t == 0) {
          cute::SM90_TMA_STORE_3D::copy(&p.y, pointer(buffer), 0, 0, strip.n * p.PP + pooled);
          cute::tma_store_arrive();
        }
#pragma unroll
        for (int j = 0; j < kPairs; ++j) m[j] = v[j];
      }
      for (int stage = 0; stage < 3; ++stage) release();
    });
    if (t == 0) await_stores();
  }

  static __device__ void run(const StemParams& p) {
    extern __shared__ uint8_t memory[];
    const uint32_t base = cute::cast_smem_ptr_to_uint(memory), buffers = (base + 1023) / 1024 * 1024;
    const uint32_t w = buffers + kStemGroups * kStemBufferBytes, rings = w + kStemWeightBytes;
    Barriers& barriers =
        *reinterpret_cast<Barriers*>(memory + (rings + kStemGroups * kStemStages * kStemStageBytes - base));
    if (threadIdx.x == 0) {
      for (int group = 0; group < kStemGroups; ++group)
        for (int i = 0; i < kStemStages; ++i) {
          Barrier::init(&barriers.full[group][i], 1);
          Barrier::init(&barriers.empty[group][i], 1);
        }
      cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    let_next_begin();
    if (threadIdx.x < kWarpGroup) {
      cutlass::arch::warpgroup_reg_dealloc<32>();
      const int warp = threadIdx.x / 32;
      if (threadIdx.x % 32 == 0 && warp < kStemGroups)
        move_rows(p, rings + warp * kStemStages * kStemStageBytes, barriers.full[warp], barriers.empty[warp], warp);
    } else {
      cutlass::arch::warpgroup_reg_alloc<160>();
      const int group = threadIdx.x / kWarpGroup - 1;
      consume(p, w, rings + group * kStemStages * kStemStageBytes, buffers + group * kStemBufferBytes,
              barriers.full[group], barriers.empty[group], group);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kStemThreads, 1) stem_kernel(const __grid_constant__ StemParams p) {
  Stem<T>::run(p);
}

}  // namespace resnet_kernels::sm90
