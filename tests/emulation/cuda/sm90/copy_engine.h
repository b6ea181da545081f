// TMA: loads of boxes of tensors into shared memory, tiled and im2col, and stores out of it.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "cuda/sm90/barriers.h"
#include "cuda/sm90/shared_memory.h"

namespace emulation {

// The decoded tensor map, to which the emulated CUtensorMap points. Strides in bytes; the box of an im2col map is
// (channels, pixels).
struct TensorMap {
  uint8_t* data;
  int rank, bytes;
  bool swizzled, im2col;
  int64_t sizes[5], strides[5];
  int box[5], lower[2], upper[2], steps[2];

  static const TensorMap& of(const CUtensorMap* map) {
    const TensorMap* kept;
    std::memcpy(&kept, map, sizeof(kept));
    return *kept;
  }
  // The address of the element at `index`, or null out of bounds.
  uint8_t* element(const int64_t* index) const {
    int64_t offset = 0;
    for (int i = 0; i < rank; ++i) {
      if (index[i] < 0 || index[i] >= sizes[i]) return nullptr;
      offset += index[i] * strides[i];
    }
    return data + offset;
  }
  int box_bytes() const {
    int64_t n = bytes;
    for (int i = 0; i < (im2col ? 2 : rank); ++i) n *= box[i];
    return n;
  }
};

// Call use(element in shared memory, element in the tensor or null, its bytes) for each element of the box, in order.
template <class Use>
void for_each_of_box(const TensorMap& m, uint32_t address, const int* corner, Use use) {
  if (address % (m.swizzled ? 1024 : 128) && m.swizzled) {
    // A swizzled box may begin at any row of 128 bytes, because the swizzle goes by address.
    if (address % 128) fail("TMA: expected a swizzled box at a multiple of 128 bytes, got " + std::to_string(address));
  } else if (address % 128) {
    fail("TMA: expected a box at a multiple of 128 bytes, got " + std::to_string(address));
  }
  // Found on an H200: without swizzle, the innermost coordinate must be a multiple of 16 bytes.
  if (!m.swizzled && corner[0] * m.bytes % 16)
    fail("TMA: expected an innermost coordinate at a multiple of 16 bytes, got " + std::to_string(corner[0]));
  const int n = m.box_bytes() / m.bytes;
  for (int i = 0; i < n; ++i) {
    int64_t index[5];
    for (int d = 0, left = i; d < m.rank; ++d) index[d] = corner[d] + left % m.box[d], left /= m.box[d];
    const uint32_t to = address + i * m.bytes;
    use(at(m.swizzled ? swizzled128(to) : to, m.bytes), m.element(index), m.bytes);
  }
}

inline void load_box(const CUtensorMap* map, uint64_t* barrier, uint32_t address, std::vector<int> corner) {
  const TensorMap& m = TensorMap::of(map);
  if (m.im2col || m.rank != static_cast<int>(corner.size()))
    fail("TMA: expected a tiled tensor map of the load's rank");
  block->in_flight.push_back([=, &m] {
    for_each_of_box(m, address, corner.data(), [](uint8_t* to, const uint8_t* from, int bytes) {
      from ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes);
    });
    barrier_at(barrier).transferred(m.box_bytes());
  });
}

// An im2col load: consecutive pixels from (w, h, n) on, columns fastest, within the map's corners; from each pixel the
// element at offset (s, r).
inline void load_im2col(const CUtensorMap* map, uint64_t* barrier, uint32_t address, int c, int w, int h, int n, int s,
                        int r) {
  const TensorMap& m = TensorMap::of(map);
  if (!m.im2col || !m.swizzled || address % 1024)
    fail("TMA: expected a swizzled im2col tensor map and an address in multiples of 1024 bytes");
  const int64_t end_w = m.sizes[1] + m.upper[0], end_h = m.sizes[2] + m.upper[1];
  block->in_flight.push_back([=, &m] {
    int64_t at_w = w, at_h = h, at_n = n;
    for (int pixel = 0; pixel < m.box[1]; ++pixel) {
      for (int i = 0; i < m.box[0]; ++i) {
        const int64_t index[4] = {c + i, at_w + s, at_h + r, at_n};
        const uint8_t* from = m.element(index);
        uint8_t* to = at(swizzled128(address + (pixel * m.box[0] + i) * m.bytes), m.bytes);
        from ? std::memcpy(to, from, m.bytes) : std::memset(to, 0, m.bytes);
      }
      if ((at_w += m.steps[0]) >= end_w) at_w = m.lower[0], at_h += m.steps[1];
      if (at_h >= end_h) at_h = m.lower[1], ++at_n;
    }
    barrier_at(barrier).transferred(m.box_bytes());
  });
}

// A thread's TMA stores, in bulk groups. Shared memory is read as late as possible, when the group is awaited, to find
// buffers that are overwritten too early.
struct Stores {
  std::vector<std::function<void()>> open;
  std::vector<std::vector<std::function<void()>>> groups;
};
inline std::vector<Stores> stores;  // by thread

inline Stores& my_stores() { return stores[block->current]; }

inline void store_box(const CUtensorMap* map, uint32_t address, std::vector<int> corner) {
  const TensorMap& m = TensorMap::of(map);
  my_stores().open.push_back([=, &m] {
    for_each_of_box(m, address, corner.data(), [](uint8_t* from, uint8_t* to, int bytes) {
      if (to) std::memcpy(to, from, bytes);
    });
  });
}
inline void end_stores() {
  my_stores().groups.push_back(std::move(my_stores().open));
  my_stores().open.clear();
}
inline void await_stores_but(size_t left) {
  auto& groups = my_stores().groups;
  while (groups.size() > left) {
    for (auto& store : groups.front()) store();
    groups.erase(groups.begin());
  }
}

}  // namespace emulation
