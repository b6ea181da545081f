// Host side of pair.cuh.
#include "cuda/sm90/pair.cuh"

#include <cuda_runtime_api.h>

#include "cuda/sm90/api.h"
#include "cuda/sm90/call.h"
#include "cuda/sm90/launch.h"
#include "cuda/sm90/tensor_map.h"

namespace resnet_kernels::sm90 {
namespace {

struct Kernel {
  PairShape shape;
  const void *bf16, *fp16;
};

template <int kInside, int kAhead, int kTiles, int kSlots, int kBuffers>
Kernel kernel() {
  return {{kInside, kAhead, kTiles, kSlots, kBuffers},
          reinterpret_cast<const void*>(&pair_kernel<__nv_bfloat16, kInside, kAhead, kTiles, kSlots, kBuffers>),
          reinterpret_cast<const void*>(&pair_kernel<__half, kInside, kAhead, kTiles, kSlots, kBuffers>)};
}

Kernel find(int inside, int ahead) {
  for (const Kernel& k : {kernel<128, 128, 2, 6, 4>(), kernel<128, 256, 1, 4, 4>(), kernel<256, 256, 1, 3, 4>()})
    if (k.shape.inside == inside && k.shape.ahead == ahead) return k;
  throw std::runtime_error("there is none from " + std::to_string(inside) + " to " + std::to_string(ahead) +
                           " channels");
}

void launch(const ResnetKernelsPair& c, cudaStream_t stream) {
  const Kernel k = find(c.J, c.ahead_channels);
  if (c.K % 64) throw std::runtime_error("expected channels outside in multiples of 64");
  PairParams p{};
  p.tiles = (c.M + kPairRows - 1) / kPairRows, p.parts = c.K / 64;
  p.shift3 = c.shift3, p.shift1 = c.shift1;
  auto map = [&](const char* what, const void* data, int64_t channels, int64_t rows, int box) {
    return tiled_map<2>(what, c.half, data, {channels, rows}, {channels}, {64, box});
  };
  p.x = map("x", c.x, c.J, c.M, kPairRows);
  p.residual = map("residual", c.residual, c.K, c.M, 64);
  p.y = map("y", c.y, c.K, c.M, 64);
  p.ahead = map("ahead", c.ahead, c.ahead_channels, c.M, 64);
  p.w3 = map("w3", c.w3, c.J, c.K, 64);
  p.w1 = map("w1", c.w1, c.K, c.ahead_channels, c.ahead_channels);
  run(c.half ? k.fp16 : k.bf16, p.tiles, c.multiprocessors, kPairThreads, pair_shared_bytes(k.shape), p, stream);
}

}  // namespace
}  // namespace resnet_kernels::sm90

extern "C" const char* resnet_kernels_sm90_pair(const ResnetKernelsPair* call, void* stream) {
  return resnet_kernels::sm90::told("sm90 pair",
                                    [&] { resnet_kernels::sm90::launch(*call, static_cast<cudaStream_t>(stream)); });
}
