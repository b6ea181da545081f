// Host side of outer.cuh: tile and span selection, and the launches.
#include "cuda/outer.cuh"

#include <algorithm>

#include "cuda/launch.h"

namespace resnet_kernels {
namespace {

// The minimum rows of a part: fewer are not worth a partial sum of their own.
constexpr int64_t kLeastSpan = 512;

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The tile's side: 64 if a tile of 128 would be half empty, and for fp32 (the FMA kernel).
int tile_of(int64_t K, int64_t C, int type) { return type == 0 || std::min(K, C) <= 64 ? 64 : 128; }

template <typename T, int kTile>
const char* by_alignment(const ResnetKernelsOuter& p, int64_t blocks, void* stream) {
  auto* const kernel = p.aligned ? outer_kernel<T, kTile, true> : outer_kernel<T, kTile, false>;
  return launch("outer", kernel, blocks, Tile<kTile>::kThreads, Tile<kTile>::kSharedBytes, stream, p);
}

template <typename T>
const char* by_tile(const ResnetKernelsOuter& p, int tile, int64_t blocks, void* stream) {
  return tile == 64 ? by_alignment<T, 64>(p, blocks, stream) : by_alignment<T, 128>(p, blocks, stream);
}

const char* products(const ResnetKernelsOuter& p, void* stream) {
  const int tile = tile_of(p.K, p.C, p.type);
  const int64_t blocks = ceil_div(p.K, tile) * ceil_div(p.C, tile) * ceil_div(p.M, p.span);
  switch (p.type) {
    case 0: return launch("outer_fma", outer_fma_kernel, blocks, kFmaThreads, 0, stream, p);
    case 1: return by_tile<__half>(p, tile, blocks, stream);
    case 2: return by_tile<__nv_bfloat16>(p, tile, blocks, stream);
  }
  return "outer: expected a type of 0 to 2 (fp32, fp16, bf16)";
}

}  // namespace
}  // namespace resnet_kernels

using namespace resnet_kernels;

const char* resnet_kernels_cuda_outer(const ResnetKernelsOuter* p, void* stream) {
  if (const char* wrong = products(*p, stream)) return wrong;
  const int64_t across = ceil_div(p->K, kMergeChannels);
  if (p->moments) return launch("merge_moments", merge_moments_kernel, p->K * across, kMergeThreads, 0, stream, *p);
  if (p->span >= p->M) return nullptr;
  const int64_t blocks = ceil_div(int64_t{p->K} * p->C, kMergeChannels) + (p->sums ? across : 0);
  return launch("add_parts", add_parts_kernel, blocks, kMergeThreads, 0, stream, *p);
}

int64_t resnet_kernels_cuda_outer_span(int64_t M, int64_t K, int64_t C, int64_t moments, int64_t type,
                                       int64_t multiprocessors) {
  const int tile = tile_of(K, C, static_cast<int>(type));
  const int64_t across = ceil_div(K, tile), tiles = moments ? across * (across + 1) / 2 : across * ceil_div(C, tile);
  // CTAs resident on the whole GPU, as limited by registers and shared memory.
  const int64_t at_once = multiprocessors * (tile == 128 ? 1 : 3);
  const int64_t parts = std::max<int64_t>(1, std::min(at_once / tiles, M / kLeastSpan));
  return ceil_div(M, parts * kFlushRows) * kFlushRows;
}
