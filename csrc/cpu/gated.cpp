// The gated pass and its gradient. A thread takes up to kSegmentRows rows (positions) of one map, and runs a chunk of rows
// at a time through plain fp32 loops, compiled for several instruction sets. 16-bit rows are widened into L1 before those
// loops and rounded after them. Memory is read once and written once.
#include "cpu/gated.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/checks.h"
#include "cpu/blocks.h"
#include "cpu/isa.h"
#include "cpu/memory_pool.h"

namespace resnet_kernels {
namespace {

constexpr int64_t kChunk = 4096;        // elements of a chunk: they stay in L1 from step to step
constexpr int64_t kSegmentRows = 256;   // rows of one map that a thread takes at a time
constexpr int64_t kSummedRows = 8;      // rows summed in fp32 before they are added in fp64

RK_MULTI_ISA void widen(float* t, const at::BFloat16* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = static_cast<float>(x[i]);
}
RK_MULTI_ISA void widen(float* t, const at::Half* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = static_cast<float>(x[i]);
}
RK_MULTI_ISA void narrow(at::BFloat16* y, const float* t, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = static_cast<at::BFloat16>(t[i]);
}
RK_MULTI_ISA void narrow(at::Half* y, const float* t, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = static_cast<at::Half>(t[i]);
}

// t = gate * z, with gate per channel.
RK_MULTI_ISA void scale(float* t, const float* z, const float* gate, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) t[m * C + c] = gate[c] * z[m * C + c];
}

// t = gate * z + s, with gate per channel.
RK_MULTI_ISA void scale_add(float* t, const float* z, const float* gate, const float* s, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) t[m * C + c] = __builtin_fmaf(gate[c], z[m * C + c], s[m * C + c]);
}

// ReLU in place; NaN stays NaN.
RK_MULTI_ISA void rectify(float* t, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = t[i] <= 0 ? 0.f : t[i];
}

// t = x where not (mask <= 0), else 0.
RK_MULTI_ISA void apply_mask(float* t, const float* x, const float* mask, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = mask[i] <= 0 ? 0.f : x[i];
}

// sum += g * z per channel.
RK_MULTI_ISA void add_products(float* sum, const float* g, const float* z, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) sum[c] = __builtin_fmaf(g[m * C + c], z[m * C + c], sum[c]);
}

// to += from, from = 0.
RK_MULTI_ISA void move_sums(double* to, float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i], from[i] = 0.f;
}

// Reads elements of a map as fp32: in place if they are fp32, else widened into a buffer.
template <typename scalar_t>
class Reader {
 public:
  Reader(const std::optional<at::Tensor>& t, int64_t size)
      : x_(t ? t->const_data_ptr<scalar_t>() : nullptr), wide_(narrow_ && t ? size : 0) {}
  const float* at(int64_t first, int64_t count) {
    if constexpr (!narrow_) return x_ + first;
    else return widen(wide_.data(), x_ + first, count), wide_.data();
  }
  explicit operator bool() const { return x_; }

 private:
  static constexpr bool narrow_ = !std::is_same_v<scalar_t, float>;
  const scalar_t* x_;
  std::vector<float> wide_;
};

// Where fp32 elements of a result are computed: in place if the result is fp32, else in a buffer that `done` rounds into
// the result.
template <typename scalar_t>
class Writer {
 public:
  Writer(const at::Tensor& t, int64_t size)
      : y_(t.defined() ? t.mutable_data_ptr<scalar_t>() : nullptr), wide_(narrow_ ? size : 0) {}
  float* at(int64_t first) {
    if constexpr (!narrow_) return y_ + first;
    else return wide_.data();
  }
  void done(int64_t first, int64_t count) {
    if constexpr (narrow_) narrow(y_ + first, wide_.data(), count);
  }
  explicit operator bool() const { return y_; }

 private:
  static constexpr bool narrow_ = !std::is_same_v<scalar_t, float>;
  scalar_t* y_;
  std::vector<float> wide_;
};

// The work of a pass: N maps of `rows` positions, cut into segments that threads take.
struct Maps {
  int64_t N, C, rows;  // rows of a map
  int64_t chunk() const { return std::max<int64_t>(1, kChunk / std::max<int64_t>(C, 1)); }
  int64_t segments() const { return (rows + kSegmentRows - 1) / kSegmentRows; }
};

Maps maps_of(const at::Tensor& z) { return {z.size(0), z.size(1), z.size(2) * z.size(3)}; }

void check_map(const std::optional<at::Tensor>& t, const at::Tensor& like, const char* name) {
  if (!t) return;
  check_cpu(*t, name);
  check_nhwc(*t, name);
  RK_CHECK_EQ(t->scalar_type(), like.scalar_type(), name);
  RK_CHECK_EQ(t->sizes(), like.sizes(), name);
}

void check_gate(const std::optional<at::Tensor>& gate, const at::Tensor& z) {
  if (!gate) return;
  check_cpu(*gate, "gate");
  RK_CHECK_EQ(gate->scalar_type(), at::kFloat, "gate");
  RK_CHECK_EQ(gate->sizes(), z.sizes().slice(0, 2), "gate");
  TORCH_CHECK(gate->is_contiguous(), "gate: expected contiguous memory, got strides ", gate->strides());
}

