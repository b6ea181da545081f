// The direct and the Winograd convolution. Both use one microkernel: a tile of 6 rows x 16 output channels (6 x 32 with
// AVX-512) accumulates in registers; values of the operand rows are broadcast, and weights stream through L1 in panels of
// 16 output channels. The rows of the implicit GEMM (or Winograd tiles) are cut into blocks whose operands stay in L2 while
// all panels pass over them. A thread owns a block.
//
// ReLU is max(0, t) with t as the second operand of vmaxps, which the instruction returns if an operand is NaN.
#include "cpu/x86.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "cpu/memory_pool.h"
#include "cpu/stream.h"
#include "cpu/x86_parts.h"

namespace resnet_kernels {

#ifdef RK_AVX2

Isa isa() {
  static const Isa found = [] {
    const auto most = at::get_cpu_capability();
    if (most == "AVX512" && __builtin_cpu_supports("avx512f")) return Isa::kAvx512;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return avx2 && (most == "AVX512" || most == "AVX2") ? Isa::kAvx2 : Isa::kNone;
  }();
  return found;
}
bool x86_runs() { return isa() != Isa::kNone; }

namespace {

constexpr int kRows = 6, kColumns = 16;
// Operand bytes of a block. In the direct convolution a block shares L2 (512 KiB) with the next one. The best of 32 KiB to
// 1.5 MiB, measured on Zen 3.
constexpr int64_t kDirectBytes = 96 * 1024, kWinogradBytes = 128 * 1024;
// Every block reads all weights. If the weights do not stay in cache, larger blocks read them less often.
constexpr int64_t kWinogradLargeBytes = 2 << 20;
constexpr size_t kLargeWeightBytes = 8 << 20;

// What a tile does to its accumulators before it stores them: out = relu(scale * t + shift + residual).
struct TileEpilogue {
  const float* scale;     // one value per column, or null
  const float* shift;     // one value per column, or null
  const float* residual;  // null, or a tensor laid out as the result; its element is at the same offset
  const float* base;      // the first element of the result, from which that offset counts
  bool relu;
  bool stream;            // use streaming stores
};

// out[r][0:16] = epilogue(sum over taps and k < depth of a[tap * kRows + r][k] * b[tap][k][0:16]) for up to kRows rows r. A
// kernel for two panels computes out[r][16:32] from the next panel likewise, whose weights begin at b + panel_stride.
using TileKernel = void (*)(int64_t taps, int64_t depth, const float* const* a, const float* b, int64_t panel_stride,
                            float* const* out, const TileEpilogue&);

template <int R>
RK_AVX2 void avx2_tile(int64_t taps, int64_t depth, const float* const* a, const float* b, int64_t, float* const* out,
                       const TileEpilogue& f) {
  __m256 acc[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
  for (int64_t tap = 0; tap < taps; ++tap, a += kRows, b += depth * kColumns) {
    const float* row[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) row[r] = a[r];
    for (int64_t k = 0; k < depth; ++k) {
      const __m256 b0 = _mm256_loadu_ps(b + k * kColumns), b1 = _mm256_loadu_ps(b + k * kColumns + 8);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256 v = _mm256_broadcast_ss(row[r] + k);
        acc[r][0] = _mm256_fmadd_ps(v, b0, acc[r][0]);
        acc[r][1] = _mm256_fmadd_ps(v, b1, acc[r][1]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    for (int h = 0; h < 2; ++h) {
      __m256 t = acc[r][h];
      if (f.scale) t = _mm256_mul_ps(t, _mm256_loadu_ps(f.scale + 8 * h));
      if (f.shift) t = _mm256_add_ps(t, _mm256_loadu_ps(f.shift + 8 * h));
      if (f.residual) t = _mm256_add_ps(t, _mm256_loadu_ps(f.residual + (out[r] - f.base) + 8 * h));
      if (f.relu) t = _mm256_max_ps(_mm256_setzero_ps(), t);
      if (f.stream) _mm256_stream_ps(out[r] + 8 * h, t);
      else _mm256_storeu_ps(out[r] + 8 * h, t);
    }
  }
}

// Six rows, not more: rows of 1024 channels are 4 KiB apart, so all of them fall into one set of the L1 cache, which has
// eight ways.
template <int R, int kPanels>
RK_AVX512 void avx512_tile(int64_t taps, int64_t depth, const float* const* a, const float* b, int64_t panel_stride,
                           float* const* out, const TileEpilogue& f) {
  __m512 acc[R][kPanels];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < kPanels; ++p) acc[r][p] = _mm512_setzero_ps();
  for (int64_t tap = 0; tap < taps; ++tap, a += kRows, b += depth * kColumns) {
    const float* row[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) row[r] = a[r];
    const float* const second_panel = b + panel_stride;
    for (int64_t k = 0; k < depth; ++k) {
      __m512 w[kPanels];
      w[0] = _mm512_loadu_ps(b + k * kColumns);
      if constexpr (kPanels == 2) w[1] = _mm512_loadu_ps(second_panel + k * kColumns);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512 v = _mm512_set1_ps(row[r][k]);
        for (int p = 0; p < kPanels; ++p) acc[r][p] = _mm512_fmadd_ps(v, w[p], acc[r][p]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      float* const to = out[r] + p * kColumns;
      __m512 t = acc[r][p];
      if (f.scale) t = _mm512_mul_ps(t, _mm512_loadu_ps(f.scale + p * kColumns));
      if (f.shift) t = _mm512_add_ps(t, _mm512_loadu_ps(f.shift + p * kColumns));
      if (f.residual) t = _mm512_add_ps(t, _mm512_loadu_ps(f.residual + (to - f.base)));
      // The masked form with every bit set: GCC 12 warns about its own expansion of the plain intrinsic.
      if (f.relu) t = _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), t);
      if (f.stream) _mm512_stream_ps(to, t);
      else _mm512_storeu_ps(to, t);
    }
  }
}

// The microkernels by their number of rows: for one panel, and for two panels (AVX-512 only, else null).
struct TileKernels {
  TileKernel one[kRows + 1], two[kRows + 1];
  // How many of the K output channels the next tile covers, starting with channel k.
  int columns(int64_t k, int64_t K) const { return two[kRows] && k + 2 * kColumns <= K ? 2 * kColumns : kColumns; }
  TileKernel tile(int rows, int columns) const { return (columns == kColumns ? one : two)[rows]; }
};

template <int... R>
constexpr TileKernels tile_kernels_of(bool avx512, std::integer_sequence<int, R...>) {
  if (avx512) return {{nullptr, avx512_tile<R + 1, 1>...}, {nullptr, avx512_tile<R + 1, 2>...}};
  return {{nullptr, avx2_tile<R + 1>...}, {}};
}

const TileKernels& tile_kernels() {
  static const TileKernels found = tile_kernels_of(isa() == Isa::kAvx512, std::make_integer_sequence<int, kRows>());
  return found;
}

// Returns the rows (or Winograd tiles) per block: a multiple of kRows, at most about `bytes` of operands, and at least as
// many blocks as threads where `count` allows it.
int64_t block_size(int64_t count, int64_t bytes_each, int64_t bytes) {
  const int64_t fits = std::max<int64_t>(1, bytes / bytes_each / kRows) * kRows;
  const int64_t threads = at::get_num_threads();
  const int64_t blocks = (std::max((count + fits - 1) / fits, std::min(threads, count)) + threads - 1) / threads * threads;
  return ((count + blocks - 1) / blocks + kRows - 1) / kRows * kRows;
}

// The output transform Y = A^T M A of F(2x2, 3x3) for 8 channels: 16 products become 2x2 outputs.
RK_AVX2 inline void transform_products(const float* m, int64_t position_stride, __m256 y[2][2]) {
  __m256 t[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m256 m0 = _mm256_loadu_ps(m + (0 + j) * position_stride), m1 = _mm256_loadu_ps(m + (4 + j) * position_stride);
    const __m256 m2 = _mm256_loadu_ps(m + (8 + j) * position_stride), m3 = _mm256_loadu_ps(m + (12 + j) * position_stride);
    t[0][j] = _mm256_add_ps(_mm256_add_ps(m0, m1), m2);
    t[1][j] = _mm256_sub_ps(_mm256_sub_ps(m1, m2), m3);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    y[i][0] = _mm256_add_ps(_mm256_add_ps(t[i][0], t[i][1]), t[i][2]);
    y[i][1] = _mm256_sub_ps(_mm256_sub_ps(t[i][1], t[i][2]), t[i][3]);
  }
}

// Input channels, and (of a transposed weight) panels, whose weights are packed together.
constexpr int kTogether = 8, kPanelsPacked = 4;

// One tap's weights of kTogether input channels and a panel's output channels.
struct WeightRows {
  float of[kTogether][kColumns];
};

// rows[c][k] = w[c * stride_c + k * stride_k] for 16 output channels k and `count` input channels c.
RK_AVX2 void gather(float (*rows)[kColumns], const float* w, int64_t stride_k, int64_t stride_c, int64_t count) {
  if (stride_k == 1) {
    for (int64_t c = 0; c < count; ++c)
      for (int k = 0; k < kColumns; k += 8) _mm256_storeu_ps(rows[c] + k, _mm256_loadu_ps(w + c * stride_c + k));
  } else if (stride_c == 1 && count == kTogether) {
    for (int k = 0; k < kColumns; k += 8) {
      // An 8x8 transpose in three steps: pairs, groups of four, halves.
      __m256 r[8], t[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(w + (k + i) * stride_k);
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
#pragma GCC unroll 2
      for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(rows[i] + k, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(rows[i + 4] + k, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
      }
    }
  } else {
    for (int64_t c = 0; c < count; ++c)
      for (int k = 0; k < kColumns; ++k) rows[c][k] = w[c * stride_c + k * stride_k];
  }
}

// The filter transform U = G g G^T of F(2x2, 3x3) for one input channel and the 16 output channels of a panel. The 16
// results of g are stored in u, `tap_stride` floats apart.
RK_AVX2 void transform_filters(const double (&g)[9][kColumns], float* u, int64_t tap_stride) {
  double t[4][3][kColumns];
  for (int j = 0; j < 3; ++j) {
    for (int k = 0; k < kColumns; ++k) {
      t[0][j][k] = g[j][k];
      t[1][j][k] = (g[j][k] + g[3 + j][k] + g[6 + j][k]) / 2;
      t[2][j][k] = (g[j][k] - g[3 + j][k] + g[6 + j][k]) / 2;
      t[3][j][k] = g[6 + j][k];
    }
  }
  for (int i = 0; i < 4; ++i) {
    float* const row = u + 4 * i * tap_stride;
    for (int k = 0; k < kColumns; ++k) {
      row[k] = static_cast<float>(t[i][0][k]);
      row[tap_stride + k] = static_cast<float>((t[i][0][k] + t[i][1][k] + t[i][2][k]) / 2);
      row[2 * tap_stride + k] = static_cast<float>((t[i][0][k] - t[i][1][k] + t[i][2][k]) / 2);
      row[3 * tap_stride + k] = static_cast<float>(t[i][2][k]);
    }
  }
}

// Computes the output tiles [begin, end): input transform into V, 16 matrix products per panel into M, output transform.
RK_AVX2 void winograd_block(float* y, const float* x, const float* packed, const float* scale, const float* shift,
                            const float* residual, bool relu, const TiledMap& g, int64_t begin, int64_t end, float* V, float* M) {
  const int64_t count = end - begin, down = g.tiles_down(), across = g.tiles_across();
  for (int64_t t = 0; t < count; ++t) {
    const int64_t n = (begin + t) / (down * across), h = (begin + t) / across % down * 2 - 1, w = (begin + t) % across * 2 - 1;
    const float* patch[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t hi = h + i / 4, wi = w + i % 4;
      const bool inside = hi >= 0 && hi < g.H && wi >= 0 && wi < g.W;
      patch[i] = inside ? x + ((n * g.H + hi) * g.W + wi) * g.C : nullptr;
      // The new columns of the patch after the next one to the right.
      if (i % 4 >= 2 && hi >= 0 && hi < g.H && wi + 4 < g.W) prefetch(x + ((n * g.H + hi) * g.W + wi + 4) * g.C, g.C);
    }
    for (int64_t c = 0; c < g.C; c += 8) transform_patch(patch, c, V + t * g.C + c, count * g.C);
  }
  const int64_t panel_stride = 16 * g.C * kColumns;
  for (int64_t k = 0, columns; k < g.K; k += columns) {
    columns = tile_kernels().columns(k, g.K);
    const float* panel = packed + k / kColumns * panel_stride;
    for (int p = 0; p < 16; ++p) {
      for (int64_t t = 0; t < count; t += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, count - t));
        const float* a[kRows];
        float* out[kRows];
        for (int r = 0; r < rows; ++r) {
          a[r] = V + (p * count + t + r) * g.C;
          out[r] = M + (p * count + t + r) * columns;
        }
        tile_kernels().tile(rows, columns)(1, g.C, a, panel + p * g.C * kColumns, panel_stride, out,
                                    TileEpilogue{nullptr, nullptr, nullptr, nullptr, false, false});
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t n = (begin + t) / (down * across), h = (begin + t) / across % down * 2, w = (begin + t) % across * 2;
      for (int part = 0; part < columns; part += 8) {
        __m256 out[2][2];
        transform_products(M + t * columns + part, count * columns, out);
        for (int i = 0; i < 4; ++i) {
          if (h + i / 2 >= g.H || w + i % 2 >= g.W) continue;
          const int64_t at = ((n * g.H + h + i / 2) * g.W + w + i % 2) * g.K + k + part;
          __m256 v = out[i / 2][i % 2];
          if (scale) v = _mm256_mul_ps(v, _mm256_loadu_ps(scale + k + part));
          if (shift) v = _mm256_add_ps(v, _mm256_loadu_ps(shift + k + part));
          if (residual) v = _mm256_add_ps(v, _mm256_loadu_ps(residual + at));
          if (relu) v = _mm256_max_ps(_mm256_setzero_ps(), v);
          _mm256_storeu_ps(y + at, v);
        }
      }
    }
  }
}

// Whether to treat a filter row as one tap: a few channels (the stem's three) are too short for the inner loop.
bool rows_as_taps(int64_t C, int64_t S, int64_t dilation) { return C < 8 && S > 1 && dilation == 1; }

// The positions of a direct convolution. Position (i, j) of a P x Q grid reads x at (i * stride + dh, j * stride + dw) for
// each tap, and writes y at (i * upsample + u, j * upsample + v).
struct Grid {
  int64_t P, Q, stride;
  std::vector<int64_t> dh, dw;
  int64_t upsample = 1, u = 0, v = 0;
};

Grid grid_of(const Window& win, int64_t P, int64_t Q) {
  Grid grid{P, Q, win.stride, {}, {}};
  for (int64_t tap = 0; tap < win.R * win.S; ++tap) {
    grid.dh.push_back(tap / win.S * win.dilation - win.padding);
    grid.dw.push_back(tap % win.S * win.dilation - win.padding);
  }
  return grid;
}

// The direct convolution over a grid. depth: how many consecutive values of x a tap reads: its channels, or several
// positions' channels where a filter row is one tap.
void direct_conv(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* scale,
            const float* shift, const float* residual, bool relu, const Grid& grid, int64_t depth) {
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3), K = y.size(1), P = grid.P, Q = grid.Q;
  const int64_t M = y.size(0) * P * Q, taps = grid.dh.size(), height = y.size(2), width = y.size(3);
  if (M == 0) return;
  const float* in = x.const_data_ptr<float>();
  const float* b = packed.const_data_ptr<float>();
  float* const result = y.mutable_data_ptr<float>();
  const std::vector<float> zeros(depth);
  const int64_t rows_per_block = block_size(M, C * sizeof(float) * std::max<int64_t>(1, std::min(taps, grid.stride * grid.stride)), kDirectBytes);
  const int64_t count = (M + rows_per_block - 1) / rows_per_block;
  const bool stream = bypasses_cache(result, y.nbytes());
  BlockQueue blocks(count);
  blocks.run([&] {
    // The addresses of a block's operand rows for every tap, and of its result rows, found once for all panels. next_rows
    // are the operand rows of the next block, which are prefetched while this block is computed.
    const int64_t size = (rows_per_block + kRows - 1) / kRows * kRows;
    std::vector<const float*> rows_of(size * taps), next_rows(taps == 1 ? size : 0);
    std::vector<float*> to_row(rows_per_block);
    const auto find_rows = [&](int64_t block, std::vector<const float*>& rows) {
      const int64_t begin = block * rows_per_block, end = std::min(M, begin + rows_per_block);
      for (int64_t m = begin; m < end; ++m) {
        const int64_t n = m / (P * Q), i = m / Q % P, j = m % Q;
        const float** const from = rows.data() + (m - begin) / kRows * taps * kRows + (m - begin) % kRows;
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t h = i * grid.stride + grid.dh[tap], w = j * grid.stride + grid.dw[tap];
          const bool inside = h >= 0 && h < H && w >= 0 && w < W;
          from[tap * kRows] = inside ? in + ((n * H + h) * W + w) * C : zeros.data();
        }
      }
      return end - begin;
    };
    int64_t block = blocks.take().first;
    int64_t rows = block < count ? find_rows(block, rows_of) : 0;
    while (block < count) {
      const int64_t begin = block * rows_per_block, next = blocks.take().first;
      const int64_t next_count = taps == 1 && next < count ? find_rows(next, next_rows) : 0;
      for (int64_t m = begin; m < begin + rows; ++m) {
        const int64_t n = m / (P * Q), i = m / Q % P, j = m % Q;
        to_row[m - begin] = result + ((n * height + i * grid.upsample + grid.u) * width + j * grid.upsample + grid.v) * K;
      }
      for (int64_t k = 0, columns; k < K; k += columns) {
        columns = tile_kernels().columns(k, K);
        const TileEpilogue epilogue{scale ? scale + k : nullptr, shift ? shift + k : nullptr, residual, result, relu, stream};
        // The part of each row of the next block that is prefetched during these columns.
        const int64_t from = (k * depth / K + 15) / 16 * 16, share = (k + columns) * depth / K - from;
        for (int64_t m = 0; m < rows; m += kRows) {
          float* out[kRows];
          const int group = static_cast<int>(std::min<int64_t>(kRows, rows - m));
          for (int r = 0; r < group; ++r) {
            out[r] = to_row[m + r] + k;
            if (!stream) prefetch(out[r], columns);
            if (residual) prefetch(residual + (out[r] - result), columns);
            if (m + r < next_count) prefetch<_MM_HINT_T1>(next_rows[m + r] + from, share);
          }
          tile_kernels().tile(group, columns)(taps, depth, rows_of.data() + m * taps, b + k * taps * depth, taps * depth * kColumns,
                                       out, epilogue);
        }
      }
      block = next;
      if (taps == 1) std::swap(rows_of, next_rows), rows = next_count;
      else if (block < count) rows = find_rows(block, rows_of);
    }
    if (stream) stream_fence();
  });
}

// Whether all |x| < 1e37; false for NaN.
RK_AVX2 bool moderate(const float* x, int64_t count) {
  const __m256 bound = _mm256_set1_ps(1e37f), sign = _mm256_set1_ps(-0.f);
  __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    all = _mm256_and_ps(all, _mm256_cmp_ps(_mm256_andnot_ps(sign, _mm256_loadu_ps(x + i)), bound, _CMP_LT_OQ));
  bool rest = true;
  for (; i < count; ++i) rest = rest && std::fabs(x[i]) < 1e37f;
  return rest && _mm256_movemask_ps(all) == 255;
}

}  // namespace

at::Tensor x86_pack(const at::Tensor& weight, const at::Tensor& scale, bool winograd, bool transposed,
                     const std::vector<int64_t>& only_taps) {
  // The weight is read through its strides, NCHW or channels_last, transposed for a data gradient or not: no copy is made.
  const auto source = weight.scalar_type() == at::kFloat ? weight : weight.to(at::kFloat);
  const int64_t K = source.size(transposed ? 1 : 0), C = source.size(transposed ? 0 : 1), R = source.size(2), S = source.size(3);
  const int64_t stride_k = source.stride(transposed ? 1 : 0), stride_c = source.stride(transposed ? 0 : 1);
  std::vector<int64_t> tap_offsets;
  for (int64_t tap = 0; tap < R * S; ++tap) tap_offsets.push_back(tap / S * source.stride(2) + tap % S * source.stride(3));
  if (transposed) std::reverse(tap_offsets.begin(), tap_offsets.end());
  if (!only_taps.empty()) {
    std::vector<int64_t> chosen;
    for (const int64_t tap : only_taps) chosen.push_back(tap_offsets[tap]);
    tap_offsets = chosen;
  }
  const int64_t taps = winograd ? 16 : tap_offsets.size();
  const auto scales = scale.to(at::kFloat).contiguous();
  const float* w = source.const_data_ptr<float>();
  const float* a = scales.const_data_ptr<float>();
  // From the memory pool, because `replace_blocks` packs at every call.
  auto packed = allocate_nhwc({1, K * taps * C, 1, 1}, source.options());
  float* const out = packed.mutable_data_ptr<float>();
  // In a transposed weight the channels of neighbouring panels are adjacent in memory, so they are read together.
  const int64_t panels = K / kColumns, together = transposed ? kPanelsPacked : 1;
  for_each_block((panels + together - 1) / together, 1, [&](int64_t group) {
    std::vector<WeightRows> gathered(tap_offsets.size());
    const int64_t last = std::min(panels, (group + 1) * together);
    for (int64_t c = 0; c < C; c += kTogether) {
      const int64_t count = std::min<int64_t>(kTogether, C - c);
      for (int64_t panel = group * together; panel < last; ++panel) {
        const float* const s = a + panel * kColumns;
        float* const to = out + (panel * taps * C + c) * kColumns;
        for (size_t tap = 0; tap < tap_offsets.size(); ++tap)
          gather(gathered[tap].of, w + panel * kColumns * stride_k + c * stride_c + tap_offsets[tap], stride_k, stride_c, count);
        for (int64_t i = 0; i < count; ++i) {
          if (winograd) {
            double scaled[9][kColumns];
            for (int tap = 0; tap < 9; ++tap)
              for (int k = 0; k < kColumns; ++k) scaled[tap][k] = static_cast<double>(gathered[tap].of[i][k]) * s[k];
            transform_filters(scaled, to + i * kColumns, C * kColumns);
          } else {
            for (int64_t tap = 0; tap < taps; ++tap)
              for (int k = 0; k < kColumns; ++k) to[(tap * C + i) * kColumns + k] = gathered[tap].of[i][k] * s[k];
          }
        }
      }
    }
  });
  return packed;
}

void x86_direct(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* scale,
                 const float* shift, const float* residual, bool relu, const Window& win) {
  if (rows_as_taps(x.size(1), win.S, win.dilation)) {
    // In a padded map a row of the filter reads S * C consecutive values: one tap of a filter with one column.
    const auto padded = at::constant_pad_nd(x, {win.padding, win.padding, win.padding, win.padding})
                            .contiguous(at::MemoryFormat::ChannelsLast);
    const Window rows{win.R, 1, win.stride, 0, win.dilation};
    direct_conv(y, padded, packed, scale, shift, residual, relu, grid_of(rows, y.size(2), y.size(3)), win.S * x.size(1));
  } else {
    direct_conv(y, x, packed, scale, shift, residual, relu, grid_of(win, y.size(2), y.size(3)), x.size(1));
  }
}

void x86_data_grad(const at::Tensor& dx, const at::Tensor& g, const at::Tensor& weight, const Window& win) {
  const auto ones = at::ones({dx.size(1)}, dx.options());
  for (int64_t u = 0; u < win.stride; ++u) {
    for (int64_t v = 0; v < win.stride; ++v) {
      // Row h = stride * i + u of dx gets contributions from the taps r where h + padding - r * dilation is a multiple of
      // the stride; columns likewise.
      Grid grid{(dx.size(2) - u + win.stride - 1) / win.stride, (dx.size(3) - v + win.stride - 1) / win.stride, 1, {}, {}, win.stride, u, v};
      std::vector<int64_t> taps;
      for (int64_t r = 0; r < win.R; ++r) {
        for (int64_t s = 0; s < win.S; ++s) {
          const int64_t h = u + win.padding - r * win.dilation, w = v + win.padding - s * win.dilation;
          if (h % win.stride != 0 || w % win.stride != 0) continue;
          grid.dh.push_back(h / win.stride);
          grid.dw.push_back(w / win.stride);
          // A transposed pack rotates the filter, so it counts taps from the other end.
          taps.push_back(win.R * win.S - 1 - (r * win.S + s));
        }
      }
      const auto packed = taps.empty() ? at::empty({0}, dx.options()) : x86_pack(weight, ones, false, true, taps);
      direct_conv(dx, g, packed, nullptr, nullptr, nullptr, false, grid, g.size(1));
    }
  }
}

void x86_winograd(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* scale,
                   const float* shift, const float* residual, bool relu) {
  const TiledMap g{x.size(0), x.size(2), x.size(3), x.size(1), y.size(1)};
  if (g.tiles() == 0) return;
  const float* in = x.const_data_ptr<float>();
  const float* b = packed.const_data_ptr<float>();
  float* const result = y.mutable_data_ptr<float>();
  const bool large_weight = packed.nbytes() > kLargeWeightBytes;  // exceeds the cache
  const int64_t per_block = block_size(g.tiles(), 16 * g.C * sizeof(float), large_weight ? kWinogradLargeBytes : kWinogradBytes);
  const int64_t count = (g.tiles() + per_block - 1) / per_block;
  BlockQueue blocks(count, std::max<int64_t>(1, count / (8 * at::get_num_threads())));
  blocks.run([&] {
    const Scratch V(16 * per_block * g.C), M(16 * per_block * 2 * kColumns);
    for (auto [block, end] = blocks.take(); block < count; std::tie(block, end) = blocks.take())
      for (; block < end; ++block)
        winograd_block(result, in, b, scale, shift, residual, relu, g, block * per_block,
                       std::min(g.tiles(), (block + 1) * per_block), V.get(), M.get());
  });
}

bool x86_all_moderate(const at::Tensor& x) {
  const float* in = x.const_data_ptr<float>();
  std::atomic<bool> all{true};
  at::parallel_for(0, x.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
    if (!moderate(in + begin, end - begin)) all = false;
  });
  return all;
}

#else

bool x86_runs() { return false; }
at::Tensor x86_pack(const at::Tensor&, const at::Tensor&, bool, bool, const std::vector<int64_t>&) { TORCH_CHECK(false, "x86_pack: expected an x86-64 build with GCC or Clang"); }
void x86_direct(const at::Tensor&, const at::Tensor&, const at::Tensor&, const float*, const float*, const float*, bool, const Window&) {}
void x86_winograd(const at::Tensor&, const at::Tensor&, const at::Tensor&, const float*, const float*, const float*, bool) {}
void x86_data_grad(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Window&) {}
bool x86_all_moderate(const at::Tensor&) { return false; }

#endif

}  // namespace resnet_kernels
