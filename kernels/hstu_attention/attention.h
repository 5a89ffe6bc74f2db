// Fused HSTU attention over any instruction set: from the projection, before SiLU, to the gated output.
//
// Keys and values are activated and packed once, 64 keys to a block, keys across the lanes. A strip of 48 query
// rows then walks over the blocks it may see: scores (a register tile of products), bias, SiLU, times values. There
// is no softmax, so partial sums simply add. At the end each row is normalised over all heads and gated.
// What a row's answer is made of depends on the row alone: not on the batch, the padding or the threads.
#pragma once
#include "call.h"

namespace {

using hstu::Call;
using hstu::Rows;
using hstu::Runtime;

constexpr int64_t kBlock = 64;            // keys in a block
constexpr int64_t kStrip = 48;            // query rows that share a walk over the blocks, at most
constexpr int64_t kParts = 2;             // of a block, or strips of a strip, where whole ones are too few to share out
constexpr int64_t kGroupBytes = 64 << 20;  // at most so much scratch for the users in flight, or one user

template <class T>
inline const T* row(const Rows& rows, int64_t user, int64_t index) {
    const int64_t first = rows.starts ? rows.starts[user] * rows.row_stride : user * rows.batch_stride;
    return static_cast<const T*>(rows.data) + first + index * rows.row_stride;
}

// Weights of a tile: SiLU(q k + bias) of the keys that are allowed, as words.
template <class Words, int M, int V>
struct Weights {
    static void run(const uint32_t* q, int64_t q_stride, const uint32_t* keys, int64_t words, const float* bias,
                    int64_t bias_stride, const uint64_t* allowed, int64_t allowed_stride, int64_t first, uint32_t* out) {
        const auto weight = [=](int m, int v, Float sum) {
            return silu<Words::kFast>(Simd::add(sum, Simd::load(bias + m * bias_stride + v * kLanes)));
        };
        const auto at = [=](int m, int v) { return out + (m * kBlock + v * kLanes) / Words::kPack; };
        bool all = true;
        for (int m = 0; m < M; ++m) all &= allowed[m * allowed_stride] == ~0ull;
        if (all) {
            products<Words, M, V>(q, q_stride, keys, kPanel, words,
                                  [=](int m, int v, Float sum) { Words::store(at(m, v), weight(m, v, sum)); });
        } else {
            products<Words, M, V>(q, q_stride, keys, kPanel, words, [=](int m, int v, Float sum) {
                const uint64_t bits = allowed[m * allowed_stride] >> (first + v * kLanes);
                Words::store(at(m, v), Simd::keep(weight(m, v, sum), bits));
            });
        }
    }
};

template <class Words, class T>
struct Attention {
    static constexpr int64_t kPack = Words::kPack;
    const Call& call;
    const Runtime& runtime;
    const int64_t heads = call.heads, dqk = call.qk_dim, dv = call.v_dim;
    const int64_t k_words = ceil_div(dqk, kPack);                 // words of one query or key
    const int64_t k_stride = round_up(k_words, kLanes);           // where the next head's words stand, before packing
    const int64_t v_lanes = round_up(dv, kLanes);                 // columns of one value
    const int64_t key_words = kBlock * k_words;                   // a packed block of keys: [panel][word][key]
    const int64_t value_words = kBlock / kPack * v_lanes;         // a packed block of values: [key or pair][column]
    const int64_t block_words = key_words + value_words;
    const int64_t q_stride = heads * k_stride;                    // words of one row of queries or keys
    const int64_t o_stride = heads * v_lanes;                     // floats of one row of attention output

