// What C++ has no word for. tests/emulation/cuda/instructions.cuh computes the same on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace resnet_kernels {

// Keeps NaN, as torch's does; fmaxf would return 0.
__device__ inline float relu(float v) {
  float kept;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(kept) : "f"(v));
  return kept;
}

}  // namespace resnet_kernels
