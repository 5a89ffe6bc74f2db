// Fused HSTU attention over any instruction set: from the projection, before SiLU, to the gated output.
//
// Keys and values are activated and packed once, 64 keys to a block, keys across the lanes. A strip of 48 query
// rows then walks over the blocks it may see: scores (a register tile of products), bias, SiLU, times values. There
// is no softmax, so partial sums simply add. At the end each row is normalised over all heads and gated.
// What a row's answer is made of depends on the row alone: not on the batch, the padding or the threads.
#pragma once
#include <cstring>

#include "abi.h"

namespace {

using hstu::Call;
using hstu::Rows;
using hstu::Runtime;
using Float = Simd::Float;

constexpr int64_t kBlock = 64;                           // keys in a block
constexpr int64_t kStrip = 48;                           // query rows that share a walk over the blocks
constexpr int64_t kLanes = Simd::kLanes;
constexpr int64_t kPanel = Simd::kLanes * Simd::kVectors;  // keys across a register tile
constexpr int64_t kGroupBytes = 16 << 20;                // packed keys and values of the users in flight

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// x / (1 + exp(-x)): exp by Cody-Waite reduction to 2^f, f in [-1/2, 1/2], and a minimax polynomial
// (relative error 7.5e-8, or 7.5e-5 where the result is rounded to bf16 anyhow).
template <bool kFast>
inline Float silu(Float x) {
    const Float y = Simd::clamp(x, Simd::set(-86.0f), Simd::set(86.0f));
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

template <class T>
inline const T* row(const Rows& rows, int64_t user, int64_t index) {
    return static_cast<const T*>(rows.data) + user * rows.batch_stride + index * rows.row_stride;
}

// Words: 32 bits that hold one float or two bf16. C[M x V lanes] (+)= A[M x words] B[words x V lanes].
template <class Words, int M, int V, bool kAdd>
void tile(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t words, float* c, int64_t c_stride) {
    Float sum[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[m][v] = kAdd ? Simd::load(c + m * c_stride + v * kLanes) : Simd::zero();
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
        for (int v = 0; v < V; ++v) Simd::store(c + m * c_stride + v * kLanes, sum[m][v]);
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

template <class Words, class T>
struct Attention {
    static constexpr int64_t kPack = Words::kPack;
    const Call& call;
    const Runtime& runtime;
    const int64_t heads = call.heads, dqk = call.qk_dim, dv = call.v_dim;
    const int64_t k_words = ceil_div(dqk, kPack);                 // words of one query or key
    const int64_t k_stride = round_up(k_words, kLanes);           // where the next row's words stand, before packing
    const int64_t v_lanes = round_up(dv, kLanes);                 // columns of one value
    const int64_t key_words = kBlock * k_words;                   // a packed block of keys: [panel][word][key]
    const int64_t value_words = kBlock / kPack * v_lanes;         // a packed block of values: [key or pair][column]
    const int64_t block_words = key_words + value_words;
    const int64_t o_stride = heads * v_lanes;                     // floats of one row of attention output

    int64_t prefix(int64_t b) const { return call.prefix_lengths ? call.prefix_lengths[b] : 0; }
    int64_t rows_of(int64_t b) const { return call.lengths ? call.lengths[b] : call.queries; }
    int64_t keys_of(int64_t b) const { return prefix(b) + (call.mode == hstu::kCausal ? rows_of(b) : 0); }
    int64_t position(int64_t b, int64_t i) const {
        if (call.mode == hstu::kCausal) return prefix(b) + i;
        return call.positions[b * call.position_batch_stride + i * call.position_row_stride];
    }
    int64_t visible(int64_t b, int64_t i) const { return position(b, i) + (call.mode == hstu::kCandidates ? 0 : 1); }

    // SiLU of n values as words; what is left of the last vector is zero.
    template <bool kSilu, class U>
    static void activate(const U* in, int64_t n, uint32_t* out) {
        const auto value = [&](int64_t i) {
            if (i >= n) return Simd::zero();
            const Float x = i + kLanes <= n ? Simd::load(in + i) : Simd::load(in + i, n - i);
            return kSilu ? silu<Words::kFast>(x) : x;
        };
        for (int64_t i = 0; i < n; i += kLanes) Words::store(out + i / kPack, value(i));
    }

    // Keys and values of one block and head, from rows of type U.
    template <bool kSilu, class U>
    void pack(const Rows& keys, const Rows& values, int64_t b, int64_t head, int64_t source, int64_t first, int64_t count,
              uint32_t* rows, uint32_t* pairs) const {
        for (int64_t i = 0; i < count; ++i)
            activate<kSilu>(row<U>(keys, b, source + i) + head * dqk, dqk, rows + (first + i) * k_stride);
        for (int64_t i = 0; i < count; ++i) {
            const U* value = row<U>(values, b, source + i) + head * dv;
            float* out = reinterpret_cast<float*>(pairs) + (first + i) * v_lanes;
            for (int64_t d = 0; d < dv; d += kLanes) {
                const Float x = d + kLanes <= dv ? Simd::load(value + d) : Simd::load(value + d, dv - d);
                Simd::store(out + d, kSilu ? silu<Words::kFast>(x) : x);
            }
        }
    }

    // Block `block` of user b's keys, for one head, at `out`: keys, then values; keys that are not there are zero.
    void pack_block(int64_t b, int64_t head, int64_t block, uint32_t* out, uint32_t* scratch) const {
        const int64_t begin = block * kBlock, end = min(begin + kBlock, keys_of(b)), from_prefix = min(end, prefix(b));
        const int64_t in_prefix = max(0, from_prefix - begin);
        const bool plain = kPack == 1;
        uint32_t* rows = scratch;
        uint32_t* values = plain ? out + key_words : scratch + kBlock * k_stride;  // floats, before they are paired
        if (in_prefix > 0) {
            const auto go = [&](auto activated, auto type) {
                pack<!decltype(activated)::value, typename decltype(type)::type>(
                    call.prefix_k, call.prefix_v, b, head, begin, 0, in_prefix, rows, values);
            };
            by_type(call.prefix_type, [&](auto type) {
                call.prefix_activated ? go(Bool<true>{}, type) : go(Bool<false>{}, type);
            });
        }
        if (end - begin > in_prefix)
            pack<true, T>(call.k, call.v, b, head, max(0, begin - prefix(b)), in_prefix, end - begin - in_prefix, rows, values);
        const int64_t missing = kBlock - (end - begin);
        if (missing) std::memset(rows + (end - begin) * k_stride, 0, missing * k_stride * 4);
        if (missing) std::memset(values + (end - begin) * v_lanes, 0, missing * v_lanes * 4);
        for (int64_t key = 0; key < kBlock; key += kLanes)
            for (int64_t w = 0; w < k_words; w += kLanes)
                Simd::transpose(rows + key * k_stride + w, k_stride, out + key / kPanel * kPanel * k_words + w * kPanel + key % kPanel,
                                kPanel, static_cast<int>(min(kLanes, k_words - w)));
        if (plain) return;
        const float* floats = reinterpret_cast<const float*>(values);
        for (int64_t key = 0; key < kBlock; key += 2)
            for (int64_t d = 0; d < v_lanes; d += kLanes)
                Words::store_pairs(out + key_words + key / 2 * v_lanes + d, Simd::load(floats + key * v_lanes + d),
                                   Simd::load(floats + (key + 1) * v_lanes + d));
    }

    template <bool value_> struct Bool { static constexpr bool value = value_; };
    template <class U> struct Typed { using type = U; };
    template <class F> static void by_type(int32_t type, F f) {
        type == hstu::kBfloat16 ? f(Typed<uint16_t>{}) : f(Typed<float>{});
    }

    // Bias of query rows [first, first + count) for every key they see, and one bit per key that says whether they do.
    void prepare(int64_t b, int64_t first, int64_t count, int64_t blocks, float* bias, uint64_t* allowed, int64_t* reach) const {
        for (int64_t r = 0; r < count; ++r) {
            const int64_t i = first + r, seen = min(visible(b, i), blocks * kBlock);
            float* out = bias + r * blocks * kBlock;
            const float* near = call.position_bias - position(b, i) + call.max_length - 1;
            switch (call.bucket_type) {
                case hstu::kUint8: add_bias<uint8_t>(b, i, seen, near, out); break;
                case hstu::kInt32: add_bias<int32_t>(b, i, seen, near, out); break;
                case hstu::kInt64: add_bias<int64_t>(b, i, seen, near, out); break;
                default: std::memcpy(out, near, seen * 4);
            }
            for (int64_t t = seen; t < round_up(seen, kBlock); ++t) out[t] = 0;
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t n = min(seen - block * kBlock, kBlock);
                allowed[r * blocks + block] = n <= 0 ? 0 : n == kBlock ? ~0ull : (1ull << n) - 1;
            }
            if (call.mask) {
                const uint8_t* mask = call.mask + b * call.mask_batch_stride + i * call.mask_row_stride;
                for (int64_t t = 0; t < seen; ++t)
                    if (!mask[t]) allowed[r * blocks + t / kBlock] &= ~(1ull << t % kBlock);
            }
            int64_t& tile_reach = reach[r / Simd::kRows];
            tile_reach = r % Simd::kRows ? max(tile_reach, seen) : seen;
        }
    }

    template <class B>
    void add_bias(int64_t b, int64_t i, int64_t seen, const float* near, float* out) const {
        const B* buckets = static_cast<const B*>(call.buckets) + b * call.bucket_batch_stride + i * call.bucket_row_stride;
        const Simd::TimeTable table = Simd::table(call.time_bias);
        const auto add = [&](int64_t from, int64_t to, const B* at) {
            for (int64_t t = from; t < to; t += kLanes) {
                const int64_t n = min(kLanes, to - t);
                Simd::store(out + t, Simd::add(Simd::load(near + t, n), Simd::look_up(table, Simd::buckets(at + t, n))), n);
            }
        };
        const int64_t split = call.own_bucket_column < 0 ? seen : min(seen, prefix(b));
        add(0, split, buckets);
        add(split, seen, buckets + call.own_bucket_column - split);
    }

    // o[count x v_lanes] = Σ SiLU(q k + bias) v over the blocks, for one head. q: words of SiLU(q), row by row.
    template <class BlockAt>
    void walk(const uint32_t* q, int64_t count, int64_t blocks, const float* bias, const uint64_t* allowed,
              const int64_t* reach, float* o, BlockAt block_at) const {
        alignas(64) float scores[Simd::kRows * kBlock];
        alignas(64) uint32_t weights[Simd::kRows * kBlock];
        for (int64_t r = 0; r < count; ++r) std::memset(o + r * o_stride, 0, v_lanes * 4);
        int64_t furthest = 0;
        for (int64_t r = 0; r < count; r += Simd::kRows) furthest = max(furthest, reach[r / Simd::kRows]);
        for (int64_t block = 0; block * kBlock < furthest; ++block) {
            const uint32_t* keys = block_at(block);
            const uint32_t* values = keys + key_words;
            for (int64_t r = 0; r < count; r += Simd::kRows) {
                const int64_t n = min(kBlock, reach[r / Simd::kRows] - block * kBlock), m = min(Simd::kRows, count - r);
                if (n <= 0) continue;
                for (int64_t key = 0; key < n; key += kPanel)
                    choose_tile<Words, false>(m, ceil_div(min(n - key, kPanel), kLanes))(
                        q + r * k_stride, k_stride, keys + key * k_words, kPanel, k_words, scores + key, kBlock);
                for (int64_t i = 0; i < m; ++i) {
                    const float* row_bias = bias + (r + i) * blocks * kBlock + block * kBlock;
                    const uint64_t bits = allowed[(r + i) * blocks + block];
                    for (int64_t key = 0; key < n; key += kLanes) {
                        const Float s = Simd::add(Simd::load(scores + i * kBlock + key), Simd::load(row_bias + key));
                        Words::store(weights + (i * kBlock + key) / kPack, Simd::keep(silu<Words::kFast>(s), bits >> key));
                    }
                }
                for (int64_t d = 0; d < v_lanes; d += kPanel)
                    choose_tile<Words, true>(m, ceil_div(min(v_lanes - d, kPanel), kLanes))(
                        weights, kBlock / kPack, values + d, v_lanes, ceil_div(n, kPack), o + r * o_stride + d, o_stride);
            }
        }
    }

    void activate_queries(int64_t b, int64_t head, int64_t first, int64_t count, uint32_t* q) const {
        for (int64_t r = 0; r < count; ++r) activate<true>(row<T>(call.q, b, first + r) + head * dqk, dqk, q + r * k_stride);
    }

    int64_t own_bucket(int64_t b, int64_t i) const {
        const int64_t at = b * call.own_bucket_batch_stride + i * call.own_bucket_row_stride;
        int64_t bucket = 0;
        if (!call.own_buckets) return bucket;
        if (call.bucket_type == hstu::kUint8) bucket = static_cast<const uint8_t*>(call.own_buckets)[at];
        if (call.bucket_type == hstu::kInt32) bucket = static_cast<const int32_t*>(call.own_buckets)[at];
        if (call.bucket_type == hstu::kInt64) bucket = static_cast<const int64_t*>(call.own_buckets)[at];
        return max(0, min(bucket, 128));
    }

    // A candidate sees itself: o += SiLU(q k + bias) v, all heads.
    void add_own(int64_t b, int64_t i, float* o) const {
        float bias = call.position_bias[call.max_length - 1];
        if (call.bucket_type) bias += call.time_bias[own_bucket(b, i)];
        for (int64_t head = 0; head < heads; ++head) {
            const T *q = row<T>(call.q, b, i) + head * dqk, *k = row<T>(call.k, b, i) + head * dqk;
            const T* v = row<T>(call.v, b, i) + head * dv;
            Float sum = Simd::zero();
            for (int64_t d = 0; d < dqk; d += kLanes) {
                const int64_t n = min(kLanes, dqk - d);
                sum = Simd::fma(silu<false>(Simd::load(q + d, n)), silu<false>(Simd::load(k + d, n)), sum);
            }
            const Float weight = silu<false>(Simd::set(Simd::sum(sum) + bias));
            float* out = o + head * v_lanes;
            for (int64_t d = 0; d < dv; d += kLanes)
                Simd::store(out + d, Simd::fma(weight, silu<false>(Simd::load(v + d, min(kLanes, dv - d))), Simd::load(out + d)));
        }
    }

    // out = SiLU(u) (o - mean) / sqrt(variance + epsilon N²): LN(o / N) without the division.
    void finish(int64_t b, int64_t first, int64_t count, float* o) const {
        const float width = static_cast<float>(heads * dv), n = static_cast<float>(call.max_length);
        for (int64_t r = 0; r < count; ++r) {
            float* values = o + r * o_stride;
            if (call.mode == hstu::kCandidates) add_own(b, first + r, values);
            const T* u = row<T>(call.u, b, first + r);
            T* out = static_cast<T*>(call.out) + b * call.out_batch_stride + (first + r) * call.out_row_stride;
            Float total = Simd::zero(), squares = Simd::zero();
            for (int64_t i = 0; i < o_stride; i += kLanes) total = Simd::add(total, Simd::load(values + i));
            const Float mean = Simd::set(Simd::sum(total) / width);
            for (int64_t head = 0; head < heads; ++head)
                for (int64_t d = 0; d < dv; d += kLanes) {
                    const int64_t lanes = min(kLanes, dv - d);
                    float* at = values + head * v_lanes + d;
                    const Float x = Simd::sub(Simd::load(at), mean);
                    Simd::store(at, x);
                    const Float inside = lanes == kLanes ? x : Simd::keep(x, (1ull << lanes) - 1);
                    squares = Simd::fma(inside, inside, squares);
                }
            const float variance = Simd::sum(squares) / width + call.epsilon * n * n;
            const Float scale = Simd::set(1.0f / __builtin_sqrtf(variance));
            for (int64_t head = 0; head < heads; ++head)
                for (int64_t d = 0; d < dv; d += kLanes) {
                    const int64_t lanes = min(kLanes, dv - d), at = head * dv + d;
                    const Float x = Simd::mul(Simd::load(values + head * v_lanes + d), scale);
                    if (lanes == kLanes) {
                        Simd::store(out + at, Simd::mul(x, silu<Words::kFast>(Simd::load(u + at))));
                    } else {
                        Simd::store(out + at, Simd::mul(x, silu<Words::kFast>(Simd::load(u + at, lanes))), lanes);
                    }
                }
        }
    }

    void clear(int64_t b) const {
        for (int64_t i = rows_of(b); i < call.queries; ++i)
            std::memset(static_cast<T*>(call.out) + b * call.out_batch_stride + i * call.out_row_stride, 0, heads * dv * sizeof(T));
    }

    // --- Many query rows: pack every block once into shared memory, then walk strip by strip. -------------------

    struct Work {  // a block to pack, or a strip of rows to answer
        int64_t user, index;
    };

    int64_t pack_scratch() const { return kBlock * (k_stride + v_lanes) * 4; }
    int64_t strip_scratch(int64_t blocks) const {
        return kStrip * (k_stride * 4 + o_stride * 4 + blocks * (kBlock * 4 + 8) + 8) + 256;
    }

    template <class F>
    void parallel(int64_t count, F body) const {
        runtime.parallel(count, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &body);
    }

    void run_group(int64_t begin, int64_t end) const {
        int64_t num_blocks = 0, num_strips = 0;
        for (int64_t b = begin; b < end; ++b) {
            num_blocks += ceil_div(keys_of(b), kBlock);
            num_strips += ceil_div(rows_of(b), kStrip);
        }
        const int64_t words = num_blocks * heads * block_words;
        const int64_t bytes = round_up(words * 4, 64) + (num_blocks + num_strips) * sizeof(Work) + (end - begin) * 8;
        char* memory = static_cast<char*>(runtime.acquire(bytes));
        uint32_t* packed = reinterpret_cast<uint32_t*>(memory);
        Work* to_pack = reinterpret_cast<Work*>(memory + round_up(words * 4, 64));
        Work* to_answer = to_pack + num_blocks;
        int64_t* first_block = reinterpret_cast<int64_t*>(to_answer + num_strips);
        num_blocks = num_strips = 0;
        for (int64_t b = begin; b < end; ++b) {
            first_block[b - begin] = num_blocks;
            for (int64_t i = 0; i < ceil_div(keys_of(b), kBlock); ++i) to_pack[num_blocks++] = {b, i};
            for (int64_t i = ceil_div(rows_of(b), kStrip) - 1; i >= 0; --i) to_answer[num_strips++] = {b, i};  // longest first
        }
        parallel(num_blocks, [=, this](int64_t item) {
            const auto [b, block] = to_pack[item];
            uint32_t* scratch = static_cast<uint32_t*>(runtime.local(pack_scratch()));
            for (int64_t head = 0; head < heads; ++head)
                pack_block(b, head, block, packed + (item * heads + head) * block_words, scratch);
        });
        parallel(num_strips, [=, this](int64_t item) {
            const auto [b, strip] = to_answer[item];
            const int64_t first = strip * kStrip, count = min(kStrip, rows_of(b) - first);
            int64_t seen = 0;
            for (int64_t r = 0; r < count; ++r) seen = max(seen, visible(b, first + r));
            const int64_t blocks = ceil_div(min(seen, keys_of(b)), kBlock);
            float* o = static_cast<float*>(runtime.local(strip_scratch(blocks)));
            uint32_t* q = reinterpret_cast<uint32_t*>(o + kStrip * o_stride);
            float* bias = reinterpret_cast<float*>(q + kStrip * k_stride);
            uint64_t* allowed = reinterpret_cast<uint64_t*>(bias + kStrip * blocks * kBlock);
            int64_t* reach = reinterpret_cast<int64_t*>(allowed + kStrip * blocks);
            prepare(b, first, count, blocks, bias, allowed, reach);
            for (int64_t head = 0; head < heads; ++head) {
                activate_queries(b, head, first, count, q);
                const uint32_t* user = packed + (first_block[b - begin] * heads + head) * block_words;
                walk(q, count, blocks, bias, allowed, reach, o + head * v_lanes,
                     [=, this](int64_t block) { return user + block * heads * block_words; });
            }
            finish(b, first, count, o);
        });
        runtime.release(memory);
    }

    // --- Few query rows: no block is used twice, so each head packs and uses it at once. ------------------------

    void run_few(int64_t begin, int64_t end) const {
        const int64_t users = end - begin;
        int64_t blocks = 0;
        for (int64_t b = begin; b < end; ++b) blocks = max(blocks, ceil_div(keys_of(b), kBlock));
        const int64_t rows = call.queries, o_floats = rows * o_stride, bias_floats = round_up(rows * blocks * kBlock, 16);
        const int64_t per_user = round_up((o_floats + bias_floats) * 4 + rows * (blocks + 1) * 8, 64);
        char* memory = static_cast<char*>(runtime.acquire(users * per_user));
        const auto o_of = [=](int64_t b) { return reinterpret_cast<float*>(memory + (b - begin) * per_user); };
        const auto bias_of = [=](int64_t b) { return o_of(b) + o_floats; };
        const auto allowed_of = [=](int64_t b) { return reinterpret_cast<uint64_t*>(bias_of(b) + bias_floats); };
        const auto reach_of = [=](int64_t b) { return reinterpret_cast<int64_t*>(allowed_of(b) + rows * blocks); };
        parallel(users, [=, this](int64_t item) {
            const int64_t b = begin + item;
            prepare(b, 0, rows_of(b), ceil_div(keys_of(b), kBlock), bias_of(b), allowed_of(b), reach_of(b));
        });
        parallel(users * heads, [=, this](int64_t item) {
            const int64_t b = begin + item / heads, head = item % heads, count = rows_of(b);
            char* scratch = static_cast<char*>(runtime.local(pack_scratch() + (block_words + rows * k_stride) * 4));
            uint32_t* block_memory = reinterpret_cast<uint32_t*>(scratch);
            uint32_t* q = block_memory + block_words;
            uint32_t* pack_memory = q + rows * k_stride;
            activate_queries(b, head, 0, count, q);
            walk(q, count, ceil_div(keys_of(b), kBlock), bias_of(b), allowed_of(b), reach_of(b), o_of(b) + head * v_lanes,
                 [=, this](int64_t block) {
                     pack_block(b, head, block, block_memory, pack_memory);
                     return block_memory;
                 });
        });
        parallel(users, [=, this](int64_t item) { finish(begin + item, 0, rows_of(begin + item), o_of(begin + item)); });
        runtime.release(memory);
    }

    void run() const {
        const bool few = call.queries <= kStrip;
        for (int64_t b = 0; b < call.batch; ++b) clear(b);
        for (int64_t begin = 0, end = 0; begin < call.batch; begin = end) {
            int64_t bytes = 0;
            while (end < call.batch && (end == begin || bytes < kGroupBytes)) {
                const int64_t blocks = ceil_div(keys_of(end), kBlock);
                bytes += few ? call.queries * (o_stride + blocks * kBlock) * 4 : blocks * heads * block_words * 4;
                ++end;
            }
            few ? run_few(begin, end) : run_group(begin, end);
        }
    }
};

template <class Words>
void run_words(const Call& call, const Runtime& runtime) {
    if (call.io_type == hstu::kBfloat16) {
        Attention<Words, uint16_t>{call, runtime}.run();
    } else {
        Attention<Words, float>{call, runtime}.run();
    }
}

}  // namespace
