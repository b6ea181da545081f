// A few rows at a time, so that they stay in L1 from one step to the next: each step is a plain loop over them,
// compiled for several instruction sets. Memory is read once and written once.
#include "cpu/reductions.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "cpu/blocks.h"
#include "cpu/isa.h"
#include "cpu/pool.h"
#include "cpu/stream.h"

namespace resnet_kernels {
namespace {

constexpr int64_t kChunk = 4096;  // elements that go through all steps together
// Rows of a chunk: so many are summed in fp32, chunks in fp64. An error of a mean is the same in every row, so that what
// is summed over the rows later has it as many times.
constexpr int64_t kFewestRows = 8, kMostRows = 32;
constexpr int64_t kSegmentRows = 256;  // rows whose squares are taken about one origin
// The origin is the mean of so many of them: the first alone may stand several deviations off, and its square is taken
// out of the sum of squares again.
constexpr int64_t kOriginRows = 8;

RK_MULTI_ISA void keep(float* t, const float* x, const float* mask, float threshold, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = mask[i] <= threshold ? 0.f : x[i];
}

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

RK_MULTI_ISA void rectify(float* t, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) t[i] = x[i] <= 0 ? 0.f : x[i];
}

// The rows' mean per channel, or the first where that is not finite.
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

RK_MULTI_ISA void move_sums(double* to, float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i], from[i] = 0.f;
}

// t += x where winners is `element`.
RK_MULTI_ISA void add_where(float* t, const float* x, const uint8_t* winners, int64_t element, int64_t C) {
  const int32_t wanted = static_cast<int32_t>(element);
  for (int64_t c = 0; c < C; ++c) t[c] += static_cast<int32_t>(winners[c]) == wanted ? x[c] : 0.f;
}

const float* data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// The pointers of a Lazy, and its value over rows: in `t`, or where it already stands.
struct Rows {
  const float *x, *mask, *a, *b, *second, *a2, *mean, *centre;
  bool relu;
  int64_t C, P, Q;  // P x Q: the map of x
  const uint8_t* winners;
  PoolWindow window;

  explicit Rows(const Lazy& l)
      : x(data(l.x)), mask(data(l.mask)), a(data(l.a)), b(data(l.b)), second(data(l.second)), a2(data(l.a2)), mean(data(l.mean)),
        centre(data(l.centre)), relu(l.relu), C(l.x.size(1)), P(l.x.size(2)), Q(l.x.size(3)),
        winners(l.winners.defined() ? l.winners.const_data_ptr<uint8_t>() : nullptr), window(l.window) {}

  const float* value(float* t, int64_t first, int64_t rows) const {
    const int64_t at = first * C, count = rows * C;
    const float* v = x + at;
    if (winners) unpool(t, first, rows), v = t;
    if (mask) keep(t, v, mask + at, 0, count), v = t;
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
      // Windows that hold (h, w) of the padded map: from the first whose end is behind it to the last that begins there.
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
    TORCH_CHECK(l.window.kernel > 0 && l.window.stride > 0, name, ": expected a window and a stride of at least 1");
  }
  for (const auto& t : {l.a, l.b, l.a2, l.mean, l.centre})
    if (t.defined()) check_per_channel(t, sizes[1], name);
  TORCH_CHECK(l.a.defined() == l.b.defined() && l.second.defined() == l.a2.defined() && l.a2.defined() == l.mean.defined() && (!l.second.defined() || l.a.defined()),
              name, ": expected a with b, and a second tensor with its factor and mean beside them");
}

}  // namespace

at::Tensor cpu_subsampled(const at::Tensor& x, int64_t stride) {
  check_cpu(x, "x");
  check_nhwc(x, "x");
  TORCH_CHECK(stride > 0, "stride: expected at least 1, got ", stride);
  const int64_t N = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), P = (H + stride - 1) / stride, Q = (W + stride - 1) / stride;
  const auto y = pooled_nhwc({N, C, P, Q}, x.options());
  const size_t bytes = C * x.itemsize();
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  char* const to = static_cast<char*>(y.mutable_data_ptr());
  each_block(N * P, 8, [&](int64_t row) {
    const int64_t at = (row / P * H + row % P * stride) * W;
    for (int64_t q = 0; q < Q; ++q) std::memcpy(to + (row * Q + q) * bytes, from + (at + q * stride) * bytes, bytes);
  });
  return y;
}

Passed cpu_pass(const Lazy& lazy, const Finish& finish, bool store, const at::Tensor& out, Reduce reduce,
                const at::Tensor& xhat, const at::Tensor& mean, const at::Tensor& rstd) {
  check_cpu(lazy.x, "x");
  check_nhwc(lazy.x, "x");
  const auto own = lazy.sizes();
  const at::IntArrayRef sizes(own);
  check(lazy, sizes, "x");
  if (finish.residual) check(*finish.residual, sizes, "residual");
  if (finish.kept) check(*finish.kept, sizes, "mask");
  const int64_t C = sizes[1], M = sizes[0] * sizes[2] * sizes[3];
  if (finish.shift.defined()) check_per_channel(finish.shift, C, "shift");
  if (reduce == Reduce::kNormalized) {
    check(Lazy{xhat}, sizes, "xhat");
    check_per_channel(mean, C, "mean");
    check_per_channel(rstd, C, "rstd");
  }
  Passed result;
  if (store) {
    result.y = out.defined() ? out : pooled_nhwc(sizes, lazy.x.options());
    check(Lazy{result.y}, sizes, "out");
  }
  const Rows x(lazy);
  const auto residual = finish.residual ? std::optional<Rows>(Rows(*finish.residual)) : std::nullopt;
  const auto kept = finish.kept ? std::optional<Rows>(Rows(*finish.kept)) : std::nullopt;
  const float *shift = data(finish.shift), *other = data(xhat), *about = data(mean);
  float* const y = store ? result.y.mutable_data_ptr<float>() : nullptr;
  const bool stream = store && C % 4 == 0 && past_cache(y, result.y.nbytes());
  const int64_t chunk = std::clamp(kChunk / std::max<int64_t>(C, 1), kFewestRows, kMostRows);
  const int64_t segments = (M + kSegmentRows - 1) / kSegmentRows;
  // Groups of segments, as many whatever the threads are: their sums are merged in order.
  const int64_t groups = std::min<int64_t>(segments, 64);
  std::vector<double> partial(reduce == Reduce::kNone ? 0 : groups * 2 * C);
  std::vector<int64_t> counts(groups);
  Blocks blocks(groups);
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
          // Where the result goes may be where the other operands are: those are read from a copy of it.
          const bool steps = shift || residual || finish.relu || kept;
          if (store && steps) {
            v = x.value(scratch.data(), m, rows);
            if (shift) add_per_channel(scratch.data(), v, shift, 1, rows, C), v = scratch.data();
            if (residual) add(scratch.data(), v, residual->value(more.data(), m, rows), count), v = scratch.data();
            if (finish.relu) rectify(scratch.data(), v, count), v = scratch.data();
            if (kept) keep(scratch.data(), v, kept->value(more.data(), m, rows), finish.threshold, count), v = scratch.data();
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
          if (stream) stream_to(y + m * C, v, count);
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
    if (stream) streamed();
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
