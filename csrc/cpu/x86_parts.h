// What x86.cpp (convolutions) and x86_wgrad.cpp (weight gradients) share.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstdint>

#include "cpu/blocks.h"
#include "cpu/memory_pool.h"

#define RK_AVX2 __attribute__((target("avx2,fma")))
#define RK_AVX512 __attribute__((target("avx512f")))

namespace resnet_kernels {

// The instruction set to use: the best that the processor has and that ATEN_CPU_CAPABILITY allows, as in torch.
enum class Isa { kNone, kAvx2, kAvx512 };
Isa isa();

// Scratch memory for `floats` values, from the memory pool: the kernel would zero fresh pages first.
class Scratch {
 public:
  explicit Scratch(int64_t floats) : memory_(allocate_nhwc({1, floats, 1, 1}, at::TensorOptions(at::kFloat))) {}
  float* get() const { return memory_.mutable_data_ptr<float>(); }

 private:
  const at::Tensor memory_;
};

// Prefetches `count` floats: into L1, or with _MM_HINT_T1 into L2 for a later read.
template <_mm_hint hint = _MM_HINT_T0>
inline void prefetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) _mm_prefetch(reinterpret_cast<const char*>(from + i), hint);
}

// An H x W map whose output is cut into 2x2 tiles, as F(2x2, 3x3) computes them.
struct TiledMap {
  int64_t N, H, W, C, K;
  int64_t tiles_down() const { return (H + 1) / 2; }
  int64_t tiles_across() const { return (W + 1) / 2; }
  int64_t tiles() const { return N * tiles_down() * tiles_across(); }
};

// The input transform V = B^T d B of a 4x4 patch, 8 channels from c on, of Winograd's minimal filtering F(2x2, 3x3) (Lavin
// and Gray 2015, arXiv 1509.09308). patch: pointers to the patch's positions; null for positions outside the map. The 16
// results are stored `position_stride` floats apart.
RK_AVX2 inline void transform_patch(const float* const patch[16], int64_t c, float* v, int64_t position_stride) {
  __m256 d[4][4], t[4][4];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) d[i / 4][i % 4] = patch[i] ? _mm256_loadu_ps(patch[i] + c) : _mm256_setzero_ps();
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[0][j] = _mm256_sub_ps(d[0][j], d[2][j]);
    t[1][j] = _mm256_add_ps(d[1][j], d[2][j]);
    t[2][j] = _mm256_sub_ps(d[2][j], d[1][j]);
    t[3][j] = _mm256_sub_ps(d[1][j], d[3][j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(v + (4 * i + 0) * position_stride, _mm256_sub_ps(t[i][0], t[i][2]));
    _mm256_storeu_ps(v + (4 * i + 1) * position_stride, _mm256_add_ps(t[i][1], t[i][2]));
    _mm256_storeu_ps(v + (4 * i + 2) * position_stride, _mm256_sub_ps(t[i][2], t[i][1]));
    _mm256_storeu_ps(v + (4 * i + 3) * position_stride, _mm256_sub_ps(t[i][1], t[i][3]));
  }
}

}  // namespace resnet_kernels
#endif
