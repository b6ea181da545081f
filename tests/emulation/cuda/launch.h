// Replaces csrc/cuda/launch.h: the grid runs on fibers, in the caller's thread, before launch returns. Shared memory
// starts as NaN.
#pragma once

#include "cuda/instructions.cuh"

namespace resnet_kernels {

template <class... Parameters, class... Arguments>
const char* launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   void*, const Arguments&... arguments) {
  static thread_local std::string message;
  try {
    if (blocks > 0x7fffffff || threads > 1024)
      throw std::runtime_error("expected at most 2^31 - 1 blocks and 1024 threads a block");
    if (shared_bytes > sizeof(emulation::shared))
      throw std::runtime_error("expected at most " + std::to_string(sizeof(emulation::shared)) +
                               " bytes of shared memory, got " + std::to_string(shared_bytes));
    emulation::reverse_odd_blocks = true;
    for (auto& groups : emulation::copies) groups.clear();
    std::memset(emulation::shared, 0xff, shared_bytes);
    emulation::run_grid(dim3(static_cast<unsigned>(blocks)), dim3(threads), [&] { kernel(arguments...); });
  } catch (const std::exception& error) {
    message = std::string(name) + ": " + error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace resnet_kernels
