// 8 lanes of AVX2 with FMA, as the kernel template wants them.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
    static constexpr int kLanes = 8, kRows = 6, kVectors = 2;  // the register tile: 6 x 16 outputs
    using Float = __m256;
    using Int = __m256i;
    struct TimeTable {
        const float* values;
    };

    static Int first(int64_t n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static Float zero() { return _mm256_setzero_ps(); }
    static Float set(float x) { return _mm256_set1_ps(x); }
    static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
    static Float fnma(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }
    static Float magnitude(Float a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static Float maximum(Float a, Float b) { return _mm256_max_ps(a, b); }
    static float most(Float a) {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    static uint64_t at_least(Float a, Float b) {  // bit per lane
        return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
    }
    static void store_int8(int8_t* p, Float a, int64_t n) {  // rounded to nearest even
        alignas(32) int32_t values[8];
        _mm256_store_si256(reinterpret_cast<Int*>(values), _mm256_cvtps_epi32(a));
        for (int64_t i = 0; i < n && i < 8; ++i) p[i] = static_cast<int8_t>(values[i]);
    }
    template <int kOffset>
    static void store_int8(int8_t* p, Float a) {  // 8 values; kOffset is added to none of them here
        static_assert(kOffset == 0);
        const Int words = _mm256_cvtps_epi32(a);
        const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(halves, halves));
    }
    static Float to_float(Float integers) { return _mm256_cvtepi32_ps(_mm256_castps_si256(integers)); }
    static float sum(Float a) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
    static Float load(const float* p) { return _mm256_loadu_ps(p); }
    static Float load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
    static void store(float* p, Float a) { _mm256_storeu_ps(p, a); }
    static void store(float* p, Float a, int64_t n) { _mm256_maskstore_ps(p, first(n), a); }
    static Float load(const uint16_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static Float load(const uint16_t* p, int64_t n) {
        uint16_t copy[8] = {};
        for (int64_t i = 0; i < n && i < 8; ++i) copy[i] = p[i];
        return load(copy);
    }
    static void store(uint16_t* p, Float a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a)); }
    static void store(uint16_t* p, Float a, int64_t n) {
        uint16_t copy[8];
        store(copy, a);
        for (int64_t i = 0; i < n && i < 8; ++i) p[i] = copy[i];
    }

    // exp(-x) = 2^f 2^n by Cody-Waite reduction, f in [-1/2, 1/2], and a minimax polynomial (relative error 7.5e-8).
    template <bool kFast>
    static Float exp_minus(Float x) {
        const Float most = set(86.0f), magic = set(12582912.0f), minus_log2e = set(-1.44269504f);
        const Float y = _mm256_min_ps(_mm256_max_ps(x, sub(zero(), most)), most);
        const Float t = fma(y, minus_log2e, magic);  // n stands in its low bits
        const Float f = fma(y, minus_log2e, sub(magic, t));
        Float p = fma(set(0.0013276466f), f, set(0.009675541f));
        p = fma(p, f, set(0.055507135f));
        p = fma(p, f, set(0.2402212f));
        p = fma(p, f, set(0.69314694f));
        p = fma(p, f, set(1.0000001f));
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
    }
    static Float reciprocal(Float a) {  // 12 bits, then one Newton step
        const Float r = _mm256_rcp_ps(a);
        return _mm256_mul_ps(r, _mm256_fnmadd_ps(a, r, _mm256_set1_ps(2.0f)));
    }
    static Float refined_reciprocal(Float a, Float r) { return mul(r, fnma(a, r, set(2.0f))); }
    static Float keep(Float a, uint64_t bits) {
        const Int lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const Int set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 0xFF)), lane);
        return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
    }

    static TimeTable table(const float* p) { return {p}; }
    static Float look_up(const TimeTable& t, Int bucket) {
        return _mm256_i32gather_ps(t.values, _mm256_min_epi32(bucket, _mm256_set1_epi32(128)), 4);
    }
    template <class T>
    static Int buckets(const T* p) { return buckets(p, 8); }
    template <class T>
    static Int buckets(const T* p, int64_t n) {
        alignas(32) int32_t copy[8] = {};
        for (int64_t i = 0; i < n && i < 8; ++i) copy[i] = p[i] < 0 ? 0 : static_cast<int32_t>(p[i]);
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(copy));
    }

    // out[word * stride + row] = in[row * in_stride + word]: 8 rows of 8 words of 32 bits
    static void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t stride, int words) {
        Float r[8], t[8];
        for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(in + i * in_stride));
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
            r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
            r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
        }
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
            t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
        }
        for (int i = 0; i < 8 && i < words; ++i) _mm256_storeu_ps(reinterpret_cast<float*>(out + i * stride), t[i]);
    }

    // bf16 by rounding to nearest even; NaN stays NaN
    static __m128i narrow(Float a) {
        const Int bits = _mm256_castps_si256(a);
        const Int odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const Int rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
        const Int nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
        const Int words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
        return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    }
    static Float widen(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }
};

struct Float32Words {
    static constexpr int kPack = 1;  // values in a word
    static Simd::Float multiply_add(Simd::Float a, Simd::Float b, Simd::Float c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(uint32_t* out, Simd::Float a) { _mm256_storeu_ps(reinterpret_cast<float*>(out), a); }
    static void store_pairs(uint32_t* out, Simd::Float a, Simd::Float) { store(out, a); }
    static constexpr bool kFast = false;
};

// Four int8 in a word, multiplied as even and odd bytes.
struct Int8Words {
    static constexpr int kPack = 4, kOffset = 0;
    static Simd::Float multiply_add(Simd::Float a, Simd::Float b, Simd::Float c) {
        const auto even = [](__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); };
        const auto odd = [](__m256i x) { return _mm256_srai_epi16(x, 8); };
        const __m256i x = _mm256_castps_si256(a), y = _mm256_castps_si256(b);
        const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(even(x), even(y)), _mm256_madd_epi16(odd(x), odd(y)));
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(c), products));
    }
};

}  // namespace
