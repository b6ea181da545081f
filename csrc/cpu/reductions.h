// The memory-bound passes of training over NHWC fp32 activations. A pass applies everything that an Operand and an Epilogue
// of the contract (resnet_kernels/backends/contract.py) can hold, and computes per-channel reductions of the result.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <utility>

namespace resnet_kernels {

// Max pooling: kernel, stride, padding, and the map (H, W) before pooling.
struct PoolWindow {
  int64_t kernel, stride, padding, H, W;
};

// The value in `Lazy::winners` of a window whose gradient goes to no element.
constexpr uint8_t kNoWinner = 255;

// An Operand of the contract: a tensor and what is applied to it while it is read. First winners, then the other fields in
// the order below. Absent fields are undefined tensors.
struct Lazy {
  at::Tensor x;                 // (N, C, H, W); with winners, a gradient of the pooled map
  at::Tensor mask;              // of sizes(): x where not (mask <= 0), else 0
  at::Tensor a, b;              // a*x + b
  at::Tensor second, a2, mean;  // + a2*(second - mean)
  bool relu = false;
  at::Tensor centre;            // - centre
  // uint8 of x's sizes: the position of each maximum within its window, counted row by row. Each element of the map before
  // pooling becomes the sum of x over the windows whose maximum it was.
  at::Tensor winners;
  PoolWindow window{};

  // The sizes of the value: with winners those of the map before pooling.
  std::array<int64_t, 4> sizes() const {
    return {x.size(0), x.size(1), winners.defined() ? window.H : x.size(2), winners.defined() ? window.W : x.size(3)};
  }
};

// An Epilogue of the contract: what happens to the value, in this order.
struct PassEpilogue {
  at::Tensor shift;
  std::optional<Lazy> residual;
  bool relu = false;
  std::optional<Lazy> mask;  // the value where not (mask <= threshold), else 0
  float threshold = 0;
};

enum class Reduce { kNone, kStats, kNormalized };

struct PassResult {
  at::Tensor y;              // undefined if not stored
  at::Tensor first, second;  // kStats: mean, M2; kNormalized: sum(y), sum(y * (xhat - mean)) * rstd
};

// Computes y = epilogue(x) and its reduction. store: write y, to `out` or, if that is undefined, to a new tensor. `out` may
// be any of the operands, since each row is read before it is written. xhat, mean and rstd: for kNormalized only. Partial
// sums cover fixed numbers of rows and are merged in fp64, so the result does not depend on the number of threads.
PassResult cpu_pass(const Lazy& x, const PassEpilogue& epilogue, bool store, const at::Tensor& out, Reduce reduce,
                const at::Tensor& xhat, const at::Tensor& mean, const at::Tensor& rstd);

// Returns every stride-th row and column of x, of any dtype.
at::Tensor cpu_subsampled(const at::Tensor& x, int64_t stride);

}  // namespace resnet_kernels
