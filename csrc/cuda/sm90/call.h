// Helpers of the host functions that turn a call of the library into a launch.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

namespace resnet_kernels::sm90 {

// Output size of a convolution or pooling along one axis.
inline int output_size(int size, int kernel, int stride, int padding, int dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// Run `function` and convert an exception to the C interface's error: returns null, or a message that stays valid until
// the thread's next call.
template <class Function>
const char* told(const char* what, Function function) {
  static thread_local std::string message;
  try {
    function();
  } catch (const std::exception& error) {
    message = std::string(what) + ": " + error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace resnet_kernels::sm90
