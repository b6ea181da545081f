// Host side of stem.cuh.
#include "cuda/sm90/stem.cuh"

#include <cuda_runtime_api.h>

#include "cuda/sm90/api.h"
#include "cuda/sm90/call.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace resnet_kernels::sm90 {
namespace {

void launch(const ResnetKernelsStem& c, cudaStream_t stream) {
  StemParams p{};
  p.P = output_size(c.H, 7, 2, 3, 1), p.Q = output_size(c.W, 7, 2, 3, 1);
  p.PP = output_size(p.P, 3, 2, 1, 1), p.PQ = output_size(p.Q, 3, 2, 1, 1);
  if (p.Q > kStemColumns) throw std::runtime_error("expected an image of at most 224 columns");
  p.images = c.N, p.w = c.w, p.shift = c.shift;
  p.x = row_map("x", c.x, c.N, c.H, c.W, kStemCopyBytes / 4);
  p.y = tiled_map<3>("y", c.half, c.y, {kStemChannels, p.PQ, int64_t{c.N} * p.PP},
                     {kStemChannels, int64_t{kStemChannels} * p.PQ}, {64, kStemColumns / 2, 1});
  const int64_t blocks = (int64_t{c.N} * p.PP + kStemGroups - 1) / kStemGroups;
  const void* kernel = c.half ? reinterpret_cast<const void*>(&stem_kernel<__half>)
                              : reinterpret_cast<const void*>(&stem_kernel<__nv_bfloat16>);
  run(kernel, blocks, c.multiprocessors, kStemThreads, kStemSharedBytes, p, stream);
}

}  // namespace
}  // namespace resnet_kernels::sm90

extern "C" const char* resnet_kernels_sm90_stem(const ResnetKernelsStem* call, void* stream) {
  return resnet_kernels::sm90::told("sm90 stem",
                                    [&] { resnet_kernels::sm90::launch(*call, static_cast<cudaStream_t>(stream)); });
}
