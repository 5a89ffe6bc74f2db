// The exported C functions: they choose the instruction set and lend threads and memory. No library is needed here but
// the C++ runtime; threads are those of the OpenMP that the process has, handed over by the caller.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "paged_hstu_attention/call.h"

namespace hstu {

void for_each(const PagedCall& call, int64_t count, void (*body)(void*, int64_t), void* context) {
    const int64_t threads = call.threads < count ? call.threads : count;
    if (threads <= 1 || !call.parallel) {
        for (int64_t i = 0; i < count; ++i) body(context, i);
        return;
    }
    struct Work {
        std::atomic<int64_t> next;
        int64_t count;
        void (*body)(void*, int64_t);
        void* context;
    } work{0, count, body, context};
    call.parallel(
        [](void* shared) {
            Work& work = *static_cast<Work*>(shared);
            for (int64_t i = work.next++; i < work.count; i = work.next++) work.body(work.context, i);
        },
        &work, static_cast<unsigned>(threads), 0);
}

void* scratch(int64_t bytes) {
    struct Memory {
        void* data = nullptr;
        int64_t size = 0;
        ~Memory() { std::free(data); }
    };
    thread_local Memory memory;
    if (memory.size < bytes) {
        std::free(memory.data);
        memory.size = (bytes + 63) / 64 * 64;
        memory.data = std::aligned_alloc(64, static_cast<size_t>(memory.size));
    }
    return memory.data;
}

}  // namespace hstu

namespace {

// The widest set this CPU and system have: -1 none, 0 AVX2 + FMA, 1 AVX-512 F BW DQ VL.
int widest() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return -1;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

const hstu::PagedKernels* const kSets[] = {&hstu::kPagedAvx2, &hstu::kPagedAvx512};
std::atomic<int> chosen{widest()};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int64_t hstu_paged_call_bytes() { return sizeof(hstu::PagedCall); }

// The instruction set in use, or "" when this CPU has not even AVX2.
EXPORT const char* hstu_paged_isa() { return chosen < 0 ? "" : kSets[chosen]->name; }

// Use at most the set of this name; 0 when it is not one of them or the CPU lacks it.
EXPORT int32_t hstu_paged_limit_isa(const char* name) {
    for (int i = 0; i <= widest(); ++i) {
        if (std::strcmp(name, kSets[i]->name) != 0) continue;
        chosen = i;
        return 1;
    }
    return 0;
}

// Every new row's key and value are in its page, and its output stands at call->out.
EXPORT void hstu_paged_attention(const hstu::PagedCall* call) { kSets[chosen]->attention(*call); }

// call->buckets holds the time bucket of next_times[i] - times[j] for every event j that a new row i may see.
EXPORT void hstu_paged_buckets(const hstu::PagedCall* call) {
    struct Buckets {
        const hstu::PagedCall& call;
        void of(int64_t request) const {
            const int64_t context = call.context[request], num_new = call.num_new[request], all = context + num_new;
            for (int64_t i = 0; i < num_new; ++i) {
                const int64_t at = call.next_times[call.first[request] + i];
                uint8_t* out = call.buckets + call.bucket_start[request] + i * all;
                int64_t bucket = 0;
                for (int64_t t = 0; t <= context + i; ++t) {
                    const int64_t page = call.table[request * call.table_stride + t / call.block];
                    const uint64_t x = static_cast<uint64_t>(at);
                    const int64_t time = call.times[page * call.block + t % call.block];
                    // as int64 subtraction and its magnitude go in torch: modulo 2^64
                    const int64_t dt = static_cast<int64_t>(x - static_cast<uint64_t>(time));
                    const uint64_t distance = dt < 0 ? 0 - static_cast<uint64_t>(dt) : static_cast<uint64_t>(dt);
                    while (bucket > 0 && distance < static_cast<uint64_t>(call.edges[bucket])) --bucket;
                    while (bucket < 128 && distance >= static_cast<uint64_t>(call.edges[bucket + 1])) ++bucket;
                    out[t] = static_cast<uint8_t>(bucket);
                }
            }
        }
    } buckets{*call};
    hstu::for_each(*call, call->requests, [](void* b, int64_t request) { static_cast<Buckets*>(b)->of(request); }, &buckets);
}
