// What the sm_90a kernels share: tensor-core products by descriptors, barriers, bulk copies. CUTLASS's headers spell
// the instructions; here are the few conventions of ours.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
// Wants the one before.
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cuda/sm90/index.h"

namespace resnet_kernels::sm90 {

using Barrier = cutlass::arch::ClusterBarrier;
using BytesBarrier = cutlass::arch::ClusterTransactionBarrier;

constexpr int kWarpGroup = 128;
// Of the copy engine's L2 accesses: nothing in particular, or what is read once.
constexpr uint64_t kNoHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
constexpr uint64_t kOnce = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);

// What cute's copies take, of an address in shared memory.
__device__ inline void* pointer(uint32_t address) { return __cvta_shared_to_generic(address); }

// A matrix of rows of 128 bytes in shared memory, swizzled as the copy engine writes it: 16-byte chunk j of row r lies
// in place j ^ (r % 8), counted from a multiple of 1024 bytes. The matrix may begin at any row.
__device__ inline uint64_t swizzled_matrix(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{8 * kRow / 16} << 32, kUnused = 1 << 16;
  return kSwizzle128 | kEightRows | kUnused | ((address & 0x3FFFF) >> 4);
}

// 16 channels further along the rows.
constexpr uint64_t kNextProduct = 32 / 16;

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

// d (64 x kColumns) = a (64 x 16) b^T (kColumns x 16) [+ d], begun, not awaited. Thread t of the warp group holds of d
// rows 16 * (t / 32) + t % 32 / 4 + {0, 8}, columns 8 * i + 2 * (t % 4) + {0, 1}: d[4 * i + 2 * (row's half) +
// column's].
template <class T, int kColumns>
__device__ inline void multiply(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
  detail::multiply<T, kColumns>(d, a, b, add, std::make_index_sequence<kColumns / 2>{});
}

// The same with a in registers: a[0] and a[1] the thread's rows of d, columns 2 * (t % 4) + {0, 1}; a[2], a[3] 8
// further. Nothing may write them before the product is done.
template <class T, int kColumns>
__device__ inline void multiply(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  detail::multiply<T, kColumns>(d, a, b, add, std::make_index_sequence<kColumns / 2>{});
}

__device__ inline void begin_products() { cute::warpgroup_arrive(); }
__device__ inline void end_products() { cute::warpgroup_commit_batch(); }
template <int kLeft>
__device__ inline void await_products() {
  cute::warpgroup_wait<kLeft>();
}
// Accumulators that products still write, or have just written, as the compiler is to see them. A fold and not a loop:
// what is indexed before loops are unrolled may end on the stack.
template <size_t... I, int kValues>
__device__ __forceinline__ void keep(float (&d)[kValues], std::index_sequence<I...>) {
  (cute::warpgroup_fence_operand(d[I]), ...);
}
template <int kValues>
__device__ __forceinline__ void keep(float (&d)[kValues]) {
  keep(d, std::make_index_sequence<kValues>{});
}

// Kernels of ours that follow each other overlap: the next one's blocks may begin where one of this has ended, and wait
// before they touch what this or an earlier one writes or reads.
__device__ inline void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ inline void await_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// NaN wins; fmaxf would drop it.
__device__ inline float max_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}
__device__ inline float relu(float v) { return max_nan(v, 0.f); }

__device__ inline float2 relu(float2 v) { return {relu(v.x), relu(v.y)}; }

__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}
__device__ inline void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// Two values of 16 bits, next to each other in memory.
template <class T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  __device__ static uint16_t narrow(float v) { return __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
  __device__ static uint32_t narrow(float2 v) {
    const __nv_bfloat162 pair = __float22bfloat162_rn(v);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static float2 widen(uint32_t v) { return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v)); }
  __device__ static uint32_t max_nan(uint32_t a, uint32_t b) {
    uint32_t m;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
  }
  static constexpr uint32_t kMinusInfinity = 0xFF80;
};
template <>
struct Pair<__half> {
  __device__ static uint16_t narrow(float v) { return __half_as_ushort(__float2half_rn(v)); }
  __device__ static uint32_t narrow(float2 v) {
    const __half2 pair = __float22half2_rn(v);
    return reinterpret_cast<const uint32_t&>(pair);
  }
  __device__ static float2 widen(uint32_t v) { return __half22float2(reinterpret_cast<const __half2&>(v)); }
  __device__ static uint32_t max_nan(uint32_t a, uint32_t b) {
    uint32_t m;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
    return m;
  }
  static constexpr uint32_t kMinusInfinity = 0xFC00;
};

}  // namespace resnet_kernels::sm90
