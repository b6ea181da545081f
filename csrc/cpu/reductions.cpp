// The passes of training. A chunk of a few rows goes through all steps while it stays in L1; each step is a plain loop,
// compiled for several instruction sets. Memory is read once and written once.
#include "cpu/reductions.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "cpu/blocks.h"
#include "cpu/isa.h"
#include "cpu/memory_pool.h"
#include "cpu/stream.h"

namespace resnet_kernels {
namespace {

constexpr int64_t kChunk = 4096;  // elements of a chunk
// The rows of a chunk. They are summed in fp32, and chunks in fp64: the error of a mean is the same in every row, so later
// sums over rows add it up.
constexpr int64_t kFewestRows = 8, kMostRows = 32;
constexpr int64_t kSegmentRows = 256;  // rows whose squared deviations are taken from one origin
// The origin is the mean of the first kOriginRows rows. One row alone may be several standard deviations off the mean, and
// the square of that distance is subtracted from the sum of squares again.
constexpr int64_t kOriginRows = 8;

// t = x where not (mask <= threshold), else 0.
RK_MULTI_ISA void apply_mask(float* t, const float* x, const float* mask, float threshold, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = mask[i] <= threshold ? 0.f : x[i];
}

// t = a*x + b per channel.
RK_MULTI_ISA void affine(float* t, const float* x, const float* a, const float* b, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) t[m * C + c] = __builtin_fmaf(a[c], x[m * C + c], b[c]);
}

RK_MULTI_ISA void affine_relu(float* t, const float* x, const float* a, const float* b, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) {
      const float v = __builtin_fmaf(a[c], x[m * C + c], b[c]);
      t[m * C + c] = v <= 0 ? 0.f : v;
    }
}

// t = a*x + b + a2*(second - mean) per channel.
RK_MULTI_ISA void affine_of_two(float* t, const float* x, const float* a, const float* b, const float* second,
                                const float* a2, const float* mean, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c)
      t[m * C + c] = __builtin_fmaf(a2[c], second[m * C + c] - mean[c], __builtin_fmaf(a[c], x[m * C + c], b[c]));
}

// t = x + sign * v per channel.
RK_MULTI_ISA void add_per_channel(float* t, const float* x, const float* v, float sign, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) t[m * C + c] = x[m * C + c] + sign * v[c];
}

RK_MULTI_ISA void add(float* t, const float* x, const float* r, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = x[i] + r[i];
}

// t = relu(x); NaN stays NaN.
RK_MULTI_ISA void rectify(float* t, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = x[i] <= 0 ? 0.f : x[i];
}

// mean = the mean of the rows per channel, or the first row's value where that mean is not finite.
RK_MULTI_ISA void mean_of(float* mean, const float* t, int64_t rows, int64_t C) {
  std::copy(t, t + C, mean);
  for (int64_t m = 1; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) mean[c] += t[m * C + c];
  const float share = 1.f / static_cast<float>(rows);
  for (int64_t c = 0; c < C; ++c) mean[c] = mean[c] - mean[c] == 0 ? mean[c] * share : t[c];
}

// s1 += t - about, s2 += (t - about)^2, per channel.
RK_MULTI_ISA void add_stats(float* s1, float* s2, const float* t, const float* about, int64_t rows, int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) {
      const float d = t[m * C + c] - about[c];
      s1[c] += d;
      s2[c] = __builtin_fmaf(d, d, s2[c]);
    }
}

// s1 += t, s2 += t * (x - mean), per channel.
RK_MULTI_ISA void add_sums(float* s1, float* s2, const float* t, const float* x, const float* mean, int64_t rows,
                           int64_t C) {
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t c = 0; c < C; ++c) {
      s1[c] += t[m * C + c];
      s2[c] = __builtin_fmaf(t[m * C + c], x[m * C + c] - mean[c], s2[c]);
    }
}

// to += from, from = 0.
RK_MULTI_ISA void move_sums(double* to, float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i], from[i] = 0.f;
}