// Calls function(scalar_t{}) for the C++ type of fp32, bf16 or fp16.
template <typename Function>
void in_dtype(at::ScalarType type, const Function& function) {
  AT_DISPATCH_SWITCH(type, "gated",
                     AT_DISPATCH_CASE(at::kFloat, [&] { function(scalar_t{}); })
                     AT_DISPATCH_CASE(at::kBFloat16, [&] { function(scalar_t{}); })
                     AT_DISPATCH_CASE(at::kHalf, [&] { function(scalar_t{}); }));
}

}  // namespace

at::Tensor cpu_gated(const at::Tensor& z, const std::optional<at::Tensor>& gate,
                     const std::optional<at::Tensor>& shortcut, bool relu) {
  check_map(z, z, "z");
  check_map(shortcut, z, "shortcut");
  check_gate(gate, z);
  auto y = allocate_nhwc(z.sizes(), z.options());
  if (y.numel() == 0) return y;
  const Maps maps = maps_of(z);
  const std::vector<float> ones(gate ? 0 : maps.C, 1.f);
  in_dtype(z.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t C = maps.C, step = maps.chunk();
    for_each_block(maps.N * maps.segments(), 1, [&](int64_t block) {
      const int64_t n = block / maps.segments(), first = block % maps.segments() * kSegmentRows;
      const int64_t last = std::min(maps.rows, first + kSegmentRows);
      Reader<scalar_t> from(z, step * C), added(shortcut, step * C);
      Writer<scalar_t> to(y, step * C);
      const float* const factor = gate ? gate->const_data_ptr<float>() + n * C : ones.data();
      for (int64_t m = first; m < last; m += step) {
        const int64_t rows = std::min(step, last - m), at = (n * maps.rows + m) * C, count = rows * C;
        float* const t = to.at(at);
        if (added) scale_add(t, from.at(at, count), factor, added.at(at, count), rows, C);
        else scale(t, from.at(at, count), factor, rows, C);
        if (relu) rectify(t, count);
        to.done(at, count);
      }
    });
  });
  return y;
}

std::array<at::Tensor, 3> cpu_gated_grad(const at::Tensor& dy, const std::optional<at::Tensor>& y,
                                         const std::optional<at::Tensor>& z, const std::optional<at::Tensor>& gate,
                                         const std::array<bool, 3>& wanted) {
  const auto [want_z, want_gate, want_g] = wanted;
  check_map(dy, dy, "dy");
  check_map(y, dy, "y");
  check_map(z, dy, "z");
  check_gate(gate, dy);
  TORCH_CHECK(!want_z || gate, "gate: expected a tensor for the gradient of z, got none");
  TORCH_CHECK(!want_gate || z, "z: expected a tensor for the gradient of the gate, got none");
  const Maps maps = maps_of(dy);
  const int64_t C = maps.C, step = maps.chunk(), segments = maps.segments();
  std::array<at::Tensor, 3> grads;
  if (want_z) grads[0] = allocate_nhwc(dy.sizes(), dy.options());
  if (want_gate) grads[1] = at::zeros({maps.N, C}, dy.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  if (want_g) grads[2] = allocate_nhwc(dy.sizes(), dy.options());
  if (dy.numel() == 0) return grads;
  std::vector<double> partial(want_gate ? maps.N * segments * C : 0);
  in_dtype(dy.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    for_each_block(maps.N * segments, 1, [&](int64_t block) {
      const int64_t n = block / segments, first = block % segments * kSegmentRows;
      const int64_t last = std::min(maps.rows, first + kSegmentRows);
      Reader<scalar_t> from(dy, step * C), mask(y, step * C), branch(z, step * C);
      Writer<scalar_t> to_z(grads[0], step * C), to_g(grads[2], step * C);
      std::vector<float> masked(step * C), sum(want_gate ? C : 0);
      const float* const factor = gate ? gate->const_data_ptr<float>() + n * C : nullptr;
      for (int64_t m = first; m < last; m += step) {
        const int64_t rows = std::min(step, last - m), at = (n * maps.rows + m) * C, count = rows * C;
        const float* g = from.at(at, count);
        if (mask) {
          float* const t = to_g ? to_g.at(at) : masked.data();
          apply_mask(t, g, mask.at(at, count), count);
          g = t;
        } else if (to_g) {
          std::copy(g, g + count, to_g.at(at));
        }
        if (to_g) to_g.done(at, count);
        if (to_z) scale(to_z.at(at), g, factor, rows, C), to_z.done(at, count);
        if (!want_gate) continue;
        const float* const z_rows = branch.at(at, count);
        for (int64_t r = 0; r < rows; r += kSummedRows) {
          add_products(sum.data(), g + r * C, z_rows + r * C, std::min(kSummedRows, rows - r), C);
          move_sums(partial.data() + block * C, sum.data(), C);
        }
      }
    });
  });
  if (want_gate) {
    float* const dgate = grads[1].mutable_data_ptr<float>();
    for (int64_t n = 0; n < maps.N; ++n)
      for (int64_t c = 0; c < C; ++c) {
        double total = 0;
        for (int64_t s = 0; s < segments; ++s) total += partial[(n * segments + s) * C + c];
        dgate[n * C + c] = static_cast<float>(total);
      }
  }
  return grads;
}

}  // namespace resnet_kernels
