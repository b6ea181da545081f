// Shared memory of a block, by addresses of 32 bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "threads.h"

// What kernels call `extern __shared__ uint8_t memory[]`.
#undef __shared__
#define __shared__

namespace resnet_kernels::sm90 {
alignas(1024) inline uint8_t memory[(227 << 10) + 1024];
}

namespace emulation {

// Of the first byte: on a GPU too it is a multiple of 16 alone.
constexpr uint32_t kFirst = 1040;
inline uint32_t shared_bytes = 0;

// All of it not a number.
inline void take_shared_memory(uint32_t bytes) {
  if (bytes > 227 << 10) throw std::runtime_error("no " + std::to_string(bytes) + " bytes of shared memory");
  shared_bytes = bytes;
  std::memset(resnet_kernels::sm90::memory, 0xFF, sizeof(resnet_kernels::sm90::memory));
}

inline uint8_t* at(uint32_t address, uint32_t bytes) {
  if (address < kFirst || address + bytes > kFirst + shared_bytes)
    fail("reaches beyond its shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(address - kFirst) +
         " of " + std::to_string(shared_bytes));
  return resnet_kernels::sm90::memory + (address - kFirst);
}

// With rows of 128 bytes in eights, chunks of 16 bytes exchange their places: bits 4 to 6 by bits 7 to 9.
inline uint32_t swizzled128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

}  // namespace emulation
