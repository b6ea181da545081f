// Instructions of the sm_90a kernels: wgmma, mbarriers, TMA. CUTLASS's headers provide most of them. All PTX is in this
// file: tests/emulation/cuda/sm90/instructions.cuh replaces it when the kernels run on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
// Needs the header above.
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <type_traits>
#include <utility>

namespace resnet_kernels::sm90 {

// mbarriers: one that counts arrivals, and one that also counts the bytes of TMA transactions.
using Barrier = cutlass::arch::ClusterBarrier;
using BytesBarrier = cutlass::arch::ClusterTransactionBarrier;

constexpr int kWarpGroup = 128;
// L2 cache hints of TMA loads: none, or evict first, for data that is read once.
constexpr uint64_t kNoHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
constexpr uint64_t kOnce = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);

// The generic pointer that cute's TMA copies take, from a 32-bit shared memory address.
__device__ inline void* pointer(uint32_t address) { return __cvta_shared_to_generic(address); }

namespace detail {
using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

template <class T, int kColumns>
struct Product;

#define RESNET_KERNELS_PRODUCT(N)                                                                             \
  template <>                                                                                                 \
  struct Product<__nv_bfloat16, N> : cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<Major::K, Major::K> {}; \
  template <>                                                                                                 \
  struct Product<__half, N> : cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<Major::K, Major::K> {};
RESNET_KERNELS_PRODUCT(64)
RESNET_KERNELS_PRODUCT(112)
RESNET_KERNELS_PRODUCT(128)
RESNET_KERNELS_PRODUCT(256)
#undef RESNET_KERNELS_PRODUCT

template <class T, int kColumns>
struct ProductOfRegisters;

#define RESNET_KERNELS_PRODUCT(N)                                                                                      \
  template <>                                                                                                          \
  struct ProductOfRegisters<__nv_bfloat16, N> : cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<Major::K, Major::K> { \
  };                                                                                                                   \
  template <>                                                                                                          \
  struct ProductOfRegisters<__half, N> : cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_RS<Major::K, Major::K> {};
RESNET_KERNELS_PRODUCT(64)
RESNET_KERNELS_PRODUCT(128)
RESNET_KERNELS_PRODUCT(256)
#undef RESNET_KERNELS_PRODUCT

template <class T, int kColumns>
struct ProductTransposed;

#define RESNET_KERNELS_PRODUCT(N)                                                                                       \
  template <>                                                                                                           \
  struct ProductTransposed<__nv_bfloat16, N> : cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<Major::MN, Major::MN> { \
  };                                                                                                                    \
  template <>                                                                                                           \
  struct ProductTransposed<__half, N> : cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_SS<Major::MN, Major::MN> {};
RESNET_KERNELS_PRODUCT(128)
RESNET_KERNELS_PRODUCT(192)
#undef RESNET_KERNELS_PRODUCT

template <class T>
struct ProductByOnes;
template <>
struct ProductByOnes<__nv_bfloat16> : cute::SM90::GMMA::MMA_64x8x16_F32BF16BF16_SS<Major::MN, Major::K> {};
template <>
struct ProductByOnes<__half> : cute::SM90::GMMA::MMA_64x8x16_F32F16F16_SS<Major::MN, Major::K> {};

template <class T, int kColumns, size_t... I>
__device__ inline void multiply_transposed(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add,
                                           std::index_sequence<I...>) {
  ProductTransposed<T, kColumns>::fma(a, b, d[I]..., add ? ScaleOut::One : ScaleOut::Zero);
}

template <class T, int kColumns, size_t... I>
__device__ inline void multiply(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add,
                                std::index_sequence<I...>) {
  ProductOfRegisters<T, kColumns>::fma(a[0], a[1], a[2], a[3], b, d[I]..., add ? ScaleOut::One : ScaleOut::Zero);
}

template <class T, int kColumns, size_t... I>
__device__ inline void multiply(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add, std::index_sequence<I...>) {
  Product<T, kColumns>::fma(a, b, d[I]..., add ? ScaleOut::One : ScaleOut::Zero);
}
}  // namespace detail

