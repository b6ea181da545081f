// One microkernel carries both: 6 rows x 16 columns of accumulators in 12 registers, with AVX-512 6 x 32, operand rows
// broadcast, weights in panels of 16 output channels that stream through L1. Rows (or Winograd tiles) are cut into blocks whose
// operands stay in L2 while all panels pass over them; threads own blocks.
//
// ReLU is max(0, t) with t as the second operand of vmaxps, which is what the instruction returns for NaN.
#include "cpu/x86.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "cpu/pool.h"
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
// Operand bytes of a block: a direct one shares L2 (512 KiB) with the next. Measured on Zen 3, from 32 KiB to 1.5 MiB.
constexpr int64_t kDirectBytes = 96 * 1024, kWinogradBytes = 128 * 1024;
// Every block reads all filters: where those do not stay in cache, larger blocks read them less often.
constexpr int64_t kWinogradFarBytes = 2 << 20;
constexpr size_t kFarBytes = 8 << 20;

struct Finish {
  const float* scale;     // a value a column, or null
  const float* shift;     // a value a column, or null
  const float* residual;  // null, or laid out as what begins at `base` and `out` points into
  const float* base;
  bool relu, stream;
};

// out[r][0:16] = finish(sum over taps and k of a[tap * kRows + r][k] * b[tap][k][0:16]) of some rows, at most kRows; where
// those are of two panels, whose weights lie `apart`, out[r][16:32] likewise.
using Tile = void (*)(int64_t taps, int64_t depth, const float* const* a, const float* b, int64_t apart, float* const* out,
                      const Finish&);

template <int R>
RK_AVX2 void avx2_tile(int64_t taps, int64_t depth, const float* const* a, const float* b, int64_t, float* const* out,
                       const Finish& f) {
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

// More than six rows would not do: 4 KiB apart, as 1024 channels are, they share a set of the first cache.
template <int R, int kPanels>
RK_AVX512 void avx512_tile(int64_t taps, int64_t depth, const float* const* a, const float* b, int64_t apart,
                           float* const* out, const Finish& f) {
  __m512 acc[R][kPanels];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < kPanels; ++p) acc[r][p] = _mm512_setzero_ps();
  for (int64_t tap = 0; tap < taps; ++tap, a += kRows, b += depth * kColumns) {
    const float* row[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) row[r] = a[r];
    const float* const second = b + apart;
    for (int64_t k = 0; k < depth; ++k) {
      __m512 w[kPanels];
      w[0] = _mm512_loadu_ps(b + k * kColumns);
      if constexpr (kPanels == 2) w[1] = _mm512_loadu_ps(second + k * kColumns);
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
      // By a mask of all: what GCC 12 makes of the plain one it warns of itself.
      if (f.relu) t = _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), t);
      if (f.stream) _mm512_stream_ps(to, t);
      else _mm512_storeu_ps(to, t);
    }
  }
}

// By rows, of one panel and, if there are such, of two.
struct Micro {
  Tile one[kRows + 1], two[kRows + 1];
  // Of the panels from k on, of K channels.
  int columns(int64_t k, int64_t K) const { return two[kRows] && k + 2 * kColumns <= K ? 2 * kColumns : kColumns; }
  Tile tile(int rows, int columns) const { return (columns == kColumns ? one : two)[rows]; }
};

template <int... R>
constexpr Micro micro_of(bool avx512, std::integer_sequence<int, R...>) {
  if (avx512) return {{nullptr, avx512_tile<R + 1, 1>...}, {nullptr, avx512_tile<R + 1, 2>...}};
  return {{nullptr, avx2_tile<R + 1>...}, {}};
}

const Micro& micro() {
  static const Micro found = micro_of(isa() == Isa::kAvx512, std::make_integer_sequence<int, kRows>());
  return found;
}

// Rows or tiles per block: a multiple of the microkernel's, as many as fit, and no fewer blocks than threads.
int64_t block_size(int64_t count, int64_t bytes_each, int64_t bytes) {
  const int64_t fits = std::max<int64_t>(1, bytes / bytes_each / kRows) * kRows;
  const int64_t threads = at::get_num_threads();
  const int64_t blocks = (std::max((count + fits - 1) / fits, std::min(threads, count)) + threads - 1) / threads * threads;
  return ((count + blocks - 1) / blocks + kRows - 1) / kRows * kRows;
}

