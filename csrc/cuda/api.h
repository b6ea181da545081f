// The C interface of the CUDA kernels. Python calls it through ctypes, so that tests can substitute another library
// (the CPU emulation). Arguments are raw pointers, sizes and a stream. Every launching function enqueues its kernels on
// that stream of the current device and returns null, or an error message that stays valid until the calling thread's
// next call. Nothing here checks shapes: Python validates that tensors fit each other before it calls.
//
// Letters: N images, H x W input map, P x Q output map, M = N*P*Q rows, C channels, K output channels, J inner channels
// of a bottleneck. A "part" is a partial result over `span` consecutive rows.
#pragma once

#include <cstdint>

extern "C" {

// `type` in every structure is the compute dtype: 0 fp32, 1 fp16, 2 bf16.

// A strided (N, H, W, C) tensor whose channels are contiguous. n, h, w: strides in elements from one image, row and
// column to the next.
struct ResnetKernelsView {
  const void* data;
  int64_t n, h, w;
};

// Where a value is kept; elsewhere it becomes 0. kind: 0 no mask. 1 packed bits: bit j of byte b is channel 8b + j; a
// set bit keeps. 2 bytes (bool): nonzero keeps. 3 a tensor t of the pass's type: keeps where not (t <= 0), or where a
// and b are non-null, where not (round(a*t + b) <= 0). A NaN keeps.
struct ResnetKernelsMask {
  ResnetKernelsView view;
  const float *a, *b;
  int64_t kind;
};

// contract.Operand without pooling: v = x where its mask keeps, a*v + b, + a2*(second - mean), ReLU, rounding, minus
// centre. The views already include the operand's stride: they step over the positions that remain. a, b, a2, mean,
// centre are per channel, fp32; null b means 0. rounds: whether the value is rounded to the pass's type; centre is
// subtracted in fp32 only.
struct ResnetKernelsOperand {
  ResnetKernelsView view, second;
  ResnetKernelsMask mask;
  const float *a, *b, *a2, *mean, *centre;
  int32_t relu, rounds, channels;
};

// y = epilogue(x) over a map of M = N*P*Q positions and C channels. y null: only the reduction is wanted.
// - residual: may have fewer channels than C (residual.channels) and, with spread > 1, is zero-inserted: it applies
// only at rows and columns of the map that are multiples of spread.
// - mapped: 0 if every view is dense rows, so that the stride `w` alone addresses it; else positions are split into n,
// h, w.
// - reduce: 0 none. 1 statistics of t, the rounded result. 2 sum(t) and, if `normalized` is non-null, sum(t *
// (normalized - mean) * rstd). 3 mask bits of t in `bits` (M, ceil(C / 8)).
// - parts: workspace (2, ceil(M / span), C): for each span of rows the mean and the sum of squared deviations, or both
// sums.
// - first, second (C): the merged results, in the same order.
// - aligned: 1 if the channel counts of x and residual are multiples of 8 and all views, per-channel vectors and y
// allow 16-byte accesses.
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

// The span (rows of one part) that suits a pass over M rows of C channels.
int64_t resnet_kernels_cuda_span(int64_t M, int64_t C, int64_t multiprocessors);

// table (5, K) of a batch norm with rows: a = gamma*rstd, b = beta - mean*a, mean, rstd = 1/sqrt(M2 / rows + eps), and
// the unbiased variance M2 / least, where least = max(rows - 1, 1).
struct ResnetKernelsTable {
  const float *mean, *M2, *gamma, *beta;
  float* table;
  double rows, least, eps;
  int64_t K;
};
const char* resnet_kernels_cuda_table(const ResnetKernelsTable*, void* stream);

// The batch norm's gradient with respect to its input c, dL/dc = a*g + be*(c - mean) + shift, each (K): be = -a * rstd
// * dgamma / rows, shift = -a * dbeta / rows.
struct ResnetKernelsBnGrad {
  const float *dbeta, *dgamma, *a, *rstd;
  float *be, *shift;
  double rows;
  int64_t K;
};
const char* resnet_kernels_cuda_bn_grad(const ResnetKernelsBnGrad*, void* stream);

// The product c = h weight^T, which is never computed, described by weight (K, J) of `type` and the moments of h: mean
// mu (J) and M2 (J, J), both fp32, over `rows` rows. product (K, J): fp32 workspace that receives weight M2.
struct ResnetKernelsProduct {
  const void* weight;
  const float *mu, *M2;
  float* product;
  double rows;
  int32_t K, J, type;
};
// The table (as in ResnetKernelsTable) of the batch norm that follows the product: mean = weight mu, M2 = diag(weight
// M2 weight^T).
struct ResnetKernelsProductTable {
  ResnetKernelsProduct of;
  const float *gamma, *beta;
  float* table;
  double least, eps;
};
const char* resnet_kernels_cuda_product_table(const ResnetKernelsProductTable*, void* stream);

// contract.Backend.finalize_tail_grad. Inputs: sg (K), G (K, J), centre (J) or null, and a, mean, rstd (K). Outputs:
// dweight (K, J), dgamma (K) and v (J) in fp32, A (K, J) and B (J, J) in `type`. q (K): workspace.
struct ResnetKernelsTailGrad {
  ResnetKernelsProduct of;
  const float *sg, *G, *centre, *a, *mean, *rstd;
  float *dweight, *dgamma, *q, *v;
  void *A, *B;
};
const char* resnet_kernels_cuda_tail_grad(const ResnetKernelsTailGrad*, void* stream);

// Max pooling, y (N, P, Q, C) from x (N, H, W, C): a NaN exceeds everything, padding never wins. winners (N, P, Q, C),
// or null: the row-major index within its window of each maximum (the first of equal values, but the last NaN), and 255
// where y <= 0. The gradient uses the same structure with the roles reversed: y (N, H, W, C) from x (N, P, Q, C) and
// winners. aligned: as in a pass; winners need 8-byte alignment.
struct ResnetKernelsPool {
  ResnetKernelsView x;
  void* y;
  uint8_t* winners;
  int32_t N, C, H, W, P, Q, kernel, stride, padding, aligned, type;
};
const char* resnet_kernels_cuda_max_pool(const ResnetKernelsPool*, void* stream);
const char* resnet_kernels_cuda_max_pool_grad(const ResnetKernelsPool*, void* stream);

// result (K, C) = g^T x, summed over M rows, with g (M, K) and x (M, C) contiguous; sums (K), or null: the column sums
// of g. With moments, x is g: result = sum of (g - mean)^T (g - mean), and sums receives the mean. parts (P, K, C) and
// sum_parts (P, K): fp32 workspace for the P = ceil(M / span) partial sums. If P is 1 and these are no moments, pass
// result and sums as parts and sum_parts. aligned: K and C are multiples of 8, and g and x start at multiples of 16
// bytes.
struct ResnetKernelsOuter {
  const void *g, *x;
  float *parts, *sum_parts, *result, *sums;
  int64_t M, span;
  int32_t K, C, moments, aligned, type;
};
const char* resnet_kernels_cuda_outer(const ResnetKernelsOuter*, void* stream);

// The span (rows of one part) that fills the GPU for these sizes; a multiple of 128.
int64_t resnet_kernels_cuda_outer_span(int64_t M, int64_t K, int64_t C, int64_t moments, int64_t type,
                                       int64_t multiprocessors);

// Return the size in bytes of the structure that resnet_kernels_cuda_NAME takes, or 0 if there is no such function.
// Callers compare it with their own structure to detect a library built from other sources.
int32_t resnet_kernels_cuda_bytes(const char* name);
}
