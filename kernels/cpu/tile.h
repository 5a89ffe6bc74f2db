// What the kernels have in common, over any instruction set: sizes, SiLU, and a register tile of products.
#pragma once
#include <cstring>

#include "runtime.h"

namespace {

using Float = Simd::Float;

constexpr int64_t kLanes = Simd::kLanes;
constexpr int64_t kPanel = Simd::kLanes * Simd::kVectors;  // columns of a register tile

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

template <class U> struct Typed { using type = U; };

// f(Typed<float>) or f(Typed<uint16_t>), by the type that holds floats.
template <class F>
inline void by_type(int64_t type, F f) {
    type == hstu::kBfloat16 ? f(Typed<uint16_t>{}) : f(Typed<float>{});
}

template <class F>
void parallel(const hstu::Runtime& runtime, int64_t count, F body) {
    runtime.parallel(count, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &body);
}

// x / (1 + exp(-x)): exp by Cody-Waite reduction to 2^f, f in [-1/2, 1/2], and a minimax polynomial
// (relative error 7.5e-8, or 7.5e-5 where the result is rounded to bf16 anyhow).
template <bool kFast>
inline Float silu(Float x) {
    const Float y = Simd::limit(x, Simd::set(86.0f));
    const Float magic = Simd::set(12582912.0f), minus_log2e = Simd::set(-1.44269504f);
    const Float t = Simd::fma(y, minus_log2e, magic);
    const Float f = Simd::fma(y, minus_log2e, Simd::sub(magic, t));
    Float p;
    if constexpr (kFast) {
        p = Simd::fma(Simd::set(0.055171624f), f, Simd::set(0.24261113f));
        p = Simd::fma(p, f, Simd::set(0.69326097f));
        p = Simd::fma(p, f, Simd::set(0.99992806f));
    } else {
        p = Simd::fma(Simd::set(0.0013276466f), f, Simd::set(0.009675541f));
        p = Simd::fma(p, f, Simd::set(0.055507135f));
        p = Simd::fma(p, f, Simd::set(0.2402212f));
        p = Simd::fma(p, f, Simd::set(0.69314694f));
        p = Simd::fma(p, f, Simd::set(1.0000001f));
    }
    const Float d = Simd::add(Simd::scale(p, t), Simd::set(1.0f));
    Float r = Simd::reciprocal(d);
    if constexpr (!kFast) r = Simd::mul(r, Simd::fnma(d, r, Simd::set(2.0f)));
    return Simd::mul(x, r);
}

// The scale at which n floats become int8, symmetrically: x = scale * out, |out| <= 127.
inline float quantize_row(const float* x, int64_t n, int8_t* out) {
    Float most = Simd::zero();
    for (int64_t i = 0; i < n; i += kLanes) most = Simd::maximum(most, Simd::magnitude(Simd::load(x + i, n - i)));
    const float scale = Simd::most(most) / 127.0f;
    const Float inverse = Simd::set(scale > 0 ? 1.0f / scale : 0.0f);
    for (int64_t i = 0; i < n; i += kLanes) Simd::store_int8(out + i, Simd::mul(Simd::load(x + i, n - i), inverse), n - i);
    return scale;
}

// Words: 32 bits that hold one float, two bf16 or four int8 (whose sums are int32). C[M x V lanes] = (C +) A[M x words] B[words x V lanes].
template <class Words, int M, int V, bool kAdd>
void tile(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t words, float* c, int64_t c_stride) {
    Float sum[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[m][v] = Simd::zero();
    for (int64_t w = 0; w < words; ++w) {
        Float right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) right[v] = Simd::load(reinterpret_cast<const float*>(b + w * b_stride) + v * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            float word;
            std::memcpy(&word, a + m * a_stride + w, 4);
            const Float left = Simd::set(word);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sum[m][v] = Words::multiply_add(left, right[v], sum[m][v]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            float* at = c + m * c_stride + v * kLanes;
            Simd::store(at, kAdd ? Simd::add(Simd::load(at), sum[m][v]) : sum[m][v]);
        }
}

using Tile = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, int64_t, float*, int64_t);

template <class Words, bool kAdd, int V>
constexpr Tile tile_of_rows(int m) {
    constexpr Tile tiles[] = {tile<Words, 1, V, kAdd>, tile<Words, 2, V, kAdd>, tile<Words, 3, V, kAdd>,
                              tile<Words, 4, V, kAdd>, tile<Words, 5, V, kAdd>, tile<Words, 6, V, kAdd>};
    static_assert(sizeof(tiles) / sizeof(Tile) == Simd::kRows);
    return tiles[m - 1];
}

template <class Words, bool kAdd>
Tile choose_tile(int64_t m, int64_t vectors) {
    const int rows = static_cast<int>(m);
    if constexpr (Simd::kVectors == 4) {
        if (vectors == 4) return tile_of_rows<Words, kAdd, 4>(rows);
        if (vectors == 3) return tile_of_rows<Words, kAdd, 3>(rows);
    }
    return vectors == 2 ? tile_of_rows<Words, kAdd, 2>(rows) : tile_of_rows<Words, kAdd, 1>(rows);
}

}  // namespace
