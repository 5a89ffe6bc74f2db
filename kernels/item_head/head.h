// The K best items of each user, exactly, from int8 approximations of all scores and float32 scores of few.
//
// An item n = row * factor is a q + e with int8 q, and a user u is b p + f. Then
//     |u . n - a b p . q|  =  |u . e + f . a q|  <=  |u| |e| + |f| |a q|  =  the item's margin for this user,
// so an item whose approximate score plus margin is below the K-th best of (score minus margin), or below the
// K-th best exact score already found, is not among the K best. All others are scored again in float32.
// The table is then read at a quarter of its size, and the answer is that of reading it whole.
#pragma once
#include "call.h"

namespace {

using hstu::HeadCall;

constexpr int64_t kHeadChunk = 8;   // panels that one thread scores at a time
constexpr float kSlack = 1e-6f;     // rounding of the float32 sums, for vectors of length 1

// Where things stand in the packed table; items are padded to whole panels.
struct Packed {
    int64_t words, items;
    uint32_t* values;  // [panel][word][item in panel], four int8 a word
    float *scale, *error, *length;
    int32_t* sum;      // of an item's int8 values
    explicit Packed(const HeadCall& call) : words(ceil_div(call.dim, 4)), items(round_up(call.items, kPanel)) {
        values = static_cast<uint32_t*>(call.packed);
        scale = reinterpret_cast<float*>(values + items * words);
        error = scale + items;
        length = error + items;
        sum = reinterpret_cast<int32_t*>(length + items);
    }
};

inline float norm(const float* x, int64_t n) {
    Float squares = Simd::zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        const Float part = Simd::load(x + i, n - i);
        squares = Simd::fma(part, part, squares);
    }
    return __builtin_sqrtf(Simd::sum(squares));
}

// What int8 loses of x: the norm of x - scale * q, a little more to be safe.
inline float lost(const float* x, const int8_t* q, float scale, int64_t n) {
    float squares = 0;
    for (int64_t i = 0; i < n; ++i) {
        const float difference = x[i] - scale * static_cast<float>(q[i]);
        squares += difference * difference;
    }
    return __builtin_sqrtf(squares) * 1.001f + 1e-7f;
}

template <class U>
void item_of(const HeadCall& call, int64_t item, float* out) {
    const U* row = static_cast<const U*>(call.table) + item * call.row_stride;
    const Float factor = Simd::set(call.factors[item]);
    for (int64_t i = 0; i < call.dim; i += kLanes)
        Simd::store(out + i, Simd::mul(Simd::load(row + i, call.dim - i), factor), call.dim - i);
}

void pack_items(const HeadCall& call, const hstu::Runtime& runtime) {
    const Packed packed(call);
    parallel(runtime, packed.items / kPanel, [&](int64_t panel) {
        const int64_t padded = packed.words * 4;
        float* row = static_cast<float*>(runtime.local(padded * 5));
        int8_t* q = reinterpret_cast<int8_t*>(row + padded);
        for (int64_t i = 0; i < kPanel; ++i) {
            const int64_t item = panel * kPanel + i;
            std::memset(q, 0, padded);
            packed.scale[item] = packed.error[item] = packed.length[item] = 0;
            packed.sum[item] = 0;
            if (item < call.items) {
                by_type(call.table_type, [&](auto type) { item_of<typename decltype(type)::type>(call, item, row); });
                packed.scale[item] = quantize_row(row, call.dim, q);
                packed.error[item] = lost(row, q, packed.scale[item], call.dim);
                packed.length[item] = norm(row, call.dim) + packed.error[item];
                for (int64_t d = 0; d < call.dim; ++d) packed.sum[item] += q[d];
            }
            for (int64_t w = 0; w < packed.words; ++w)
                std::memcpy(packed.values + (panel * packed.words + w) * kPanel + i, q + 4 * w, 4);
        }
    });
}

