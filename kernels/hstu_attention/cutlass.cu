// HSTU attention on Hopper in bf16 and fp16: o_i = Σ_j SiLU(q_i · k_j) v_j / N over the rows j that row i sees, jagged,
// causal, with targets; forward. schedule.h says who does what when; this file says how, in CuTe.
//
//   q, k, v, out [T, H, D]: a row's heads lie side by side, rows apart by *_row elements; offsets int64 [B+1], num_targets
//   int64 [B]. Addresses and rows are multiples of 16 bytes.
//
// A persistent warp-specialised kernel. One thread of the first warpgroup loads through TMA: Q into one buffer, K and V
// into rings. Each other warpgroup multiplies 64 rows: S = Q Kᵀ from shared memory, SiLU in its tanh form on the
// accumulators, O += P V with P in registers. No softmax, so nothing is rescaled, and tiles may come in any order.
#include <cuda_runtime.h>

#include <cstdint>

#include "cute/tensor.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/numeric_conversion.h"
#include "cutlass/numeric_types.h"
#include "schedule.h"

namespace hstu {

using namespace cute;
using Full = cutlass::arch::ClusterTransactionBarrier;
using Empty = cutlass::arch::ClusterBarrier;

constexpr int64_t CacheBytes = 24 << 20;  // of L2 for the keys and values that blocks of rows share at one time

template <class Element_, int D_, int Groups_, int Columns_, int Stages_>
struct Shapes {
  using Element = Element_;
  static constexpr int D = D_, Groups = Groups_, Rows = 64 * Groups, Columns = Columns_, Stages = Stages_;
  static constexpr int Threads = 128 * (Groups + 1), Warps = 4 * Groups;
  static constexpr int LoadRegisters = Groups == 2 ? 24 : 32, MultiplyRegisters = Groups == 2 ? 240 : 160;

  using QueryTile = Shape<Int<Rows>, Int<D>>;
  using KeyTile = Shape<Int<Columns>, Int<D>>;
  using ValueTile = Shape<Int<D>, Int<Columns>>;
  using RowOfGroups = Layout<Shape<Int<Groups>, _1, _1>>;
  using ScoresMma = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<Int<Rows>, Int<Columns>, Int<D>>>(), RowOfGroups{}));
  using ValuesMma = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<Int<Rows>, Int<D>, Int<Columns>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      RowOfGroups{}));
  using QueryLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{}, QueryTile{}));
  using KeyLayout = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<Element>{},
                                           Shape<Int<Columns>, Int<D>, Int<Stages>>{}));
  using ValueLayout = decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Element>{},
                                             Shape<Int<D>, Int<Columns>, Int<Stages>>{}, Step<_2, _1, _3>{}));

  static auto query_map(Element const* x, int rows, int heads, int64_t row) {
    auto tensor = make_tensor(make_gmem_ptr(x), make_shape(rows, Int<D>{}, heads), make_stride(row, _1{}, Int<D>{}));
    return make_tma_copy(SM90_TMA_LOAD{}, tensor, QueryLayout{}, QueryTile{}, _1{});
  }
  static auto key_map(Element const* x, int rows, int heads, int64_t row) {
    auto tensor = make_tensor(make_gmem_ptr(x), make_shape(rows, Int<D>{}, heads), make_stride(row, _1{}, Int<D>{}));
    return make_tma_copy(SM90_TMA_LOAD{}, tensor, take<0, 2>(KeyLayout{}), KeyTile{}, _1{});
  }
  static auto value_map(Element const* x, int rows, int heads, int64_t row) {
    auto tensor = make_tensor(make_gmem_ptr(x), make_shape(Int<D>{}, rows, heads), make_stride(_1{}, row, Int<D>{}));
    return make_tma_copy(SM90_TMA_LOAD{}, tensor, take<0, 2>(ValueLayout{}), ValueTile{}, _1{});
  }

  struct Params {
    decltype(query_map(nullptr, 0, 0, 0)) q;
    decltype(key_map(nullptr, 0, 0, 0)) k;
    decltype(value_map(nullptr, 0, 0, 0)) v;
    Element* out;
    int64_t const *offsets, *num_targets;
    int64_t out_row;
    int rows;
    float scale;
    WorkList list;
  };

  struct Storage {
    alignas(1024) Element q[cosize_v<QueryLayout>];
    alignas(1024) Element k[cosize_v<KeyLayout>];
    alignas(1024) Element v[cosize_v<ValueLayout>];
    uint64_t q_full, q_empty, k_full[Stages], k_empty[Stages], v_full[Stages], v_empty[Stages];
  };
  static_assert(sizeof(Storage) <= 232448, "more shared memory than a block may have");

  // schedule.h and CuTe agree on where accumulators stand: both add a thread's part and an element's part, so that one
  // row and one column of the table tell all of it.
  static constexpr bool agree(int thread, int e) {
    return int(typename ScoresMma::Atom::LayoutC_TV{}(thread, e)) ==
           hstu::fragment_row(thread, e) + 64 * hstu::fragment_column(thread, e);
  }
  static constexpr bool fragments_agree() {
    for (int thread = 0; thread < 128; ++thread)
      if (!agree(thread, 0)) return false;
    for (int e = 0; e < Columns / 2; ++e)
      if (!agree(0, e)) return false;
    return true;
  }
  static_assert(size(typename ScoresMma::Atom::LayoutC_TV{}) == 64 * Columns, "one product is a tile wide");
};

