// The exported C functions: choose the instruction set, lend threads and memory, check the call.
// Compiled for any x86-64; only here stands a library (TBB), so that no wide instruction leaks out of the kernels.
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "hstu_attention/call.h"
#include "item_head/call.h"
#include "projection/call.h"

namespace {

using hstu::Call;

constexpr int32_t kVersion = 3;

void serial(int64_t count, void (*body)(void*, int64_t), void* context) {
    for (int64_t i = 0; i < count; ++i) body(context, i);
}

// Items are taken in order, so the longest, which come first, do not end up last. Isolated: a thread that waits
// here takes no work of another call, whose scratch it would share.
void threaded(int64_t count, void (*body)(void*, int64_t), void* context) {
    const int64_t workers = std::min<int64_t>(count, tbb::this_task_arena::max_concurrency());
    if (workers <= 1) return serial(count, body, context);
    std::atomic<int64_t> next{0};
    const auto work = [&](int64_t) {
        for (int64_t i = next++; i < count; i = next++) body(context, i);
    };
    tbb::this_task_arena::isolate([&] {
        tbb::parallel_for(int64_t{0}, workers, int64_t{1}, work, tbb::simple_partitioner{});
    });
}

struct Memory {
    void* data = nullptr;
    int64_t bytes = 0;
    void reserve(int64_t wanted) {
        if (wanted <= bytes) return;
        std::free(data);
        bytes = (wanted + 4095) / 4096 * 4096;
        data = std::aligned_alloc(64, static_cast<size_t>(bytes));
        if (data == nullptr) std::abort();  // out of memory: as malloc's callers everywhere in this process
    }
};

struct Local : Memory {
    ~Local() { std::free(data); }
};

void* local(int64_t bytes) {
    thread_local Local memory;
    memory.reserve(bytes);
    return memory.data;
}

// Shared scratch is kept between calls: fresh pages would cost more than some layers.
std::mutex pool_lock;
std::vector<Memory> pool, in_use;

void* acquire(int64_t bytes) {
    const std::lock_guard<std::mutex> guard(pool_lock);
    Memory memory;
    if (!pool.empty()) {
        memory = pool.back();
        pool.pop_back();
    }
    memory.reserve(bytes > 0 ? bytes : 1);
    in_use.push_back(memory);
    return memory.data;
}

void release(void* data) {
    const std::lock_guard<std::mutex> guard(pool_lock);
    for (auto& memory : in_use) {
        if (memory.data != data) continue;
        pool.push_back(memory);
        std::swap(memory, in_use.back());
        in_use.pop_back();
        return;
    }
}

const hstu::Kernels* const kSets[] = {&hstu::kAvx2, &hstu::kAvx512, &hstu::kAvx512Bf16};

// The widest set this CPU and system have: -1 none, 0 AVX2 + FMA, 1 AVX-512 F BW DQ VL, 2 also BF16 and VNNI.
int widest() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return -1;
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!wide) return 0;
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? 2 : 1;
}

std::atomic<int> chosen{widest()};

hstu::Runtime runtime_of(int64_t wants_threads) {
    const int64_t workers = wants_threads ? tbb::this_task_arena::max_concurrency() : 1;
    return {workers, workers > 1 ? threaded : serial, local, acquire, release};
}

const char* check(const Call& c) {
    if (c.batch < 0 || c.queries < 0 || c.prefix_rows < 0) return "a size is negative";
    if (c.heads < 1 || c.qk_dim < 1 || c.v_dim < 1 || c.max_length < 1) return "a dimension is not positive";
    if (c.bucket_type != hstu::kNoBuckets && (!c.buckets || !c.time_bias)) return "buckets without their table";
    const bool causal = c.mode == hstu::kCausal;
    const int64_t* const starts[] = {c.u.starts, c.k.starts, c.prefix_k.starts};
    if (c.q.starts != starts[0] || c.v.starts != starts[1] || c.prefix_v.starts != starts[2] || (causal && starts[1] != starts[0]))
        return "rows of one kind that start at different places";
    for (const int64_t* start : starts)
        if (start && start[0] < 0) return "a user's rows start before the first";
    if (!causal && c.mode != hstu::kCandidates && c.mode != hstu::kQueries) return "no such mode";
    if (!causal && !c.positions) return "query rows without positions";
    if (c.own_lengths && c.mode != hstu::kQueries) return "own lengths of rows that have them already";
    const int64_t lowest = c.mode == hstu::kQueries ? -1 : 0;  // -1: a row that sees nothing
    for (int64_t b = 0; b < c.batch; ++b) {
        const int64_t rows = c.lengths ? c.lengths[b] : c.queries, prefix = c.prefix_lengths ? c.prefix_lengths[b] : 0;
        if (rows < 0 || rows > c.queries) return "a length is outside 0..queries";
        if (prefix < 0 || prefix > c.prefix_rows) return "a prefix length is outside 0..prefix_rows";
        const int64_t own = causal ? rows : c.own_lengths ? c.own_lengths[b] : 0, counts[] = {rows, own, prefix};
        if (own < 0) return "a length is negative";
        for (int i = 0; i < 3; ++i)
            if (starts[i] && starts[i][b + 1] - starts[i][b] < counts[i]) return "a user has more rows than stand before the next user's";
        if (prefix + own > c.max_length) return "a history is longer than max_length";
        for (int64_t i = 0; !causal && i < rows; ++i) {
            const int64_t position = c.positions[b * c.position_batch_stride + i * c.position_row_stride];
            if (position < lowest || position > prefix + own + lowest || position >= c.max_length) return "a position is outside the prefix";
        }
    }
    return nullptr;
}

