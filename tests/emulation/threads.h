// CUDA's threads on one thread of a CPU: those of a block are fibers that take turns, blocks follow each other. What
// waits for what will never come is told as a deadlock, with who waits.
#pragma once

#include <setjmp.h>
#include <ucontext.h>
#include <vector_types.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

// Where a fiber runs, kept from block to block: to make one asks the system for memory. _setjmp and _longjmp, unlike
// swapcontext, do not ask it at every turn for the signals that are blocked.
struct Place {
  jmp_buf at;
  std::unique_ptr<char[]> stack;
};

struct Fiber {
  dim3 thread;
  const char* waits_for = nullptr;
  bool done = false;
};

// A point where `threads` meet, as often as they like.
struct Meeting {
  unsigned arrived = 0, generation = 0;
};

struct Block {
  dim3 grid, size, index;
  std::vector<Fiber> fibers;
  unsigned alive = 0, current = 0;
  bool progress = false;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  std::string failure;
  Meeting all, named[16];
  std::vector<Meeting> warps;
  std::vector<uint64_t> exchanged;               // of a thread, what it gives to its warp
  std::vector<std::function<void()>> under_way;  // what the copy engine has yet to do, in no order
  uint32_t random = 1;

  unsigned threads() const { return size.x * size.y * size.z; }
  Fiber& me() { return fibers[current]; }
};

inline Block* block = nullptr;

// What was started and nobody awaited when a thread ends: null, or what it is.
inline const char* (*left_behind)(unsigned thread) = nullptr;

inline std::vector<Place> places;

// Whether threads of every second block take their turns from the last to the first: who is first must not matter.
inline bool turned = false;

inline void yield() {
  if (!_setjmp(places[block->current].at)) _longjmp(block->scheduler, 1);
}

template <class Predicate>
void await(const char* what, Predicate there) {
  block->me().waits_for = what;
  while (!there()) yield();
  block->me().waits_for = nullptr;
  block->progress = true;
}

// A kernel's fault: the launch fails by it.
[[noreturn]] inline void fail(const std::string& what) {
  Block& b = *block;
  b.failure = what + ", thread " + std::to_string(b.current) + " of block " + std::to_string(b.index.x);
  yield();
  __builtin_unreachable();
}

inline void meet(const char* what, Meeting& at, std::function<unsigned()> threads) {
  const unsigned generation = at.generation;
  ++at.arrived;
  await(what, [&] {
    if (at.generation == generation && at.arrived >= threads()) at.arrived = 0, ++at.generation;
    return at.generation != generation;
  });
}

inline void sync_threads() {
  meet("__syncthreads", block->all, [] { return block->alive; });
}
inline void sync_named(unsigned threads, unsigned id) {
  meet("a named barrier", block->named[id], [=] { return threads; });
}
inline void sync_warp() {
  const unsigned warp = block->current / kWarp, first = warp * kWarp;
  meet("its warp", block->warps[warp], [=] { return std::min<unsigned>(kWarp, block->threads() - first); });
}

// What lane `from` of the warp gives. All lanes take part.
template <class T>
T exchange(uint32_t mask, T mine, unsigned from) {
  static_assert(sizeof(T) <= 8);
  if (mask != ~0u) fail("a shuffle of some lanes is not emulated");
  std::memcpy(&block->exchanged[block->current], &mine, sizeof(T));
  sync_warp();
  T theirs;
  std::memcpy(&theirs, &block->exchanged[block->current / kWarp * kWarp + from % kWarp], sizeof(T));
  sync_warp();
  return theirs;
}
inline unsigned lane() { return block->current % kWarp; }

// One thread of each block after the other.
inline void run_fibers() {
  for (;; yield()) {
    (*block->body)();
    if (const char* what = left_behind ? left_behind(block->current) : nullptr) fail(std::string("ends before ") + what);
    block->me().done = true;
    --block->alive;
    block->progress = true;
  }
}

// Runs the current thread until it waits or ends.
[[gnu::noinline]] inline void resume() {
  if (_setjmp(block->scheduler)) return;
  Place& place = places[block->current];
  if (place.stack) _longjmp(place.at, 1);
  place.stack.reset(new char[kStackBytes]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = place.stack.get(), context.uc_stack.ss_size = kStackBytes, context.uc_link = nullptr;
  makecontext(&context, run_fibers, 0);
  setcontext(&context);
}

// Those that wait for what will never come are given up, with what they hold.
[[noreturn]] inline void give_up(const std::string& why) {
  places.clear();
  throw std::runtime_error(why);
}

inline bool chance(Block& b) { return (b.random = b.random * 1664525u + 1013904223u) >> 31; }

inline std::string who_waits(const Block& b) {
  std::string text = "deadlock in block " + std::to_string(b.index.x) + ":";
  const char* last = nullptr;
  for (size_t i = 0; i < b.fibers.size(); ++i)
    if (!b.fibers[i].done && b.fibers[i].waits_for != last)
      text += " from thread " + std::to_string(i) + " for " + (last = b.fibers[i].waits_for) + ";";
  return text;
}

// Throws std::runtime_error where a thread fails, or all wait.
inline void run_block(dim3 grid, dim3 size, dim3 index, const std::function<void()>& body) {
  Block b;
  block = &b;
  b.grid = grid, b.size = size, b.index = index, b.body = &body, b.random = 2 * index.x + 1;
  b.alive = b.threads();
  b.fibers.resize(b.alive), b.exchanged.resize(b.alive), b.warps.resize((b.alive + kWarp - 1) / kWarp);
  for (unsigned i = 0; i < b.fibers.size(); ++i)
    b.fibers[i].thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
  if (places.size() < b.fibers.size()) places.resize(b.fibers.size());
  while (b.alive > 0 || !b.under_way.empty()) {
    b.progress = false;
    for (unsigned turn = 0; turn < b.fibers.size(); ++turn) {
      b.current = turned && index.x % 2 ? static_cast<unsigned>(b.fibers.size()) - 1 - turn : turn;
      if (b.me().done) continue;
      resume();
      if (!b.failure.empty()) give_up(b.failure);
    }
    // What is under way arrives sooner or later, the last first.
    for (size_t i = b.under_way.size(); i-- > 0;)
      if (chance(b) || !b.progress) {
        auto arrives = std::move(b.under_way[i]);
        b.under_way.erase(b.under_way.begin() + i);
        arrives();
        b.progress = true;
      }
    if (!b.failure.empty()) give_up(b.failure);
    if (!b.progress) give_up(who_waits(b));
  }
}

inline void run_grid(dim3 grid, dim3 size, const std::function<void()>& body) {
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) run_block(grid, size, dim3(x, y, z), body);
}

}  // namespace emulation

// What nvcc knows.
#define threadIdx (emulation::block->me().thread)
#define blockIdx (emulation::block->index)
#define blockDim (emulation::block->size)
#define gridDim (emulation::block->grid)
#ifndef __global__
#define __global__
#define __device__
#define __host__
#endif
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#ifndef __forceinline__
#define __forceinline__ inline
#endif
#ifndef __grid_constant__
#define __grid_constant__
#endif
// One block runs at a time. What a kernel takes without a size is the emulator's of the kernel's library.
#undef __shared__
#define __shared__ static

inline void __syncthreads() { emulation::sync_threads(); }
inline void __syncwarp(uint32_t mask = ~0u) { emulation::exchange(mask, 0, 0); }
template <class T>
T __shfl_sync(uint32_t mask, T v, int from, int = 32) {
  return emulation::exchange(mask, v, from);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T v, int across, int = 32) {
  return emulation::exchange(mask, v, emulation::lane() ^ across);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
