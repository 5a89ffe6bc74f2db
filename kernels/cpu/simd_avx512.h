// 16 lanes of AVX-512 (F, BW, DQ, VL), as the kernel template wants them; bf16 products where the CPU has them.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

struct Simd {
    static constexpr int kLanes = 16, kRows = 6, kVectors = 4;  // the register tile: 6 x 64 outputs
    using Float = __m512;
    using Int = __m512i;
    struct TimeTable {  // 129 values in nine registers
        Float part[8], last;
    };

    static __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }
    static Float zero() { return _mm512_setzero_ps(); }
    static Float set(float x) { return _mm512_set1_ps(x); }
    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
    static Float fnma(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }
    static Float magnitude(Float a) { return _mm512_abs_ps(a); }
    static Float maximum(Float a, Float b) { return _mm512_max_ps(a, b); }
    static float sum(Float a) { return _mm512_reduce_add_ps(a); }
    static float most(Float a) { return _mm512_reduce_max_ps(a); }
    static uint64_t at_least(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }  // bit per lane
    static void store_int8(int8_t* p, Float a, int64_t n) {  // rounded to nearest even
        _mm512_mask_cvtsepi32_storeu_epi8(p, first(n), _mm512_cvtps_epi32(a));
    }
    template <int kOffset>
    static void store_int8(int8_t* p, Float a) {  // the same of 16 values, to which kOffset (0 or 128) is added
        const __m128i bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(kOffset))));
    }
    static Float to_float(Float integers) { return _mm512_cvtepi32_ps(_mm512_castps_si512(integers)); }
    static Float load(const float* p) { return _mm512_loadu_ps(p); }
    static Float load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
    static void store(float* p, Float a) { _mm512_storeu_ps(p, a); }
    static void store(float* p, Float a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a); }
    static Float load(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static Float load(const uint16_t* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
    static void store(uint16_t* p, Float a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
    static void store(uint16_t* p, Float a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow(a)); }

    // exp(-x) = 2^z, z = -x log2(e): 2^floor(z) by the instruction for it, 2^fraction by a minimax polynomial
    // (relative error 7.5e-8, or 7.5e-5 where the result is rounded to bf16 anyhow). Infinite where it overflows.
    template <bool kFast>
    static Float exp_minus(Float x) {
        const Float minus_log2e = set(-1.44269504f);
        if constexpr (kFast) {
            const Float z = mul(x, minus_log2e), f = _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
            Float p = fma(set(0.07802448f), f, set(0.22606720f));
            p = fma(p, f, set(0.69583350f));
            p = fma(p, f, set(0.99992520f));
            return _mm512_scalef_ps(p, z);
        }
        const Float n = _mm512_roundscale_ps(mul(x, minus_log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const Float f = _mm512_fmsub_ps(x, minus_log2e, n);
        Float p = fma(set(0.0013276466f), f, set(0.009675541f));
        p = fma(p, f, set(0.055507135f));
        p = fma(p, f, set(0.2402212f));
        p = fma(p, f, set(0.69314694f));
        return _mm512_scalef_ps(fma(p, f, set(1.0000001f)), n);
    }
    static Float reciprocal(Float a) { return _mm512_rcp14_ps(a); }  // 14 bits; 0 of infinity
    // One Newton step; infinity has the reciprocal 0, which the step would make NaN.
    static Float refined_reciprocal(Float a, Float r) {
        return _mm512_mask_mul_ps(r, _mm512_cmp_ps_mask(a, set(1e37f), _CMP_LT_OQ), r, fnma(a, r, set(2.0f)));
    }
    static Float keep(Float a, uint64_t bits) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), a); }

    static TimeTable table(const float* p) {
        TimeTable t;
        for (int i = 0; i < 8; ++i) t.part[i] = _mm512_loadu_ps(p + 16 * i);
        t.last = _mm512_set1_ps(p[128]);
        return t;
    }
    static Float look_up(const TimeTable& t, Int bucket) {
        const auto pick = [&](int i) { return _mm512_permutex2var_ps(t.part[i], bucket, t.part[i + 1]); };
        const __mmask16 high = _mm512_test_epi32_mask(bucket, _mm512_set1_epi32(32));
        const Float low_half = _mm512_mask_blend_ps(high, pick(0), pick(2));
        const Float high_half = _mm512_mask_blend_ps(high, pick(4), pick(6));
        const __mmask16 upper = _mm512_test_epi32_mask(bucket, _mm512_set1_epi32(64));
        const __mmask16 last = _mm512_cmpge_epi32_mask(bucket, _mm512_set1_epi32(128));
        return _mm512_mask_mov_ps(_mm512_mask_blend_ps(upper, low_half, high_half), last, t.last);
    }
    static Int buckets(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static Int buckets(const uint8_t* p, int64_t n) {
        return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first(n), p));
    }
    template <class T>
    static Int buckets(const T* p) { return buckets(p, 16); }
    static Int buckets(const int32_t* p, int64_t n) {
        return _mm512_max_epi32(_mm512_maskz_loadu_epi32(first(n), p), _mm512_setzero_si512());
    }
    static Int buckets(const int64_t* p, int64_t n) {
        const __m256i low = _mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(first(n)), p));
        const __m256i high = _mm512_cvtepi64_epi32(_mm512_maskz_loadu_epi64(static_cast<__mmask8>(first(n) >> 8), p + 8));
        return _mm512_max_epi32(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), _mm512_setzero_si512());
    }

    // out[word * stride + row] = in[row * in_stride + word]: 16 rows of 16 words of 32 bits
    static void transpose(const uint32_t* in, int64_t in_stride, uint32_t* out, int64_t stride, int words) {
        Int r[16], t[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * in_stride);
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
            r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
            r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
            r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
        }
        for (int i = 0; i < 16; i += 8) {
            for (int j = 0; j < 4; ++j) {
                t[i + j] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0x88);
                t[i + j + 4] = _mm512_shuffle_i32x4(r[i + j], r[i + j + 4], 0xDD);
            }
        }
        for (int i = 0; i < 8; ++i) {
            r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
            r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        }
        for (int i = 0; i < 16 && i < words; ++i) _mm512_storeu_si512(out + i * stride, r[i]);
    }

    // bf16 by rounding to nearest even; NaN stays NaN
    static __m256i narrow(Float a) {
#ifdef __AVX512BF16__
        return (__m256i)_mm512_cvtneps_pbh(a);
#else
        const Int bits = _mm512_castps_si512(a);
        const Int odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const Int rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
        const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000)), 16));
