// Argument checks. Every message has the form "NAME: expected X, got Y" and raises a RuntimeError in Python.
#pragma once

#include <ATen/ATen.h>

#define RK_CHECK_EQ(got, expected, name)                                                      \
  do {                                                                                        \
    const auto rk_got = (got);                                                                \
    const auto rk_expected = (expected);                                                      \
    TORCH_CHECK(rk_got == rk_expected, name, ": expected ", rk_expected, ", got ", rk_got);   \
  } while (0)

namespace resnet_kernels {

// Four dimensions, channels_last in memory.
inline void check_nhwc(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 4, name, ": expected 4 dimensions (N, C, H, W), got ", t.sizes());
  TORCH_CHECK(t.is_contiguous(at::MemoryFormat::ChannelsLast), name, ": expected channels_last memory, got sizes ",
              t.sizes(), " with strides ", t.strides());
}

inline void check_cpu(const at::Tensor& t, const char* name) {
  TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor, got one on ", t.device());
}

// A contiguous fp32 vector of one value per channel.
inline void check_per_channel(const at::Tensor& t, int64_t channels, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kFloat, name, ": expected float32, got ", t.scalar_type());
  TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.is_contiguous(), name, ": expected ", channels,
              " contiguous values, one per channel, got sizes ", t.sizes());
}

}  // namespace resnet_kernels
