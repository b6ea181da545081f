// What Python calls through ctypes, so that tests can put another library in this one's place: raw pointers, sizes and
// a stream. Every function launches on the stream of the current device, and returns null or what is wrong; the text
// is good until the thread's next call. Python checks what tensors fit each other before it calls.
#pragma once

#include <cstdint>

extern "C" {

// `type`: 0 fp32, 1 fp16, 2 bf16.

// A tensor of rows of channels that lie next to each other, and elements from an image, row, column to the next.
struct ResnetKernelsView {
  const void* data;
  int64_t n, h, w;
};

// kind: 0 none; 1 bits, bit j of byte b tells of channel 8b + j; 2 bytes, not 0 keeps; 3 a tensor t of the pass's type:
// where not (t <= 0), or not (a*t + b <= 0), rounded, where there are a and b.
struct ResnetKernelsMask {
  ResnetKernelsView view;
  const float *a, *b;
  int64_t kind;
};

// contract.Operand without pooling; its view and those of `second` and `mask` are of the positions that its stride
// leaves. b: null is zero. rounds: whether its value is rounded to the pass's type.
struct ResnetKernelsOperand {
  ResnetKernelsView view, second;
  ResnetKernelsMask mask;
  const float *a, *b, *a2, *mean, *centre;
  int32_t relu, rounds, channels;
};

// y = epilogue(x) over a map of N*P*Q = M positions and C channels; y null: reduced alone. residual: of `channels`,
// which may be fewer; it stands at every spread-th row and column of the map. mapped: 0 where all views are rows one
// after the other, so that `w` is enough. reduce: 0 none; 1 statistics; 2 the sums of t and, where it is there, of t *
// (normalized - mean) * rstd; 3 `bits` (M, ceil(C / 8)). parts (2, ceil(M / span), C): of each span rows the mean and
// the sum of squared deviations, or the sums; first, second (C): what they make. aligned: 1 where channels and
// residual's are multiples of 8, and all views, per-channel vectors and y allow 16 bytes at a time.
struct ResnetKernelsPass {
  ResnetKernelsOperand x, residual;
  ResnetKernelsMask mask;
  ResnetKernelsView normalized;
  const float *shift, *mean, *rstd;
  void* y;
  uint8_t* bits;
  float *parts, *first, *second;
  int64_t M, span;
  int32_t P, Q, C, spread, relu, reduce, mapped, aligned, type;
};
const char* resnet_kernels_cuda_pass(const ResnetKernelsPass*, void* stream);

// Rows of a part of a pass over M rows of C channels.
int64_t resnet_kernels_cuda_span(int64_t M, int64_t C, int64_t multiprocessors);

// The table (5, K): a = gamma*rstd, b = beta - mean*a, mean, rstd, M2 / least, with rstd from M2 / rows + eps.
struct ResnetKernelsTable {
  const float *mean, *M2, *gamma, *beta;
  float* table;
  double rows, least, eps;
  int64_t K;
};
const char* resnet_kernels_cuda_table(const ResnetKernelsTable*, void* stream);

// be = -a * rstd * dgamma / rows, shift = -a * dbeta / rows, each (K).
struct ResnetKernelsBnGrad {
  const float *dbeta, *dgamma, *a, *rstd;
  float *be, *shift;
  double rows;
  int64_t K;
};
const char* resnet_kernels_cuda_bn_grad(const ResnetKernelsBnGrad*, void* stream);

// Of c = h weight^T, weight (K, J) of `type`, with moments mu (J), M2 (J, J) of h. product (K, J): scratch.
struct ResnetKernelsProduct {
  const void* weight;
  const float *mu, *M2;
  float* product;
  double rows;
  int32_t K, J, type;
};
struct ResnetKernelsProductTable {
  ResnetKernelsProduct of;
  const float *gamma, *beta;
  float* table;
  double least, eps;
};
const char* resnet_kernels_cuda_product_table(const ResnetKernelsProductTable*, void* stream);

// contract.Backend.finalize_tail_grad: sg (K), G (K, J), centre (J) or null, a, mean, rstd (K); dweight (K, J), dgamma
// (K), v (J); A (K, J), B (J, J) of `type`. q (K): scratch.
struct ResnetKernelsTailGrad {
  ResnetKernelsProduct of;
  const float *sg, *G, *centre, *a, *mean, *rstd;
  float *dweight, *dgamma, *q, *v;
  void *A, *B;
};
const char* resnet_kernels_cuda_tail_grad(const ResnetKernelsTailGrad*, void* stream);

// y (N, P, Q, C) = the maxima of windows of x (N, H, W, C), NaN above all, padding below; winners (N, P, Q, C), or
// null: which element of its window each first is (the last NaN), row by row, 255 where y <= 0. And its gradient: y
// (N, H, W, C) from x (N, P, Q, C) and winners. aligned: as in a pass, of 8 bytes for winners.
struct ResnetKernelsPool {
  ResnetKernelsView x;
  void* y;
  uint8_t* winners;
  int32_t N, C, H, W, P, Q, kernel, stride, padding, aligned, type;
};
const char* resnet_kernels_cuda_max_pool(const ResnetKernelsPool*, void* stream);
const char* resnet_kernels_cuda_max_pool_grad(const ResnetKernelsPool*, void* stream);

// result (K, C) = sum over rows of g^T x, g (M, K) and x (M, C) contiguous, and sums (K) of g over rows, or null. With
// moments x is g: result = sum of (g - mean)^T (g - mean), sums are the mean. parts (P, K, C), sum_parts (P, K):
// scratch for P = ceil(M / span); of one part without moments they are result and sums. aligned: K and C are multiples
// of 8, g and x of 16 bytes.
struct ResnetKernelsOuter {
  const void *g, *x;
  float *parts, *sum_parts, *result, *sums;
  int64_t M, span;
  int32_t K, C, moments, aligned, type;
};
const char* resnet_kernels_cuda_outer(const ResnetKernelsOuter*, void* stream);

// Rows of a part.
int64_t resnet_kernels_cuda_outer_span(int64_t M, int64_t K, int64_t C, int64_t moments, int64_t type,
                                       int64_t multiprocessors);

// Of the structure that resnet_kernels_cuda_NAME takes, so that who was written for another finds out; 0: there is none.
int32_t resnet_kernels_cuda_bytes(const char* name);
}