// Y = A^T M A, 8 channels: 2x2 outputs.
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

constexpr int kTogether = 8, kPanelsPacked = 4;  // input channels and panels whose weights are packed together

struct Rows {
  float of[kTogether][kColumns];
};

// rows[c][0:16] = w[c * stride_c + k * stride_k] of 16 output channels k and `count` input channels.
RK_AVX2 void gather(float (*rows)[kColumns], const float* w, int64_t stride_k, int64_t stride_c, int64_t count) {
  if (stride_k == 1) {
    for (int64_t c = 0; c < count; ++c)
      for (int k = 0; k < kColumns; k += 8) _mm256_storeu_ps(rows[c] + k, _mm256_loadu_ps(w + c * stride_c + k));
  } else if (stride_c == 1 && count == kTogether) {
    for (int k = 0; k < kColumns; k += 8) {
      // An 8x8 transpose: pairs, fours, halves.
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

// U = G g G^T of 16 filters at once, of one input channel and a panel's output channels: g[9][16] -> u, whose taps lie
// `tap_stride` floats apart.
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

RK_AVX2 void winograd_block(float* y, const float* x, const float* packed, const float* scale, const float* shift,
                            const float* residual, bool relu, const Map& g, int64_t begin, int64_t end, float* V, float* M) {
  const int64_t count = end - begin, down = g.tiles_down(), across = g.tiles_across();
  for (int64_t t = 0; t < count; ++t) {
    const int64_t n = (begin + t) / (down * across), h = (begin + t) / across % down * 2 - 1, w = (begin + t) % across * 2 - 1;
    const float* patch[16];
    for (int i = 0; i < 16; ++i) {
      const int64_t hi = h + i / 4, wi = w + i % 4;
      const bool inside = hi >= 0 && hi < g.H && wi >= 0 && wi < g.W;
      patch[i] = inside ? x + ((n * g.H + hi) * g.W + wi) * g.C : nullptr;
      // What the next patch but one to the right has that this one has not.
      if (i % 4 >= 2 && hi >= 0 && hi < g.H && wi + 4 < g.W) prefetch(x + ((n * g.H + hi) * g.W + wi + 4) * g.C, g.C);
    }
    for (int64_t c = 0; c < g.C; c += 8) transform_patch(patch, c, V + t * g.C + c, count * g.C);
  }
  const int64_t of_panel = 16 * g.C * kColumns;
  for (int64_t k = 0, columns; k < g.K; k += columns) {
    columns = micro().columns(k, g.K);
    const float* panel = packed + k / kColumns * of_panel;
    for (int p = 0; p < 16; ++p) {
      for (int64_t t = 0; t < count; t += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, count - t));
        const float* a[kRows];
        float* out[kRows];
        for (int r = 0; r < rows; ++r) {
          a[r] = V + (p * count + t + r) * g.C;
          out[r] = M + (p * count + t + r) * columns;
        }
        micro().tile(rows, columns)(1, g.C, a, panel + p * g.C * kColumns, of_panel, out,
                                    Finish{nullptr, nullptr, nullptr, nullptr, false, false});
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

// Too few channels for an inner loop over them alone: the stem's three.
bool rows_as_taps(int64_t C, int64_t S, int64_t dilation) { return C < 8 && S > 1 && dilation == 1; }

// Which rows of x an output position (i, j) of a P x Q grid meets: (i * stride + dh, j * stride + dw) for each tap; and
// where it stands in y: at (i * spread + u, j * spread + v).
struct Grid {
  int64_t P, Q, stride;
  std::vector<int64_t> dh, dw;
  int64_t spread = 1, u = 0, v = 0;
};

Grid grid_of(const Window& win, int64_t P, int64_t Q) {
  Grid grid{P, Q, win.stride, {}, {}};
  for (int64_t tap = 0; tap < win.R * win.S; ++tap) {
    grid.dh.push_back(tap / win.S * win.dilation - win.padding);
    grid.dw.push_back(tap % win.S * win.dilation - win.padding);
  }
  return grid;
}

// depth: how many neighbouring values of a row of x a tap meets: its channels, or more.
void direct(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* scale,
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
  const bool stream = past_cache(result, y.nbytes());
  Blocks blocks(count);
  blocks.run([&] {
    // A block's operand rows of every tap and its result's, found once for all panels; the next one's rows, to be asked
    // for while this one is computed.
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
      const int64_t coming = taps == 1 && next < count ? find_rows(next, next_rows) : 0;
      for (int64_t m = begin; m < begin + rows; ++m) {
        const int64_t n = m / (P * Q), i = m / Q % P, j = m % Q;
        to_row[m - begin] = result + ((n * height + i * grid.spread + grid.u) * width + j * grid.spread + grid.v) * K;
      }
      for (int64_t k = 0, columns; k < K; k += columns) {
        columns = micro().columns(k, K);
        const Finish finish{scale ? scale + k : nullptr, shift ? shift + k : nullptr, residual, result, relu, stream};
        // These columns' share of the next block.
        const int64_t from = (k * depth / K + 15) / 16 * 16, share = (k + columns) * depth / K - from;
        for (int64_t m = 0; m < rows; m += kRows) {
          float* out[kRows];
          const int group = static_cast<int>(std::min<int64_t>(kRows, rows - m));
          for (int r = 0; r < group; ++r) {
            out[r] = to_row[m + r] + k;
            if (!stream) prefetch(out[r], columns);
            if (residual) prefetch(residual + (out[r] - result), columns);
            if (m + r < coming) prefetch<_MM_HINT_T1>(next_rows[m + r] + from, share);
          }
          micro().tile(group, columns)(taps, depth, rows_of.data() + m * taps, b + k * taps * depth, taps * depth * kColumns,
                                       out, finish);
        }
      }
      block = next;
      if (taps == 1) std::swap(rows_of, next_rows), rows = coming;
      else if (block < count) rows = find_rows(block, rows_of);
    }
    if (stream) streamed();
  });
}

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

at::Tensor x86_pack(const at::Tensor& weight, const at::Tensor& scale, bool winograd, bool turned,
                     const std::vector<int64_t>& some) {
  // Read where it lies: NCHW or channels_last, and turned for a data gradient without a copy.
  const auto source = weight.scalar_type() == at::kFloat ? weight : weight.to(at::kFloat);
  const int64_t K = source.size(turned ? 1 : 0), C = source.size(turned ? 0 : 1), R = source.size(2), S = source.size(3);
  const int64_t stride_k = source.stride(turned ? 1 : 0), stride_c = source.stride(turned ? 0 : 1);
  std::vector<int64_t> at_tap;
  for (int64_t tap = 0; tap < R * S; ++tap) at_tap.push_back(tap / S * source.stride(2) + tap % S * source.stride(3));
  if (turned) std::reverse(at_tap.begin(), at_tap.end());
  if (!some.empty()) {
    std::vector<int64_t> chosen;
    for (const int64_t tap : some) chosen.push_back(at_tap[tap]);
    at_tap = chosen;
  }
  const int64_t taps = winograd ? 16 : at_tap.size();
  const auto scales = scale.to(at::kFloat).contiguous();
  const float* w = source.const_data_ptr<float>();
  const float* a = scales.const_data_ptr<float>();
  // From the pool: a replaced model packs at every call.
  auto packed = pooled_nhwc({1, K * taps * C, 1, 1}, source.options());
  float* const out = packed.mutable_data_ptr<float>();
  // Panels that lie side by side in a turned weight are read together.
  const int64_t panels = K / kColumns, together = turned ? kPanelsPacked : 1;
  each_block((panels + together - 1) / together, 1, [&](int64_t group) {
    std::vector<Rows> some(at_tap.size());
    const int64_t last = std::min(panels, (group + 1) * together);
    for (int64_t c = 0; c < C; c += kTogether) {
      const int64_t count = std::min<int64_t>(kTogether, C - c);
      for (int64_t panel = group * together; panel < last; ++panel) {
        const float* const s = a + panel * kColumns;
        float* const to = out + (panel * taps * C + c) * kColumns;
        for (size_t tap = 0; tap < at_tap.size(); ++tap)
          gather(some[tap].of, w + panel * kColumns * stride_k + c * stride_c + at_tap[tap], stride_k, stride_c, count);
        for (int64_t i = 0; i < count; ++i) {
          if (winograd) {
            double scaled[9][kColumns];
            for (int tap = 0; tap < 9; ++tap)
              for (int k = 0; k < kColumns; ++k) scaled[tap][k] = static_cast<double>(some[tap].of[i][k]) * s[k];
            transform_filters(scaled, to + i * kColumns, C * kColumns);
          } else {
            for (int64_t tap = 0; tap < taps; ++tap)
              for (int k = 0; k < kColumns; ++k) to[(tap * C + i) * kColumns + k] = some[tap].of[i][k] * s[k];
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
    // With the padding there, a row of the filter meets S * C neighbouring values: one tap of a filter of one column.
    const auto padded = at::constant_pad_nd(x, {win.padding, win.padding, win.padding, win.padding})
                            .contiguous(at::MemoryFormat::ChannelsLast);
    const Window rows{win.R, 1, win.stride, 0, win.dilation};
    direct(y, padded, packed, scale, shift, residual, relu, grid_of(rows, y.size(2), y.size(3)), win.S * x.size(1));
  } else {
    direct(y, x, packed, scale, shift, residual, relu, grid_of(win, y.size(2), y.size(3)), x.size(1));
  }
}

void x86_data_grad(const at::Tensor& dx, const at::Tensor& g, const at::Tensor& weight, const Window& win) {
  const auto ones = at::ones({dx.size(1)}, dx.options());
  for (int64_t u = 0; u < win.stride; ++u) {
    for (int64_t v = 0; v < win.stride; ++v) {
      // Rows h = stride * i + u of dx: those taps r whose h + padding - r * dilation is stride * p.
      Grid grid{(dx.size(2) - u + win.stride - 1) / win.stride, (dx.size(3) - v + win.stride - 1) / win.stride, 1, {}, {}, win.stride, u, v};
      std::vector<int64_t> taps;
      for (int64_t r = 0; r < win.R; ++r) {
        for (int64_t s = 0; s < win.S; ++s) {
          const int64_t h = u + win.padding - r * win.dilation, w = v + win.padding - s * win.dilation;
          if (h % win.stride != 0 || w % win.stride != 0) continue;
          grid.dh.push_back(h / win.stride);
          grid.dw.push_back(w / win.stride);
          // A turned pack counts taps from the other end.
          taps.push_back(win.R * win.S - 1 - (r * win.S + s));
        }
      }
      const auto packed = taps.empty() ? at::empty({0}, dx.options()) : x86_pack(weight, ones, false, true, taps);
      direct(dx, g, packed, nullptr, nullptr, nullptr, false, grid, g.size(1));
    }
  }
}

void x86_winograd(const at::Tensor& y, const at::Tensor& x, const at::Tensor& packed, const float* scale,
                   const float* shift, const float* residual, bool relu) {
  const Map g{x.size(0), x.size(2), x.size(3), x.size(1), y.size(1)};
  if (g.tiles() == 0) return;
  const float* in = x.const_data_ptr<float>();
  const float* b = packed.const_data_ptr<float>();
  float* const result = y.mutable_data_ptr<float>();
  const bool far = packed.nbytes() > kFarBytes;
  const int64_t per_block = block_size(g.tiles(), 16 * g.C * sizeof(float), far ? kWinogradFarBytes : kWinogradBytes);
  const int64_t count = (g.tiles() + per_block - 1) / per_block;
  Blocks blocks(count, std::max<int64_t>(1, count / (8 * at::get_num_threads())));
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
at::Tensor x86_pack(const at::Tensor&, const at::Tensor&, bool, bool, const std::vector<int64_t>&) { TORCH_CHECK(false, "not an x86-64 build"); }
void x86_direct(const at::Tensor&, const at::Tensor&, const at::Tensor&, const float*, const float*, const float*, bool, const Window&) {}
void x86_winograd(const at::Tensor&, const at::Tensor&, const at::Tensor&, const float*, const float*, const float*, bool) {}
void x86_data_grad(const at::Tensor&, const at::Tensor&, const at::Tensor&, const Window&) {}
bool x86_all_moderate(const at::Tensor&) { return false; }

#endif

}  // namespace resnet_kernels
