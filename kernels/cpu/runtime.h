// What every CPU kernel is given by the process, and what it gives to it. Kernels themselves use no library.
#pragma once
#include <cstdint>

namespace hstu {

enum Type : int64_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2 };

struct Runtime {
    int64_t workers;
    void (*parallel)(int64_t count, void (*body)(void*, int64_t), void* context);
    void* (*local)(int64_t bytes);    // this thread's scratch, until it asks again
    void* (*acquire)(int64_t bytes);  // shared scratch of one call
    void (*release)(void* memory);
};

struct Call;            // hstu_attention/call.h
struct HeadCall;        // item_head/call.h
struct ProjectionCall;  // projection/call.h

// One instruction set's kernels; each set is compiled in a translation unit of its own.
struct Kernels {
    const char* name;
    void (*attention)(const Call&, const Runtime&);
    void (*item_head_pack)(const HeadCall&, const Runtime&);
    void (*item_head_top)(const HeadCall&, const Runtime&);
    void (*projection_pack)(const ProjectionCall&, const Runtime&);
    void (*projection)(const ProjectionCall&, const Runtime&);
};
extern const Kernels kAvx2, kAvx512, kAvx512Bf16;

}  // namespace hstu
