// Host side of finalize.cuh: which launches make a table, and which make the gradient of a bottleneck's tail.
#include "cuda/finalize.cuh"

#include "cuda/launch.h"

namespace resnet_kernels {
namespace {

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// workspace product (K, J) = weight M2.
template <typename T>
const char* times_moments(const ResnetKernelsProduct& p, void* stream) {
  return launch("product", product_kernel<T, false>, ceil_div(p.K, kTile) * ceil_div(p.J, kTile), kFinalizeThreads, 0,
                stream, p, nullptr, nullptr);
}

template <typename T>
const char* product_table(const ResnetKernelsProductTable& p, void* stream) {
  if (const char* wrong = times_moments<T>(p.of, stream)) return wrong;
  return launch("product_table", product_table_kernel<T>, ceil_div(p.of.K, kWarps), kFinalizeThreads, 0, stream, p);
}

// Four launches: T = W M2; dgamma, q, A and dweight by row; B = -W^T (q W); v from the rounded A and B.
template <typename T>
const char* tail_grad(const ResnetKernelsTailGrad& p, void* stream) {
  if (const char* wrong = times_moments<T>(p.of, stream)) return wrong;
  if (const char* wrong = launch("tail", tail_kernel<T>, ceil_div(p.of.K, kWarps), kFinalizeThreads, 0, stream, p))
    return wrong;
  const int64_t across = ceil_div(p.of.J, kTile);
  if (const char* wrong = launch("square", product_kernel<T, true>, across * across, kFinalizeThreads, 0, stream, p.of,
                                 static_cast<const float*>(p.q), p.B))
    return wrong;
  return launch("shift", shift_kernel<T>, ceil_div(p.of.J, kColumns), kShiftThreads, 0, stream, p);
}

}  // namespace
}  // namespace resnet_kernels

using namespace resnet_kernels;

const char* resnet_kernels_cuda_table(const ResnetKernelsTable* p, void* stream) {
  return launch("table", table_kernel, ceil_div(p->K, kFinalizeThreads), kFinalizeThreads, 0, stream, *p);
}

const char* resnet_kernels_cuda_bn_grad(const ResnetKernelsBnGrad* p, void* stream) {
  return launch("bn_grad", bn_grad_kernel, ceil_div(p->K, kFinalizeThreads), kFinalizeThreads, 0, stream, *p);
}

const char* resnet_kernels_cuda_product_table(const ResnetKernelsProductTable* p, void* stream) {
  switch (p->of.type) {
    case 0: return product_table<float>(*p, stream);
    case 1: return product_table<__half>(*p, stream);
    case 2: return product_table<__nv_bfloat16>(*p, stream);
  }
  return "product_table: expected a type of 0 to 2 (fp32, fp16, bf16)";
}

const char* resnet_kernels_cuda_tail_grad(const ResnetKernelsTailGrad* p, void* stream) {
  switch (p->of.type) {
    case 0: return tail_grad<float>(*p, stream);
    case 1: return tail_grad<__half>(*p, stream);
    case 2: return tail_grad<__nv_bfloat16>(*p, stream);
  }
  return "tail_grad: expected a type of 0 to 2 (fp32, fp16, bf16)";
}
