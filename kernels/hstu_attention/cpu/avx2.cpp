#include "simd_avx2.h"
#include "attention.h"

void hstu::attention_avx2(const Call& call, const Runtime& runtime) { run_words<Float32Words>(call, runtime); }
