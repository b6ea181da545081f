// The C interface of the sm_90a kernels. Python calls it through ctypes, so that one build serves every Python version.
//
// Letters: N images, H x W map, C input channels, K output channels, R x S filter, P x Q output map, M = N*P*Q output
// positions, J inner channels of a bottleneck. All tensors are channels_last bf16 or, if `half`, fp16; scales, shifts,
// masks and partial sums are fp32. `ahead` is the output of the next block's first convolution. multiprocessors: the
// number of CTAs of the persistent kernels.
#pragma once

#include <cstdint>

extern "C" {

// y = relu(scale * conv(x, w) + conv1x1(x2, w2) + shift + residual). A null pointer leaves its term out; relu is
// applied if `relu`.
//
// x (N, H, W, C) and x2 (N, P, Q, C2) may be views, with strides in elements; w (K, R, S, C), w2 (K, C2), residual and
// y (M, K) are contiguous. tile: an index into resnet_kernels_sm90_tiles.
//
// Tiles that reduce write `parts` (2, ceil(M / 128), K): two partial results for each 128 positions (the last part may
// have fewer), taken from the rounded y. A statistics tile writes the mean, then the sum of squared deviations. A sums
// tile writes the sum of y, then the sum of y * (z - centre). There `residual` is z and is not added: y = conv + shift
// where relu(a * z + b), rounded, is positive or NaN, else 0. masks (K, 4) holds shift, a, b and centre of each
// channel.
struct ResnetKernelsConv {
  const void *x, *w, *x2, *w2, *residual;
  void* y;
  const float *scale, *shift, *masks;
  float* parts;
  int64_t x_strides[3], x2_strides[3];  // of images, rows, columns
  int32_t N, H, W, C, K, R, S, stride, padding, dilation;
  int32_t C2, relu, half, tile, multiprocessors;
};

// Enqueue the kernel on the current device's stream. Returns null, or an error message that stays valid until the
// calling thread's next call. The same holds for every launching function below.
const char* resnet_kernels_sm90_conv_act(const ResnetKernelsConv*, void* stream);

// The stem: y = max_pool3x3/2(relu(conv7x7/2(x, w) + shift)), paddings 3 and 1. x (N, H, W, 4), y (N, PP, PQ, 64), w
// (64, 7, 8, 4), whose eighth filter column is never read; all contiguous, W even and at most 224.
struct ResnetKernelsStem {
  const void *x, *w;
  void* y;
  const float* shift;
  int32_t N, H, W, half, multiprocessors;
};
const char* resnet_kernels_sm90_stem(const ResnetKernelsStem*, void* stream);

// The tail of a bottleneck with the first convolution of the next block: h = relu(conv3x3(x, w) + shift), y = relu(h
// w3^T + shift3 + residual), ahead = relu(y w1^T + shift1), with h and y rounded. x (N, H, W, J), residual and y (N, H,
// W, K), ahead (N, H, W, ahead_channels); w (J, 3, 3, J), w3 (K, J), w1 (ahead_channels, K); all contiguous. Supported:
// J 64, K 256, ahead_channels 64 or 128, W at most 56; or J and ahead_channels 128, K a multiple of 64, W at most 28.
struct ResnetKernelsTail {
  const void *x, *w, *w3, *w1, *residual;
  void *y, *ahead;
  const float *shift, *shift3, *shift1;
  int32_t N, H, W, J, K, ahead_channels, half, multiprocessors;
};
const char* resnet_kernels_sm90_tail(const ResnetKernelsTail*, void* stream);

// A whole bottleneck: a = relu(x w1^T + shift1), h = relu(conv3x3(a, w) + shift), y = relu(h w3^T + shift3 + x wp^T),
// with a and h rounded. If wp is null, the shortcut is the identity: x instead of x wp^T. x (N, H, W, C), C 64 with wp
// (256, 64) and 256 without; y (N, H, W, 256), which may not overlap x; w1 (64, C), w (64, 3, 3, 64), w3 (256, 64); all
// contiguous, W at most 56.
struct ResnetKernelsBottleneck {
  const void *x, *w1, *w, *w3, *wp;
  void* y;
  const float *shift1, *shift, *shift3;
  int32_t N, H, W, half, multiprocessors;
};
const char* resnet_kernels_sm90_bottleneck(const ResnetKernelsBottleneck*, void* stream);

// The last convolution of a bottleneck with the first one of the next block: y = relu(x w3^T + shift3 + residual),
// rounded, and ahead = relu(y w1^T + shift1). x (M, J), residual and y (M, K), ahead (M, ahead_channels), w3 (K, J), w1
// (ahead_channels, K); all contiguous. (J, ahead_channels): (128, 128), (128, 256) or (256, 256); K a multiple of 64.
struct ResnetKernelsPair {
  const void *x, *w3, *w1, *residual;
  void *y, *ahead;
  const float *shift3, *shift1;
  int32_t M, J, K, ahead_channels, half, multiprocessors;
};
const char* resnet_kernels_sm90_pair(const ResnetKernelsPair*, void* stream);

// A weight gradient as partial sums: parts (ceil(M / span), K, R, S, C), each the sum over `span` output positions m
// (span is a multiple of 128) of g[m, k] * x[the input position of tap (r, s) at m, c]; and, unless null, sums (ceil(M
// / span), K), those of g. g (N, P, Q, K) and x (N, H, W, C) may be views. columns: 2 or 3, slices of 64 channels of x
// in a tile. upper: second moments, where x is g, R = S = 1 and columns is 2; tiles of 128 x 128 below the diagonal are
// not written.
struct ResnetKernelsWgrad {
  const void *g, *x;
  float *parts, *sums;
  int64_t g_strides[3], x_strides[3];  // of images, rows, columns
  int32_t N, H, W, C, K, R, S, stride, padding, dilation;
  int32_t span, columns, upper, half, multiprocessors;
};
const char* resnet_kernels_sm90_wgrad(const ResnetKernelsWgrad*, void* stream);

// Return the size in bytes of the structure that resnet_kernels_sm90_NAME takes, or 0 if there is no such function.
// Callers compare it with their own structure to detect a library built from other sources.
int32_t resnet_kernels_sm90_bytes(const char* name);

// Return the names of conv_act's tiles, separated by spaces; a tile's position is its number.
const char* resnet_kernels_sm90_tiles();
}
