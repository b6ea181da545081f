// A kernel launch from the host. tests/emulation/cuda/launch.h replaces this file when the kernels run on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <string>

namespace resnet_kernels {

// Launch the kernel `name`. Returns null, or the error message, valid until the thread's next call.
template <class... Parameters, class... Arguments>
const char* launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   void* stream, const Arguments&... arguments) {
  auto error = cudaSuccess;
  // More than 48 KB of dynamic shared memory is opt-in.
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
