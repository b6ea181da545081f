// Weight gradients: sums of outer products over rows (or Winograd tiles). A block of rows of both operands is packed into
// panels of 16 channels, [panel][row][16]. Each 16 x 16 piece of the result is then one register tile (three with AVX2)
// that runs down two panels. One thread computes a piece at a time, so the order of every sum is fixed.
#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "cpu/x86.h"
#include "cpu/x86_parts.h"

namespace resnet_kernels {

#ifdef RK_AVX2

namespace {

constexpr int64_t kPanel = 16;
constexpr int64_t kDepth = 128;           // rows of two panels that fit in L1
constexpr int64_t kRowsPacked = 64;       // rows that a thread packs at a time
constexpr int64_t kBlockBytes = 2 << 20;  // the packed operands of a block, which all threads share

// out[r][0:16] = sum over t of a[t][r] * b[t][0:16] for R rows of `out`, `stride` floats apart; with `accumulate` the sum is
// added to out. The registers always start from zero: one accumulator over all rows would lose four digits of a second
// moment.
template <int R>
RK_AVX2 void avx2_rows(const float* a, const float* b, int64_t depth, float* out, int64_t stride, bool accumulate) {
  __m256 acc[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h) acc[r][h] = _mm256_setzero_ps();
  for (int64_t t = 0; t < depth; ++t, a += kPanel, b += kPanel) {
    const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256 v = _mm256_broadcast_ss(a + r);
      acc[r][0] = _mm256_fmadd_ps(v, b0, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(v, b1, acc[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
    for (int h = 0; h < 2; ++h) {
      float* const to = out + r * stride + 8 * h;
      _mm256_storeu_ps(to, accumulate ? _mm256_add_ps(_mm256_loadu_ps(to), acc[r][h]) : acc[r][h]);
    }
}

void avx2_tile(const float* a, const float* b, int64_t depth, float* out, int64_t stride, bool accumulate) {
  avx2_rows<6>(a, b, depth, out, stride, accumulate);
  avx2_rows<6>(a + 6, b, depth, out + 6 * stride, stride, accumulate);
  avx2_rows<4>(a + 12, b, depth, out + 12 * stride, stride, accumulate);
}

RK_AVX512 void avx512_tile(const float* a, const float* b, int64_t depth, float* out, int64_t stride, bool accumulate) {
  __m512 acc[kPanel];
#pragma GCC unroll 16
  for (int r = 0; r < kPanel; ++r) acc[r] = _mm512_setzero_ps();
  for (int64_t t = 0; t < depth; ++t, a += kPanel, b += kPanel) {
    const __m512 v = _mm512_loadu_ps(b);
#pragma GCC unroll 16
    for (int r = 0; r < kPanel; ++r) acc[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[r]), v, acc[r]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kPanel; ++r) {
    float* const to = out + r * stride;
    _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), acc[r]) : acc[r]);
  }
}

// Multiplies one panel of `a` by the first C / 16 panels of `b`: 16 rows of `out` with C columns, `stride` floats apart.
void outer_rows(const float* a, const float* b, int64_t depth, int64_t panel_rows, int64_t C, float* out,
                int64_t stride, bool accumulate) {
  const auto tile = isa() == Isa::kAvx512 ? avx512_tile : avx2_tile;
  for (int64_t t = 0; t < depth; t += kDepth) {
    const int64_t count = std::min(kDepth, depth - t);
    const bool add = accumulate || t > 0;
    for (int64_t c = 0; c < C; c += kPanel) {
      const float *pa = a + t * kPanel, *pb = b + c * panel_rows + t * kPanel;
      for (int r = 0; add && r < kPanel; ++r) prefetch(out + r * stride + c, kPanel);
      tile(pa, pb, count, out + c, stride, add);
    }
  }
}

// Packs rows of `channels` values into panels of `panel_rows` rows, and adds them to `sums` unless that is null.
RK_AVX2 void pack_rows(float* panels, const float* x, float* sums, int64_t rows, int64_t channels, int64_t panel_rows) {
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t c = 0; c < channels; c += 8) {
      const __m256 v = _mm256_loadu_ps(x + t * channels + c);
      if (sums) _mm256_storeu_ps(sums + c, _mm256_add_ps(_mm256_loadu_ps(sums + c), v));
      _mm256_storeu_ps(panels + c / kPanel * panel_rows * kPanel + t * kPanel + c % kPanel, v);
    }
  }
}

// The panel stride in rows. One more than the depth, because panels a power of two apart would share a few cache sets.
int64_t panel_stride(int64_t depth) { return depth + 1; }

// Returns how many rows of `bytes_each` fit in `bytes`: a multiple of kRowsPacked, from `least` to `most`.
int64_t rows_that_fit(int64_t bytes, int64_t bytes_each, int64_t least, int64_t most) {
  return std::clamp(bytes / bytes_each / kRowsPacked * kRowsPacked, least, most);
}

// The gradient transform Z = A dY A^T of a 2x2 patch, 8 channels from c on; null pointers for positions outside the map.
RK_AVX2 inline void transform_gradient(const float* const patch[4], int64_t c, float* z, int64_t position_stride) {
  __m256 d[2][2], t[4][2];
  for (int i = 0; i < 4; ++i) d[i / 2][i % 2] = patch[i] ? _mm256_loadu_ps(patch[i] + c) : _mm256_setzero_ps();
  const __m256 zero = _mm256_setzero_ps();
  for (int j = 0; j < 2; ++j) {
    t[0][j] = d[0][j];
    t[1][j] = _mm256_add_ps(d[0][j], d[1][j]);
    t[2][j] = _mm256_sub_ps(d[0][j], d[1][j]);
    t[3][j] = _mm256_sub_ps(zero, d[1][j]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(z + (4 * i + 0) * position_stride, t[i][0]);
    _mm256_storeu_ps(z + (4 * i + 1) * position_stride, _mm256_add_ps(t[i][0], t[i][1]));
    _mm256_storeu_ps(z + (4 * i + 2) * position_stride, _mm256_sub_ps(t[i][0], t[i][1]));
    _mm256_storeu_ps(z + (4 * i + 3) * position_stride, _mm256_sub_ps(zero, t[i][1]));
  }
}

// The filter gradient G^T S G of the C filters of one output channel. s: S [16][K][C] from that channel's first value on.
RK_AVX2 void finish_filters(float* dweight, const float* s, int64_t position_stride, int64_t C) {
  const __m256 half = _mm256_set1_ps(0.5f);
  for (int64_t c = 0; c < C; c += 8) {
    __m256 t[3][4];
    for (int j = 0; j < 4; ++j) {
      const __m256 s0 = _mm256_loadu_ps(s + (0 + j) * position_stride + c), s3 = _mm256_loadu_ps(s + (12 + j) * position_stride + c);
      const __m256 s1 = _mm256_mul_ps(half, _mm256_loadu_ps(s + (4 + j) * position_stride + c));
      const __m256 s2 = _mm256_mul_ps(half, _mm256_loadu_ps(s + (8 + j) * position_stride + c));
      const __m256 sum = _mm256_add_ps(s1, s2);
      t[0][j] = _mm256_add_ps(s0, sum);
      t[1][j] = _mm256_sub_ps(s1, s2);
      t[2][j] = _mm256_add_ps(sum, s3);
    }
    for (int i = 0; i < 3; ++i) {
      const __m256 t1 = _mm256_mul_ps(half, t[i][1]), t2 = _mm256_mul_ps(half, t[i][2]), sum = _mm256_add_ps(t1, t2);
      _mm256_storeu_ps(dweight + (3 * i + 0) * C + c, _mm256_add_ps(t[i][0], sum));
      _mm256_storeu_ps(dweight + (3 * i + 1) * C + c, _mm256_sub_ps(t1, t2));
      _mm256_storeu_ps(dweight + (3 * i + 2) * C + c, _mm256_add_ps(sum, t[i][3]));
    }
  }
}

}  // namespace

void x86_wgrad(float* dweight, const float* g, const float* x, float* sums, int64_t M, int64_t K, int64_t C) {
  const bool square = g == x;
  const int64_t depth = rows_that_fit(kBlockBytes, (K + C) * sizeof(float), 2 * kRowsPacked, 1024);
  const Scratch a(panel_stride(depth) * K), b(panel_stride(depth) * C);
  std::vector<float> partial(sums ? (depth + kRowsPacked - 1) / kRowsPacked * K : 0);
  std::vector<double> total(sums ? K : 0);
  if (M == 0) std::fill(dweight, dweight + K * C, 0.f);
  for (int64_t begin = 0; begin < M; begin += depth) {
    const int64_t rows = std::min(depth, M - begin), used = (rows + kRowsPacked - 1) / kRowsPacked;
    for_each_block(used, 1, [&](int64_t part) {
      const int64_t t = part * kRowsPacked, count = std::min(kRowsPacked, rows - t);
      float* const s = sums ? partial.data() + part * K : nullptr;
      if (s) std::fill(s, s + K, 0.f);
      pack_rows(a.get() + t * kPanel, g + (begin + t) * K, s, count, K, panel_stride(depth));
      if (!square) pack_rows(b.get() + t * kPanel, x + (begin + t) * C, nullptr, count, C, panel_stride(depth));
    });
    for (int64_t part = 0; sums && part < used; ++part)
      for (int64_t k = 0; k < K; ++k) total[k] += partial[part * K + k];
    const int64_t panels = K / kPanel;
    for_each_block(panels, 1, [&](int64_t unit) {
      // A symmetric result is computed up to its diagonal; the longest rows go first, to balance the threads.
      const int64_t panel = panels - 1 - unit;
      outer_rows(a.get() + panel * panel_stride(depth) * kPanel, square ? a.get() : b.get(), rows, panel_stride(depth), square ? (panel + 1) * kPanel : C,
                 dweight + panel * kPanel * C, C, begin > 0);
    });
  }
  for (int64_t k = 0; square && k < K; ++k)
    for (int64_t c = k + 1; c < C; ++c) dweight[k * C + c] = dweight[c * C + k];
  for (int64_t k = 0; sums && k < K; ++k) sums[k] = static_cast<float>(total[k]);
}

void x86_conv_wgrad(const at::Tensor& dweight, const at::Tensor& g, const at::Tensor& x, const Window& win) {
  const int64_t K = g.size(1), C = x.size(1), H = x.size(2), W = x.size(3), P = g.size(2), Q = g.size(3);
  const int64_t M = g.size(0) * P * Q, taps = win.R * win.S, stride = taps * C;
  const int64_t depth = rows_that_fit(kBlockBytes, (K + C) * sizeof(float), 2 * kRowsPacked, 1024);
  const Scratch a(panel_stride(depth) * K), b(panel_stride(depth) * C);
  const float *in = x.const_data_ptr<float>(), *gradient = g.const_data_ptr<float>();
  float* const result = dweight.mutable_data_ptr<float>();
  const std::vector<float> zeros(C);
  if (M == 0) std::fill(result, result + K * stride, 0.f);
  for (int64_t begin = 0; begin < M; begin += depth) {
    const int64_t rows = std::min(depth, M - begin);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for_each_block((rows + kRowsPacked - 1) / kRowsPacked, 1, [&](int64_t part) {
        const int64_t first = part * kRowsPacked, last = std::min(rows, first + kRowsPacked);
        if (tap == 0) pack_rows(a.get() + first * kPanel, gradient + (begin + first) * K, nullptr, last - first, K, panel_stride(depth));
        for (int64_t t = first; t < last; ++t) {
          const int64_t m = begin + t, n = m / (P * Q);
          const int64_t h = m / Q % P * win.stride - win.padding + tap / win.S * win.dilation;
          const int64_t w = m % Q * win.stride - win.padding + tap % win.S * win.dilation;
          const bool inside = h >= 0 && h < H && w >= 0 && w < W;
          pack_rows(b.get() + t * kPanel, inside ? in + ((n * H + h) * W + w) * C : zeros.data(), nullptr, 1, C, panel_stride(depth));
        }
      });
      for_each_block(K / kPanel, 1, [&](int64_t panel) {
        outer_rows(a.get() + panel * panel_stride(depth) * kPanel, b.get(), rows, panel_stride(depth), C, result + panel * kPanel * stride + tap * C, stride,
                   begin > 0);
      });
    }
  }
}

