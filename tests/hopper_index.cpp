// Checks csrc/cuda/sm90/index.h and statistics.h against brute force, on the host. Exit code 0 if everything agrees;
// else it prints what differs.
#include "cuda/sm90/index.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>
#include <type_traits>
#include <vector>

#include "cuda/sm90/statistics.h"

using namespace resnet_kernels::sm90;

int wrong = 0;
void expect(bool right, const char* what) {
  if (!right) std::printf("wrong: %s\n", what), ++wrong;
}

template <int kStages>
void ring() {
  // The ring's slot and phase against a plain counter of steps.
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

  // The swizzle: the 16-byte chunks of 8 rows fill 1024 bytes, and the same chunk of 8 rows covers all 32 banks.
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

  // Accumulators: together, 128 threads hold each element of 64 x 64 exactly once.
  std::vector<int> had(64 * 64);
  for (unsigned t = 0; t < 128; ++t)
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 8; ++i)
        for (int odd = 0; odd < 2; ++odd)
          ++had[accumulator_row(t, half) * 64 + 8 * i + static_cast<int>(accumulator_column(t)) + odd];
  for (int n : had) expect(n == 1, "accumulators");
  // A register operand has the accumulators' rows and columns.
  expect(accumulator_row(37, 0) == 17 && accumulator_row(37, 1) == 25 && accumulator_column(37) == 2, "register operand");

  // The tail of 128 channels: whatever the map's width, both halves of a tile fit their buffers, and each tap of each
  // position reads its neighbour in the halo; what a wgmma reads beyond it is inside the same buffer.
  for (int W = 1; W <= kWideColumns; ++W) {
    const int pitch = wide_pitch(W), rows = wide_rows(W);
    expect(rows >= 1 && rows * pitch <= kWidePositions && (2 * rows + 2) * pitch <= kWideHalo, "wide tail: a tile exceeds its buffers");
    for (int half = 0; half < 2; ++half)
      for (int tap = 0; tap < 9; ++tap) {
        const int begins = half * rows * pitch + tap_column(0, tap, pitch);
        expect(begins + kWidePositions <= kWideHalo, "wide tail: a product reads outside the halo");
        for (int row = 0; row < rows; ++row)
          for (int column = 0; column < W; ++column) {
            // The halo begins at row -1 and column -1 of the tile.
            const int seen = begins + row * pitch + column;
            expect(seen / pitch - 1 == half * rows + row + tap / 3 - 1 && seen % pitch - 1 == column + tap % 3 - 1,
                   "wide tail: neighbours");
          }
      }
  }

  // The whole bottleneck: rows of a take the ring's slots in order, across strips.
  int step = 0;
  for (int pairs : {1, 3, 2}) {
    const int begun = step;
    for (int row = -1; row <= 2 * pairs; ++row, ++step) {
      const RowOfA at(begun, row);
      expect(at.slot == step % kRowsOfA && at.phase == static_cast<uint32_t>(step / kRowsOfA % 2), "ring of rows of a");
    }
  }
  // Strips have even numbers of rows. On 132 multiprocessors 256 images are not cut; one image, and few images, are.
  expect(rows_of_strip(256, 56, 132) == 56 && rows_of_strip(1, 56, 132) == 2 && rows_of_strip(1, 1, 1) == 2, "strips");
  expect(rows_of_strip(33, 56, 132) == 14 && rows_of_strip(2, 5, 1) == 6, "strips");

  // Positions: columns vary fastest, then rows, then images.
  int m = 0;
  for (int n = 0; n < 3; ++n)
    for (int i = 0; i < 5; ++i)
      for (int q = 0; q < 7; ++q, ++m) {
        const Position at(m, 5, 7);
        expect(at.n == n && at.i == i && at.q == q, "position");
      }

  // Taps: input row r and column s - 1 of an output column, in rows of W + 2 columns from column -1.
  const int W = 9, pitch = W + 2;
  for (int row = 0; row < 2; ++row)
    for (int tap = 0; tap < 9; ++tap)
      for (int q = 0; q < W; ++q)
        expect(tap_column(row, tap, pitch) + q == (row + tap / 3) * pitch + (q + tap % 3 - 1) - -1, "tap");
  // Statistics: the rows that each warp owns before the last position.
  for (int parts = 1; parts <= 2; ++parts)
    for (int left = 1; left <= 200; ++left)
      for (int warp = 0; warp < 4; ++warp) {
        std::set<int> rows;
        for (unsigned t = 32u * warp; t < 32u * warp + 32; ++t)
          for (int part = 0; part < parts; ++part)
            for (int half = 0; half < 2; ++half) {
              const int row = 64 * part + accumulator_row(t, half);
              if (row < left) rows.insert(row);
            }
        expect(rows_of_warp(left, warp, parts) == static_cast<int>(rows.size()), "rows of a warp");
      }
  // The statistics of eight lanes with one row each, merged by halves: with rows missing in some lanes, and a channel
  // that holds NaN.
  for (int missing = 0; missing < 8; ++missing) {
    auto value = [](int channel, int row) { return channel == 5 ? std::nanf("") : 100 + std::sin(31.f * channel + row); };
    float mean[32][16], M2[32][16] = {}, rows[32];
    for (unsigned lane = 0; lane < 32; ++lane) {
      rows[lane] = static_cast<int>(lane / 4) >= missing;
      for (int j = 0; j < 16; ++j)
        mean[lane][j] = rows[lane] ? value(8 * (j / 2) + 2 * (lane % 4) + j % 2, lane / 4) : 0;
    }
    auto round = [&]<int kLeft>(std::integral_constant<int, kLeft>) {
      float mean_given[32][kLeft], M2_given[32][kLeft];
      for (unsigned lane = 0; lane < 32; ++lane)
        halve<kLeft>(mean[lane], mean_given[lane], lane), halve<kLeft>(M2[lane], M2_given[lane], lane);
      float total[32];
      for (unsigned lane = 0; lane < 32; ++lane) {
        const unsigned other = lane ^ (2 * kLeft);
        total[lane] = rows[lane] + rows[other];
        for (int j = 0; j < kLeft; ++j)
          Merge(rows[lane], rows[other])(mean[lane][j], M2[lane][j], mean_given[other][j], M2_given[other][j]);
      }
      std::copy(total, total + 32, rows);
    };
    round(std::integral_constant<int, 8>{});
    round(std::integral_constant<int, 4>{});
    round(std::integral_constant<int, 2>{});
    for (int lane = 0; lane < 32; ++lane)
      for (int odd = 0; odd < 2; ++odd) {
        const int channel = 2 * lane + odd;
        double want = 0, deviations = 0;
        for (int row = missing; row < 8; ++row) want += value(channel, row) / (8. - missing);
        for (int row = missing; row < 8; ++row) deviations += (value(channel, row) - want) * (value(channel, row) - want);
        expect(rows[lane] == 8 - missing, "merged: rows");
        if (channel == 5)
          expect(std::isnan(mean[lane][odd]) && std::isnan(M2[lane][odd]), "merged: NaN");
        else
          expect(std::abs(mean[lane][odd] - want) < 3e-5 && std::abs(M2[lane][odd] - deviations) < 1e-3, "merged");
      }
  }

  for (int n = 1; n < 9; ++n) {
    int t = 0;
    for (int column = 0; column < n; ++column)
      for (int row = 0; row <= column; ++row, ++t) {
        const UpperTile tile(t);
        expect(tile.row == row && tile.column == column, "upper tile");
      }
  }

  return wrong != 0;
}
