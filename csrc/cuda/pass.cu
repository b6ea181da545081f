// Host side of pass.cuh: the number of parts, and the choice of the template instance.
#include "cuda/pass.cuh"

#include <algorithm>
#include <string>

#include "cuda/launch.h"

namespace resnet_kernels {
namespace {

// Twice what a multiprocessor holds at once at most (4): CTAs that finish early leave their place to others, which
// balances the load.
constexpr int kBlocksPerMultiprocessor = 8;
// The minimum rows of a thread that are worth a CTA.
constexpr int kRowsOfAPart = 4;

template <typename T, int kReduce, bool kAligned, bool kFull>
const char* run(const ResnetKernelsPass& p, void* stream) {
  const int64_t blocks = Layout(p.C).tiles * ((p.M + p.span - 1) / p.span);
  const char* wrong = launch("pass", pass_kernel<T, kReduce, kAligned, kFull>, blocks, kThreads, 0, stream, p);
  if constexpr (kReduce == kStats || kReduce == kSums) {
    const int64_t across = (p.C + kMergeChannels - 1) / kMergeChannels;
    if (!wrong) wrong = launch("merge", merge_kernel<kReduce>, across, kMergeThreads, 0, stream, p);
  }
  return wrong;
}

// Unaligned calls share one instance with all features. Aligned ones without a second tensor and a residual have a
// leaner one.
template <typename T, int kReduce>
const char* by_alignment(const ResnetKernelsPass& p, void* stream) {
  if (!p.aligned) return run<T, kReduce, false, true>(p, stream);
  const bool full = p.x.second.data || p.residual.view.data;
  return full ? run<T, kReduce, true, true>(p, stream) : run<T, kReduce, true, false>(p, stream);
}

template <typename T>
const char* by_reduction(const ResnetKernelsPass& p, void* stream) {
  switch (p.reduce) {
    case kNothing: return by_alignment<T, kNothing>(p, stream);
    case kStats: return by_alignment<T, kStats>(p, stream);
    case kSums: return by_alignment<T, kSums>(p, stream);
    case kBits: return by_alignment<T, kBits>(p, stream);
  }
  return "pass: expected a reduction of 0 to 3 (none, statistics, sums, mask bits)";
}

}  // namespace
}  // namespace resnet_kernels

using namespace resnet_kernels;

const char* resnet_kernels_cuda_pass(const ResnetKernelsPass* p, void* stream) {
  switch (p->type) {
    case 0: return by_reduction<float>(*p, stream);
    case 1: return by_reduction<__half>(*p, stream);
    case 2: return by_reduction<__nv_bfloat16>(*p, stream);
  }
  return "pass: expected a type of 0 to 2 (fp32, fp16, bf16)";
}

int64_t resnet_kernels_cuda_span(int64_t M, int64_t C, int64_t multiprocessors) {
  const Layout layout(static_cast<int>(C));
  const int64_t at_once = layout.down * kRowsOfAPart;
  const int64_t wanted = std::max<int64_t>(1, multiprocessors * kBlocksPerMultiprocessor / layout.tiles);
  const int64_t parts = std::max<int64_t>(1, std::min((M + at_once - 1) / at_once, wanted));
  return std::max<int64_t>(1, (M + parts * at_once - 1) / (parts * at_once)) * at_once;
}

int32_t resnet_kernels_cuda_bytes(const char* name) {
  const std::string of = name;
  return of == "pass"            ? sizeof(ResnetKernelsPass)
         : of == "table"         ? sizeof(ResnetKernelsTable)
         : of == "bn_grad"       ? sizeof(ResnetKernelsBnGrad)
         : of == "product_table" ? sizeof(ResnetKernelsProductTable)
         : of == "tail_grad"     ? sizeof(ResnetKernelsTailGrad)
         : of == "max_pool"      ? sizeof(ResnetKernelsPool)
         : of == "max_pool_grad" ? sizeof(ResnetKernelsPool)
         : of == "outer"         ? sizeof(ResnetKernelsOuter)
                                 : 0;
}
