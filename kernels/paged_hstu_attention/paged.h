// HSTU attention straight on the pages, over any instruction set: from the projection to the gated output.
//
// First every new row's key and value go to their page. Then strips of up to 48 rows of one request walk over its
// events, 64 to a block, whose keys are laid across the lanes on the way. What a row's answer is made of depends on
// its own history alone, block by block from the first event on: not on chunks, pages, company or threads.
#pragma once
#include <vector>

#include "hstu_attention/attention.h"
#include "paged_hstu_attention/call.h"

namespace {

using hstu::PagedCall;

template <class T>
struct Paged {
    const PagedCall& call;
    const int64_t heads = call.heads, dqk = call.qk_dim, dv = call.v_dim, hv = heads * dv, hqk = heads * dqk;
    const int64_t width = dqk + dv;
    const int64_t k_stride = round_up(dqk, kLanes), v_lanes = round_up(dv, kLanes);
    const int64_t q_stride = heads * k_stride, o_stride = heads * v_lanes;
    const int64_t key_floats = kBlock * dqk, block_floats = key_floats + kBlock * v_lanes;

    const T* columns(int64_t row, int64_t column) const {
        return static_cast<const T*>(call.uvqk) + row * call.row_stride + column;
    }
    T* in_page(int64_t page, int64_t head, int64_t row) const {
        return static_cast<T*>(call.pages) + ((page * heads + head) * call.block + row) * width;
    }
    int64_t page_of(int64_t request, int64_t event) const {
        return call.table[request * call.table_stride + event / call.block];
    }

    // The suffix row that a beam's ancestor at `generation` left.
    T* in_suffix(int64_t row, int64_t generation, int64_t head) const {
        return static_cast<T*>(call.suffix) + (call.ancestors[row * call.num_suffix + generation] * heads + head) * width;
    }
    bool beams() const { return call.num_suffix > 0; }
    int64_t sees(int64_t request, int64_t i) const { return call.context[request] + (beams() ? 0 : i + 1); }

    void store_row(int64_t row) const {
        for (int64_t head = 0; head < heads; ++head) {
            T* out = beams() ? in_suffix(row, call.num_suffix - 1, head)
                             : in_page(call.slots[row] / call.block, head, call.slots[row] % call.block);
            activate(columns(row, 2 * hv + hqk + head * dqk), dqk, out);
            activate(columns(row, hv + head * dv), dv, out + dqk);
        }
    }

    static void activate(const T* in, int64_t n, T* out) {
        for (int64_t i = 0; i < n; i += kLanes)
            Simd::store(out + i, silu<false>(Simd::load(in + i, min(kLanes, n - i))), min(kLanes, n - i));
    }

    // Keys of one block of a head across the lanes, [panel][dimension][key], then its values [key][v_lanes]. Pages are
    // anywhere in memory, which no prefetcher follows: those of the block after this one are fetched meanwhile.
    void pack(int64_t request, int64_t head, int64_t block, int64_t seen, float* out, float* rows) const {
        const int64_t begin = block * kBlock, count = min(kBlock, seen - begin);
        const int64_t next_head = begin + kBlock < seen ? head : head + 1, next = begin + kBlock < seen ? begin + kBlock : 0;
        for (int64_t key = 0; key < count; key += kLanes) {
            const int64_t real = min(kLanes, count - key), event = begin + key;
            const T* in = in_page(page_of(request, event), head, event % call.block);
            if (next_head < heads && next + key < seen) {
                const T* ahead = in_page(page_of(request, next + key), next_head, (next + key) % call.block);
                const int64_t bytes = min(kLanes, seen - next - key) * width * static_cast<int64_t>(sizeof(T));
                for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char*>(ahead) + at);
            }
            for (int64_t i = 0; i < real; ++i) {
                copy(in + i * width, dqk, rows + i * k_stride);
                copy(in + i * width + dqk, dv, out + key_floats + (key + i) * v_lanes);
            }
            for (int64_t i = real; i < kLanes; ++i) std::memset(rows + i * k_stride, 0, k_stride * 4);
            for (int64_t d = 0; d < dqk; d += kLanes)
                Simd::transpose(reinterpret_cast<const uint32_t*>(rows + d), k_stride,
                                reinterpret_cast<uint32_t*>(out + key / kPanel * kPanel * dqk + d * kPanel + key % kPanel),
                                kPanel, static_cast<int>(min(kLanes, dqk - d)));
        }
    }

