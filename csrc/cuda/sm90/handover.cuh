// From one product to the next: accumulators that become the next product's operand in registers, and the buffers per
// warp group through which results leave and residuals come.
#pragma once

#include "cuda/sm90/hopper.cuh"

namespace resnet_kernels::sm90 {

// Of 64 x 64 accumulators: the thread's channels of eight number i, that of its rows number `half`, as operand of a
// product that sums over the channels.
template <class T>
__device__ inline void hand_over(uint32_t (&a)[4][4], int i, int half, float2 v) {
  a[i / 2][i % 2 * 2 + half] = Pair<T>::narrow(v);
}

// The thread's first row of 64, the other is 8 further.
__device__ inline int first_row() { return accumulator_row(threadIdx.x % kWarpGroup, 0); }

// Where in a buffer of 64 channels a row the thread's channels of eight number i lie. `row` from `first_row_at`.
__device__ inline uint32_t first_row_at(uint32_t buffer) {
  return buffer + swizzled(first_row(), 0) + threadIdx.x % 4 * 4;
}
__device__ inline uint32_t place(uint32_t row, int i, int half) { return (row ^ i * 16) + half * 8 * kRow; }

// Of a vector over channels: the thread's of eight number i.
__device__ inline float2 channels(const float* v, int i) {
  return __ldg(reinterpret_cast<const float2*>(v + 8 * i + accumulator_column(threadIdx.x)));
}

__device__ inline float2 shifted(const float (&d)[32], int i, int half, float2 shift) {
  return {d[4 * i + 2 * half] + shift.x, d[4 * i + 2 * half + 1] + shift.y};
}

// Step n of a warp group, over all its tiles, uses buffer n % kBuffers. `loaded`: it holds the residual, or is free;
// `ready`: it holds the result. With few buffers the residual's way takes longer than what is computed meanwhile.
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

// The mover's side. load(step, buffer, barrier) brings or gives a buffer, store(step, buffer) takes it out; buffer: its
// number.
template <int kBuffers, class Load, class Store>
__device__ void move_steps(int steps, StepBarriers<kBuffers>& barriers, Load load, Store store) {
  for (int step = 0; step < kBuffers && step < steps; ++step) load(step, step, &barriers.loaded[step]);
  Ring<kBuffers> at;
  for (int step = 0; step < steps; ++step) {
    Barrier::wait(&barriers.ready[at.slot], at.phase);
    store(step, at.slot);
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();  // the buffer has been read
    if (step + kBuffers < steps) load(step + kBuffers, at.slot, &barriers.loaded[at.slot]);
    at.advance();
  }
  await_stores();  // and all is written
}

// The multiplying warp group's.
template <int kBuffers, int kBytes>
class Steps {
 public:
  __device__ Steps(StepBarriers<kBuffers>& barriers, uint32_t buffers) : barriers_(barriers), buffers_(buffers) {}
  // The step's buffer, when it may be written.
  __device__ uint32_t buffer() const {
    Barrier::wait(&barriers_.loaded[at_.slot], at_.phase);
    return buffers_ + at_.slot * kBytes;
  }
  // It has been written.
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

// The thread's of 64 values per channel.
struct Shift {
  float2 of[8];
  __device__ explicit Shift(const float* v) {
#pragma unroll
    for (int i = 0; i < 8; ++i) of[i] = channels(v, i);
  }
};

// One step: relu(d + shift + what is in the buffer) takes its place there, and becomes the next product's operand. Of
// rows from `rows` on nothing is read or written.
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

// Steps: relu(d + shift) of 64 x kColumns accumulators, 64 channels a step.
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
