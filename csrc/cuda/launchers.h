// What bindings.cpp may launch. Raw pointers and a stream: the .cu files include no torch header, whose compilation
// by nvcc takes over a minute a file.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace resnet_kernels {

enum class Scalar { kFloat, kHalf, kBFloat16 };

// y, x and residual (may be null) are rows x channels of `type`; scale and shift (may be null) are fp32, one per channel.
cudaError_t bn_pass(Scalar type, void* y, const void* x, const float* scale, const float* shift, const void* residual,
                    bool relu, int64_t rows, int64_t channels, cudaStream_t stream);

}  // namespace resnet_kernels
