// Streaming stores, which write to memory without reading the line into cache first.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace resnet_kernels {

constexpr size_t kStreamBytes = 16 << 20;  // results larger than this are streamed

// Whether to write a result with streaming stores. A result this large would not stay in cache, and an ordinary store
// reads each line before it writes it. Streaming stores need aligned addresses, which a caller's memory may not have.
inline bool bypasses_cache(const void* to, size_t bytes) {
  return bytes > kStreamBytes && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

#ifdef __SSE2__
// Copies `count` floats with streaming stores. `to` is aligned to 16 bytes and `count` is a multiple of 4.
inline void stream_copy(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
}

// Makes this thread's streaming stores visible to the other threads.
inline void stream_fence() { _mm_sfence(); }
#else
inline void stream_copy(float* to, const float* from, int64_t count) { std::copy(from, from + count, to); }
inline void stream_fence() {}
#endif

}  // namespace resnet_kernels