struct Best {  // an item and its score; the heap's top is the worst of the best
    float score;
    int32_t index;
    bool before(const Best& other) const {  // whether this one ranks higher
        return score > other.score || (score == other.score && index < other.index);
    }
};

inline void sift_down(Best* heap, int64_t size, int64_t at) {
    for (int64_t child = 2 * at + 1; child < size; child = 2 * at + 1) {
        if (child + 1 < size && heap[child].before(heap[child + 1])) ++child;
        if (!heap[at].before(heap[child])) return;
        const Best swapped = heap[at];
        heap[at] = heap[child];
        heap[child] = swapped;
        at = child;
    }
}

// A heap of the `limit` best so far.
inline void keep_best(Best* heap, int64_t& size, int64_t limit, Best candidate) {
    if (size < limit) {
        heap[size++] = candidate;
        if (size == limit)
            for (int64_t i = limit / 2 - 1; i >= 0; --i) sift_down(heap, limit, i);
    } else if (candidate.before(heap[0])) {
        heap[0] = candidate;
        sift_down(heap, limit, 0);
    }
}

template <class U>
float exact_score(const HeadCall& call, const float* user, int64_t item) {
    const U* row = static_cast<const U*>(call.table) + item * call.row_stride;
    Float sum[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
    int64_t i = 0;
    for (; i + 4 * kLanes <= call.dim; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
            sum[j] = Simd::fma(Simd::load(row + i + j * kLanes), Simd::load(user + i + j * kLanes), sum[j]);
    for (; i < call.dim; i += kLanes)
        sum[0] = Simd::fma(Simd::load(row + i, call.dim - i), Simd::load(user + i, call.dim - i), sum[0]);
    return Simd::sum(Simd::add(Simd::add(sum[0], sum[1]), Simd::add(sum[2], sum[3]))) * call.factors[item];
}

struct UserWords {
    float scale, error, length;
};

// The best of one user, whose approximate scores stand at `score`.
void choose_items(const HeadCall& call, const Packed& packed, const UserWords& user, const float* embedding, float* score,
                  float* score_out, int32_t* index_out, Best* heap) {
    const float error = user.error + kSlack * user.length;
    const auto margin = [&](int64_t item) {
        return Simd::fma(Simd::set(user.length), Simd::load(packed.error + item),
                         Simd::mul(Simd::set(error), Simd::load(packed.length + item)));
    };
    const auto each_at_least = [&](float limit, bool upper, auto use) {
        Float least = Simd::set(limit);
        for (int64_t item = 0; item < call.items; item += kLanes) {
            const Float s = Simd::load(score + item), m = margin(item);
            uint64_t lanes = Simd::at_least(upper ? Simd::add(s, m) : Simd::sub(s, m), least);
            if (call.items - item < kLanes) lanes &= (1ull << (call.items - item)) - 1;
            for (; lanes; lanes &= lanes - 1) least = Simd::set(use(static_cast<int32_t>(item + __builtin_ctzll(lanes))));
        }
    };
    const auto scalar_margin = [&](int64_t item) {
        return user.length * packed.error[item] + error * packed.length[item];
    };
    if (!(user.length < __builtin_inff())) {  // NaN or infinity: the answer says so
        for (int64_t i = 0; i < call.results; ++i) {
            score_out[i] = __builtin_nanf("");
            index_out[i] = static_cast<int32_t>(i);
        }
        return;
    }
    // The K items that have the best scores for certain.
    int64_t size = 0;
    each_at_least(-__builtin_inff(), false, [&](int32_t item) {
        keep_best(heap, size, call.results, {score[item] - scalar_margin(item), item});
        return size < call.results ? -__builtin_inff() : heap[0].score;
    });
    Best* exact = heap + call.results;
    const auto rescore = [&](int32_t item) {
        float found = 0;
        by_type(call.table_type, [&](auto type) { found = exact_score<typename decltype(type)::type>(call, embedding, item); });
        return Best{found, item};
    };
    int64_t num_exact = 0;
    for (int64_t i = 0; i < size; ++i) {
        keep_best(exact, num_exact, call.results, rescore(heap[i].index));
        score[heap[i].index] = -__builtin_inff();  // done
    }
    each_at_least(exact[0].score, true, [&](int32_t item) {
        if (score[item] > -__builtin_inff()) keep_best(exact, num_exact, call.results, rescore(item));
        return exact[0].score;
    });
    for (int64_t end = num_exact; end > 1; --end) {  // the heap's worst goes last
        const Best worst = exact[0];
        exact[0] = exact[end - 1];
        exact[end - 1] = worst;
        sift_down(exact, end - 1, 0);
    }
    for (int64_t i = 0; i < num_exact; ++i) {
        score_out[i] = exact[i].score;
        index_out[i] = exact[i].index;
    }
}

void top_items(const HeadCall& call, const hstu::Runtime& runtime) {
    const Packed packed(call);
    const int64_t panels = packed.items / kPanel, padded = packed.words * 4;
    const int64_t user_bytes = round_up(padded, 64), score_bytes = packed.items * 4;
    char* memory = static_cast<char*>(runtime.acquire(call.users * (user_bytes + score_bytes + sizeof(UserWords)) + 64));
    uint8_t* words = reinterpret_cast<uint8_t*>(memory);
    float* scores = reinterpret_cast<float*>(memory + call.users * user_bytes);
    UserWords* users = reinterpret_cast<UserWords*>(scores + call.users * packed.items);
    for (int64_t u = 0; u < call.users; ++u) {
        int8_t* q = reinterpret_cast<int8_t*>(words + u * user_bytes);
        const float* embedding = call.embeddings + u * call.dim;
        std::memset(q, 0, user_bytes);
        users[u].scale = quantize_row(embedding, call.dim, q);
        users[u].error = lost(embedding, q, users[u].scale, call.dim);
        users[u].length = norm(embedding, call.dim) * 1.000001f;
        for (int64_t d = 0; d < padded; ++d) q[d] = static_cast<int8_t>(q[d] + Int8Words::kOffset);
    }
    parallel(runtime, ceil_div(panels, kHeadChunk), [&](int64_t chunk) {
        alignas(64) float sums[Simd::kRows * kPanel];
        for (int64_t panel = chunk * kHeadChunk; panel < min(panels, (chunk + 1) * kHeadChunk); ++panel)
            for (int64_t u = 0; u < call.users; u += Simd::kRows) {
                const int64_t m = min(Simd::kRows, call.users - u);
                choose<Int8Words, Set>(m, Simd::kVectors)(
                    reinterpret_cast<const uint32_t*>(words + u * user_bytes), user_bytes / 4,
                    packed.values + panel * packed.words * kPanel, kPanel, packed.words, sums, kPanel);
                for (int64_t i = 0; i < m; ++i)
                    for (int64_t item = panel * kPanel, j = 0; j < kPanel; j += kLanes) {
                        const Float offset = Simd::mul(
                            Simd::to_float(Simd::load(reinterpret_cast<const float*>(packed.sum + item + j))),
                            Simd::set(static_cast<float>(Int8Words::kOffset)));
                        const Float product = Simd::sub(Simd::to_float(Simd::load(sums + i * kPanel + j)), offset);
                        const Float scale = Simd::mul(Simd::load(packed.scale + item + j), Simd::set(users[u + i].scale));
                        Simd::store(scores + (u + i) * packed.items + item + j, Simd::mul(product, scale));
                    }
            }
    });
    parallel(runtime, call.users, [&](int64_t u) {
        Best* heap = static_cast<Best*>(runtime.local(2 * call.results * sizeof(Best)));
        choose_items(call, packed, users[u], call.embeddings + u * call.dim, scores + u * packed.items,
                     call.scores + u * call.results, call.indices + u * call.results, heap);
    });
    runtime.release(memory);
}

}  // namespace
