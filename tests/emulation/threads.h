// An emulator of CUDA's execution model on one CPU thread. The threads of a block are fibers that take turns; blocks
// run one after another. A wait that can never end is reported as a deadlock, with the threads that wait and what they
// wait for.
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

// A fiber's context and stack. They are reused from block to block, because creating one asks the system for memory.
// _setjmp and _longjmp make no system call; swapcontext would save the signal mask at every switch.
struct Place {
  jmp_buf at;
  std::unique_ptr<char[]> stack;
};

// A thread of the block: what it waits for, and whether it has ended.
struct Fiber {
  dim3 thread;
  const char* waits_for = nullptr;
  bool done = false;
};

// A reusable barrier: threads that have arrived, and how often it has opened.
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
  std::vector<uint64_t> exchanged;               // per thread: the value of a shuffle
  std::vector<std::function<void()>> in_flight;  // TMA loads in flight, completed in random order
  uint32_t random = 1;

  unsigned threads() const { return size.x * size.y * size.z; }
  Fiber& me() { return fibers[current]; }
};

inline Block* block = nullptr;

// Set by an emulated unit: returns what a thread had started and not awaited when it ended ("it had waited for its TMA stores"),
// or null.
inline const char* (*unawaited)(unsigned thread) = nullptr;

inline std::vector<Place> places;

// Whether every second block runs its threads from the last to the first, to find kernels that depend on the order of
// threads.
inline bool reverse_odd_blocks = false;

// Return to the scheduler; run on at this thread's next turn.
inline void yield() {
  if (!_setjmp(places[block->current].at)) _longjmp(block->scheduler, 1);
}

// Let other threads run until the predicate holds.
template <class Predicate>
void await(const char* what, Predicate there) {
  block->me().waits_for = what;
  while (!there()) yield();
  block->me().waits_for = nullptr;
  block->progress = true;
}

// Report a kernel's error: the launch fails with this message.
[[noreturn]] inline void fail(const std::string& what) {
  Block& b = *block;
  b.failure = what + ", thread " + std::to_string(b.current) + " of block " + std::to_string(b.index.x);
  yield();
  __builtin_unreachable();
}

// Wait at a barrier until `threads` threads have arrived.
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

// Return what lane `from` of the warp passes. All lanes must take part.
template <class T>
T exchange(uint32_t mask, T mine, unsigned from) {
  static_assert(sizeof(T) <= 8);
  if (mask != ~0u) fail("shuffles are emulated for full masks only, got a partial mask");
  std::memcpy(&block->exchanged[block->current], &mine, sizeof(T));
  sync_warp();
  T theirs;
  std::memcpy(&theirs, &block->exchanged[block->current / kWarp * kWarp + from % kWarp], sizeof(T));
  sync_warp();
  return theirs;
}
inline unsigned lane() { return block->current % kWarp; }

// A fiber's body: this thread of one block after another.
inline void run_fibers() {
  for (;; yield()) {
    (*block->body)();
    if (const char* what = unawaited ? unawaited(block->current) : nullptr)
      fail(std::string("the thread ended before ") + what);
    block->me().done = true;
    --block->alive;
    block->progress = true;
  }
}

// Run the current thread until it waits or ends.
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

// Abandon all fibers, with what they hold, and fail the launch.
[[noreturn]] inline void abandon(const std::string& why) {
  places.clear();
  throw std::runtime_error(why);
}

// A pseudorandom bit, the same in every run.
inline bool coin_flip(Block& b) { return (b.random = b.random * 1664525u + 1013904223u) >> 31; }

inline std::string deadlock_report(const Block& b) {
  std::string text = "deadlock: every thread waits in block " + std::to_string(b.index.x) + ":";
  const char* last = nullptr;
  for (size_t i = 0; i < b.fibers.size(); ++i)
    if (!b.fibers[i].done && b.fibers[i].waits_for != last)
      text += " from thread " + std::to_string(i) + " on for " + (last = b.fibers[i].waits_for) + ";";
  return text;
}

// Run one block. Throws std::runtime_error if a thread fails, or if all threads wait.
inline void run_block(dim3 grid, dim3 size, dim3 index, const std::function<void()>& body) {
  Block b;
  block = &b;
  b.grid = grid, b.size = size, b.index = index, b.body = &body, b.random = 2 * index.x + 1;
  b.alive = b.threads();
  b.fibers.resize(b.alive), b.exchanged.resize(b.alive), b.warps.resize((b.alive + kWarp - 1) / kWarp);
  for (unsigned i = 0; i < b.fibers.size(); ++i)
    b.fibers[i].thread = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
  if (places.size() < b.fibers.size()) places.resize(b.fibers.size());
  while (b.alive > 0 || !b.in_flight.empty()) {
    b.progress = false;
    for (unsigned turn = 0; turn < b.fibers.size(); ++turn) {
      b.current = reverse_odd_blocks && index.x % 2 ? static_cast<unsigned>(b.fibers.size()) - 1 - turn : turn;
      if (b.me().done) continue;
      resume();
      if (!b.failure.empty()) abandon(b.failure);
    }
    // Loads in flight complete at random, latest first; at least one does if no thread has made progress.
    for (size_t i = b.in_flight.size(); i-- > 0;)
      if (coin_flip(b) || !b.progress) {
        auto arrives = std::move(b.in_flight[i]);
        b.in_flight.erase(b.in_flight.begin() + i);
        arrives();
        b.progress = true;
      }
    if (!b.failure.empty()) abandon(b.failure);
    if (!b.progress) abandon(deadlock_report(b));
  }
}

inline void run_grid(dim3 grid, dim3 size, const std::function<void()>& body) {
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) run_block(grid, size, dim3(x, y, z), body);
}

}  // namespace emulation

// CUDA's built-in variables, qualifiers and intrinsics.
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
// One block runs at a time, so static is as good as shared. Dynamic shared memory is provided by each library's
// emulator.
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
