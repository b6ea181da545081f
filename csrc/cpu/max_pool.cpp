// Each thread has rows of windows; the inner loops are plain C++ over one row of channels, compiled for several
// instruction sets: they vectorise without -ffast-math because max is written as the selection that keeps NaN.
#include "cpu/max_pool.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <array>
#include <vector>

#include "common/checks.h"
#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/reductions.h"

namespace resnet_kernels {
namespace {

// fp32 rows pass through unchanged; bf16 rows are widened on the way in and rounded on the way out.
RK_MULTI_ISA void max_row(float* y, const float* x, int64_t C) {
  for (int64_t c = 0; c < C; ++c) y[c] = x[c] > y[c] || x[c] != x[c] ? x[c] : y[c];
}

RK_MULTI_ISA void widen_row(float* y, const at::BFloat16* x, int64_t C) {
  for (int64_t c = 0; c < C; ++c) y[c] = static_cast<float>(x[c]);
}

RK_MULTI_ISA void round_row(at::BFloat16* y, const float* x, int64_t C) {
  for (int64_t c = 0; c < C; ++c) y[c] = static_cast<at::BFloat16>(x[c]);
}

const float* as_float(const float* x, std::vector<float>&, int64_t) { return x; }

const float* as_float(const at::BFloat16* x, std::vector<float>& row, int64_t C) {
  widen_row(row.data(), x, C);
  return row.data();
}

void store(float* y, const float* x, int64_t C) { std::copy(x, x + C, y); }
void store(at::BFloat16* y, const float* x, int64_t C) { round_row(y, x, C); }

// Where relu(a*x + b) is above best, it and its place take over.
RK_MULTI_ISA void max_row_winners(float* best, int32_t* winners, const float* x, const float* a, const float* b,
                                int32_t element, int64_t C) {
  for (int64_t c = 0; c < C; ++c) {
    const float t = __builtin_fmaf(a[c], x[c], b[c]), v = t <= 0 ? 0.f : t;
    const bool wins = v > best[c] || v != v;
    best[c] = wins ? v : best[c];
    winners[c] = wins ? element : winners[c];
  }
}

RK_MULTI_ISA void narrow_row(uint8_t* y, const int32_t* x, const float* best, int64_t C) {
  for (int64_t c = 0; c < C; ++c) y[c] = static_cast<uint8_t>(best[c] <= 0 ? int32_t{kNoWinner} : x[c]);
}

constexpr int64_t kGrain = 32768;  // elements a thread must have to be worth waking

template <typename scalar_t>
void max_pool_rows(scalar_t* y, const scalar_t* x, int64_t N, int64_t H, int64_t W, int64_t C, int64_t P, int64_t Q,
                   int64_t kernel, int64_t stride, int64_t padding) {
  at::parallel_for(0, N * P, std::max<int64_t>(1, kGrain / (Q * C)), [&](int64_t begin, int64_t end) {
    std::vector<float> wide_x(C), best(C);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / P, h0 = (row % P) * stride - padding;
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t w0 = q * stride - padding;
        // max(relu(.)) = max(0, .), and every window holds at least one element.
        std::fill(best.begin(), best.end(), 0.f);
        for (int64_t h = std::max<int64_t>(h0, 0); h < std::min(h0 + kernel, H); ++h)
          for (int64_t w = std::max<int64_t>(w0, 0); w < std::min(w0 + kernel, W); ++w)
            max_row(best.data(), as_float(x + ((n * H + h) * W + w) * C, wide_x, C), C);
        store(y + (row * Q + q) * C, best.data(), C);
      }
    }
  });
}

std::array<int64_t, 4> pooled_sizes(const at::Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  check_cpu(x, "x");
  check_nhwc(x, "x");
  TORCH_CHECK(padding >= 0 && 2 * padding <= kernel && stride > 0, "max pool: expected 2 * padding <= kernel, got kernel ",
              kernel, ", stride ", stride, ", padding ", padding);
  const int64_t H = x.size(2), W = x.size(3);
  TORCH_CHECK(H + 2 * padding >= kernel && W + 2 * padding >= kernel, "max pool: a window of ", kernel,
              " does not fit a map of ", H, " x ", W, " padded by ", padding);
  return {x.size(0), x.size(1), (H + 2 * padding - kernel) / stride + 1, (W + 2 * padding - kernel) / stride + 1};
}

}  // namespace

at::Tensor cpu_max_pool_relu(const at::Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  auto y = pooled_nhwc(pooled_sizes(x, kernel, stride, padding), x.options());
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), P = y.size(2), Q = y.size(3);
  if (y.numel() == 0) return y;
  AT_DISPATCH_SWITCH(x.scalar_type(), "max_pool_relu",
                     AT_DISPATCH_CASE(at::kFloat, [&] {
                       max_pool_rows(y.mutable_data_ptr<float>(), x.const_data_ptr<float>(), N, H, W, C, P, Q, kernel,
                                     stride, padding);
                     }) AT_DISPATCH_CASE(at::kBFloat16, [&] {
                       max_pool_rows(y.mutable_data_ptr<at::BFloat16>(), x.const_data_ptr<at::BFloat16>(), N, H, W, C,
                                     P, Q, kernel, stride, padding);
                     }));
  return y;
}

std::pair<at::Tensor, at::Tensor> cpu_max_pool_relu_winners(const at::Tensor& x, const std::optional<at::Tensor>& a,
                                                          const std::optional<at::Tensor>& b, int64_t kernel,
                                                          int64_t stride, int64_t padding) {
  auto y = pooled_nhwc(pooled_sizes(x, kernel, stride, padding), x.options());
  RK_CHECK_EQ(x.scalar_type(), at::kFloat, "x");
  TORCH_CHECK(kernel * kernel < kNoWinner, "max pool: expected a kernel of at most 15 for winners, got ", kernel);
  TORCH_CHECK(a.has_value() == b.has_value(), "max pool: expected a with b");
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), P = y.size(2), Q = y.size(3);
  const auto scale = a.value_or(at::Tensor()), shift = b.value_or(at::Tensor());
  for (const auto& t : {scale, shift})
    if (t.defined()) check_per_channel(t, C, "a and b");
  auto winners = pooled_nhwc(y.sizes(), x.options().dtype(at::kByte));
  if (y.numel() == 0) return {y, winners};
  const std::vector<float> ones(C, 1.f), zeros(C);
  const float *from = x.const_data_ptr<float>(), *times = scale.defined() ? scale.const_data_ptr<float>() : ones.data(),
              *plus = shift.defined() ? shift.const_data_ptr<float>() : zeros.data();
  float* const to = y.mutable_data_ptr<float>();
  uint8_t* const places = winners.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, N * P, std::max<int64_t>(1, kGrain / (Q * C)), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> place(C);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / P, h0 = (row % P) * stride - padding;
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t w0 = q * stride - padding, at = (row * Q + q) * C;
        // Below any relu(.), so that the first element of a window is one of its maxima.
        std::fill(to + at, to + at + C, -1.f);
        for (int64_t h = std::max<int64_t>(h0, 0); h < std::min(h0 + kernel, H); ++h)
          for (int64_t w = std::max<int64_t>(w0, 0); w < std::min(w0 + kernel, W); ++w)
            max_row_winners(to + at, place.data(), from + ((n * H + h) * W + w) * C, times, plus,
                          static_cast<int32_t>((h - h0) * kernel + w - w0), C);
        narrow_row(places + at, place.data(), to + at, C);
      }
    }
  });
  return {y, winners};
}

}  // namespace resnet_kernels
