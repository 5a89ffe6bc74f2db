#include "cpu/simd_avx512.h"
#include "cpu/tile.h"
#include "paged_hstu_attention/paged.h"

const hstu::PagedKernels hstu::kPagedAvx512{"avx512", paged_attention};
