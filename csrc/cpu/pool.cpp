#include "cpu/pool.h"

#include <stdlib.h>
#include <map>
#include <mutex>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace resnet_kernels {
namespace {

// Smaller blocks are malloc's business: it keeps those.
constexpr size_t kSmallest = 256 << 10, kHugePage = 2 << 20;

class Pool {
 public:
  std::pair<void*, size_t> take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = waiting_.lower_bound(bytes);
      // A much larger block would be missing elsewhere, and what training keeps would be as much larger.
      if (found != waiting_.end() && found->first <= bytes + bytes / 4) {
        const auto block = std::make_pair(found->second, found->first);
        held_ -= block.second;
        waiting_.erase(found);
        return block;
      }
    }
    const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
    // Not a multiple of the alignment: a block rounded up would be too large for the tensor that it was made for.
    const size_t size = (bytes + 63) / 64 * 64;
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, alignment, size) == 0, "could not allocate ", size, " bytes of activations");
#ifdef __linux__
    if (alignment == kHugePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return {memory, size};
  }

  void give(void* memory, size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (held_ + size <= static_cast<size_t>(kPoolBytes)) {
        waiting_.emplace(size, memory);
        held_ += size;
        return;
      }
    }
    std::free(memory);
  }

  size_t held() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return held_;
  }

 private:
  std::mutex mutex_;
  std::multimap<size_t, void*> waiting_;
  size_t held_ = 0;
};

// Never destroyed: tensors may outlive the library's own statics.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

at::Tensor pooled_nhwc(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < kSmallest) return at::empty(sizes, options.memory_format(at::MemoryFormat::ChannelsLast));
  const auto [memory, size] = pool().take(bytes);
  const int64_t C = sizes[1], H = sizes[2], W = sizes[3];
  return at::from_blob(memory, sizes, {H * W * C, 1, W * C, C},
                       [size = size](void* p) { pool().give(p, size); }, options);
}

int64_t pool_bytes() { return static_cast<int64_t>(pool().held()); }

}  // namespace resnet_kernels
