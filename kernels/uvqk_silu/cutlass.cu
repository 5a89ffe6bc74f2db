// The fused projection on Hopper: out = SiLU(x Wᵀ + b) in bf16, fp16 and int8 (per token × per channel), with CUTLASS.
//
//   x [M, K], weight [N, K], out [M, N], rows contiguous and apart by *_row elements; bias float32 [N].
//   int8: out = SiLU((x · weightᵀ) · x_scale[m] · weight_scale[n] + bias[n]), sums in int32, so exact up to the scales.
//
// A persistent warp-specialised kernel: producer warps feed two consumer warpgroups through TMA; the epilogue is an
// expression tree on the accumulators in registers. One launcher per type with C linkage; a workspace is not needed.
#include <cuda_runtime.h>

#include <cstdint>

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_compute_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_load_tma_warpspecialized.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"
#include "cutlass/epilogue/thread/activation.h"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;
constexpr auto Round = cutlass::FloatRoundStyle::round_to_nearest;
using PerColumn = Stride<_0, _1, _0>;
using PerRow = Stride<_1, _0, _0>;

template <class Out, class Tile>
struct FloatEpilogue {
  using Bias = fusion::Sm90RowBroadcast<0, Tile, float, float, PerColumn>;
  using Sum = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, float, float, Round>, Bias, fusion::Sm90AccFetch>;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::SiLu, Out, float, Round>, Sum>;
  static typename Tree::Arguments arguments(float const* bias, float const*, float const*) {
    return {{{bias}, {}, {}}, {}};
  }
};

template <class Out, class Tile>
struct IntegerEpilogue {
  using Bias = fusion::Sm90RowBroadcast<0, Tile, float, float, PerColumn>;
  using Channel = fusion::Sm90RowBroadcast<0, Tile, float, float, PerColumn>;
  using Token = fusion::Sm90ColBroadcast<0, Tile, float, float, PerRow>;
  using Times = fusion::Sm90Compute<cutlass::multiplies, float, float, Round>;
  using Scaled = fusion::Sm90EVT<Times, Channel, fusion::Sm90AccFetch>;
  using Product = fusion::Sm90EVT<Times, Token, Scaled>;
  using Sum = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::plus, float, float, Round>, Bias, Product>;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<cutlass::epilogue::thread::SiLu, Out, float, Round>, Sum>;
  static typename Tree::Arguments arguments(float const* bias, float const* token, float const* channel) {
    return {{{bias}, {{token}, {{channel}, {}, {}}, {}}, {}}, {}};
  }
};

template <class In, class Sum, class Out, class Tile, template <class, class> class EpilogueOf>
struct Projection {
  using Cluster = Shape<_2, _1, _1>;
  using Tree = EpilogueOf<Out, Tile>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, Sum, float, void, cutlass::layout::RowMajor,
      128 / cutlass::sizeof_bits_v<Out>, Out, cutlass::layout::RowMajor, 128 / cutlass::sizeof_bits_v<Out>,
      cutlass::epilogue::TmaWarpSpecializedCooperative, typename Tree::Tree>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, In, cutlass::layout::RowMajor,
      128 / cutlass::sizeof_bits_v<In>, In, cutlass::layout::ColumnMajor, 128 / cutlass::sizeof_bits_v<In>, Sum, Tile,
      Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static int run(void const* x, void const* weight, float const* bias, float const* token, float const* channel,
                 void* out, int m, int n, int k, int64_t x_row, int64_t weight_row, int64_t out_row, int device,
                 int num_sms, cudaStream_t stream) {
    typename Kernel::StrideA stride_x{x_row, _1{}, 0};
    typename Kernel::StrideB stride_weight{weight_row, _1{}, 0};
    typename Kernel::StrideD stride_out{out_row, _1{}, 0};
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {m, n, k, 1},
        {static_cast<In const*>(x), stride_x, static_cast<In const*>(weight), stride_weight},
        {Tree::arguments(bias, token, channel), nullptr, {}, static_cast<Out*>(out), stride_out},
        {device, num_sms}};
    Gemm gemm;
    if (auto status = gemm.can_implement(arguments); status != cutlass::Status::kSuccess) return int(status);
    if (Gemm::get_workspace_size(arguments) != 0) return int(cutlass::Status::kErrorWorkspaceNull);
    if (auto status = gemm.initialize(arguments, nullptr, stream); status != cutlass::Status::kSuccess)
      return int(status);
    return int(gemm.run(stream));
  }
};

}  // namespace

#define LAUNCHER(NAME, ...)                                                                                            \
  extern "C" int NAME(void const* x, void const* weight, float const* bias, float const* x_scale,                      \
                      float const* weight_scale, void* out, int m, int n, int k, int64_t x_row, int64_t weight_row,    \
                      int64_t out_row, int device, int num_sms, void* stream) {                                        \
    return Projection<__VA_ARGS__>::run(x, weight, bias, x_scale, weight_scale, out, m, n, k, x_row, weight_row,       \
                                        out_row, device, num_sms, static_cast<cudaStream_t>(stream));                  \
  }

#if defined(UVQK_BF16)
using Half = cutlass::bfloat16_t;
#define FLOAT_NAME uvqk_silu_bf16
#define INT8_NAME uvqk_silu_int8_bf16
#else
using Half = cutlass::half_t;
#define FLOAT_NAME uvqk_silu_fp16
#define INT8_NAME uvqk_silu_int8_fp16
#endif

#if defined(UVQK_INT8)
LAUNCHER(INT8_NAME, int8_t, int32_t, Half, Shape<_128, _256, _128>, IntegerEpilogue)
#else
LAUNCHER(FLOAT_NAME, Half, float, Half, Shape<_128, _256, _64>, FloatEpilogue)
#endif

extern "C" char const* uvqk_silu_status(int status) {
  return cutlass::cutlassGetStatusString(static_cast<cutlass::Status>(status));
}
