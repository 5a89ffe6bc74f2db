#include "cpu/simd_avx2.h"
#include "cpu/tile.h"
#include "hstu_attention/attention.h"
#include "item_head/head.h"

namespace {
void attention(const hstu::Call& call, const hstu::Runtime& runtime) {
    run_words<Float32Words>(call, runtime);
}
}  // namespace

const hstu::Kernels hstu::kAvx2{"avx2", attention, pack_items, top_items};