    static void copy(const T* in, int64_t n, float* out) {
        for (int64_t i = 0; i < n; i += kLanes) Simd::store(out + i, Simd::load(in + i, min(kLanes, n - i)));
    }

    void add_bias(int64_t request, int64_t i, int64_t seen, float* out) const {
        const int64_t all = beams() ? 0 : call.context[request] + call.num_new[request];
        const int64_t place = beams() ? seen + call.num_suffix - 1 : seen - 1;
        const uint8_t* buckets = call.buckets + call.bucket_start[request] + i * all;
        const float* near = call.position_bias + call.max_length - 1 - place;
        const Simd::TimeTable table = Simd::table(call.time_bias);
        int64_t t = 0;
        for (; t + kLanes <= seen; t += kLanes)
            Simd::store(out + t, Simd::add(Simd::load(near + t), Simd::look_up(table, Simd::buckets(buckets + t))));
        const int64_t n = seen - t;
        if (n > 0)
            Simd::store(out + t, Simd::add(Simd::load(near + t, n), Simd::look_up(table, Simd::buckets(buckets + t, n))), n);
    }

    // Rows first .. first + count - 1 of a request's new rows: attended over all heads, and written.
    void strip(int64_t request, int64_t first, int64_t count) const {
        const int64_t seen = sees(request, first + count - 1);
        const int64_t blocks = ceil_div(seen, kBlock);
        const int64_t floats = count * (o_stride + q_stride + blocks * kBlock) + block_floats + kLanes * k_stride;
        const int64_t words = round_up(count * blocks, 8);
        uint64_t* allowed = static_cast<uint64_t*>(hstu::scratch(words * 8 + floats * 4));
        float* o = reinterpret_cast<float*>(allowed + words);
        float* q = o + count * o_stride;
        float* bias = q + count * q_stride;
        float* packed = bias + count * blocks * kBlock;
        float* rows = packed + block_floats;
        std::memset(o, 0, count * o_stride * 4);
        for (int64_t r = 0; r < count; ++r) {
            const int64_t own = sees(request, first + r);
            float* at = bias + r * blocks * kBlock;
            add_bias(request, first + r, own, at);
            std::memset(at + own, 0, (blocks * kBlock - own) * 4);
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t n = min(own - block * kBlock, kBlock);
                allowed[r * blocks + block] = n <= 0 ? 0 : n == kBlock ? ~0ull : (1ull << n) - 1;
            }
            for (int64_t head = 0; head < heads; ++head) {
                const T* in = columns(call.first[request] + first + r, 2 * hv + head * dqk);
                for (int64_t d = 0; d < dqk; d += kLanes)
                    Simd::store(q + r * q_stride + head * k_stride + d, silu<false>(Simd::load(in + d, min(kLanes, dqk - d))));
            }
        }
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t block = 0; block < blocks; ++block) {
                pack(request, head, block, seen, packed, rows);
                attend(q + head * k_stride, sees(request, first), count, block, blocks, packed, bias, allowed, o + head * v_lanes);
            }
        for (int64_t r = 0; beams() && r < count; ++r) add_suffix(first + r, q + r * q_stride, o + r * o_stride);
        for (int64_t r = 0; r < count; ++r) finish(call.first[request] + first + r, o + r * o_stride);
    }

    // o += Σ SiLU(q k + bias) v over the events of one block, for one head.
    void attend(const float* q, int64_t first_sees, int64_t count, int64_t block, int64_t blocks, const float* keys,
                const float* bias, const uint64_t* allowed, float* o) const {
        alignas(64) uint32_t weights[Simd::kRows * kBlock];
        const uint32_t* words = reinterpret_cast<const uint32_t*>(keys);
        for (int64_t r = 0; r < count; r += Simd::kRows) {
            const int64_t m = min(Simd::kRows, count - r), n = min(kBlock, first_sees + (beams() ? 0 : r + m - 1) - block * kBlock);
            if (n <= 0) continue;
            for (int64_t key = 0; key < n; key += kPanel)
                choose<Float32Words, Weights>(m, ceil_div(min(n - key, kPanel), kLanes))(
                    reinterpret_cast<const uint32_t*>(q + r * q_stride), q_stride, words + key * dqk, dqk,
                    bias + (r * blocks + block) * kBlock + key, blocks * kBlock, allowed + r * blocks + block, blocks, key,
                    weights + key);
            for (int64_t d = 0; d < v_lanes; d += kPanel)
                choose<Float32Words, Add>(m, ceil_div(min(v_lanes - d, kPanel), kLanes))(
                    weights, kBlock, words + key_floats + d, v_lanes, n, o + r * o_stride + d, o_stride);
        }
    }

    // A beam sees its ancestors' suffix and itself: o += Σ SiLU(q k + bias) v, all heads.
    void add_suffix(int64_t row, const float* q, float* o) const {
        for (int64_t generation = 0; generation < call.num_suffix; ++generation) {
            const float bias = call.position_bias[generation - call.num_suffix + call.max_length] + call.time_bias[0];
            for (int64_t head = 0; head < heads; ++head) {
                const T *k = in_suffix(row, generation, head), *v = k + dqk;
                Float sum = Simd::zero();
                for (int64_t d = 0; d < dqk; d += kLanes)
                    sum = Simd::fma(Simd::load(q + head * k_stride + d), Simd::load(k + d, min(kLanes, dqk - d)), sum);
                const Float weight = silu<false>(Simd::set(Simd::sum(sum) + bias));
                float* out = o + head * v_lanes;
                for (int64_t d = 0; d < dv; d += kLanes)
                    Simd::store(out + d, Simd::fma(weight, Simd::load(v + d, min(kLanes, dv - d)), Simd::load(out + d)));
            }
        }
    }

    // One row: u * LN(o / N) over all heads, without the division; or o / N.
    void finish(int64_t row, const float* o) const {
        T* out = static_cast<T*>(call.out) + row * hv;
        Float sum = Simd::zero(), square = Simd::zero();
        const float n = static_cast<float>(call.max_length), size = static_cast<float>(hv);
        Float mean = Simd::zero(), scale = Simd::set(1.0f / n);
        if (call.gated) {
            for (int64_t i = 0; i < o_stride; i += kLanes) sum = Simd::add(sum, Simd::load(o + i));  // lanes past dv are 0
            mean = Simd::set(Simd::sum(sum) / size);
            for (int64_t head = 0; head < heads; ++head)
                for (int64_t d = 0; d < dv; d += kLanes) {
                    Float x = Simd::sub(Simd::load(o + head * v_lanes + d), mean);
                    if (dv - d < kLanes) x = Simd::keep(x, (1ull << (dv - d)) - 1);
                    square = Simd::fma(x, x, square);
                }
            const float variance = Simd::sum(square) / size + static_cast<float>(call.epsilon) * n * n;
            scale = Simd::set(1.0f / __builtin_sqrtf(variance));
        }
        const T* u = columns(row, 0);
        for (int64_t head = 0; head < heads; ++head)
            for (int64_t d = 0; d < dv; d += kLanes) {
                const int64_t lanes = min(kLanes, dv - d), at = head * dv + d;
                Float x = Simd::mul(Simd::sub(Simd::load(o + head * v_lanes + d), mean), scale);
                if (call.gated) x = Simd::mul(x, silu<false>(Simd::load(u + at, lanes)));
                Simd::store(out + at, x, lanes);
            }
    }

    template <class F>
    void each(int64_t count, F body) const {
        hstu::for_each(call, count, [](void* f, int64_t i) { (*static_cast<F*>(f))(i); }, &body);
    }

    void run() const {
        // With a request or more for every thread, a thread does all of one while its rows are in its cache.
        if (!beams() && call.requests >= call.threads) return each(call.requests, [this](int64_t request) {
            for (int64_t i = 0; i < call.num_new[request]; ++i) store_row(call.first[request] + i);
            for (int64_t first = 0; first < call.num_new[request]; first += kStrip)
                strip(request, first, min(kStrip, call.num_new[request] - first));
        });
        constexpr int64_t kRowsAtOnce = 64;
        each(ceil_div(call.rows, kRowsAtOnce), [this](int64_t part) {
            for (int64_t row = part * kRowsAtOnce; row < min(call.rows, (part + 1) * kRowsAtOnce); ++row) store_row(row);
        });
        struct Strip {
            int64_t request, first, count;
        };
        std::vector<Strip> strips;
        for (int64_t request = 0; request < call.requests; ++request)
            for (int64_t first = 0; first < call.num_new[request]; first += kStrip)
                strips.push_back({request, first, min(kStrip, call.num_new[request] - first)});
        const int64_t last = static_cast<int64_t>(strips.size()) - 1;  // it sees the most, and goes first
        each(last + 1, [this, &strips, last](int64_t i) {
            const Strip& at = strips[last - i];
            strip(at.request, at.first, at.count);
        });
    }
};

void paged_attention(const PagedCall& call) {
    call.bfloat16 ? Paged<uint16_t>{call}.run() : Paged<float>{call}.run();
}

}  // namespace
