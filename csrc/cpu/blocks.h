// How work is shared among threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <tuple>
#include <utility>

namespace resnet_kernels {

// `count` blocks of work. A thread takes the next blocks whenever it is free, because the cores of a shared machine are
// not equally fast. It takes `at_a_time` consecutive blocks, which share operands.
class BlockQueue {
 public:
  explicit BlockQueue(int64_t count, int64_t at_a_time = 1) : count_(count), at_a_time_(at_a_time) {}
  // Runs work() on every thread. It must take blocks until none is left.
  template <typename Work>
  void run(const Work& work) {
    const int64_t takers = std::min<int64_t>((count_ + at_a_time_ - 1) / at_a_time_, at::get_num_threads());
    at::parallel_for(0, takers, 1, [&](int64_t, int64_t) { work(); });
  }
  // Returns the begin and end of the next blocks. If none is left, begin is `count` or more.
  std::pair<int64_t, int64_t> take() {
    const int64_t begin = next_.fetch_add(at_a_time_, std::memory_order_relaxed);
    return {begin, std::min(count_, begin + at_a_time_)};
  }

 private:
  const int64_t count_, at_a_time_;
  std::atomic<int64_t> next_{0};
};

// Runs work(block) for every block in [0, count), on all threads.
template <typename Work>
void for_each_block(int64_t count, int64_t at_a_time, const Work& work) {
  BlockQueue blocks(count, at_a_time);
  blocks.run([&] {
    for (auto [block, end] = blocks.take(); block < count; std::tie(block, end) = blocks.take())
      for (; block < end; ++block) work(block);
  });
}

}  // namespace resnet_kernels