    int64_t prefix(int64_t b) const { return call.prefix_lengths ? call.prefix_lengths[b] : 0; }
    int64_t rows_of(int64_t b) const { return call.lengths ? call.lengths[b] : call.queries; }
    int64_t keys_of(int64_t b) const { return prefix(b) + own(b); }
    int64_t own(int64_t b) const {  // keys after the prefix
        return call.mode == hstu::kCausal ? rows_of(b) : call.own_lengths ? call.own_lengths[b] : 0;
    }
    int64_t first_out(int64_t b) const { return call.u.starts ? call.u.starts[b] : b * call.queries; }
    int64_t position(int64_t b, int64_t i) const {
        if (call.mode == hstu::kCausal) return prefix(b) + i;
        return call.positions[b * call.position_batch_stride + i * call.position_row_stride];
    }
    int64_t visible(int64_t b, int64_t i) const { return position(b, i) + (call.mode == hstu::kCandidates ? 0 : 1); }

    // SiLU (or a copy) of n values as words; what is left of the last vector is zero. What lies `ahead` elements
    // further, the row after next, is fetched meanwhile: rows are far apart, and no prefetcher follows that far.
    template <bool kSilu, class U>
    static void words_of(const U* in, int64_t n, int64_t ahead, uint32_t* out) {
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            __builtin_prefetch(in + i + ahead);
            Words::store(out + i / kPack, activated<kSilu>(Simd::load(in + i)));
        }
        if (i < n) Words::store(out + i / kPack, activated<kSilu>(Simd::load(in + i, n - i)));
    }

