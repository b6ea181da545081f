// Memory-bound passes of training over NHWC fp32 activations: everything an Operand and an Epilogue of the contract
// (resnet_kernels/backends/contract.py) can hold, and per-channel reductions beside it.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <utility>

namespace resnet_kernels {

// Of max pooling: kernel, stride, padding, and the map (H, W) that was pooled.
struct PoolWindow {
  int64_t kernel, stride, padding, H, W;
};

constexpr uint8_t kNoWinner = 255;  // in `Lazy::winners`: what is at x there goes nowhere

// A tensor seen through what is applied to it, in this order; absent parts are undefined tensors.
struct Lazy {
  at::Tensor x;                 // (N, C, H, W); with winners, of the pooled map
  at::Tensor mask;              // of x's sizes: x where not (mask <= 0), else 0
  at::Tensor a, b;              // a*x + b
  at::Tensor second, a2, mean;  // + a2*(second - mean)
  bool relu = false;
  at::Tensor centre;            // - centre
  // First of all: uint8 of x's sizes, which element of its window, row by row, each maximum was. Every element of the
  // map that was pooled is the sum of x over the windows whose maximum it was.
  at::Tensor winners;
  PoolWindow window{};

  // Of what it stands for.
  std::array<int64_t, 4> sizes() const {
    return {x.size(0), x.size(1), winners.defined() ? window.H : x.size(2), winners.defined() ? window.W : x.size(3)};
  }
};

// What happens to it then, in this order.
struct Finish {
  at::Tensor shift;
  std::optional<Lazy> residual;
  bool relu = false;
  std::optional<Lazy> kept;  // where not (kept <= threshold), else 0
  float threshold = 0;
};

enum class Reduce { kNone, kStats, kNormalized };

struct Passed {
  at::Tensor y;              // undefined if not stored
  at::Tensor first, second;  // kStats: mean, M2; kNormalized: sum(y), sum(y * (xhat - mean)) * rstd
};

// y = finish(x), reduced. `out` is where y goes (it may be any of the operands: each row is read before it is written);
// undefined and `store`: a new tensor. Partial sums are taken over a fixed number of rows, so that the result does not
// depend on the number of threads, merged in fp64.
Passed cpu_pass(const Lazy& x, const Finish& finish, bool store, const at::Tensor& out, Reduce reduce,
                const at::Tensor& xhat, const at::Tensor& mean, const at::Tensor& rstd);

// Every stride-th row and column of x.
at::Tensor cpu_subsampled(const at::Tensor& x, int64_t stride);

}  // namespace resnet_kernels
