// The tile shapes of conv_act. Each is compiled in a file of its own, conv_act_NAME.cu, so that they compile in
// parallel. launchers.py lists the same tiles in the same order.
#pragma once

#include "cuda/sm90/conv_act.h"

namespace resnet_kernels::sm90 {

// Name; positions per warp group, output channels, stages, in_turn (ping-pong), reduction.
#define RESNET_KERNELS_TILES(X)                           \
  X(turn128x128, 128, 128, 5, true, Reduce::kNothing)     \
  X(turn128x64, 128, 64, 8, true, Reduce::kNothing)       \
  X(both64x256, 64, 256, 3, false, Reduce::kNothing)      \
  X(stats128x128, 128, 128, 4, true, Reduce::kStatistics) \
  X(stats128x64, 128, 64, 7, true, Reduce::kStatistics)   \
  X(sums128x64, 128, 64, 7, true, Reduce::kSums)

#define X(NAME, ...)                            \
  namespace tiles {                             \
  inline constexpr TileShape NAME{__VA_ARGS__}; \
  }                                             \
  const void* NAME##_bf16();                    \
  const void* NAME##_fp16();
RESNET_KERNELS_TILES(X)
#undef X

struct ConvTile {
  const char* name;
  TileShape shape;
  const void* (*kernel)(bool half);
};

#define X(NAME, ...) {#NAME, tiles::NAME, [](bool half) { return half ? NAME##_fp16() : NAME##_bf16(); }},
inline const ConvTile kTiles[] = {RESNET_KERNELS_TILES(X)};
#undef X

}  // namespace resnet_kernels::sm90