    template <bool kSilu, class U>
    static void floats_of(const U* in, int64_t n, int64_t ahead, float* out) {
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            __builtin_prefetch(in + i + ahead);
            Simd::store(out + i, activated<kSilu>(Simd::load(in + i)));
        }
        if (i < n) Simd::store(out + i, activated<kSilu>(Simd::load(in + i, n - i)));
    }

    template <bool kSilu>
    static Float activated(Float x) {
        return kSilu ? silu<Words::kFast>(x) : x;
    }

    // All heads of one row of queries or keys as words [head][k_stride].
    template <bool kSilu, class U>
    void heads_as_words(const Rows& rows, int64_t b, int64_t i, uint32_t* out) const {
        const U* in = row<U>(rows, b, i);
        const int64_t ahead = 2 * rows.row_stride;
        if (k_stride * kPack == dqk) return words_of<kSilu>(in, heads * dqk, ahead, out);
        for (int64_t head = 0; head < heads; ++head) words_of<kSilu>(in + head * dqk, dqk, ahead, out + head * k_stride);
    }

    // All heads of one row of values as floats, head h at out + h * stride.
    template <bool kSilu, class U>
    void heads_as_floats(const Rows& rows, int64_t b, int64_t i, float* out, int64_t stride) const {
        const U* in = row<U>(rows, b, i);
        const int64_t ahead = 2 * rows.row_stride;
        for (int64_t head = 0; head < heads; ++head) floats_of<kSilu>(in + head * dv, dv, ahead, out + head * stride);
    }

    void key_row(int64_t b, int64_t t, uint32_t* k, float* v, int64_t v_stride) const {
        if (t >= prefix(b)) {
            heads_as_words<true, T>(call.k, b, t - prefix(b), k);
            heads_as_floats<true, T>(call.v, b, t - prefix(b), v, v_stride);
            return;
        }
        by_type(call.prefix_type, [&](auto type) {
            using U = typename decltype(type)::type;
            if (call.prefix_activated) {
                heads_as_words<false, U>(call.prefix_k, b, t, k);
                heads_as_floats<false, U>(call.prefix_v, b, t, v, v_stride);
            } else {
                heads_as_words<true, U>(call.prefix_k, b, t, k);
                heads_as_floats<true, U>(call.prefix_v, b, t, v, v_stride);
            }
        });
    }

    // Keys [from, to) of block `block` of user b at `out`, head after head, each keys, then values; absent ones are zero.
    // Rows are read whole, one after the other: a head's part of a row is far from its part of the next.
    void pack_block(int64_t b, int64_t block, uint32_t* out, uint32_t* scratch, int64_t from = 0, int64_t to = kBlock) const {
        const int64_t begin = block * kBlock, count = min(kBlock, keys_of(b) - begin);
        uint32_t* rows = scratch;  // [key][head][k_stride]
        float* pair = reinterpret_cast<float*>(scratch + kBlock * q_stride);  // [2][head][v_lanes]
        for (int64_t i = from; i < to; ++i) {
            uint32_t* k = rows + i * q_stride;
            uint32_t* packed = out + key_words + i / kPack * v_lanes;
            float* v = kPack == 1 ? reinterpret_cast<float*>(packed) : pair + i % 2 * o_stride;
            const int64_t v_stride = kPack == 1 ? block_words : v_lanes;
            if (i < count) {
                key_row(b, begin + i, k, v, v_stride);
            } else {
                std::memset(k, 0, q_stride * 4);
                for (int64_t head = 0; head < heads; ++head) std::memset(v + head * v_stride, 0, v_lanes * 4);
            }
            if (kPack == 1 || i % 2 == 0) continue;
            for (int64_t head = 0; head < heads; ++head)
                for (int64_t d = 0; d < v_lanes; d += kLanes)
                    Words::store_pairs(packed + head * block_words + d, Simd::load(pair + head * v_lanes + d),
                                       Simd::load(pair + o_stride + head * v_lanes + d));
        }
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t key = from; key < to; key += kLanes)
                for (int64_t w = 0; w < k_words; w += kLanes)
                    Simd::transpose(rows + key * q_stride + head * k_stride + w, q_stride,
                                    out + head * block_words + key / kPanel * kPanel * k_words + w * kPanel + key % kPanel,
                                    kPanel, static_cast<int>(min(kLanes, k_words - w)));
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
            int64_t t = from;
            for (; t + kLanes <= to; t += kLanes)
                Simd::store(out + t, Simd::add(Simd::load(near + t), Simd::look_up(table, Simd::buckets(at + t))));
            const int64_t n = to - t;
            if (n > 0)
                Simd::store(out + t, Simd::add(Simd::load(near + t, n), Simd::look_up(table, Simd::buckets(at + t, n))), n);
        };
        const int64_t split = call.own_bucket_column < 0 ? seen : min(seen, prefix(b));
        add(0, split, buckets);
        add(split, seen, buckets + call.own_bucket_column - split);
    }

    // o[count x v_lanes] += Σ SiLU(q k + bias) v over the keys of one block, for one head.
    void attend(const uint32_t* q, int64_t count, int64_t block, int64_t blocks, const uint32_t* keys, const float* bias,
                const uint64_t* allowed, const int64_t* reach, float* o) const {
        alignas(64) uint32_t weights[Simd::kRows * kBlock];
        const uint32_t* values = keys + key_words;
        for (int64_t r = 0; r < count; r += Simd::kRows) {
            const int64_t n = min(kBlock, reach[r / Simd::kRows] - block * kBlock), m = min(Simd::kRows, count - r);
            if (n <= 0) continue;
            for (int64_t key = 0; key < n; key += kPanel)
                choose<Words, Weights>(m, ceil_div(min(n - key, kPanel), kLanes))(
                    q + r * q_stride, q_stride, keys + key * k_words, k_words, bias + (r * blocks + block) * kBlock + key,
                    blocks * kBlock, allowed + r * blocks + block, blocks, key, weights + key / kPack);
            for (int64_t d = 0; d < v_lanes; d += kPanel)
                choose<Words, Add>(m, ceil_div(min(v_lanes - d, kPanel), kLanes))(
                    weights, kBlock / kPack, values + d, v_lanes, ceil_div(n, kPack), o + r * o_stride + d, o_stride);
        }
    }

    static int64_t furthest(const int64_t* reach, int64_t count) {
        int64_t end = 0;
        for (int64_t r = 0; r < count; r += Simd::kRows) end = max(end, reach[r / Simd::kRows]);
        return end;
    }

    void activate_queries(int64_t b, int64_t first, int64_t count, uint32_t* q) const {
        for (int64_t r = 0; r < count; ++r) heads_as_words<true, T>(call.q, b, first + r, q + r * q_stride);
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
        for (int64_t r = 0; r < count; ++r) {
            float* at = o + r * o_stride;
            const int64_t index = first_out(b) + first + r;
            const T* u = row<T>(call.u, b, first + r);
            if (call.mode == hstu::kCandidates) add_own(b, first + r, at);
            if (call.out_type == hstu::kBfloat16) {
                gate(u, at, static_cast<uint16_t*>(call.out) + index * heads * dv);
            } else if (call.out_type == hstu::kFloat32) {
                gate(u, at, static_cast<float*>(call.out) + index * heads * dv);
            } else {
                gate(u, at, at);  // a vector is read before it is written, never behind where it stands
                call.out_scales[index] = quantize_row(at, heads * dv, static_cast<int8_t*>(call.out) + index * heads * dv);
            }
        }
    }

    template <class U>
    void gate(const T* u, float* o, U* out) const {
        const float width = static_cast<float>(heads * dv), n = static_cast<float>(call.max_length);
        const bool whole = dv % kLanes == 0;  // no lanes between the heads
        const int64_t quarter = whole ? o_stride / (4 * kLanes) * (4 * kLanes) : 0;
        Float total[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
        Float square[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
        for (int64_t i = 0; i < quarter; i += 4 * kLanes)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) total[j] = Simd::add(total[j], Simd::load(o + i + j * kLanes));
        for (int64_t i = quarter; i < o_stride; i += kLanes) total[0] = Simd::add(total[0], Simd::load(o + i));
        const Float sum = Simd::add(Simd::add(total[0], total[1]), Simd::add(total[2], total[3]));
        const Float mean = Simd::set(Simd::sum(sum) / width);
        for (int64_t i = 0; i < quarter; i += 4 * kLanes)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const Float x = Simd::sub(Simd::load(o + i + j * kLanes), mean);
                square[j] = Simd::fma(x, x, square[j]);
            }
        for (int64_t i = quarter; i < o_stride; i += kLanes) {
            const int64_t lanes = dv - i % v_lanes;
            Float x = Simd::sub(Simd::load(o + i), mean);
            if (lanes < kLanes) x = Simd::keep(x, (1ull << lanes) - 1);
            square[0] = Simd::fma(x, x, square[0]);
        }
        const Float squares = Simd::add(Simd::add(square[0], square[1]), Simd::add(square[2], square[3]));
        const float variance = Simd::sum(squares) / width + static_cast<float>(call.epsilon) * n * n;
        const Float scale = Simd::set(1.0f / __builtin_sqrtf(variance));
        const auto value = [&](int64_t i, Float gate) {
            return Simd::mul(Simd::mul(Simd::sub(Simd::load(o + i), mean), scale), silu<Words::kFast>(gate));
        };
        if (whole) {
            for (int64_t i = 0; i < o_stride; i += kLanes) {
                __builtin_prefetch(u + i + 2 * call.u.row_stride);
                Simd::store(out + i, value(i, Simd::load(u + i)));
            }
            return;
        }
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t d = 0; d < dv; d += kLanes) {
                const int64_t lanes = min(kLanes, dv - d), at = head * dv + d;
                Simd::store(out + at, value(head * v_lanes + d, Simd::load(u + at, lanes)), lanes);
            }
    }

    void clear(int64_t b) const {
        const int64_t sizes[] = {4, 2, 1}, bytes = heads * dv * sizes[call.out_type];
        const int64_t begin = first_out(b) + rows_of(b), count = first_out(b + 1) - begin;
        std::memset(static_cast<char*>(call.out) + begin * bytes, 0, count * bytes);
        if (call.out_type == hstu::kInt8) std::memset(call.out_scales + begin, 0, count * sizeof(float));
    }

    struct Work {  // a block of keys, or a strip of query rows
        int64_t user, index;
    };

    int64_t pack_scratch() const { return (kBlock * q_stride + 2 * o_stride) * 4; }

    // --- Many query rows: pack every block once into shared memory, then walk strip by strip. -------------------

    void run_many(int64_t begin, int64_t end) const {
        int64_t num_blocks = 0, num_strips = 0;
        for (int64_t b = begin; b < end; ++b) {
            num_blocks += ceil_div(keys_of(b), kBlock);
            num_strips += ceil_div(rows_of(b), kStrip);
        }
        const int64_t parts = runtime.workers > 1 && num_blocks < 4 * runtime.workers ? kParts : 1;
        const int64_t strip = kStrip / parts;
        if (parts > 1) {
            num_strips = 0;
            for (int64_t b = begin; b < end; ++b) num_strips += ceil_div(rows_of(b), strip);
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
            for (int64_t i = ceil_div(rows_of(b), strip) - 1; i >= 0; --i) to_answer[num_strips++] = {b, i};  // longest first
        }
        parallel(runtime, num_blocks * parts, [=, this](int64_t item) {
            uint32_t* scratch = static_cast<uint32_t*>(runtime.local(pack_scratch()));
            const int64_t block = item / parts, from = item % parts * (kBlock / parts);
            pack_block(to_pack[block].user, to_pack[block].index, packed + block * heads * block_words, scratch, from,
                       from + kBlock / parts);
        });
        parallel(runtime, num_strips, [=, this](int64_t item) {
            const auto [b, index] = to_answer[item];
            answer_strip(b, index * strip, strip, packed + first_block[b - begin] * heads * block_words);
        });
        runtime.release(memory);
    }

    void answer_strip(int64_t b, int64_t first, int64_t most, const uint32_t* packed) const {
        const int64_t count = min(most, rows_of(b) - first);
        int64_t seen = 0;
        for (int64_t r = 0; r < count; ++r) seen = max(seen, visible(b, first + r));
        const int64_t blocks = ceil_div(min(seen, keys_of(b)), kBlock);
        const int64_t bytes = kStrip * ((o_stride + q_stride + blocks * kBlock) * 4 + blocks * 8 + 8);
        float* o = static_cast<float*>(runtime.local(bytes));
        uint32_t* q = reinterpret_cast<uint32_t*>(o + kStrip * o_stride);
        float* bias = reinterpret_cast<float*>(q + kStrip * q_stride);
        uint64_t* allowed = reinterpret_cast<uint64_t*>(bias + kStrip * blocks * kBlock);
        int64_t* reach = reinterpret_cast<int64_t*>(allowed + kStrip * blocks);
        prepare(b, first, count, blocks, bias, allowed, reach);
        activate_queries(b, first, count, q);
        std::memset(o, 0, count * o_stride * 4);
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t block = 0; block * kBlock < furthest(reach, count); ++block)
                attend(q + head * k_stride, count, block, blocks, packed + (block * heads + head) * block_words, bias,
                       allowed, reach, o + head * v_lanes);
        finish(b, first, count, o);
    }

    // --- Few query rows: no block is used twice, so each is packed, used and forgotten. -------------------------
    // The blocks' sums are added in order, as they are in a strip.

    void run_few(int64_t begin, int64_t end) const {
        const int64_t users = end - begin, rows = call.queries;
        int64_t num_blocks = 0;
        for (int64_t b = begin; b < end; ++b) num_blocks += ceil_div(keys_of(b), kBlock);
        const int64_t q_words = users * rows * q_stride, sums = num_blocks * rows * o_stride, biases = num_blocks * rows * kBlock;
        const int64_t bytes = (q_words + sums + biases) * 4 + (num_blocks * rows + users * rows + users + 2 * num_blocks) * 8 + 64;
        char* memory = static_cast<char*>(runtime.acquire(bytes));
        uint32_t* queries = reinterpret_cast<uint32_t*>(memory);                 // [user][row][q_stride]
        float* sum = reinterpret_cast<float*>(queries + q_words);                // [block][row][o_stride]
        float* bias = sum + sums;                                                // [user][row][keys]
        uint64_t* allowed = reinterpret_cast<uint64_t*>(memory + round_up((q_words + sums + biases) * 4, 64));
        int64_t* reach = reinterpret_cast<int64_t*>(allowed + num_blocks * rows);
        int64_t* first_block = reach + users * rows;
        Work* work = reinterpret_cast<Work*>(first_block + users);
        num_blocks = 0;
        for (int64_t b = begin; b < end; ++b) {
            first_block[b - begin] = num_blocks;
            for (int64_t i = 0; i < ceil_div(keys_of(b), kBlock); ++i) work[num_blocks++] = {b, i};
        }
        parallel(runtime, users, [=, this](int64_t user) {
            const int64_t b = begin + user, at = first_block[user] * rows;
            activate_queries(b, 0, rows_of(b), queries + user * rows * q_stride);
            prepare(b, 0, rows_of(b), ceil_div(keys_of(b), kBlock), bias + at * kBlock, allowed + at, reach + user * rows);
        });
        parallel(runtime, num_blocks, [=, this](int64_t item) {
            const auto [b, block] = work[item];
            const int64_t user = b - begin, at = first_block[user] * rows, blocks = ceil_div(keys_of(b), kBlock);
            float* o = sum + item * rows * o_stride;
            std::memset(o, 0, rows_of(b) * o_stride * 4);
            if (furthest(reach + user * rows, rows_of(b)) <= block * kBlock) return;
            uint32_t* packed = static_cast<uint32_t*>(runtime.local(heads * block_words * 4 + pack_scratch()));
            pack_block(b, block, packed, packed + heads * block_words);
            for (int64_t head = 0; head < heads; ++head)
                attend(queries + user * rows * q_stride + head * k_stride, rows_of(b), block, blocks, packed + head * block_words,
                       bias + at * kBlock, allowed + at, reach + user * rows, o + head * v_lanes);
        });
        parallel(runtime, users, [=, this](int64_t user) {
            const int64_t b = begin + user, floats = rows_of(b) * o_stride;
            float* o = sum + first_block[user] * rows * o_stride;
            if (keys_of(b) == 0) {
                o = static_cast<float*>(runtime.local(floats * 4));
                std::memset(o, 0, floats * 4);
            }
            for (int64_t block = 1; block < ceil_div(keys_of(b), kBlock); ++block)
                for (int64_t i = 0; i < floats; i += kLanes)
                    Simd::store(o + i, Simd::add(Simd::load(o + i), Simd::load(o + block * rows * o_stride + i)));
            finish(b, 0, rows_of(b), o);
        });
        runtime.release(memory);
    }

    // Users in flight: enough for all workers, few enough for the caches.
    void run() const {
        const bool few = call.queries <= kStrip;
        for (int64_t b = 0; b < call.batch; ++b) clear(b);
        for (int64_t begin = 0, end = 0; begin < call.batch; begin = end) {
            int64_t bytes = 0, items = 0;
            while (end < call.batch && items < 4 * runtime.workers && bytes < kGroupBytes) {
                const int64_t blocks = ceil_div(keys_of(end), kBlock);
                bytes += few ? blocks * call.queries * (o_stride + kBlock) * 4 : blocks * heads * block_words * 4;
                items += few ? blocks : ceil_div(rows_of(end), kStrip);
                ++end;
            }
            few ? run_few(begin, end) : run_many(begin, end);
        }
    }
};

template <class Words>
void run_words(const Call& call, const Runtime& runtime) {
    if (call.in_type == hstu::kBfloat16) {
        Attention<Words, uint16_t>{call, runtime}.run();
    } else {
        Attention<Words, float>{call, runtime}.run();
    }
}

}  // namespace
