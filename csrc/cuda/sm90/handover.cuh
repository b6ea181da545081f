// Fusing consecutive products (tail, wide tail, pair, bottleneck): accumulators that become the next product's A
// operand in registers, and the per-warp-group ring of results buffers in shared memory, through which residuals come
// in and results go out.
//
// A step of this ring is one slice of 64 channels of up to 64 positions. The producer is one warp per consumer warp
// group (move_steps): it loads the residual into the buffer by TMA, or hands over an empty buffer, and later stores the
// result from the same buffer. The consumer (Steps, finish_part, finish_last) adds the residual and writes the result
// in its place.
#pragma once

#include "cuda/sm90/hopper.cuh"

namespace resnet_kernels::sm90 {

// Pack one pair of a 64 x 64 result into the A fragment of a product whose K extent is these 64 channels. i: which
// eight channels, half: which of the thread's two rows. wgmma's accumulator and register-operand layouts agree, so no
// shuffle is needed.
template <class T>
__device__ inline void hand_over(uint32_t (&a)[4][4], int i, int half, float2 v) {
  a[i / 2][i % 2 * 2 + half] = Pair<T>::narrow(v);
}

// The thread's first of two accumulator rows of 64; the other is 8 rows further.
__device__ inline int first_row() { return accumulator_row(threadIdx.x % kWarpGroup, 0); }

// Shared memory addresses of the thread's values in a swizzled buffer with rows of 64 channels: first_row_at gives that
// of its first row, place that of channel group i (eight channels) and row `half`, from it.
__device__ inline uint32_t first_row_at(uint32_t buffer) {
  return buffer + swizzled(first_row(), 0) + threadIdx.x % 4 * 4;
}
__device__ inline uint32_t place(uint32_t row, int i, int half) { return (row ^ i * 16) + half * 8 * kRow; }

// The thread's two entries, in channel group i, of a per-channel vector.
__device__ inline float2 channels(const float* v, int i) {
  return __ldg(reinterpret_cast<const float2*>(v + 8 * i + accumulator_column(threadIdx.x)));
}

// The thread's two accumulators of channel group i and row `half`, plus shift.
__device__ inline float2 shifted(const float (&d)[32], int i, int half, float2 shift) {
  return {d[4 * i + 2 * half] + shift.x, d[4 * i + 2 * half + 1] + shift.y};
}

// Mbarriers of the results ring: step n of a warp group, counted over all its tiles, uses buffer n % kBuffers.
// - loaded: the buffer holds the residual, or is free for a result without one. One arrival, by the producer (with the
// TMA's bytes).
// - ready: the buffer holds the result. One arrival by each of the warp group's 128 threads.
//
// Several buffers, because a residual's latency exceeds the computation of one step.
template <int kBuffers>
struct StepBarriers {
  uint64_t loaded[kBuffers], ready[kBuffers];
  __device__ void init() {
    for (int i = 0; i < kBuffers; ++i) {
      Barrier::init(&loaded[i], 1);
      Barrier::init(&ready[i], kWarpGroup);
    }
  }
};

// The producer's loop, run by one thread. load(step, buffer, barrier) starts the residual's load or arrives at once;
// store(step, buffer) issues the TMA store; buffer: the index in the ring.
template <int kBuffers, class Load, class Store>
__device__ void move_steps(int steps, StepBarriers<kBuffers>& barriers, Load load, Store store) {
  for (int step = 0; step < kBuffers && step < steps; ++step) load(step, step, &barriers.loaded[step]);
  Ring<kBuffers> at;
  for (int step = 0; step < steps; ++step) {
    Barrier::wait(&barriers.ready[at.slot], at.phase);
    store(step, at.slot);
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();  // the store has read the buffer, which may be refilled
    if (step + kBuffers < steps) load(step + kBuffers, at.slot, &barriers.loaded[at.slot]);
    at.advance();
  }
  await_stores();  // all stores have been written to global memory
}

// The consumer warp group's side of the results ring.
template <int kBuffers, int kBytes>
class Steps {
 public:
  __device__ Steps(StepBarriers<kBuffers>& barriers, uint32_t buffers) : barriers_(barriers), buffers_(buffers) {}
  // Wait for the step's buffer and return its address: the residual is there and the result may be written.
  __device__ uint32_t buffer() const {
    Barrier::wait(&barriers_.loaded[at_.slot], at_.phase);
    return buffers_ + at_.slot * kBytes;
  }
  // The result has been written: pass the buffer to the producer. The fence makes the writes visible to TMA.
  __device__ void next() {
    cutlass::arch::fence_view_async_shared();
    Barrier::arrive(&barriers_.ready[at_.slot]);
    at_.advance();
  }

 private:
  StepBarriers<kBuffers>& barriers_;
  uint32_t buffers_;
  Ring<kBuffers> at_;
};

// The thread's 16 entries of a per-channel vector over 64 channels, in registers.
struct Shift {
  float2 of[8];
  __device__ explicit Shift(const float* v) {
#pragma unroll
    for (int i = 0; i < 8; ++i) of[i] = channels(v, i);
  }
};

// The epilogue of one step with a residual: relu(d + shift + residual), rounded, replaces the residual in the buffer
// and is packed into y, the next product's A operand. Rows from `rows` on are computed but neither read from nor
// written to the buffer.
template <class T>
__device__ inline void finish_part(const float (&d)[32], const Shift& shift, uint32_t buffer, int rows,
                                   uint32_t (&y)[4][4]) {
  const uint32_t at = first_row_at(buffer);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool kept = first_row() + 8 * half < rows;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float2 v = shifted(d, i, half, shift.of[i]);
      if (kept) {
        const float2 r = Pair<T>::widen(load_shared(place(at, i, half)));
        v.x += r.x, v.y += r.y;
      }
      hand_over<T>(y, i, half, relu(v));
    }
    if (kept)
#pragma unroll
      for (int i = 0; i < 8; ++i) store_shared(place(at, i, half), y[i / 2][i % 2 * 2 + half]);
  }
}

// The epilogue of a product without a residual: relu(d + shift) of 64 x kColumns accumulators, one step per 64
// channels.
template <class T, int kColumns, class AnySteps>
__device__ inline void finish_last(const float (&d)[kColumns / 2], const float* shift, int rows, AnySteps& steps) {
#pragma unroll
  for (int part = 0; part < kColumns / kSlice; ++part) {
    const Shift s(shift + part * kSlice);
    const uint32_t at = first_row_at(steps.buffer());
    const float (&d1)[32] = reinterpret_cast<const float (&)[32]>(d[32 * part]);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (first_row() + 8 * half < rows)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          store_shared(place(at, i, half), Pair<T>::narrow(relu(shifted(d1, i, half, s.of[i]))));
    steps.next();
  }
}

}  // namespace resnet_kernels::sm90
