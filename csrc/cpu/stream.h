// Stores that go past the cache.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace resnet_kernels {

constexpr size_t kStreamBytes = 16 << 20;

// Whether a result goes past the cache: one so large would not stay there, and to write a line there it is read first.
// Such stores need aligned addresses, which memory of a caller's own may not have.
inline bool past_cache(const void* to, size_t bytes) {
  return bytes > kStreamBytes && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

#ifdef __SSE2__
// `to` aligned to 16 bytes, `count` a multiple of 4.
inline void stream_to(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
}

// What this thread streamed is there for the others.
inline void streamed() { _mm_sfence(); }
#else
inline void stream_to(float* to, const float* from, int64_t count) { std::copy(from, from + count, to); }
inline void streamed() {}
#endif

}  // namespace resnet_kernels
