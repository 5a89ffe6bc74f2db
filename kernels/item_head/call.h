// The K best items of users, exactly, at the memory traffic of int8; cpu.py mirrors this structure field by field.
#pragma once
#include "cpu/runtime.h"

namespace hstu {

struct HeadCall {
    int64_t items, dim;
    const void* table;         // [items, dim], row_stride elements from one row to the next
    int64_t table_type, row_stride;
    const float* factors;      // [items]: a score is user . row * factor
    void* packed;              // written by pack, at least hstu_item_head_bytes
    int64_t users, results;    // results <= items
    const float* embeddings;   // [users, dim]
    float* scores;             // [users, results], falling; of equal scores the lower index comes first
    int32_t* indices;          // [users, results], into the table
    int64_t threaded;
};

}  // namespace hstu
