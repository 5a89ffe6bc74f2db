// Pairwise dot-product interaction on Ampere and newer, with CuTe's operations: out [B, P] is the packed lower triangle of
// x xᵀ of each sample's features x [F, 128], F <= 32, in bf16 or fp16, sums in float32.
//
// Each warp goes through samples of its own: asynchronous copies fill a ring of swizzled tiles, products on tensor cores
// take both operands from one load (x is both), and the triangle is packed in shared memory, so that the stores to out are
// contiguous. It is bound by memory: a sample is read and its triangle written once.
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cute/arch/copy_sm75.hpp"
#include "cute/arch/copy_sm80.hpp"
#include "cute/arch/mma_sm80.hpp"
#include "cute/tensor.hpp"
#include "cutlass/numeric_types.h"
#include "samples.h"

namespace hstu {

using namespace cute;

constexpr int Width = 128, Stages = 3, Warps = 4, MaxPairs = hstu::PaddedFeatures * (hstu::PaddedFeatures + 1) / 2;

#if defined(INTERACTION_BF16)
using Element = cutlass::bfloat16_t;
using Product = SM80_16x8x16_F32BF16BF16F32_TN;
#else
using Element = cutlass::half_t;
using Product = SM80_16x8x16_F32F16F16F32_TN;
#endif

// 16-byte pieces of eight rows lie in eight different groups of banks.
using Atom = decltype(composition(Swizzle<3, 3, 3>{}, Layout<Shape<_8, _64>, Stride<_64, _1>>{}));
using Tile = decltype(tile_to_shape(Atom{}, Shape<Int<hstu::PaddedFeatures>, Int<Width>>{}));

struct alignas(16) WarpStorage {
  Element x[Stages][cosize_v<Tile>];
  Element triangle[MaxPairs];
};
static_assert(Warps * sizeof(WarpStorage) <= 166912, "more shared memory than a block may have on sm_80");

template <bool WithSelf>
struct Interact {
  Element const* x;
  Element* out;
  int64_t x_row, out_row;
  int features, lane;
  WarpStorage& s;

  CUTLASS_DEVICE Element* place(int slot, int row, int column) { return &s.x[slot][Tile{}(row, column)]; }

  CUTLASS_DEVICE void clear_padding() {
    int const from = features * (Width / 8), end = hstu::PaddedFeatures * (Width / 8);
    for (int slot = 0; slot < Stages; ++slot)
      for (int piece = from + lane; piece < end; piece += 32)
        *reinterpret_cast<uint4*>(place(slot, piece / (Width / 8), piece % (Width / 8) * 8)) = make_uint4(0, 0, 0, 0);
    __syncwarp();
  }
  CUTLASS_DEVICE void load(int64_t sample, int slot) {
    Element const* from = x + sample * x_row;
    for (int piece = lane; piece < features * (Width / 8); piece += 32)
      SM80_CP_ASYNC_CACHEGLOBAL<uint128_t>::copy(
          *reinterpret_cast<uint128_t const*>(from + 8 * piece),
          *reinterpret_cast<uint128_t*>(place(slot, piece / (Width / 8), piece % (Width / 8) * 8)));
  }
  CUTLASS_DEVICE void commit() { cp_async_fence(); }
  CUTLASS_DEVICE void wait() {
    cp_async_wait<Stages - 2>();
    __syncwarp();
  }
  CUTLASS_DEVICE void multiply(int64_t sample, int slot) {
    float sum[hstu::Products][4] = {};
    CUTLASS_PRAGMA_UNROLL
    for (int step = 0; step < Width / 16; ++step) {
      uint32_t a[2][4];
      CUTLASS_PRAGMA_UNROLL
      for (int half = 0; half < 2; ++half)
        SM75_U32x4_LDSM_N::copy(
            *reinterpret_cast<uint128_t const*>(
                place(slot, 16 * half + hstu::loaded_row(lane), 16 * step + hstu::loaded_column(lane))),
            a[half][0], a[half][1], a[half][2], a[half][3]);
      CUTLASS_PRAGMA_UNROLL
      for (int product = 0; product < hstu::Products; ++product) {
        auto const& left = a[hstu::product_rows(product) / 16];
        auto const& right = a[hstu::product_columns(product) / 16];
        int const part = hstu::product_columns(product) / 8 % 2;
        auto& c = sum[product];
        Product::fma(c[0], c[1], c[2], c[3], left[0], left[1], left[2], left[3], right[part], right[part + 2], c[0],
                     c[1], c[2], c[3]);
      }
    }
    CUTLASS_PRAGMA_UNROLL
    for (int product = 0; product < hstu::Products; ++product)
      CUTLASS_PRAGMA_UNROLL
      for (int e = 0; e < 4; ++e) {
        int const i = hstu::product_rows(product) + hstu::sum_row(lane, e);
        int const j = hstu::product_columns(product) + hstu::sum_column(lane, e);
        if (hstu::is_pair(i, j, features, WithSelf)) s.triangle[hstu::packed(i, j, WithSelf)] = Element(sum[product][e]);
      }
    __syncwarp();
    Element* const to = out + sample * out_row;
    for (int pair = lane; pair < hstu::packed(features, 0, WithSelf); pair += 32) to[pair] = s.triangle[pair];
    __syncwarp();
  }
};

template <bool WithSelf>
__global__ void __launch_bounds__(32 * Warps) interaction_kernel(Element const* x, Element* out, int64_t samples,
                                                                 int features, int64_t x_row, int64_t out_row) {
  extern __shared__ __align__(16) unsigned char memory[];
  int const warp = int(threadIdx.x) / 32;
  Interact<WithSelf> interact{x,        out,
                              x_row,    out_row,
                              features, int(threadIdx.x) % 32,
                              reinterpret_cast<WarpStorage*>(memory)[warp]};
  interact.clear_padding();
  hstu::each_sample<Stages>(int64_t(blockIdx.x) * Warps + warp, int64_t(gridDim.x) * Warps, samples, interact);
}

template <bool WithSelf>
cudaError_t launch(void const* x, void* out, int64_t samples, int features, int64_t x_row, int64_t out_row, int num_sms,
                   cudaStream_t stream) {
  int const shared = Warps * sizeof(WarpStorage);
  auto const kernel = interaction_kernel<WithSelf>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  int resident = 1;
  if (status == cudaSuccess)
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * Warps, shared);
  if (status != cudaSuccess) return status;
  int64_t const wanted = (samples + Warps - 1) / Warps, most = int64_t(num_sms) * (resident < 1 ? 1 : resident);
  kernel<<<dim3(unsigned(wanted < most ? wanted : most)), dim3(32 * Warps), shared, stream>>>(
      static_cast<Element const*>(x), static_cast<Element*>(out), samples, features, x_row, out_row);
  return cudaGetLastError();
}

}  // namespace hstu

extern "C" int interaction(void const* x, void* out, int64_t samples, int features, int64_t x_row, int64_t out_row,
                           int with_self, int num_sms, void* stream) {
  auto const queue = static_cast<cudaStream_t>(stream);
  return with_self ? hstu::launch<true>(x, out, samples, features, x_row, out_row, num_sms, queue)
                   : hstu::launch<false>(x, out, samples, features, x_row, out_row, num_sms, queue);
}

// Bytes of shared memory that a block asks for.
extern "C" int interaction_shared_bytes() { return hstu::Warps * sizeof(hstu::WarpStorage); }

extern "C" char const* interaction_status(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
