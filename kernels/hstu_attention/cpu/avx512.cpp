#include "simd_avx512.h"
#include "attention.h"

void hstu::attention_avx512(const Call& call, const Runtime& runtime) { run_words<Float32Words>(call, runtime); }
