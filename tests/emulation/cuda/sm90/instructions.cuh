// Replaces csrc/cuda/sm90/instructions.cuh: the same functions, on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "cuda/sm90/barriers.h"
#include "cuda/sm90/copy_engine.h"
#include "cuda/sm90/shared_memory.h"
#include "cuda/sm90/tensor_cores.h"
#include "threads.h"

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  return result;
}

namespace cute {

inline uint32_t cast_smem_ptr_to_uint(const void* p) {
  return static_cast<const uint8_t*>(p) - resnet_kernels::sm90::memory + emulation::kFirst;
}

// The shared memory address of a pointer that `pointer` returned.
inline uint32_t address_of(const void* p) { return cast_smem_ptr_to_uint(p); }

template <int kRank>
struct Load {
  template <class... Int>
  static void copy(const CUtensorMap* map, uint64_t* barrier, uint64_t, void* to, Int... corner) {
    static_assert(sizeof...(corner) == kRank);
    emulation::load_box(map, barrier, address_of(to), {corner...});
  }
};
using SM90_TMA_LOAD_2D = Load<2>;
using SM90_TMA_LOAD_3D = Load<3>;
using SM90_TMA_LOAD_4D = Load<4>;

struct SM90_TMA_LOAD_IM2COL_4D {
  static void copy(const CUtensorMap* map, uint64_t* barrier, void* to, int c, int w, int h, int n, uint16_t s,
                   uint16_t r) {
    emulation::load_im2col(map, barrier, address_of(to), c, w, h, n, s, r);
  }
};

template <int kRank>
struct Store {
  template <class... Int>
  static void copy(const CUtensorMap* map, const void* from, Int... corner) {
    static_assert(sizeof...(corner) == kRank);
    emulation::store_box(map, address_of(from), {corner...});
  }
};
using SM90_TMA_STORE_2D = Store<2>;
using SM90_TMA_STORE_3D = Store<3>;
using SM90_TMA_STORE_4D = Store<4>;

inline void tma_store_arrive() { emulation::end_stores(); }
template <int kLeft>
void tma_store_wait() {
  emulation::await_stores_but(kLeft);
}

}  // namespace cute

namespace resnet_kernels::sm90 {

using Barrier = cutlass::arch::ClusterBarrier;
using BytesBarrier = cutlass::arch::ClusterTransactionBarrier;

constexpr int kWarpGroup = 128;
constexpr uint64_t kNoHint = 0, kOnce = 0;

inline void* pointer(uint32_t address) { return memory + (address - emulation::kFirst); }

template <class T, int kColumns>
emulation::Product product(float (&d)[kColumns / 2], uint64_t b, bool add) {
  emulation::Product p{};
  p.d = d, p.columns = kColumns, p.half = std::is_same_v<T, __half>, p.b = b, p.add = add;
  return p;
}

template <class T, int kColumns>
void multiply(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
  auto p = product<T, kColumns>(d, b, add);
  p.a = a;
  emulation::my_batches().open.push_back(p);
}
template <class T, int kColumns>
void multiply(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  auto p = product<T, kColumns>(d, b, add);
  p.a_in_registers = true;
  std::copy(a, a + 4, p.registers);
  emulation::my_batches().open.push_back(p);
}
template <class T, int kColumns>
void multiply_transposed(float (&d)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
  auto p = product<T, kColumns>(d, b, add);
  p.a = a, p.a_transposed = p.b_transposed = true;
  emulation::my_batches().open.push_back(p);
}
template <class T>
void multiply_by_ones(float (&d)[4], uint64_t a, uint64_t b, bool add) {
  auto p = product<T, 8>(d, b, add);
  p.a = a, p.a_transposed = true;
  emulation::my_batches().open.push_back(p);
}

// wgmma is issued by whole warps, so the warp meets here.
inline void begin_products() { emulation::sync_warp(); }
inline void end_products() {
  auto& mine = emulation::my_batches();
  mine.ended.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int kLeft>
void await_products() {
  emulation::await_batches_but(kLeft);
}
template <int kValues>
void keep(float (&)[kValues]) {}

inline void let_next_begin() {}
inline void await_previous() {}

inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a > b ? a : b; }

inline uint32_t max_nan_of_two(uint32_t a, uint32_t b, bool half) {
  uint32_t m = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t x = a >> shift, y = b >> shift;
    const float u = emulation::value(x, half), v = emulation::value(y, half);
    m |= uint32_t{std::isnan(u) || std::isnan(v) ? uint16_t{0x7FFF} : u > v ? x : y} << shift;
  }
  return m;
}
inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) { return max_nan_of_two(a, b, false); }
inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) { return max_nan_of_two(a, b, true); }

template <class V>
void store_shared(uint32_t address, V v) {
  std::memcpy(emulation::at(address, sizeof(V)), &v, sizeof(V));
}
template <class V>
V loaded_from_shared(uint32_t address) {
  V v;
  std::memcpy(&v, emulation::at(address, sizeof(V)), sizeof(V));
  return v;
}
inline uint32_t load_shared(uint32_t address) { return loaded_from_shared<uint32_t>(address); }
inline float4 load_shared_four(uint32_t address) { return loaded_from_shared<float4>(address); }

inline void await_stores() { emulation::await_stores_but(0); }

}  // namespace resnet_kernels::sm90