// t += x where winners == element.
RK_MULTI_ISA void add_where(float* t, const float* x, const uint8_t* winners, int64_t element, int64_t C) {
  const int32_t wanted = static_cast<int32_t>(element);
  for (int64_t c = 0; c < C; ++c) t[c] += static_cast<int32_t>(winners[c]) == wanted ? x[c] : 0.f;
}

const float* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// The data pointers of a Lazy. value() computes its value for some rows in `t`, or returns a pointer to x if nothing is
// applied.
struct LazyRows {
  const float *x, *mask, *a, *b, *second, *a2, *mean, *centre;
  bool relu;
  int64_t C, P, Q;  // P x Q: the map of x
  const uint8_t* winners;
  PoolWindow window;

  explicit LazyRows(const Lazy& l)
      : x(data(l.x)), mask(data(l.mask)), a(data(l.a)), b(data(l.b)), second(data(l.second)), a2(data(l.a2)), mean(data(l.mean)),
        centre(data(l.centre)), relu(l.relu), C(l.x.size(1)), P(l.x.size(2)), Q(l.x.size(3)),
        winners(l.winners.defined() ? l.winners.const_data_ptr<uint8_t>() : nullptr), window(l.window) {}

  const float* value(float* t, int64_t first, int64_t rows) const {
    const int64_t at = first * C, count = rows * C;
    const float* v = x + at;
    if (winners) unpool(t, first, rows), v = t;
    if (mask) apply_mask(t, v, mask + at, 0, count), v = t;
    if (a && second) affine_of_two(t, v, a, b, second + at, a2, mean, rows, C), v = t;
    else if (a && relu) return affine_relu(t, v, a, b, rows, C), centred(t, t, rows);
    else if (a) affine(t, v, a, b, rows, C), v = t;
    if (relu) rectify(t, v, count), v = t;
    return centred(t, v, rows);
  }

 private:
  void unpool(float* t, int64_t first, int64_t rows) const {
    const auto [kernel, stride, padding, H, W] = window;
    std::fill(t, t + rows * C, 0.f);
    for (int64_t m = first; m < first + rows; ++m, t += C) {
      const int64_t n = m / (H * W), h = m / W % H + padding, w = m % W + padding;
      // The windows that contain (h, w) of the padded map: from the first that ends after it to the last that begins at or
      // before it.
      const auto from = [&](int64_t at) { return at < kernel ? 0 : (at - kernel) / stride + 1; };
      for (int64_t p = from(h); p <= std::min(h / stride, P - 1); ++p)
        for (int64_t q = from(w); q <= std::min(w / stride, Q - 1); ++q) {
          const int64_t at = ((n * P + p) * Q + q) * C;
          add_where(t, x + at, winners + at, (h - p * stride) * kernel + w - q * stride, C);
        }
    }
  }

  const float* centred(float* t, const float* v, int64_t rows) const {
    if (!centre) return v;
    add_per_channel(t, v, centre, -1, rows, C);
    return t;
  }
};

// Checks that all tensors of a Lazy fit a value of `sizes`.
void check(const Lazy& l, at::IntArrayRef sizes, const char* name) {
  for (const auto& t : {l.x, l.mask, l.second}) {
    if (!t.defined()) continue;
    check_cpu(t, name);
    check_nhwc(t, name);
    RK_CHECK_EQ(t.scalar_type(), at::kFloat, name);
    if (!t.is_same(l.x)) RK_CHECK_EQ(t.sizes(), sizes, name);
  }
  const auto own = l.sizes();
  RK_CHECK_EQ(at::IntArrayRef(own), sizes, name);
  if (l.winners.defined()) {
    check_cpu(l.winners, name);
    check_nhwc(l.winners, name);
    RK_CHECK_EQ(l.winners.scalar_type(), at::kByte, name);
    RK_CHECK_EQ(l.winners.sizes(), l.x.sizes(), name);
    TORCH_CHECK(l.window.kernel > 0 && l.window.stride > 0, name, ": expected a window and a stride of at least 1, got ", l.window.kernel,
                " and ", l.window.stride);
  }
  for (const auto& t : {l.a, l.b, l.a2, l.mean, l.centre})
    if (t.defined()) check_per_channel(t, sizes[1], name);
  TORCH_CHECK(l.a.defined() == l.b.defined() && l.second.defined() == l.a2.defined() && l.a2.defined() == l.mean.defined() && (!l.second.defined() || l.a.defined()),
              name, ": expected a with b, and a second tensor only together with a, b, its factor and its mean");
}

}  // namespace

