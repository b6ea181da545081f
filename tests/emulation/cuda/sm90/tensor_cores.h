// wgmma. A product is computed as late as possible, when its batch is awaited, to find operands that are overwritten
// too early.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/sm90/shared_memory.h"

namespace emulation {

constexpr unsigned kWarpGroup = 128;

// One thread's view of an issued wgmma: d (64 x columns) = a b^T [+ d], a (64 x 16) and b (columns x 16) as
// descriptors, or a in registers. Transposed operands are (16 x 64) and (16 x columns) in memory.
struct Product {
  float* d;
  int columns;
  bool half, add, a_in_registers, a_transposed, b_transposed;
  uint64_t a, b;
  uint32_t registers[4];

  bool same(const Product& p) const {
    return columns == p.columns && half == p.half && add == p.add && a_in_registers == p.a_in_registers &&
           a_transposed == p.a_transposed && b_transposed == p.b_transposed && a == p.a && b == p.b;
  }
};

// A thread's products: not yet committed, and committed batches.
struct Batches {
  std::vector<Product> open;
  std::vector<std::vector<Product>> ended;
};
struct WarpGroup {
  std::vector<Batches> of = std::vector<Batches>(kWarpGroup);  // of its threads
  size_t done = 0;                                             // batches completed
};
inline std::vector<WarpGroup> warp_groups;

inline WarpGroup& my_warp_group() { return warp_groups[block->current / kWarpGroup]; }
inline Batches& my_batches() { return my_warp_group().of[block->current % kWarpGroup]; }

inline float value(uint16_t bits, bool half) {
  if (half) {
    __half h;
    std::memcpy(&h, &bits, 2);
    return __half2float(h);
  }
  const uint32_t wide = uint32_t{bits} << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

// The address of element k of a row of a described matrix, by the PTX manual's canonical layouts: chunks of 8 elements,
// without swizzle or with the 128-byte swizzle. transposed: the MN-major layout, where rows are contiguous and not k.
inline uint32_t where(uint64_t descriptor, int row, int k, bool transposed) {
  const uint32_t start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3FFF) << 4;
  const unsigned swizzle = descriptor >> 62;
  if (descriptor >> 49 & 7) fail("wgmma: expected a descriptor with base offset 0");
  if (transposed) {
    if (swizzle != 1) fail("wgmma: expected a transposed operand with the 128-byte swizzle");
    return swizzled128(start + row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128);
  }
  if (swizzle == 1) return swizzled128(start + row / 8 * stride + row % 8 * 128 + k * 2);
  if (swizzle != 0) fail("wgmma: expected an operand without swizzle or with the 128-byte swizzle");
  return start + row / 8 * stride + row % 8 * 16 + k / 8 * leading + k % 8 * 2;
}

inline void read_matrix(float (*to)[16], int rows, uint64_t descriptor, bool half, bool transposed) {
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < 16; ++k) {
      uint16_t bits;
      std::memcpy(&bits, at(where(descriptor, row, k, transposed), 2), 2);
      to[row][k] = value(bits, half);
    }
}

inline void make_product(std::vector<Batches>& threads, size_t i) {
  const Product& first = threads[0].ended.front()[i];
  static float a[64][16], b[256][16];
  read_matrix(b, first.columns, first.b, first.half, first.b_transposed);
  if (!first.a_in_registers) read_matrix(a, 64, first.a, first.half, first.a_transposed);
  for (unsigned t = 0; t < kWarpGroup; ++t) {
    const Product& p = threads[t].ended.front()[i];
    if (!p.same(first)) fail("wgmma: threads of a warp group issued different products");
    for (int r = 0; p.a_in_registers && r < 4; ++r)
      for (int j = 0; j < 2; ++j)
        a[16 * (t / 32) + t % 32 / 4 + 8 * (r % 2)][8 * (r / 2) + 2 * (t % 4) + j] =
            value(p.registers[r] >> 16 * j & 0xFFFF, p.half);
  }
  for (unsigned t = 0; t < kWarpGroup; ++t) {
    const Product& p = threads[t].ended.front()[i];
    for (int half = 0; half < 2; ++half)
      for (int column = 0; column < p.columns / 8; ++column)
        for (int j = 0; j < 2; ++j) {
          const float* x = a[16 * (t / 32) + t % 32 / 4 + 8 * half];
          const float* y = b[8 * column + 2 * (t % 4) + j];
          float& d = p.d[4 * column + 2 * half + j];
          float sum = p.add ? d : 0.f;
          for (int k = 0; k < 16; ++k) sum += x[k] * y[k];
          d = sum;
        }
  }
}

inline void await_batches_but(size_t left) {
  WarpGroup& group = my_warp_group();
  Batches& mine = my_batches();
  const size_t begun = group.done + mine.ended.size();
  const size_t target = begun > left ? begun - left : 0;
  await("its warp group's wgmma batches", [&] {
    for (auto& of : group.of)
      if (group.done + of.ended.size() < target) return false;
    return true;
  });
  for (; group.done < target; ++group.done) {
    for (auto& of : group.of)
      if (of.ended.front().size() != group.of[0].ended.front().size())
        fail("wgmma: threads of a warp group committed batches of different sizes");
    for (size_t i = 0; i < group.of[0].ended.front().size(); ++i) make_product(group.of, i);
    for (auto& of : group.of) of.ended.erase(of.ended.begin());
  }
}

}  // namespace emulation
