// A block's shared memory, addressed by 32-bit addresses with bounds checks.
#pragma once

#include <cstdint>
#include <cstring>

#include "threads.h"

// The kernels' `extern __shared__ uint8_t memory[]`.
#undef __shared__
#define __shared__

namespace resnet_kernels::sm90 {
alignas(1024) inline uint8_t memory[(227 << 10) + 1024];
}

namespace emulation {

// The address of the first byte. As on a GPU, only a multiple of 16 is guaranteed.
constexpr uint32_t kFirst = 1040;
inline uint32_t shared_bytes = 0;

// Give the block `bytes` of shared memory, filled with NaN.
inline void take_shared_memory(uint32_t bytes) {
  if (bytes > 227 << 10)
    throw std::runtime_error("expected at most 227 KB of shared memory, got " + std::to_string(bytes) + " bytes");
  shared_bytes = bytes;
  std::memset(resnet_kernels::sm90::memory, 0xFF, sizeof(resnet_kernels::sm90::memory));
}

inline uint8_t* at(uint32_t address, uint32_t bytes) {
  if (address < kFirst || address + bytes > kFirst + shared_bytes)
    fail("an access outside shared memory: " + std::to_string(bytes) + " bytes at offset " +
         std::to_string(address - kFirst) + " of " + std::to_string(shared_bytes));
  return resnet_kernels::sm90::memory + (address - kFirst);
}

// TMA's 128-byte swizzle: among eight rows of 128 bytes, address bits 4 to 6 (the 16-byte chunk) are XORed with bits 7
// to 9 (the row).
inline uint32_t swizzled128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

}  // namespace emulation
