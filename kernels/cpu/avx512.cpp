#include "cpu/simd_avx512.h"
#include "cpu/tile.h"
#include "hstu_attention/attention.h"
#include "item_head/head.h"

namespace {
void attention(const hstu::Call& call, const hstu::Runtime& runtime) {
    run_words<Float32Words>(call, runtime);
}
}  // namespace

const hstu::Kernels hstu::kAvx512{"avx512", attention, pack_items, top_items};
