#include "cuda/bn_pass.cuh"

#include <algorithm>
#include <numeric>

#include "cuda/launchers.h"

namespace resnet_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 8;  // 2048 threads: full occupancy on sm_80 to sm_100

template <typename T, int kWidth>
cudaError_t launch(void* y, const void* x, const float* scale, const float* shift, const void* residual, bool relu,
                   int64_t rows, int64_t channels, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  if (const auto error = cudaGetDevice(&device)) return error;
  if (const auto error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) return error;
  const int64_t vectors = rows * channels / kWidth, per_row = channels / kWidth;
  const int64_t wanted = std::min<int64_t>((vectors + kThreads - 1) / kThreads,
                                           int64_t{multiprocessors} * kBlocksPerMultiprocessor);
  // Up to the next grid whose threads are a multiple of a row's vectors.
  const int64_t whole_rows = per_row / std::gcd(per_row, int64_t{kThreads});
  const int64_t blocks = (wanted + whole_rows - 1) / whole_rows * whole_rows;
  bn_pass_kernel<T, kWidth><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<T*>(y), static_cast<const T*>(x), scale, shift, static_cast<const T*>(residual), relu, vectors,
      static_cast<int>(per_row));
  return cudaGetLastError();
}

template <typename T>
cudaError_t choose_width(void* y, const void* x, const float* scale, const float* shift, const void* residual,
                         bool relu, int64_t rows, int64_t channels, cudaStream_t stream) {
  constexpr int kWidth = 16 / sizeof(T);
  const auto address = reinterpret_cast<uintptr_t>(y) | reinterpret_cast<uintptr_t>(x) |
                       reinterpret_cast<uintptr_t>(residual);
  const bool wide = channels % kWidth == 0 && address % 16 == 0;
  return wide ? launch<T, kWidth>(y, x, scale, shift, residual, relu, rows, channels, stream)
              : launch<T, 1>(y, x, scale, shift, residual, relu, rows, channels, stream);
}

}  // namespace

cudaError_t bn_pass(Scalar type, void* y, const void* x, const float* scale, const float* shift, const void* residual,
                    bool relu, int64_t rows, int64_t channels, cudaStream_t stream) {
  if (rows == 0 || channels == 0) return cudaSuccess;
  switch (type) {
    case Scalar::kFloat:
      return choose_width<float>(y, x, scale, shift, residual, relu, rows, channels, stream);
    case Scalar::kHalf:
      return choose_width<__half>(y, x, scale, shift, residual, relu, rows, channels, stream);
    case Scalar::kBFloat16:
      return choose_width<__nv_bfloat16>(y, x, scale, shift, residual, relu, rows, channels, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace resnet_kernels
