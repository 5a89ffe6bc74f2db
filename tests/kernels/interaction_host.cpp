// samples.h as the GPU kernel runs it, on this machine: copies that land as late as they may, the fragments of
// ldmatrix.x4 and mma.m16n8k16 as the PTX ISA gives them, and the packed triangle.
#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <utility>
#include <vector>

#include "samples.h"

namespace {

constexpr int Stages = 3, Width = 128;
constexpr double NaN = std::numeric_limits<double>::quiet_NaN();

struct Warp {
  double const* x;
  double* out;
  int features, pairs;
  bool with_self;
  std::vector<double> tiles[Stages];
  std::deque<std::vector<std::pair<int64_t, int>>> flying;  // copies of each commit that have not landed
  std::vector<std::pair<int64_t, int>> open;
  int error = 0;

  void load(int64_t sample, int slot) { open.push_back({sample, slot}); }
  void commit() {
    flying.push_back(open);
    open.clear();
  }
  void wait() {
    while (flying.size() > Stages - 2) {
      for (auto [sample, slot] : flying.front())
        for (int i = 0; i < features * Width; ++i) tiles[slot][i] = x[sample * features * Width + i];
      flying.pop_front();
    }
    for (auto const& group : flying)  // while a copy flies its target holds nothing of use
      for (auto [sample, slot] : group)
        for (int i = 0; i < features * Width; ++i) tiles[slot][i] = NaN;
  }
  void multiply(int64_t sample, int slot) {
    for (auto [other, target] : open) error |= target == slot;
    for (auto const& group : flying)
      for (auto [other, target] : group) error |= target == slot;
    std::vector<double> const& tile = tiles[slot];
    std::vector<double> sums(32 * hstu::Products * 4, 0.0);
    for (int step = 0; step < Width / 16; ++step) {
      // ldmatrix.x4: matrix m's rows are those that lanes 8m..8m+7 name; lane l gets elements 2(l%4), +1 of row l/4.
      double a[32][2][4][2];
      for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < 2; ++half)
          for (int m = 0; m < 4; ++m)
            for (int y = 0; y < 2; ++y) {
              int const namer = 8 * m + lane / 4;
              int const row = 16 * half + hstu::loaded_row(namer), column = 16 * step + hstu::loaded_column(namer);
              a[lane][half][m][y] = tile[row * Width + column + lane % 4 * 2 + y];
            }
      for (int product = 0; product < hstu::Products; ++product) {
        int const left = hstu::product_rows(product) / 16, right = hstu::product_columns(product) / 16;
        int const part = hstu::product_columns(product) / 8 % 2;
        double rows[16][16], columns[16][8];
        for (int lane = 0; lane < 32; ++lane)
          for (int y = 0; y < 2; ++y) {
            // A, row major: registers 0..3 are rows l/4, l/4 + 8, l/4, l/4 + 8 of columns 0-7, 0-7, 8-15, 8-15.
            for (int r = 0; r < 4; ++r)
              rows[lane / 4 + r % 2 * 8][lane % 4 * 2 + y + r / 2 * 8] = a[lane][left][r][y];
            // B, column major: registers 0 and 1 are rows 2(l%4), +1 of 0-7 and 8-15, in column l/4.
            for (int r = 0; r < 2; ++r)
              columns[lane % 4 * 2 + y + 8 * r][lane / 4] = a[lane][right][part + 2 * r][y];
          }
        for (int lane = 0; lane < 32; ++lane)
          for (int e = 0; e < 4; ++e)
            for (int k = 0; k < 16; ++k)
              sums[(lane * hstu::Products + product) * 4 + e] +=
                  rows[hstu::sum_row(lane, e)][k] * columns[k][hstu::sum_column(lane, e)];
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int product = 0; product < hstu::Products; ++product)
        for (int e = 0; e < 4; ++e) {
          int const i = hstu::product_rows(product) + hstu::sum_row(lane, e);
          int const j = hstu::product_columns(product) + hstu::sum_column(lane, e);
          if (!hstu::is_pair(i, j, features, with_self)) continue;
          double& place = out[sample * pairs + hstu::packed(i, j, with_self)];
          error |= !std::isinf(place);  // written once
          place = sums[(lane * hstu::Products + product) * 4 + e];
        }
  }
};

}  // namespace

// out [samples, pairs], infinite before; the answer is 0 where nothing was read too early or written twice.
extern "C" int interact(double const* x, double* out, int64_t samples, int features, int with_self, int num_warps) {
  int error = 0;
  for (int warp = 0; warp < num_warps; ++warp) {
    Warp w{x, out, features, hstu::packed(features, 0, with_self != 0), with_self != 0, {}, {}, {}, 0};
    for (auto& tile : w.tiles) tile.assign(hstu::PaddedFeatures * Width, 0.0);
    hstu::each_sample<Stages>(warp, num_warps, samples, w);
    error |= w.error;
  }
  return error;
}
