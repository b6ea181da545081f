// The copy engine (TMA): boxes of tensors to and from shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "cuda/sm90/barriers.h"
#include "cuda/sm90/shared_memory.h"

namespace emulation {

// What a CUtensorMap points to. Strides in bytes; box of an im2col map: channels and pixels.
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
  // Of the element at `index`, or null outside.
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

// use(shared memory's element, the tensor's or null, its bytes) for each of the box, in order.
template <class Use>
void for_each_of_box(const TensorMap& m, uint32_t address, const int* corner, Use use) {
  if (address % (m.swizzled ? 1024 : 128) && m.swizzled) {
    // Rows of 128 bytes may begin anywhere among eight: the swizzle goes by address.
    if (address % 128) fail("a swizzled box at " + std::to_string(address));
  } else if (address % 128) {
    fail("a box at " + std::to_string(address) + ", no multiple of 128");
  }
  // Found on an H200: without swizzle the innermost coordinate is a multiple of 16 bytes.
  if (!m.swizzled && corner[0] * m.bytes % 16) fail("a box from coordinate " + std::to_string(corner[0]));
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
  if (m.im2col || m.rank != static_cast<int>(corner.size())) fail("a load of another kind than its tensor map");
  block->under_way.push_back([=, &m] {
    for_each_of_box(m, address, corner.data(), [](uint8_t* to, const uint8_t* from, int bytes) {
      from ? std::memcpy(to, from, bytes) : std::memset(to, 0, bytes);
    });
    barrier_at(barrier).transferred(m.box_bytes());
  });
}

// Pixels from (w, h, n) on, columns first, inside the map less its corners; of each what lies (s, r) further.
inline void load_im2col(const CUtensorMap* map, uint64_t* barrier, uint32_t address, int c, int w, int h, int n, int s,
                        int r) {
  const TensorMap& m = TensorMap::of(map);
  if (!m.im2col || !m.swizzled || address % 1024) fail("a load of another kind than its tensor map");
  const int64_t end_w = m.sizes[1] + m.upper[0], end_h = m.sizes[2] + m.upper[1];
  block->under_way.push_back([=, &m] {
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

// Of a thread: boxes to be taken out, in groups; shared memory is read as late as may be, when the group is awaited.
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