#endif
    }
    static Float widen(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
};

// How two 32-bit words are multiplied and added, and how floats become words.
struct Float32Words {
    static constexpr int kPack = 1;  // values in a word
    static Simd::Float multiply_add(Simd::Float a, Simd::Float b, Simd::Float c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(uint32_t* out, Simd::Float a) { _mm512_storeu_ps(out, a); }  // 16 values
    static void store_pairs(uint32_t* out, Simd::Float a, Simd::Float) { _mm512_storeu_ps(out, a); }
    static constexpr bool kFast = false;
};

// Four int8 in a word. The left word is unsigned where the CPU multiplies unsigned by signed: kOffset is added to it.
struct Int8Words {
    static constexpr int kPack = 4;
#ifdef __AVX512VNNI__
    static constexpr int kOffset = 128;
    static Simd::Float multiply_add(Simd::Float a, Simd::Float b, Simd::Float c) {
        return _mm512_castsi512_ps(
            _mm512_dpbusd_epi32(_mm512_castps_si512(c), _mm512_castps_si512(a), _mm512_castps_si512(b)));
    }
#else
    static constexpr int kOffset = 0;
    static Simd::Float multiply_add(Simd::Float a, Simd::Float b, Simd::Float c) {  // even and odd bytes as int16
        const auto even = [](__m512i x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); };
        const auto odd = [](__m512i x) { return _mm512_srai_epi16(x, 8); };
        const __m512i x = _mm512_castps_si512(a), y = _mm512_castps_si512(b);
        const __m512i products = _mm512_add_epi32(_mm512_madd_epi16(even(x), even(y)), _mm512_madd_epi16(odd(x), odd(y)));
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(c), products));
    }
#endif
};

#ifdef __AVX512BF16__
struct Bfloat16Words {
    static constexpr int kPack = 2;
    static Simd::Float multiply_add(Simd::Float a, Simd::Float b, Simd::Float c) {
        return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
    }
    static void store(uint32_t* out, Simd::Float a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), (__m256i)_mm512_cvtneps_pbh(a));
    }
    static void store_pairs(uint32_t* out, Simd::Float a, Simd::Float b) {  // word i holds a[i] and b[i]
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
        _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    static constexpr bool kFast = true;
};
#endif

}  // namespace
