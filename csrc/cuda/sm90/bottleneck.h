// A whole bottleneck of 64 inner channels, for sm_90a: kernel parameters and shared memory sizes, without device code.
#pragma once

#include <cuda.h>

#include "cuda/sm90/index.h"

namespace resnet_kernels::sm90 {

struct BottleneckParams {
  CUtensorMap x, y;           // (N, H, W, C) and (N, H, W, 256)
  CUtensorMap w1, w, w3, wp;  // (64, C), (64, 9, 64), (256, 64), and the projection's (256, 64)
  const float *shift1, *shift, *shift3;
  int strips, strips_of_image, rows, H, W;  // rows: output rows of a strip, even
};

constexpr int kBottleneckThreads = 384;
constexpr int kBottleneckJ = 64, kBottleneckK = 256, kBottleneckColumns = 56;  // inner, outer channels; max width

// Bytes of an item: one slice of 64 channels of one row of the map.
constexpr int kBottleneckItem = kBottleneckColumns * kRow;
// Bytes of the ring of rows of a, with the rows that a 64-position wgmma reads beyond the last, rounded up to multiples
// of 1024 bytes.
constexpr int kBottleneckA = (kRowsOfA * (kBottleneckColumns + 2) + 14) / 8 * 8 * kRow;

// With the identity shortcut x has 256 channels, with a projection 64. slices: of x. slots: of the ring of x. buffers:
// results buffers of a consumer warp group. projected: 1 if each warp group has a buffer of x for the projection.
struct BottleneckShape {
  bool projection;
  constexpr int slices() const { return projection ? 1 : kBottleneckK / kSlice; }
  constexpr int slots() const { return projection ? 2 : 3; }
  constexpr int buffers() const { return projection ? 1 : 2; }
  constexpr int projected() const { return projection ? 1 : 0; }
  constexpr int weights() const {
    return (9 * kBottleneckJ + slices() * kBottleneckJ + (1 + projected()) * kBottleneckK) * kRow;
  }
  constexpr int shared_bytes() const {
    return weights() + kBottleneckA + (slots() + 2 * (buffers() + projected())) * kBottleneckItem + 256 + 1024;
  }
};
static_assert(BottleneckShape{false}.shared_bytes() <= 227 * 1024);
static_assert(BottleneckShape{true}.shared_bytes() <= 227 * 1024);

}  // namespace resnet_kernels::sm90
