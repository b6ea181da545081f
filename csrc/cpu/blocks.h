// How work is shared among threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <tuple>
#include <utility>

namespace resnet_kernels {

// Work in blocks, each done by whichever thread is free: the cores of a shared machine are not equally fast. Neighbours that
// share operands come `together`.
class Blocks {
 public:
  explicit Blocks(int64_t count, int64_t together = 1) : count_(count), together_(together) {}
  // work() on every thread: it takes blocks until none is left.
  template <typename Work>
  void run(const Work& work) {
    const int64_t takers = std::min<int64_t>((count_ + together_ - 1) / together_, at::get_num_threads());
    at::parallel_for(0, takers, 1, [&](int64_t, int64_t) { work(); });
  }
  // Begin and end of the next ones; begin is `count` or more where none is left.
  std::pair<int64_t, int64_t> take() {
    const int64_t begin = next_.fetch_add(together_, std::memory_order_relaxed);
    return {begin, std::min(count_, begin + together_)};
  }

 private:
  const int64_t count_, together_;
  std::atomic<int64_t> next_{0};
};

template <typename Work>
void each_block(int64_t count, int64_t together, const Work& work) {
  Blocks blocks(count, together);
  blocks.run([&] {
    for (auto [block, end] = blocks.take(); block < count; std::tie(block, end) = blocks.take())
      for (; block < end; ++block) work(block);
  });
}

}  // namespace resnet_kernels
