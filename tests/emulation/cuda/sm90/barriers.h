// mbarriers in shared memory: arrival counts, transaction bytes, phases; and named barriers.
#pragma once

#include <cstdint>

#include "cuda/sm90/shared_memory.h"

namespace emulation {

// An mbarrier in its 8 bytes. The phase completes when no arrival and no byte is pending.
struct BytesBarrier {
  uint16_t expected : 15, phase : 1;
  int16_t pending;
  int32_t bytes;

  void arrived() {
    if (--pending < 0) fail("mbarrier: more arrivals than the barrier expects in a phase");
    turn();
  }
  void transferred(int n) {
    bytes -= n;
    turn();
  }
  void turn() {
    if (pending == 0 && bytes == 0) phase ^= 1, pending = expected;
  }
};
static_assert(sizeof(BytesBarrier) == 8);

inline BytesBarrier& barrier_at(const uint64_t* where) {
  return *reinterpret_cast<BytesBarrier*>(const_cast<uint64_t*>(where));
}

}  // namespace emulation

namespace cutlass::arch {

struct ClusterBarrier {
  static void init(const uint64_t* where, uint32_t arrivals) {
    emulation::barrier_at(where) = {static_cast<uint16_t>(arrivals), 0, static_cast<int16_t>(arrivals), 0};
  }
  static void arrive(const uint64_t* where) { emulation::barrier_at(where).arrived(); }
  static void wait(const uint64_t* where, uint32_t phase) {
    emulation::await("an mbarrier", [&] { return emulation::barrier_at(where).phase != phase; });
  }
};

struct ClusterTransactionBarrier : ClusterBarrier {
  static void arrive_and_expect_tx(const uint64_t* where, uint32_t bytes) {
    emulation::barrier_at(where).bytes += bytes;
    arrive(where);
  }
};

struct NamedBarrier {
  static void sync(uint32_t threads, uint32_t id) { emulation::sync_named(threads, id); }
  static void arrive_and_wait(uint32_t threads, uint32_t id) { sync(threads, id); }
};

inline void fence_barrier_init() {}
inline void fence_view_async_shared() {}
template <int>
void warpgroup_reg_alloc() {}
template <int>
void warpgroup_reg_dealloc() {}

}  // namespace cutlass::arch
