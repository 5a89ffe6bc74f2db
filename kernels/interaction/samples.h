// Where things stand in the pairwise interaction kernel, and in which order a warp goes through its samples. Neither CUDA
// nor CuTe is needed: cutlass.cu compiles it for the GPU, the tests with the host's compiler.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SAMPLES __host__ __device__ __forceinline__
#else
#define SAMPLES inline
#endif

namespace hstu {

// Features are padded to two blocks of 16 rows. Six products of 16 × 8 cover the lower triangle of 32 × 32.
constexpr int PaddedFeatures = 32, Products = 6;

SAMPLES constexpr int product_rows(int product) { return product < 2 ? 0 : 16; }
SAMPLES constexpr int product_columns(int product) { return product < 2 ? 8 * product : 8 * (product - 2); }

// What lane `lane` names for the four 8 × 8 matrices that it loads with others (ldmatrix.x4): a row of a block of 16 rows,
// and a column of a step of 16. Matrix m then is register m: rows 0–7 and 8–15 of columns 0–7, then of columns 8–15,
// which is the A operand of a 16 × 8 × 16 product; registers {0, 2} are the B operand of its rows 0–7, {1, 3} of 8–15.
SAMPLES constexpr int loaded_row(int lane) { return lane % 16; }
SAMPLES constexpr int loaded_column(int lane) { return lane / 16 * 8; }

// Where accumulator e (0..3) of a 16 × 8 product stands; source: PTX ISA, "Matrix fragments for mma.m16n8k16".
SAMPLES constexpr int sum_row(int lane, int e) { return lane / 4 + e / 2 * 8; }
SAMPLES constexpr int sum_column(int lane, int e) { return lane % 4 * 2 + e % 2; }

// The place of x_i · x_j in the packed lower triangle, for j < i, or j <= i with products of a feature with itself.
SAMPLES constexpr int packed(int i, int j, bool with_self) { return (with_self ? i * (i + 1) : i * (i - 1)) / 2 + j; }
SAMPLES constexpr bool is_pair(int i, int j, int features, bool with_self) {
  return i < features && (with_self ? j <= i : j < i);
}

// Samples first, first + step, .. below count, through a ring of Stages buffers. `m` has load(sample, slot), commit() after
// each load or none, wait() until all but the newest Stages - 2 of these have landed, and multiply(sample, slot).
template <int Stages, class M>
SAMPLES void each_sample(int64_t first, int64_t step, int64_t count, M& m) {
  int64_t next = first;
  for (int slot = 0; slot < Stages - 1; ++slot, next += step) {
    if (next < count) m.load(next, slot);
    m.commit();
  }
  int slot = 0;
  for (int64_t sample = first; sample < count; sample += step, next += step) {
    m.wait();
    if (next < count) m.load(next, slot == 0 ? Stages - 1 : slot - 1);
    m.commit();
    m.multiply(sample, slot);
    slot = slot + 1 == Stages ? 0 : slot + 1;
  }
}

}  // namespace hstu
