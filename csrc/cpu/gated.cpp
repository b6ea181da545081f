// Rows of a map go a few at a time through plain loops over fp32, compiled for several instruction sets: 16-bit ones are
// widened into L1 before and rounded behind them. Memory is read once and written once.
#include "cpu/gated.h"

#include <ATen/Dispatch.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/checks.h"
#include "cpu/blocks.h"
#include "cpu/isa.h"
#include "cpu/pool.h"

namespace resnet_kernels {
namespace {

constexpr int64_t kChunk = 4096;        // elements that go through all steps together
constexpr int64_t kSegmentRows = 256;   // rows of one map that a thread takes
constexpr int64_t kSummedRows = 8;      // rows that are summed in fp32

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

RK_MULTI_ISA void scale(float* t, const float* z, const float* gate, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) t[m * C + c] = gate[c] * z[m * C + c];
}

RK_MULTI_ISA void scale_add(float* t, const float* z, const float* gate, const float* s, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) t[m * C + c] = __builtin_fmaf(gate[c], z[m * C + c], s[m * C + c]);
}

RK_MULTI_ISA void rectify(float* t, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = t[i] <= 0 ? 0.f : t[i];
}

RK_MULTI_ISA void keep(float* t, const float* x, const float* mask, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = mask[i] <= 0 ? 0.f : x[i];
}

RK_MULTI_ISA void add_products(float* sum, const float* g, const float* z, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) sum[c] = __builtin_fmaf(g[m * C + c], z[m * C + c], sum[c]);
}

RK_MULTI_ISA void move_sums(double* to, float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i], from[i] = 0.f;
}

// A map's elements in fp32: where they stand, or in memory of its own.
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

// Where fp32 elements of a result are computed: in place, or in memory of its own and rounded by `done`.
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
  TORCH_CHECK(gate->is_contiguous(), "gate: expected it contiguous, got strides ", gate->strides());
}

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
  auto y = pooled_nhwc(z.sizes(), z.options());
  if (y.numel() == 0) return y;
  const Maps maps = maps_of(z);
  const std::vector<float> ones(gate ? 0 : maps.C, 1.f);
  in_dtype(z.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const int64_t C = maps.C, step = maps.chunk();
    each_block(maps.N * maps.segments(), 1, [&](int64_t block) {
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
  TORCH_CHECK(!want_z || gate, "gate: expected one for the gradient of z");
  TORCH_CHECK(!want_gate || z, "z: expected it for the gradient of the gate");
  const Maps maps = maps_of(dy);
  const int64_t C = maps.C, step = maps.chunk(), segments = maps.segments();
  std::array<at::Tensor, 3> found;
  if (want_z) found[0] = pooled_nhwc(dy.sizes(), dy.options());
  if (want_gate) found[1] = at::zeros({maps.N, C}, dy.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous));
  if (want_g) found[2] = pooled_nhwc(dy.sizes(), dy.options());
  if (dy.numel() == 0) return found;
  std::vector<double> parts(want_gate ? maps.N * segments * C : 0);
  in_dtype(dy.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    each_block(maps.N * segments, 1, [&](int64_t block) {
      const int64_t n = block / segments, first = block % segments * kSegmentRows;
      const int64_t last = std::min(maps.rows, first + kSegmentRows);
      Reader<scalar_t> from(dy, step * C), mask(y, step * C), seen(z, step * C);
      Writer<scalar_t> to(found[0], step * C), kept(found[2], step * C);
      std::vector<float> masked(step * C), sum(want_gate ? C : 0);
      const float* const factor = gate ? gate->const_data_ptr<float>() + n * C : nullptr;
      for (int64_t m = first; m < last; m += step) {
        const int64_t rows = std::min(step, last - m), at = (n * maps.rows + m) * C, count = rows * C;
        const float* g = from.at(at, count);
        if (mask) {
          float* const t = kept ? kept.at(at) : masked.data();
          keep(t, g, mask.at(at, count), count);
          g = t;
        } else if (kept) {
          std::copy(g, g + count, kept.at(at));
        }
        if (kept) kept.done(at, count);
        if (to) scale(to.at(at), g, factor, rows, C), to.done(at, count);
        if (!want_gate) continue;
        const float* const z_rows = seen.at(at, count);
        for (int64_t r = 0; r < rows; r += kSummedRows) {
          add_products(sum.data(), g + r * C, z_rows + r * C, std::min(kSummedRows, rows - r), C);
          move_sums(parts.data() + block * C, sum.data(), C);
        }
      }
    });
  });
  if (want_gate) {
    float* const dgate = found[1].mutable_data_ptr<float>();
    for (int64_t n = 0; n < maps.N; ++n)
      for (int64_t c = 0; c < C; ++c) {
        double total = 0;
        for (int64_t s = 0; s < segments; ++s) total += parts[(n * segments + s) * C + c];
        dgate[n * C + c] = static_cast<float>(total);
      }
  }
  return found;
}

}  // namespace resnet_kernels
