// From one product to the next: accumulators that become the next product's operand in registers, and the two buffers per
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
__device__ inline int first_row() {
  const int t = threadIdx.x % kWarpGroup;
  return 16 * (t / 32) + t % 32 / 4;
}

// Where in a buffer of 64 channels a row the thread's channels of eight number i lie.
__device__ inline uint32_t place(uint32_t buffer, int row, int i) {
  return buffer + row * kRow + ((i ^ row % 8) * 16) + threadIdx.x % 4 * 4;
}

// Of a vector over channels: the thread's of eight number i.
__device__ inline float2 channels(const float* v, int i) {
  return __ldg(reinterpret_cast<const float2*>(v + 8 * i + 2 * (threadIdx.x % 4)));
}

__device__ inline float2 shifted(const float (&d)[32], int i, int half, float2 shift) {
  return {d[4 * i + 2 * half] + shift.x, d[4 * i + 2 * half + 1] + shift.y};
}

// Step n of a warp group, over all its tiles, uses buffer n % 2. `loaded`: it holds the residual, or is free; `ready`: it
// holds the result.
struct StepBarriers {
  uint64_t loaded[2], ready[2];
  __device__ void init() {
    for (int i = 0; i < 2; ++i) {
      Barrier::init(&loaded[i], 1);
      Barrier::init(&ready[i], kWarpGroup);
    }
  }
};

// The mover's side. load(step, barrier) brings or gives a buffer, store(step) takes it out.
template <class Load, class Store>
__device__ void move_steps(int steps, StepBarriers& barriers, Load load, Store store) {
  for (int step = 0; step < 2 && step < steps; ++step) load(step, &barriers.loaded[step]);
  for (int step = 0; step < steps; ++step) {
    Barrier::wait(&barriers.ready[step % 2], step / 2 % 2);
    store(step);
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();  // the buffer has been read
    if (step + 2 < steps) load(step + 2, &barriers.loaded[step % 2]);
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");  // and all is written
}

// The multiplying warp group's.
class Steps {
 public:
  __device__ Steps(StepBarriers& barriers, uint32_t buffers, int bytes)
      : barriers_(barriers), buffers_(buffers), bytes_(bytes) {}
  // The step's buffer, when it may be written.
  __device__ uint32_t buffer() const {
    Barrier::wait(&barriers_.loaded[step_ % 2], step_ / 2 % 2);
    return buffers_ + step_ % 2 * bytes_;
  }
  // It has been written.
  __device__ void next() {
    cutlass::arch::fence_view_async_shared();
    Barrier::arrive(&barriers_.ready[step_ % 2]);
    ++step_;
  }

 private:
  StepBarriers& barriers_;
  uint32_t buffers_;
  int bytes_, step_ = 0;
};

// One step: relu(d + shift + what is in the buffer) takes its place there, and becomes the next product's operand. Of
// rows from `rows` on nothing is read or written.
template <class T>
__device__ inline void finish_part(const float (&d)[32], const float* shift, uint32_t buffer, int rows,
                                   uint32_t (&y)[4][4]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 s = channels(shift, i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 v = shifted(d, i, half, s);
      const int row = first_row() + 8 * half;
      const uint32_t address = place(buffer, row, i);
      if (row < rows) {
        const float2 r = Pair<T>::widen(load_shared(address));
        v.x += r.x, v.y += r.y;
      }
      hand_over<T>(y, i, half, relu(v));
      if (row < rows) store_shared(address, y[i / 2][i % 2 * 2 + half]);
    }
  }
}

// Steps: relu(d + shift) of 64 x kColumns accumulators, 64 channels a step.
template <class T, int kColumns>
__device__ inline void finish_last(const float (&d)[kColumns / 2], const float* shift, int rows, Steps& steps) {
#pragma unroll
  for (int part = 0; part < kColumns / kSlice; ++part) {
    const uint32_t buffer = steps.buffer();
    const float(&d1)[32] = reinterpret_cast<const float(&)[32]>(d[32 * part]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 s = channels(shift + part * kSlice, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row() + 8 * half;
        if (row < rows) store_shared(place(buffer, row, i), Pair<T>::narrow(relu(shifted(d1, i, half, s))));
      }
    }
    steps.next();
  }
}

}  // namespace resnet_kernels::sm90