// Issue a wgmma, asynchronously: d (64 x kColumns) = a (64 x 16) b^T (kColumns x 16) [+ d if add], a and b as shared
// memory descriptors, both K-major. Thread t of the warp group holds rows 16 * (t / 32) + t % 32 / 4 + {0, 8} and
// columns 8 * i + 2 * (t % 4) + {0, 1} of d, as d[4 * i + 2 * (half of the row) + (odd column)].
template <class T, int kColumns>
__device__ inline void multiply(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
  detail::multiply<T, kColumns>(d, a, b, add, std::make_index_sequence<kColumns / 2>{});
}

// The same with a from registers, in the accumulators' layout: a[0] and a[1] are the thread's two rows at columns 2 *
// (t % 4) + {0, 1}, a[2] and a[3] the same at columns 8 further. The registers may not be written before the wgmma has
// completed.
template <class T, int kColumns>
__device__ inline void multiply(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  detail::multiply<T, kColumns>(d, a, b, add, std::make_index_sequence<kColumns / 2>{});
}

// d (64 x kColumns) = a^T b [+ d], with a (16 x 64) and b (16 x kColumns) MN-major: contiguous along the result's rows
// and columns.
template <class T, int kColumns>
__device__ inline void multiply_transposed(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
  detail::multiply_transposed<T, kColumns>(d, a, b, add, std::make_index_sequence<kColumns / 2>{});
}

// d (64 x 8) = a^T b^T [+ d], with a (16 x 64) MN-major as above and b (8 x 16) K-major as in `multiply`.
template <class T>
__device__ inline void multiply_by_ones(float (&d)[4], uint64_t a, uint64_t b, bool add) {
  detail::ProductByOnes<T>::fma(a, b, d[0], d[1], d[2], d[3], add ? detail::ScaleOut::One : detail::ScaleOut::Zero);
}

// wgmma.fence, commit_group and wait_group: a warp group brackets each batch of products with begin and end;
// await_products<n> waits until at most n batches are in flight.
__device__ inline void begin_products() { cute::warpgroup_arrive(); }
__device__ inline void end_products() { cute::warpgroup_commit_batch(); }
template <int kLeft>
__device__ inline void await_products() {
  cute::warpgroup_wait<kLeft>();
}
// A compiler fence on accumulators around asynchronous products, so that no access moves across. A fold and not a loop:
// an array that is indexed before the compiler unrolls loops may end up on the stack.
template <size_t... I, int kValues>
__device__ __forceinline__ void keep(float (&d)[kValues], std::index_sequence<I...>) {
  (cute::warpgroup_fence_operand(d[I]), ...);
}
template <int kValues>
__device__ __forceinline__ void keep(float (&d)[kValues]) {
  keep(d, std::make_index_sequence<kValues>{});
}

// Programmatic dependent launch (griddepcontrol). let_next_begin: the next kernel's CTAs may start where CTAs of this
// kernel have ended. await_previous: wait until the preceding kernels have completed and their writes are visible;
// needed before touching anything that they read or write.
__device__ inline void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ inline void await_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The maximum, or NaN if either is NaN; fmaxf would drop it.
__device__ inline float max_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}
__device__ inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t m;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  return m;
}
__device__ inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  uint32_t m;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  return m;
}

__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ inline float4 load_shared_four(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address));
  return v;
}
__device__ inline void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}
__device__ inline void store_shared(uint32_t address, uint2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(v.x), "r"(v.y) : "memory");
}
__device__ inline void store_shared(uint32_t address, uint16_t v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(v) : "memory");
}

// Wait until all TMA stores of this thread have been written to global memory (not only read from shared memory).
__device__ inline void await_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

}  // namespace resnet_kernels::sm90