// x/2 · (1 + tanh(x/2)) = SiLU(x). Not volatile, so that the compiler may order it as it likes.
CUTLASS_DEVICE float silu(float x) {
  float const half = 0.5f * x;
  float tanh;
  asm("tanh.approx.f32 %0, %1;" : "=f"(tanh) : "f"(half));
  return half * tanh + half;
}

// The loading thread.
template <class S>
struct Load {
  typename S::Params const& p;
  typename S::Storage& s;
  Slot q{}, k{}, v{};

  template <class Map, class Layout, class Tile, class Offset>
  CUTLASS_DEVICE void copy_tile(Map const& map, uint64_t& full, typename S::Element* to, Layout, Tile, Offset offset,
                                int head) {
    auto shape = [&] {
      if constexpr (is_constant<0, decltype(get<0>(offset))>::value)
        return make_shape(Int<S::D>{}, p.rows, p.list.heads);
      else
        return make_shape(p.rows, Int<S::D>{}, p.list.heads);
    }();
    auto source = local_tile(domain_offset(offset, map.get_tma_tensor(shape)(_, _, head)), Tile{}, make_coord(_0{}, _0{}));
    auto target = make_tensor(make_smem_ptr(to), Layout{});
    auto slice = map.get_slice(_0{});
    Full::arrive_and_expect_tx(&full, sizeof(typename S::Element) * size(Tile{}));
    copy(map.with(full), slice.partition_S(source), slice.partition_D(target));
  }

  CUTLASS_DEVICE void query(Work const& w) {
    Empty::wait(&s.q_empty, q.phase ^ 1);
    copy_tile(p.q, s.q_full, s.q, typename S::QueryLayout{}, typename S::QueryTile{},
              make_coord(int(w.begin) + w.first, _0{}), w.head);
    q.next(1);
  }
  CUTLASS_DEVICE void keys(Work const& w, int start) {
    using Layout = decltype(take<0, 2>(typename S::KeyLayout{}));
    Empty::wait(&s.k_empty[k.index], k.phase ^ 1);
    copy_tile(p.k, s.k_full[k.index], s.k + k.index * S::Columns * S::D, Layout{}, typename S::KeyTile{},
              make_coord(int(w.begin) + start, _0{}), w.head);
    k.next(S::Stages);
  }
  CUTLASS_DEVICE void values(Work const& w, int start) {
    using Layout = decltype(take<0, 2>(typename S::ValueLayout{}));
    Empty::wait(&s.v_empty[v.index], v.phase ^ 1);
    copy_tile(p.v, s.v_full[v.index], s.v + v.index * S::Columns * S::D, Layout{}, typename S::ValueTile{},
              make_coord(_0{}, int(w.begin) + start), w.head);
    v.next(S::Stages);
  }
};

// One multiplying warpgroup.
template <class S>
struct Multiply {
  using Element = typename S::Element;
  using Scores = decltype(partition_fragment_C(typename S::ScoresMma{}, Shape<Int<S::Rows>, Int<S::Columns>>{}));
  using Values = decltype(partition_fragment_C(typename S::ValuesMma{}, Shape<Int<S::Rows>, Int<S::D>>{}));
  // A's fragment of a product 16 deep is the accumulators of two products 8 wide, in the same order.
  using Weights = decltype(make_tensor<Element>(Shape<Shape<_2, _2, _2>, _1, Int<S::Columns / 16>>{}));
  using Pairs = cutlass::NumericArrayConverter<Element, float, 2>;

  typename S::Params const& p;
  typename S::Storage& s;
  int group, thread;
  Slot q{}, k{}, v{};
  typename S::ScoresMma scores_mma{};
  typename S::ValuesMma values_mma{};
  Scores scores{};
  Values values{};
  Weights weights{};

  CUTLASS_DEVICE void release(uint64_t& empty) {
    __syncwarp();
    if (thread % 32 == 0) Empty::arrive(&empty);
  }

