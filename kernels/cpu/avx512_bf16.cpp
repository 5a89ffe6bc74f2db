#include "cpu/simd_avx512.h"
#include "cpu/tile.h"
#include "hstu_attention/attention.h"
#include "item_head/head.h"

namespace {
void attention(const hstu::Call& call, const hstu::Runtime& runtime) {
    if (call.compute_type == hstu::kBfloat16) return run_words<Bfloat16Words>(call, runtime);
    run_words<Float32Words>(call, runtime);
}
}  // namespace

const hstu::Kernels hstu::kAvx512Bf16{"avx512_bf16", attention, pack_items, top_items};
