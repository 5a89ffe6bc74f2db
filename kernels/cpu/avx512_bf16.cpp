#include "cpu/simd_avx512.h"
#include "cpu/tile.h"
#include "hstu_attention/attention.h"
#include "item_head/head.h"
#include "projection/projection.h"

namespace {
void attention(const hstu::Call& call, const hstu::Runtime& runtime) {
    if (call.compute_type == hstu::kBfloat16) return run_words<Bfloat16Words>(call, runtime);
    run_words<Float32Words>(call, runtime);
}
template <class F>
void by_words(const hstu::ProjectionCall& call, F f) {
    if (call.compute_type == hstu::kInt8) return f(Int8Words{});
    if (call.compute_type == hstu::kBfloat16) return f(Bfloat16Words{});
    f(Float32Words{});
}
void pack(const hstu::ProjectionCall& call, const hstu::Runtime& runtime) {
    by_words(call, [&](auto words) { pack_weight<decltype(words)>(call, runtime); });
}
void product(const hstu::ProjectionCall& call, const hstu::Runtime& runtime) {
    by_words(call, [&](auto words) { project<decltype(words)>(call, runtime); });
}
}  // namespace

const hstu::Kernels hstu::kAvx512Bf16{"avx512_bf16", attention, pack_items, top_items, pack, product};