void x86_winograd_wgrad(const at::Tensor& dweight, const at::Tensor& g, const at::Tensor& x) {
  const TiledMap map{x.size(0), x.size(2), x.size(3), x.size(1), g.size(1)};
  const int64_t C = map.C, K = map.K, H = map.H, W = map.W, down = map.tiles_down(), across = map.tiles_across();
  const float *in = x.const_data_ptr<float>(), *gradient = g.const_data_ptr<float>();
  float* const result = dweight.mutable_data_ptr<float>();
  const int64_t depth = rows_that_fit(kBlockBytes, 16 * (K + C) * sizeof(float), kRowsPacked, 512);
  const Scratch Z(16 * panel_stride(depth) * K), V(16 * panel_stride(depth) * C), S(16 * K * C);
  if (map.tiles() == 0) std::fill(S.get(), S.get() + 16 * K * C, 0.f);
  for (int64_t begin = 0; begin < map.tiles(); begin += depth) {
    const int64_t tiles = std::min(depth, map.tiles() - begin);
    for_each_block(tiles, 8, [&](int64_t t) {
      const int64_t n = (begin + t) / (down * across), h = (begin + t) / across % down * 2, w = (begin + t) % across * 2;
      const auto pixel = [&](const float* base, int64_t hi, int64_t wi, int64_t channels) -> const float* {
        return hi >= 0 && hi < H && wi >= 0 && wi < W ? base + ((n * H + hi) * W + wi) * channels : nullptr;
      };
      const float *patch[16], *dy[4];
      for (int i = 0; i < 16; ++i) patch[i] = pixel(in, h - 1 + i / 4, w - 1 + i % 4, C);
      for (int i = 0; i < 4; ++i) dy[i] = pixel(gradient, h + i / 2, w + i % 2, K);
      for (int64_t c = 0; c < C; c += 8)
        transform_patch(patch, c, V.get() + c / kPanel * panel_stride(depth) * kPanel + t * kPanel + c % kPanel, panel_stride(depth) * C);
      for (int64_t k = 0; k < K; k += 8)
        transform_gradient(dy, k, Z.get() + k / kPanel * panel_stride(depth) * kPanel + t * kPanel + k % kPanel, panel_stride(depth) * K);
    });
    for_each_block(16 * (K / kPanel), 1, [&](int64_t unit) {
      const int64_t p = unit / (K / kPanel), panel = unit % (K / kPanel);
      outer_rows(Z.get() + (p * K + panel * kPanel) * panel_stride(depth), V.get() + p * C * panel_stride(depth), tiles, panel_stride(depth), C,
                 S.get() + (p * K + panel * kPanel) * C, C, begin > 0);
    });
  }
  for_each_block(K, 16, [&](int64_t k) { finish_filters(result + k * 9 * C, S.get() + k * C, K * C, C); });
}

#else

void x86_wgrad(float*, const float*, const float*, float*, int64_t, int64_t, int64_t) {}
void x86_winograd_wgrad(const at::Tensor&, const at::Tensor&, const at::Tensor&) {}
void x86_conv_wgrad(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Window&) {}

#endif

}  // namespace resnet_kernels
