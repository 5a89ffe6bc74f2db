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

// x / (1 + exp(-x)); with kFast for what is rounded to bf16.
template <bool kFast>
inline Float silu(Float x) {
    const Float d = Simd::add(Simd::exp_minus<kFast>(x), Simd::set(1.0f));
    Float r = Simd::reciprocal(d);
    if constexpr (!kFast) r = Simd::refined_reciprocal(d, r);
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
// What becomes of the sums of row m, vector v, is up to `finish`.
template <class Words, int M, int V, class Finish>
inline __attribute__((always_inline)) void products(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride,
                                                    int64_t words, Finish finish) {
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
        for (int v = 0; v < V; ++v) finish(m, v, sum[m][v]);
}

template <class Words, int M, int V, bool kAdd>
struct Product {  // C = (C +) A B
    static void run(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t words, float* c,
                    int64_t c_stride) {
        products<Words, M, V>(a, a_stride, b, b_stride, words, [=](int m, int v, Float sum) {
            float* at = c + m * c_stride + v * kLanes;
            Simd::store(at, kAdd ? Simd::add(Simd::load(at), sum) : sum);
        });
    }
};
template <class Words, int M, int V> using Add = Product<Words, M, V, true>;
template <class Words, int M, int V> using Set = Product<Words, M, V, false>;

// The function of T for m rows (1..kRows) and some vectors of columns (1..kVectors).
template <class Words, template <class, int, int> class T, int V>
auto of_rows(int64_t m) {
    constexpr decltype(&T<Words, 1, V>::run) functions[] = {
        T<Words, 1, V>::run, T<Words, 2, V>::run, T<Words, 3, V>::run,
        T<Words, 4, V>::run, T<Words, 5, V>::run, T<Words, 6, V>::run};
    static_assert(sizeof(functions) / sizeof(functions[0]) == Simd::kRows);
    return functions[m - 1];
}

template <class Words, template <class, int, int> class T>
auto choose(int64_t m, int64_t vectors) {
    if constexpr (Simd::kVectors == 4) {
        if (vectors == 4) return of_rows<Words, T, 4>(m);
        if (vectors == 3) return of_rows<Words, T, 3>(m);
    }
    return vectors == 2 ? of_rows<Words, T, 2>(m) : of_rows<Words, T, 1>(m);
}

}  // namespace
