// Max pooling. A thread owns whole rows of windows. The inner loops are plain C++ over the channels of one position,
// compiled for several instruction sets. They vectorise without -ffast-math because max is written as a selection that
// keeps NaN.
#include "cpu/max_pool.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <array>
#include <vector>

#include "common/checks.h"
#include "cpu/isa.h"
#include "cpu/memory_pool.h"
#include "cpu/reductions.h"

namespace resnet_kernels {
namespace {

// A "row" below is the C channels of one position. fp32 rows are read in place; bf16 rows are widened before the maximum
// and rounded after it.
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

// Per channel: if v = relu(a*x + b) exceeds best or is NaN, best = v and winners = element.
RK_MULTI_ISA void max_row_winners(float* best, int32_t* winners, const float* x, const float* a, const float* b,
                                int32_t element, int64_t C) {
  for (int64_t c = 0; c < C; ++c) {
    const float t = __builtin_fmaf(a[c], x[c], b[c]), v = t <= 0 ? 0.f : t;
    const bool wins = v > best[c] || v != v;
    best[c] = wins ? v : best[c];
    winners[c] = wins ? element : winners[c];
  }
}

// y = winners as uint8, or kNoWinner where best <= 0.
RK_MULTI_ISA void narrow_row(uint8_t* y, const int32_t* x, const float* best, int64_t C) {
  for (int64_t c = 0; c < C; ++c) y[c] = static_cast<uint8_t>(best[c] <= 0 ? int32_t{kNoWinner} : x[c]);
}

constexpr int64_t kGrain = 32768;  // elements below which waking another thread costs more than it saves

template <typename scalar_t>
void max_pool_rows(scalar_t* y, const scalar_t* x, int64_t N, int64_t H, int64_t W, int64_t C, int64_t P, int64_t Q,
                   int64_t kernel, int64_t stride, int64_t padding) {
  at::parallel_for(0, N * P, std::max<int64_t>(1, kGrain / (Q * C)), [&](int64_t begin, int64_t end) {
    std::vector<float> widened(C), best(C);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / P, h0 = (row % P) * stride - padding;
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t w0 = q * stride - padding;
        // max of relu(x) is max(0, max of x), and every window holds at least one element.
        std::fill(best.begin(), best.end(), 0.f);
        for (int64_t h = std::max<int64_t>(h0, 0); h < std::min(h0 + kernel, H); ++h)
          for (int64_t w = std::max<int64_t>(w0, 0); w < std::min(w0 + kernel, W); ++w)
            max_row(best.data(), as_float(x + ((n * H + h) * W + w) * C, widened, C), C);
        store(y + (row * Q + q) * C, best.data(), C);
      }
    }
  });
}

// Checks the arguments of max pooling and returns the sizes (N, C, P, Q) of its result.
std::array<int64_t, 4> pooled_sizes(const at::Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  check_cpu(x, "x");
  check_nhwc(x, "x");
  TORCH_CHECK(padding >= 0 && 2 * padding <= kernel && stride > 0, "max pool: expected 2 * padding <= kernel and a stride of at least 1, got kernel ", kernel, ", stride ", stride,
              ", padding ", padding);
  const int64_t H = x.size(2), W = x.size(3);
  TORCH_CHECK(H + 2 * padding >= kernel && W + 2 * padding >= kernel, "max pool: expected a window that fits, but a window of ",
              kernel, " does not fit a map of ", H, " x ", W, " padded by ", padding);
  return {x.size(0), x.size(1), (H + 2 * padding - kernel) / stride + 1, (W + 2 * padding - kernel) / stride + 1};
}

}  // namespace

at::Tensor cpu_max_pool_relu(const at::Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  auto y = allocate_nhwc(pooled_sizes(x, kernel, stride, padding), x.options());
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
  auto y = allocate_nhwc(pooled_sizes(x, kernel, stride, padding), x.options());
  RK_CHECK_EQ(x.scalar_type(), at::kFloat, "x");
  TORCH_CHECK(kernel * kernel < kNoWinner, "max pool: expected a kernel of at most 15 for winners, got ", kernel);
  TORCH_CHECK(a.has_value() == b.has_value(), "max pool: expected a with b, got one of the two");
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), P = y.size(2), Q = y.size(3);
  const auto scale = a.value_or(at::Tensor()), shift = b.value_or(at::Tensor());
  for (const auto& t : {scale, shift})
    if (t.defined()) check_per_channel(t, C, "a and b");
  auto winners = allocate_nhwc(y.sizes(), x.options().dtype(at::kByte));
  if (y.numel() == 0) return {y, winners};
  const std::vector<float> ones(C, 1.f), zeros(C);
  const float* const in = x.const_data_ptr<float>();
  const float* const a_values = scale.defined() ? scale.const_data_ptr<float>() : ones.data();
  const float* const b_values = shift.defined() ? shift.const_data_ptr<float>() : zeros.data();
  float* const out = y.mutable_data_ptr<float>();
  uint8_t* const winners_out = winners.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, N * P, std::max<int64_t>(1, kGrain / (Q * C)), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> winners_row(C);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / P, h0 = (row % P) * stride - padding;
      for (int64_t q = 0; q < Q; ++q) {
        const int64_t w0 = q * stride - padding, at = (row * Q + q) * C;
        // Below any value of a ReLU, so that the first element of a window becomes its first maximum.
        std::fill(out + at, out + at + C, -1.f);
        for (int64_t h = std::max<int64_t>(h0, 0); h < std::min(h0 + kernel, H); ++h)
          for (int64_t w = std::max<int64_t>(w0, 0); w < std::min(w0 + kernel, W); ++w)
            max_row_winners(out + at, winners_row.data(), in + ((n * H + h) * W + w) * C, a_values, b_values,
                            static_cast<int32_t>((h - h0) * kernel + w - w0), C);
        narrow_row(winners_out + at, winners_row.data(), out + at, C);
      }
    }
  });
  return {y, winners};
}

}  // namespace resnet_kernels
