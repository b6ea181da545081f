// What the library offers: plain C, called by Python through ctypes, so that one build serves every Python.
#pragma once

#include <cstdint>

extern "C" {

// y = relu(scale * conv(x, w) + conv1x1(x2, w2) + shift + residual), of bf16 or, if half, fp16; M = N*P*Q. x (N, H, W,
// C) and x2 (N, P, Q, C2) may be views, of strides in elements; w (K, R, S, C), w2 (K, C2), residual and y (M, K) are
// contiguous. Null: there is none. tile: its number in resnet_kernels_sm90_tiles. parts, of tiles that reduce: per
// channel of the rounded y's 128 positions each (the last ones may be fewer), (ceil(M / 128), K) twice: with statistics
// the mean, and the sum of squared deviations; with sums the sum of y, and of y * (z - centre). Then residual is z, which
// is not added: y = conv + shift where relu(a * z + b), rounded, is positive or NaN, else 0; shift, a, b and centre are
// the rows of masks (K, 4).
struct ResnetKernelsConv {
  const void *x, *w, *x2, *w2, *residual;
  void* y;
  const float *scale, *shift, *masks;
  float* parts;
  int64_t x_strides[3], x2_strides[3];  // of images, rows, columns
  int32_t N, H, W, C, K, R, S, stride, padding, dilation;
  int32_t C2, relu, half, tile, multiprocessors;
};

// Launch on the stream of the current device. Returns null, or what is wrong; the text is good until the thread's next
// call.
const char* resnet_kernels_sm90_conv_act(const ResnetKernelsConv*, void* stream);

// y = max_pool3x3/2(relu(conv7x7/2(x, w) + shift)); x (N, H, W, 4), y (N, PP, PQ, 64), w (64, 7, 8, 4), its last column
// not looked at; all contiguous, W even and at most 224.
struct ResnetKernelsStem {
  const void *x, *w;
  void* y;
  const float* shift;
  int32_t N, H, W, half, multiprocessors;
};
const char* resnet_kernels_sm90_stem(const ResnetKernelsStem*, void* stream);

// The end of a bottleneck and the beginning of the next: h = relu(conv3x3(x, w) + shift), y = relu(h w3^T + shift3 +
// residual), ahead = relu(y w1^T + shift1), h and y rounded. x (N, H, W, J), residual and y (N, H, W, K), ahead (N, H, W,
// ahead_channels); w (J, 3, 3, J), w3 (K, J), w1 (ahead_channels, K); all contiguous. J 64, K 256, ahead_channels 64 or
// 128, W at most 56; or J and ahead_channels 128, K in multiples of 64, W at most 28.
struct ResnetKernelsTail {
  const void *x, *w, *w3, *w1, *residual;
  void *y, *ahead;
  const float *shift, *shift3, *shift1;
  int32_t N, H, W, J, K, ahead_channels, half, multiprocessors;
};
const char* resnet_kernels_sm90_tail(const ResnetKernelsTail*, void* stream);

// A whole bottleneck: a = relu(x w1^T + shift1), h = relu(conv3x3(a, w) + shift), y = relu(h w3^T + shift3 + x wp^T), or
// with x for x wp^T where wp is null; a and h rounded. x (N, H, W, C), C 64 with wp (256, 64) and 256 without; y (N, H, W,
// 256), which may not overlap x; w1 (64, C), w (64, 3, 3, 64), w3 (256, 64); all contiguous, W at most 56.
struct ResnetKernelsBottleneck {
  const void *x, *w1, *w, *w3, *wp;
  void* y;
  const float *shift1, *shift, *shift3;
  int32_t N, H, W, half, multiprocessors;
};
const char* resnet_kernels_sm90_bottleneck(const ResnetKernelsBottleneck*, void* stream);

// The last convolution of a bottleneck and the first of the next: y = relu(x w3^T + shift3 + residual), rounded, ahead
// = relu(y w1^T + shift1). x (M, J), residual and y (M, K), ahead (M, ahead_channels), w3 (K, J), w1 (ahead_channels,
// K); all contiguous; J and ahead_channels 128 and 128, 128 and 256, or 256 and 256; K in multiples of 64.
struct ResnetKernelsPair {
  const void *x, *w3, *w1, *residual;
  void *y, *ahead;
  const float *shift3, *shift1;
  int32_t M, J, K, ahead_channels, half, multiprocessors;
};
const char* resnet_kernels_sm90_pair(const ResnetKernelsPair*, void* stream);

// Of a weight gradient: parts (ceil(M / span), K, R, S, C), each the sum over `span` output positions (a multiple of
// 128) of g (m, k) * x (what the tap sees from m, c), and if not null sums (ceil(M / span), K) of g. g (N, P, Q, K) and
// x (N, H, W, C) may be views. columns: 2 or 3, slices of 64 channels of x in a tile. upper: x is g, R = S = 1, columns
// 2: of tiles of 128 x 128 those below the diagonal are not written.
struct ResnetKernelsWgrad {
  const void *g, *x;
  float *parts, *sums;
  int64_t g_strides[3], x_strides[3];  // of images, rows, columns
  int32_t N, H, W, C, K, R, S, stride, padding, dilation;
  int32_t span, columns, upper, half, multiprocessors;
};
const char* resnet_kernels_sm90_wgrad(const ResnetKernelsWgrad*, void* stream);

// Of the structure that resnet_kernels_sm90_NAME takes, so that who was written for another finds out; 0: there is none.
int32_t resnet_kernels_sm90_bytes(const char* name);

// Names of conv_act's tiles, separated by spaces, in the order of their numbers.
const char* resnet_kernels_sm90_tiles();
}
