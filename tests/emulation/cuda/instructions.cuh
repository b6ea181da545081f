// In place of csrc/cuda/instructions.cuh: what the instructions do, as the PTX ISA tells it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "threads.h"

namespace emulation {

// What a block takes without a size: what a multiprocessor of sm_80 has for one.
alignas(128) inline char shared[163 << 10];

}  // namespace emulation

namespace resnet_kernels {

inline float relu(float v) { return v <= 0 ? 0.f : v; }

}  // namespace resnet_kernels