  CUTLASS_DEVICE void begin() {
    clear(values);
    Full::wait(&s.q_full, q.phase);
  }
  CUTLASS_DEVICE void release_query() {
    release(s.q_empty);
    q.next(1);
  }
  CUTLASS_DEVICE void start_scores() {
    auto slice = scores_mma.get_slice(group * 128 + thread);
    auto a = slice.make_fragment_A(slice.partition_A(make_tensor(make_smem_ptr(s.q), typename S::QueryLayout{})));
    auto b = slice.make_fragment_B(slice.partition_B(make_tensor(make_smem_ptr(s.k), typename S::KeyLayout{})));
    Full::wait(&s.k_full[k.index], k.phase);
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
    scores_mma.accumulate_ = GMMA::ScaleOut::Zero;
    CUTLASS_PRAGMA_UNROLL
    for (int block = 0; block < size<2>(a); ++block) {
      gemm(scores_mma, a(_, _, block), b(_, _, block, k.index), scores);
      scores_mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
  }
  CUTLASS_DEVICE void finish_scores(bool alone) {
    if (alone)
      warpgroup_wait<0>();
    else
      warpgroup_wait<1>();
    warpgroup_fence_operand(scores);
    release(s.k_empty[k.index]);
    k.next(S::Stages);
  }
  CUTLASS_DEVICE void weigh(Work const& w, int start, bool masked) {
    CUTLASS_PRAGMA_UNROLL
    for (int e = 0; e < size(scores); ++e) {
      float weight = silu(scores(e));
      if (masked) {
        int const i = w.first + 64 * group + hstu::fragment_row(thread, e);
        weight = hstu::sees(i, start + hstu::fragment_column(thread, e), w.history) ? weight : 0.0f;
      }
      scores(e) = weight;
    }
    warpgroup_fence_operand(scores);  // here, while the other product runs: not after it
  }
  CUTLASS_DEVICE void settle_weights() {
    auto from = recast<cutlass::Array<float, 2>>(scores);
    auto to = recast<cutlass::Array<Element, 2>>(weights);
    CUTLASS_PRAGMA_UNROLL
    for (int pair = 0; pair < size(to); ++pair) to(pair) = Pairs::convert(from(pair));
  }
  // Rows from `from` on become zero: whatever stands there, a weight of zero must not make NaN of it. Both warpgroups
  // write the same zeros; each waits for its own alone.
  CUTLASS_DEVICE void clear_values(int from) {
    auto tile = make_tensor(make_smem_ptr(s.v), typename S::ValueLayout{});
    Full::wait(&s.v_full[v.index], v.phase);
    for (int chunk = from * (S::D / 8) + thread; chunk < S::Columns * (S::D / 8); chunk += 128) {
      uint32_t const place = cast_smem_ptr_to_uint(&tile(chunk % (S::D / 8) * 8, chunk / (S::D / 8), v.index));
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(place), "r"(0) : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory");
  }
  CUTLASS_DEVICE void start_values() {
    auto slice = values_mma.get_slice(group * 128 + thread);
    auto b = slice.make_fragment_B(slice.partition_B(make_tensor(make_smem_ptr(s.v), typename S::ValueLayout{})));
    Full::wait(&s.v_full[v.index], v.phase);
    warpgroup_fence_operand(values);
    warpgroup_fence_operand(weights);
    warpgroup_arrive();
    CUTLASS_PRAGMA_UNROLL
    for (int block = 0; block < size<2>(weights); ++block)
      gemm(values_mma, weights(_, _, block), b(_, _, block, v.index), values);
    warpgroup_commit_batch();
  }
  CUTLASS_DEVICE void finish_values() {
    warpgroup_wait<0>();
    warpgroup_fence_operand(values);
    release(s.v_empty[v.index]);
    v.next(S::Stages);
  }
  // Four threads hold a row's columns two by two; they trade until each holds eight side by side, which is one store.
  CUTLASS_DEVICE void store(Work const& w) {
    CUTLASS_PRAGMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      int const i = w.first + 64 * group + hstu::fragment_row(thread, 2 * half);
      CUTLASS_PRAGMA_UNROLL
      for (int four = 0; four < S::D / 32; ++four) {
        uint32_t word[4];
        CUTLASS_PRAGMA_UNROLL
        for (int block = 0; block < 4; ++block) {
          int const e = (4 * four + block) * 4 + 2 * half;
          cutlass::Array<float, 2> pair;
          pair[0] = p.scale * values(e);
          pair[1] = p.scale * values(e + 1);
          auto const rounded = Pairs::convert(pair);
          word[block] = reinterpret_cast<uint32_t const&>(rounded);
        }
        hstu::trade(word, thread % 4, [](uint32_t x, int lane) { return __shfl_xor_sync(0xffffffffu, x, lane); });
        if (i < w.length) {
          Element* place = p.out + (w.begin + i) * p.out_row + w.head * S::D + (4 * four + thread % 4) * 8;
          *reinterpret_cast<uint4*>(place) = make_uint4(word[0], word[1], word[2], word[3]);
        }
      }
    }
  }
};

template <class S>
__global__ void __launch_bounds__(S::Threads, 1) attention(__grid_constant__ typename S::Params const p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  static_assert(S::fragments_agree());
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& s = *reinterpret_cast<typename S::Storage*>(memory);
  if (threadIdx.x == 0) {
    prefetch_tma_descriptor(p.q.get_tma_descriptor());
    prefetch_tma_descriptor(p.k.get_tma_descriptor());
    prefetch_tma_descriptor(p.v.get_tma_descriptor());
    Full::init(&s.q_full, 1);
    Empty::init(&s.q_empty, S::Warps);
    for (int stage = 0; stage < S::Stages; ++stage) {
      Full::init(&s.k_full[stage], 1);
      Full::init(&s.v_full[stage], 1);
      Empty::init(&s.k_empty[stage], S::Warps);
      Empty::init(&s.v_empty[stage], S::Warps);
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  int const group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
  Work w;
  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<S::LoadRegisters>();
    if (threadIdx.x == 0) {
      Load<S> load{p, s};
      for (int64_t item = blockIdx.x; item < p.list.count(); item += gridDim.x)
        if (p.list.work(item, S::Rows, p.offsets, p.num_targets, w))
          hstu::produce(w, Tiles(w, S::Rows, S::Columns), load);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<S::MultiplyRegisters>();
    Multiply<S> multiply{p, s, group - 1, int(threadIdx.x) % 128};
    for (int64_t item = blockIdx.x; item < p.list.count(); item += gridDim.x)
      if (p.list.work(item, S::Rows, p.offsets, p.num_targets, w))
        hstu::consume(w, Tiles(w, S::Rows, S::Columns), multiply);
  }
#endif
}

template <class S>
cudaError_t launch(void const* q, void const* k, void const* v, void* out, int64_t const* offsets,
                   int64_t const* num_targets, int rows, int heads, int users, int longest, int64_t q_row, int64_t k_row,
                   int64_t v_row, int64_t out_row, float scale, int num_sms, cudaStream_t stream) {
  using Element = typename S::Element;
  int64_t const bytes = int64_t(longest) * 2 * S::D * sizeof(Element), pairs = int64_t(heads) * users;
  int64_t const together = CacheBytes / bytes < 1 ? 1 : CacheBytes / bytes;
  WorkList const list{heads, users, hstu::blocks_of(longest, S::Rows), int(together < pairs ? together : pairs)};
  typename S::Params const params{
      S::query_map(static_cast<Element const*>(q), rows, heads, q_row),
      S::key_map(static_cast<Element const*>(k), rows, heads, k_row),
      S::value_map(static_cast<Element const*>(v), rows, heads, v_row),
      static_cast<Element*>(out), offsets, num_targets, out_row, rows, scale, list};
  int const shared = sizeof(typename S::Storage);
  cudaError_t status = cudaFuncSetAttribute(attention<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  int64_t const grid = list.count() < num_sms ? list.count() : num_sms;
  attention<S><<<dim3(unsigned(grid)), dim3(S::Threads), shared, stream>>>(params);
  return cudaGetLastError();
}

#if defined(HSTU_BF16)
using Half = cutlass::bfloat16_t;
#else
using Half = cutlass::half_t;
#endif
#if HSTU_D == 64
using Chosen = Shapes<Half, 64, HSTU_GROUPS, 128, 4>;
#else
using Chosen = Shapes<Half, 128, HSTU_GROUPS, 128, 3>;
#endif

}  // namespace hstu

extern "C" int hstu_attention(void const* q, void const* k, void const* v, void* out, int64_t const* offsets,
                              int64_t const* num_targets, int rows, int heads, int users, int longest, int64_t q_row,
                              int64_t k_row, int64_t v_row, int64_t out_row, float scale, int num_sms, void* stream) {
  return hstu::launch<hstu::Chosen>(q, k, v, out, offsets, num_targets, rows, heads, users, longest, q_row, k_row, v_row, out_row,
                        scale, num_sms, static_cast<cudaStream_t>(stream));
}

// Bytes of shared memory that a block asks for.
extern "C" int hstu_attention_shared_bytes() { return sizeof(hstu::Chosen::Storage); }

extern "C" char const* hstu_attention_status(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
