// csrc/cuda/sm90/index.h against brute force, on the host. Exit code 0: all is as it should be.
#include "cuda/sm90/index.h"

#include <cstdio>
#include <set>
#include <vector>

using namespace resnet_kernels::sm90;

int wrong = 0;
void expect(bool right, const char* what) {
  if (!right) std::printf("wrong: %s\n", what), ++wrong;
}

template <int kStages>
void ring() {
  // A counter of steps, and what a ring must make of it.
  for (int jump = 0; jump < 3 * kStages; ++jump) {
    Ring<kStages> at;
    int step = 0;
    for (int i = 0; i < 5 * kStages; ++i) {
      expect(at.slot == step % kStages && at.phase == static_cast<uint32_t>(step / kStages % 2), "ring");
      const int by = i % 3 == 2 ? jump : 1;
      at.advance(by), step += by;
    }
  }
}

int main() {
  ring<1>(), ring<3>(), ring<5>(), ring<8>();

  // The swizzle: 16-byte chunks of 8 rows fill 1024 bytes, and one chunk of 8 rows all 32 banks.
  std::set<uint32_t> places;
  for (int row = 0; row < 16; ++row)
    for (int chunk = 0; chunk < 8; ++chunk) {
      const uint32_t at = swizzled(row, chunk);
      expect(at / kRow == static_cast<uint32_t>(row) && at % 16 == 0, "swizzled: row");
      expect(at % kRow / 16 == static_cast<uint32_t>(chunk ^ row % 8), "swizzled: chunk");
      places.insert(at);
    }
  expect(places.size() == 128 && *places.rbegin() == 2048 - 16, "swizzled: all places");
  for (int chunk = 0; chunk < 8; ++chunk) {
    std::set<uint32_t> banks;
    for (int row = 0; row < 8; ++row) banks.insert(swizzled(row, chunk) / 16 % 8);
    expect(banks.size() == 8, "swizzled: banks");
  }

  // Accumulators: 128 threads have each of 64 x 64 once.
  std::vector<int> had(64 * 64);
  for (unsigned t = 0; t < 128; ++t)
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 8; ++i)
        for (int odd = 0; odd < 2; ++odd)
          ++had[accumulator_row(t, half) * 64 + 8 * i + static_cast<int>(accumulator_column(t)) + odd];
  for (int n : had) expect(n == 1, "accumulators");
  // Operands from registers want a thread's rows and columns where the accumulators have them.
  expect(accumulator_row(37, 0) == 17 && accumulator_row(37, 1) == 25 && accumulator_column(37) == 2, "operand");

  // Positions count over columns, rows, images.
  int m = 0;
  for (int n = 0; n < 3; ++n)
    for (int i = 0; i < 5; ++i)
      for (int q = 0; q < 7; ++q, ++m) {
        const Position at(m, 5, 7);
        expect(at.n == n && at.i == i && at.q == q, "position");
      }

  // Taps: input rows r, columns s - 1 of an output column, in rows of W + 2 columns from column -1.
  const int W = 9, pitch = W + 2;
  for (int row = 0; row < 2; ++row)
    for (int tap = 0; tap < 9; ++tap)
      for (int q = 0; q < W; ++q)
        expect(tap_column(row, tap, pitch) + q == (row + tap / 3) * pitch + (q + tap % 3 - 1) - -1, "tap");
  return wrong != 0;
}
