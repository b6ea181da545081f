#include "cpu/memory_pool.h"

#include <stdlib.h>
#include <map>
#include <mutex>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace resnet_kernels {
namespace {

// Smaller tensors use malloc, which reuses blocks of that size itself.
constexpr size_t kMinBytes = 256 << 10, kHugePage = 2 << 20;

class MemoryPool {
 public:
  // Returns memory of at least `bytes` and its real size.
  std::pair<void*, size_t> take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = free_.lower_bound(bytes);
      // At most a quarter larger than needed. A much larger block is left for a larger tensor, and in training, which holds
      // many activations, the surplus would add up.
      if (found != free_.end() && found->first <= bytes + bytes / 4) {
        const auto block = std::make_pair(found->second, found->first);
        free_bytes_ -= block.second;
        free_.erase(found);
        return block;
      }
    }
    const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
    // Rounded to cache lines, not to huge pages: a block of whole huge pages would exceed the quarter allowed above.
    const size_t size = (bytes + 63) / 64 * 64;
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, alignment, size) == 0, "memory pool: could not allocate ", size,
                " bytes");
#ifdef __linux__
    if (alignment == kHugePage) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return {memory, size};
  }

  // Takes a block back: it stays free in the pool, or is released if the pool is full.
  void give(void* memory, size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (free_bytes_ + size <= static_cast<size_t>(kPoolBytes)) {
        free_.emplace(size, memory);
        free_bytes_ += size;
        return;
      }
    }
    std::free(memory);
  }

  size_t free_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return free_bytes_;
  }

 private:
  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  size_t free_bytes_ = 0;
};

// Never destroyed: tensors may outlive the library's own statics.
MemoryPool& pool() {
  static MemoryPool* const instance = new MemoryPool;
  return *instance;
}

}  // namespace

at::Tensor allocate_nhwc(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < kMinBytes) return at::empty(sizes, options.memory_format(at::MemoryFormat::ChannelsLast));
  const auto [memory, size] = pool().take(bytes);
  const int64_t C = sizes[1], H = sizes[2], W = sizes[3];
  return at::from_blob(memory, sizes, {H * W * C, 1, W * C, C},
                       [size = size](void* p) { pool().give(p, size); }, options);
}

int64_t pool_bytes() { return static_cast<int64_t>(pool().free_bytes()); }

}  // namespace resnet_kernels
