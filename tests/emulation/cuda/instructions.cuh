// Replaces csrc/cuda/instructions.cuh: the same functions on a CPU, with the semantics of the PTX ISA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"

namespace emulation {

// Dynamic shared memory: the largest that a block can have on sm_80.
alignas(128) inline char shared[163 << 10];

constexpr unsigned kMostThreads = 1024;

// Exchange values within the warp: returns the array of all lanes' values. Double-buffered, because a lane may already
// be at the next instruction.
template <class Given>
const Given* meet_warp(const Given& mine) {
  static Given given[2][kMostThreads];
  static bool turn[kMostThreads];
  const unsigned me = block->current;
  Given* all = given[turn[me] = !turn[me]];
  all[me] = mine;
  sync_warp();
  return all + me / kWarp * kWarp;
}

struct Copy {
  void* to;
  const void* from;
  bool there;
};
// cp.async copies in flight by thread, in commit groups; the last group is the open one.
inline std::vector<std::vector<Copy>> copies[kMostThreads];

inline void arrive(const std::vector<Copy>& group) {
  for (const Copy& c : group) c.there ? std::memcpy(c.to, c.from, 16) : std::memset(c.to, 0, 16);
}

inline const char* unawaited_copies(unsigned thread) {
  for (const auto& group : copies[thread])
    if (!group.empty()) return "it had waited for its cp.async copies";
  copies[thread].clear();
  return nullptr;
}
inline const bool registered = (unawaited = unawaited_copies, true);

}  // namespace emulation

namespace resnet_kernels {

inline float relu(float v) { return v <= 0 ? 0.f : v; }

inline char* shared_memory() { return emulation::shared; }

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Given {
    float a[4][2], b[2][2];
  } mine;
  const auto widened = [](uint32_t pair, float (&to)[2]) {
    T halves[2];
    std::memcpy(halves, &pair, 4);
    to[0] = static_cast<float>(halves[0]), to[1] = static_cast<float>(halves[1]);
  };
  for (int i = 0; i < 4; ++i) widened(a[i], mine.a[i]);
  for (int i = 0; i < 2; ++i) widened(b[i], mine.b[i]);
  const Given* all = emulation::meet_warp(mine);
  const unsigned lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k)
      sum += double{all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2][k % 2]} *
             all[column * 4 + k % 8 / 2].b[k / 8][k % 2];
    // The PTX ISA leaves the rounding open; tensor cores truncate.
    d[i] = static_cast<float>(sum);
    if (std::fabs(d[i]) > std::fabs(sum) && std::isfinite(sum)) d[i] = std::nextafter(d[i], 0.f);
  }
}

inline void load_transposed(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    emulation::fail("ldmatrix: expected row addresses in multiples of 16 bytes");
  const auto* all = emulation::meet_warp(static_cast<const uint16_t*>(row));
  const unsigned lane = emulation::lane();
  for (int j = 0; j < 4; ++j)
    r[j] = all[8 * j + lane % 4 * 2][lane / 4] | uint32_t{all[8 * j + lane % 4 * 2 + 1][lane / 4]} << 16;
}

// Copies complete as late as they may, in wait_copies, to find reads that come too early.
inline void copy_async(void* to, const void* from, bool there) {
  auto& mine = emulation::copies[emulation::block->current];
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
    emulation::fail("cp.async: expected addresses in multiples of 16 bytes");
  if (mine.empty()) mine.emplace_back();
  mine.back().push_back({to, from, there});
}
inline void commit_copies() {
  auto& mine = emulation::copies[emulation::block->current];
  if (mine.empty()) mine.emplace_back();
  mine.emplace_back();
}
template <int kLeft>
void wait_copies() {
  auto& mine = emulation::copies[emulation::block->current];
  for (; mine.size() > kLeft + 1; mine.erase(mine.begin())) emulation::arrive(mine.front());
}

}  // namespace resnet_kernels
