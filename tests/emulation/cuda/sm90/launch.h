// Replaces csrc/cuda/sm90/launch.h: the grid runs on this CPU and has completed when run returns.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "cuda/sm90/copy_engine.h"
#include "cuda/sm90/shared_memory.h"
#include "cuda/sm90/tensor_cores.h"
#include "threads.h"

namespace emulation {

inline const char* unawaited_by(unsigned thread) {
  if (!stores[thread].open.empty() || !stores[thread].groups.empty()) return "it had waited for its TMA stores";
  const auto& products = warp_groups[thread / kWarpGroup].of[thread % kWarpGroup];
  if (!products.open.empty() || !products.ended.empty()) return "it had waited for its wgmma batches";
  return nullptr;
}

inline void begin_block(uint32_t threads, uint32_t bytes) {
  take_shared_memory(bytes);
  stores.assign(threads, {});
  warp_groups.assign((threads + kWarpGroup - 1) / kWarpGroup, {});
  unawaited = unawaited_by;
  reverse_odd_blocks = true;
}

}  // namespace emulation

namespace resnet_kernels::sm90 {

template <class Params>
void run(const void* kernel, int64_t tiles, int multiprocessors, int threads, int bytes, Params& params, cudaStream_t) {
  const auto function = reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel));
  const dim3 grid(std::min<int64_t>(tiles, multiprocessors)), size(threads);
  for (unsigned x = 0; x < grid.x; ++x) {
    emulation::begin_block(threads, bytes);
    emulation::run_block(grid, size, dim3(x), [&] { function(params); });
  }
}

}  // namespace resnet_kernels::sm90
