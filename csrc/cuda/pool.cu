// Host side of pool.cuh.
#include "cuda/pool.cuh"

#include "cuda/launch.h"

namespace resnet_kernels {
namespace {

template <typename T>
const char* run(const ResnetKernelsPool& p, bool gradient, void* stream) {
  const int64_t positions = int64_t{p.N} * (gradient ? int64_t{p.H} * p.W : int64_t{p.P} * p.Q);
  const int64_t blocks = (positions * ((p.C + 7) / 8) + kPoolThreads - 1) / kPoolThreads;
  const char* name = gradient ? "max_pool_grad" : "max_pool";
  auto* const kernel = p.aligned ? (gradient ? max_pool_grad_kernel<T, true> : max_pool_kernel<T, true>)
                                 : (gradient ? max_pool_grad_kernel<T, false> : max_pool_kernel<T, false>);
  return launch(name, kernel, blocks, kPoolThreads, 0, stream, p);
}

const char* by_type(const ResnetKernelsPool& p, bool gradient, void* stream) {
  switch (p.type) {
    case 0: return run<float>(p, gradient, stream);
    case 1: return run<__half>(p, gradient, stream);
    case 2: return run<__nv_bfloat16>(p, gradient, stream);
  }
  return "max_pool: expected a type of 0 to 2 (fp32, fp16, bf16)";
}

}  // namespace
}  // namespace resnet_kernels

const char* resnet_kernels_cuda_max_pool(const ResnetKernelsPool* p, void* stream) {
  return resnet_kernels::by_type(*p, false, stream);
}

const char* resnet_kernels_cuda_max_pool_grad(const ResnetKernelsPool* p, void* stream) {
  return resnet_kernels::by_type(*p, true, stream);
}