at::Tensor cpu_subsampled(const at::Tensor& x, int64_t stride) {
  check_cpu(x, "x");
  check_nhwc(x, "x");
  TORCH_CHECK(stride > 0, "stride: expected at least 1, got ", stride);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), P = (H + stride - 1) / stride, Q = (W + stride - 1) / stride;
  const auto y = allocate_nhwc({N, C, P, Q}, x.options());
  const size_t bytes = C * x.itemsize();
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  char* const to = static_cast<char*>(y.mutable_data_ptr());
  for_each_block(N * P, 8, [&](int64_t row) {
    const int64_t at = (row / P * H + row % P * stride) * W;
    for (int64_t q = 0; q < Q; ++q) std::memcpy(to + (row * Q + q) * bytes, from + (at + q * stride) * bytes, bytes);
  });
  return y;
}

PassResult cpu_pass(const Lazy& lazy, const PassEpilogue& epilogue, bool store, const at::Tensor& out, Reduce reduce,
                const at::Tensor& xhat, const at::Tensor& mean, const at::Tensor& rstd) {
  check_cpu(lazy.x, "x");
  check_nhwc(lazy.x, "x");
  const auto own = lazy.sizes();
  const at::IntArrayRef sizes(own);
  check(lazy, sizes, "x");
  if (epilogue.residual) check(*epilogue.residual, sizes, "residual");
  if (epilogue.mask) check(*epilogue.mask, sizes, "mask");
  const int64_t C = sizes[1], M = sizes[0] * sizes[2] * sizes[3];
  if (epilogue.shift.defined()) check_per_channel(epilogue.shift, C, "shift");
  if (reduce == Reduce::kNormalized) {
    check(Lazy{xhat}, sizes, "xhat");
    check_per_channel(mean, C, "mean");
    check_per_channel(rstd, C, "rstd");
  }
  PassResult result;
  if (store) {
    result.y = out.defined() ? out : allocate_nhwc(sizes, lazy.x.options());
    check(Lazy{result.y}, sizes, "out");
  }
  const LazyRows x(lazy);
  const auto residual = epilogue.residual ? std::optional<LazyRows>(LazyRows(*epilogue.residual)) : std::nullopt;
  const auto mask = epilogue.mask ? std::optional<LazyRows>(LazyRows(*epilogue.mask)) : std::nullopt;
  const float *shift = data(epilogue.shift), *other = data(xhat), *about = data(mean);
  float* const y = store ? result.y.mutable_data_ptr<float>() : nullptr;
  const bool stream = store && C % 4 == 0 && bypasses_cache(y, result.y.nbytes());
  const int64_t chunk = std::clamp(kChunk / std::max<int64_t>(C, 1), kFewestRows, kMostRows);
  const int64_t segments = (M + kSegmentRows - 1) / kSegmentRows;
  // Segments are cut into groups, whose number does not depend on the threads. The sums of groups are merged in order.
  const int64_t groups = std::min<int64_t>(segments, 64);
  std::vector<double> partial(reduce == Reduce::kNone ? 0 : groups * 2 * C);
  std::vector<int64_t> counts(groups);
  BlockQueue blocks(groups);
  blocks.run([&] {
    std::vector<float> scratch(chunk * C), more(chunk * C), few(2 * C), origin(C);
    std::vector<double> s(2 * C);
    for (int64_t group = blocks.take().first; group < groups; group = blocks.take().first) {
      double* const sums = reduce == Reduce::kNone ? nullptr : partial.data() + group * 2 * C;
      const int64_t from = group * segments / groups, to = (group + 1) * segments / groups;
      for (int64_t part = from; part < to; ++part) {
        const int64_t begin = part * kSegmentRows, end = std::min(M, begin + kSegmentRows);
        std::fill(s.begin(), s.end(), 0.0);
        for (int64_t m = begin; m < end; m += chunk) {
          const int64_t rows = std::min(chunk, end - m), count = rows * C;
          float* const t = store && !stream ? y + m * C : scratch.data();
          const float* v;
          // The result may overwrite an operand, so every step writes to scratch memory and the chunk is copied at the end.
          const bool steps = shift || residual || epilogue.relu || mask;
          if (store && steps) {
            v = x.value(scratch.data(), m, rows);
            if (shift) add_per_channel(scratch.data(), v, shift, 1, rows, C), v = scratch.data();
            if (residual) add(scratch.data(), v, residual->value(more.data(), m, rows), count), v = scratch.data();
            if (epilogue.relu) rectify(scratch.data(), v, count), v = scratch.data();
            if (mask) apply_mask(scratch.data(), v, mask->value(more.data(), m, rows), epilogue.threshold, count), v = scratch.data();
          } else {
            v = x.value(scratch.data(), m, rows);
          }
          if (reduce == Reduce::kStats) {
            if (m == begin) mean_of(origin.data(), v, std::min(rows, kOriginRows), C);
            add_stats(few.data(), few.data() + C, v, origin.data(), rows, C);
          } else if (reduce == Reduce::kNormalized) {
            add_sums(few.data(), few.data() + C, v, other + m * C, about, rows, C);
          }
          if (reduce != Reduce::kNone) move_sums(s.data(), few.data(), 2 * C);
          if (stream) stream_copy(y + m * C, v, count);
          else if (store && v != t) std::copy(v, v + count, t);
        }
        if (reduce == Reduce::kNormalized) {
          for (int64_t i = 0; i < 2 * C; ++i) sums[i] += s[i];
        } else if (reduce == Reduce::kStats) {
          // Chan, Golub and LeVeque: two means and sums of squares about them into one.
          const double n = static_cast<double>(end - begin), before = static_cast<double>(counts[group]);
          for (int64_t c = 0; c < C; ++c) {
            const double part_mean = origin[c] + s[c] / n, M2 = s[C + c] - s[c] * s[c] / n;
            const double delta = part_mean - sums[c];
            sums[c] += delta * n / (before + n);
            sums[C + c] += std::max(M2, 0.0) + delta * delta * before * n / (before + n);
          }
        }
        counts[group] += end - begin;
      }
    }
    if (stream) stream_fence();
  });
  if (reduce == Reduce::kNone) return result;
  const auto fp32 = at::TensorOptions(at::kFloat);
  result.first = at::empty({C}, fp32);
  result.second = at::empty({C}, fp32);
  float *first = result.first.mutable_data_ptr<float>(), *second = result.second.mutable_data_ptr<float>();
  const float* scale = data(rstd);
  for (int64_t c = 0; c < C; ++c) {
    double sum = 0, square = 0, n = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const double* const sums = partial.data() + group * 2 * C;
      const double more = static_cast<double>(counts[group]);
      if (reduce == Reduce::kStats) {
        const double delta = sums[c] - sum;
        square += sums[C + c] + delta * delta * n * more / (n + more);
        sum += delta * more / (n + more);
        n += more;
      } else {
        sum += sums[c];
        square += sums[C + c];
      }
    }
    first[c] = static_cast<float>(sum);
    second[c] = static_cast<float>(reduce == Reduce::kStats ? square : square * scale[c]);
  }
  return result;
}

}  // namespace resnet_kernels
