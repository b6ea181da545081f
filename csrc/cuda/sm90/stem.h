// A ResNet's stem for sm_90a, seen from the host.
#pragma once

#include <cuda.h>

namespace resnet_kernels::sm90 {

struct StemParams {
  CUtensorMap x, y;  // x (N, H, 2 * W): elements of 4 bytes; y (N * PP, PQ, 64)
  const void* w;     // (64, 7, 8, 4)
  const float* shift;
  int images, P, Q, PP, PQ;  // of the convolution's map, and pooled
};

constexpr int kStemGroups = 3;  // warp groups that multiply, beside the one that moves
constexpr int kStemThreads = 128 * (kStemGroups + 1);
constexpr int kStemChannels = 64, kStemColumns = 112;  // output channels; columns of a row of the convolution
// Of an input row that are brought by one copy: 256 elements of 4 bytes, half a pixel, are the most.
constexpr int kStemCopyBytes = 1024, kStemRowBytes = 2 * kStemCopyBytes;
constexpr int kStemStages = 8;  // of two input rows
constexpr int kStemStageBytes = 2 * kStemRowBytes;
constexpr int kStemBufferBytes = kStemColumns / 2 * 128;
constexpr int kStemWeightBytes = 4 * kStemChannels * 128;
constexpr int kStemBarrierBytes = 512;
constexpr int kStemSharedBytes =
    kStemGroups * (kStemStages * kStemStageBytes + kStemBufferBytes) + kStemWeightBytes + kStemBarrierBytes + 1024;
static_assert(kStemSharedBytes <= 227 * 1024);

}  // namespace resnet_kernels::sm90
