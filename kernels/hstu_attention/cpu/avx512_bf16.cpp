#include "simd_avx512.h"
#include "attention.h"

void hstu::attention_avx512_bf16(const Call& call, const Runtime& runtime) {
    if (call.compute_type == kBfloat16) {
        run_words<Bfloat16Words>(call, runtime);
    } else {
        run_words<Float32Words>(call, runtime);
    }
}