// THRESHOLDS of hstu/time_buckets.py, between 0 and infinity: set by the caller, so that one table exists.
struct Edges {
    const int64_t* lower;  // [129], lower[b] <= dt < lower[b + 1] is bucket b; lower[0] = 0
    uint8_t of(uint64_t dt, uint8_t guess) const {
        while (guess > 0 && dt < static_cast<uint64_t>(lower[guess])) --guess;
        while (guess < 128 && dt >= static_cast<uint64_t>(lower[guess + 1])) ++guess;
        return guess;
    }
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int32_t hstu_cpu_version() { return kVersion; }
EXPORT int64_t hstu_cpu_call_bytes() { return sizeof(Call) + sizeof(hstu::HeadCall) + sizeof(hstu::ProjectionCall); }

// The instruction set in use, or "" when this CPU has not even AVX2.
EXPORT const char* hstu_cpu_isa() { return chosen < 0 ? "" : kSets[chosen]->name; }

// Use at most the set of this name; 0 when it is not one of them or the CPU lacks it.
EXPORT int32_t hstu_cpu_limit_isa(const char* name) {
    for (int i = 0; i <= widest(); ++i) {
        if (std::strcmp(name, kSets[i]->name) != 0) continue;
        chosen = i;
        return 1;
    }
    return 0;
}

// The answer stands at call->out and null is returned, or a message that says why nothing was done.
EXPORT const char* hstu_attention(const Call* call) {
    if (const char* error = check(*call)) return error;
    kSets[chosen]->attention(*call, runtime_of(call->threaded));
    return nullptr;
}

// Bytes of the packed form of a table, on any instruction set.
EXPORT int64_t hstu_item_head_bytes(int64_t items, int64_t dim) {
    const int64_t padded = (items + 63) / 64 * 64;
    return padded * ((dim + 3) / 4 * 4 + 16);
}

// call->packed holds the table's int8 form, for the instruction set in use.
EXPORT void hstu_item_head_pack(const hstu::HeadCall* call) {
    kSets[chosen]->item_head_pack(*call, runtime_of(call->threaded));
}

// The best items stand at call->scores and call->indices.
EXPORT void hstu_item_head_top(const hstu::HeadCall* call) {
    kSets[chosen]->item_head_top(*call, runtime_of(call->threaded));
}

// Bytes of the packed form of a weight, on any instruction set.
EXPORT int64_t hstu_projection_bytes(int64_t depth, int64_t columns, int64_t compute_type) {
    const int64_t pack = compute_type == hstu::kInt8 ? 4 : compute_type == hstu::kBfloat16 ? 2 : 1;
    const bool wide = compute_type == hstu::kBfloat16 && chosen < 2;  // multiplied as float32
    return (columns + 31) / 32 * 32 * 4 * ((wide ? depth : (depth + pack - 1) / pack) + 3);
}

// call->packed holds the weight, its scales and its bias, for the instruction set in use.
EXPORT void hstu_projection_pack(const hstu::ProjectionCall* call) {
    kSets[chosen]->projection_pack(*call, runtime_of(call->threaded));
}

// The answer stands at call->out and null is returned, or a message that says why nothing was done.
EXPORT const char* hstu_projection(const hstu::ProjectionCall* call) {
    if (call->rows < 0) return "a size is negative";
    if (call->in_type == hstu::kInt8 && (call->compute_type != hstu::kInt8 || !call->in_scales || call->normalize))
        return "int8 rows that are not multiplied as they are";
    if (call->residual && call->out_type != hstu::kFloat32) return "a sum with a residual is float32";
    if (call->out_type == hstu::kInt8) return "products are not int8";
    kSets[chosen]->projection(*call, runtime_of(call->threaded));
    return nullptr;
}

// out[b, i, t] = bucket of |from[b, i] - to[b, t]| for t < seen (causal: t <= i), 0 elsewhere. All contiguous.
EXPORT void hstu_time_buckets(const int64_t* from, const int64_t* to, int64_t batch, int64_t rows, int64_t keys,
                              int32_t causal, const int64_t* lower, uint8_t* out, int32_t parallel) {
    const Edges edges{lower};
    const auto body = [=](int64_t item) {
        const int64_t b = item / rows, i = item % rows, seen = causal ? std::min(i + 1, keys) : keys;
        const uint64_t start = static_cast<uint64_t>(from[item]);
        const int64_t* ends = to + b * keys;
        uint8_t* row = out + item * keys;
        const auto difference = [=](int64_t t) {
            const uint64_t end = static_cast<uint64_t>(ends[t]);
            return from[item] >= ends[t] ? start - end : end - start;
        };
        uint8_t bucket = 0;
        for (int64_t t = 0; t < seen;) {  // neighbours mostly share a bucket
            bucket = edges.of(difference(t), bucket);
            const uint64_t least = static_cast<uint64_t>(lower[bucket]);
            const uint64_t size = bucket < 128 ? static_cast<uint64_t>(lower[bucket + 1]) - least : ~least;
            do row[t++] = bucket;
            while (t < seen && difference(t) - least < size);
        }
        std::memset(row + seen, 0, static_cast<size_t>(keys - seen));
    };
    (parallel ? threaded : serial)(batch * rows, [](void* f, int64_t i) { (*static_cast<const decltype(body)*>(f))(i); },
                                   const_cast<void*>(static_cast<const void*>(&body)));
}
