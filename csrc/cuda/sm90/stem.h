// A ResNet's stem for sm_90a: kernel parameters and shared memory sizes, without device code.
#pragma once

#include <cuda.h>

namespace resnet_kernels::sm90 {

struct StemParams {
  CUtensorMap x, y;  // x (N, H, 2 * W): elements of 4 bytes; y (N * PP, PQ, 64)
  const void* w;     // (64, 7, 8, 4)
  const float* shift;
  int images, P, Q, PP, PQ;  // P x Q: the convolution's map; PP x PQ: the pooled map
};

constexpr int kStemGroups = 3;  // consumer warp groups, beside the producer's
constexpr int kStemThreads = 128 * (kStemGroups + 1);
constexpr int kStemChannels = 64, kStemColumns = 112;  // output channels; maximum columns of a convolution row
// Bytes of an input row per copy: a TMA box has at most 256 elements, here of 4 bytes (half a pixel), so a row takes
// two.
constexpr int kStemCopyBytes = 1024, kStemRowBytes = 2 * kStemCopyBytes;
constexpr int kStemStages = 8;  // of two input rows each
constexpr int kStemStageBytes = 2 * kStemRowBytes;
constexpr int kStemBufferBytes = kStemColumns / 2 * 128;
constexpr int kStemWeightBytes = 4 * kStemChannels * 128;
constexpr int kStemBarrierBytes = 512;
constexpr int kStemSharedBytes =
    kStemGroups * (kStemStages * kStemStageBytes + kStemBufferBytes) + kStemWeightBytes + kStemBarrierBytes + 1024;
static_assert(kStemSharedBytes <= 227 * 1024);

}  // namespace resnet_kernels::sm90
