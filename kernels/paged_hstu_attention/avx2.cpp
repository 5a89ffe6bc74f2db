#include "cpu/simd_avx2.h"
#include "cpu/tile.h"
#include "paged_hstu_attention/paged.h"

const hstu::PagedKernels hstu::kPagedAvx2{"avx2", paged_attention};
