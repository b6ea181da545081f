// From the host to a grid. tests/emulation/cuda/launch.h stands in its place where there is no GPU.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace resnet_kernels {

// Null, or what is wrong with the launch of the kernel `name`.
template <class... Parameters, class... Arguments>
const char* launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   void* stream, const Arguments&... arguments) {
  auto error = cudaSuccess;
  // Beyond 48 KB a kernel has to ask.
  if (shared_bytes > 48 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (blocks > 0x7fffffff) error = cudaErrorInvalidConfiguration;
  if (error == cudaSuccess && blocks > 0) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return nullptr;
  static thread_local std::string message;
  message = std::string(name) + ": " + cudaGetErrorString(error) + " at " + std::to_string(blocks) + " blocks of " +
            std::to_string(threads) + " threads with " + std::to_string(shared_bytes) + " bytes of shared memory";
  return message.c_str();
}

}  // namespace resnet_kernels
