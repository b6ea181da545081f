// Each thread has rows of windows; the inner loops are plain C++ over one row of channels, compiled for several
// instruction sets: they vectorise without -ffast-math because max is written as the selection that keeps NaN.
#include "cpu/max_pool.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <limits>
#include <vector>

#include "common/checks.h"
#include "cpu/isa.h"
#include "cpu/pool.h"

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

}  // namespace

at::Tensor cpu_max_pool_relu(const at::Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  check_cpu(x, "x");
  check_nhwc(x, "x");
  TORCH_CHECK(padding >= 0 && 2 * padding <= kernel && stride > 0, "max pool: expected 2 * padding <= kernel, got kernel ",
              kernel, ", stride ", stride, ", padding ", padding);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  const int64_t P = (H + 2 * padding - kernel) / stride + 1, Q = (W + 2 * padding - kernel) / stride + 1;
  TORCH_CHECK(H + 2 * padding >= kernel && W + 2 * padding >= kernel, "max pool: a window of ", kernel,
              " does not fit a map of ", H, " x ", W, " padded by ", padding);
  auto y = pooled_nhwc({N, C, P, Q}, x.options());
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

}  // namespace resnet_kernels
