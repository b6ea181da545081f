// Launch of a persistent sm_90a kernel, one CTA per multiprocessor. tests/emulation/cuda/sm90/launch.h replaces this
// file when the kernels run on a CPU.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace resnet_kernels::sm90 {

// Launch min(tiles, multiprocessors) CTAs, which take the tiles in turn. bytes: dynamic shared memory. Throws
// std::runtime_error.
template <class Params>
void run(const void* kernel, int64_t tiles, int multiprocessors, int threads, int bytes, Params& params,
         cudaStream_t stream) {
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    throw std::runtime_error("no " + std::to_string(bytes) + " bytes of shared memory: " + cudaGetErrorString(error));
  void* arguments[] = {&params};
  // Programmatic dependent launch: CTAs may start before the preceding kernel of the stream has ended. The kernels call
  // await_previous themselves before they touch its results.
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors))),
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes, config.stream = stream, config.attrs = &early, config.numAttrs = 1;
  if (const auto error = cudaLaunchKernelExC(&config, kernel, arguments))
    throw std::runtime_error(std::string("the launch failed: ") + cudaGetErrorString(error));
}

}  // namespace resnet_kernels::sm90
