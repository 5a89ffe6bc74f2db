// Rows times a weight, over any instruction set: normalise and narrow the rows, multiply, scale, add bias and residual.
//
// The weight is packed once, two vectors of columns to a panel: [panel][word of depth][column]. Rows are narrowed and
// transposed tile by tile, [word][row], so that the inner loop walks over two streams. A panel stays in the first
// cache while all tiles of a block of rows pass by; a block stays in the second while all panels do.
// Every sum runs over the depth in order: an answer depends neither on the number of rows nor on the threads.
#pragma once
#include "call.h"

namespace {

using hstu::ProjectionCall;

constexpr int64_t kTileRows = Simd::kLanes == 16 ? 14 : 6;  // as many sums of two vectors as fit the registers
constexpr int64_t kTileColumns = 2 * kLanes;
constexpr int64_t kAhead = 4096;            // words of a weight fetched into the second cache before they are needed
constexpr int64_t kBlockBytes = 512 << 10;  // of narrowed rows that all panels pass: half of the second cache

// Where things stand in a packed weight; columns are padded to whole panels.
struct PackedWeight {
    int64_t words, columns;
    uint32_t* values;   // [panel][word][column in panel]
    uint32_t* start;    // what the sums of a column start from
    float *scale, *bias;
    PackedWeight(const ProjectionCall& call, int64_t pack)
        : words(ceil_div(call.depth, pack)), columns(round_up(call.columns, kTileColumns)) {
        values = static_cast<uint32_t*>(call.packed);
        start = values + columns * words;
        scale = reinterpret_cast<float*>(start + columns);
        bias = scale + columns;
    }
};

template <class Words>
void pack_weight(const ProjectionCall& call, const hstu::Runtime& runtime) {
    constexpr int64_t kPack = Words::kPack;
    const PackedWeight packed(call, kPack);
    parallel(runtime, packed.columns / kTileColumns, [&](int64_t panel) {
        for (int64_t j = 0; j < kTileColumns; ++j) {
            const int64_t n = panel * kTileColumns + j;
            const bool there = n < call.columns;
            packed.scale[n] = there && call.scales ? call.scales[n] : 1.0f;
            packed.bias[n] = there && call.bias ? call.bias[n] : 0.0f;
            packed.start[n] = 0;
        }
        for (int64_t w = 0; w < packed.words; ++w)
            for (int64_t j = 0; j < kTileColumns; ++j) {
                const int64_t n = panel * kTileColumns + j;
                uint32_t word = 0;
                for (int64_t i = 0; i < kPack; ++i) {
                    const int64_t k = w * kPack + i, at = k * call.columns + n;
                    if (k >= call.depth || n >= call.columns) continue;
                    if constexpr (kPack == 4) {
                        const int8_t value = static_cast<const int8_t*>(call.weight)[at];
                        word |= static_cast<uint32_t>(static_cast<uint8_t>(value)) << 8 * i;
                        packed.start[n] -= static_cast<uint32_t>(Words::kOffset * value);
                    } else if constexpr (kPack == 2) {
                        word |= static_cast<uint32_t>(static_cast<const uint16_t*>(call.weight)[at]) << 16 * i;
                    } else if (call.weight_type == hstu::kBfloat16) {
                        word = static_cast<uint32_t>(static_cast<const uint16_t*>(call.weight)[at]) << 16;
                    } else {
                        word = static_cast<const uint32_t*>(call.weight)[at];
                    }
                }
                packed.values[(panel * packed.words + w) * kTileColumns + j] = word;
            }
    });
}

// What becomes of the sums of M rows and one panel.
struct TileOut {
    const PackedWeight& weight;
    const float* row_scale;
    const float* residual;  // of the first row and column; rows are `stride` apart, here and in out
    void* out;
    int64_t stride, column, columns;
};

template <class Words, class Out, bool kResidual>
struct Tile {
    template <int M>
    static void run(const uint32_t* a, const uint32_t* b, int64_t words, const TileOut& to) {
        Float sum[M][2];
        const float* start = reinterpret_cast<const float*>(to.weight.start + to.column);
#pragma GCC unroll 14
        for (int m = 0; m < M; ++m) {
            sum[m][0] = Words::kPack == 4 ? Simd::load(start) : Simd::zero();
            sum[m][1] = Words::kPack == 4 ? Simd::load(start + kLanes) : Simd::zero();
        }
        for (int m = 0; m < M; ++m) {  // rows are far apart, and no prefetcher follows from one to the next
            const int64_t at = m * to.stride;
            __builtin_prefetch(static_cast<const Out*>(to.out) + at, 1);
            if (sizeof(Out) * kTileColumns > 64) __builtin_prefetch(static_cast<const Out*>(to.out) + at + kLanes, 1);
            if constexpr (kResidual) {
                __builtin_prefetch(to.residual + at);
                if (kLanes == 16) __builtin_prefetch(to.residual + at + kLanes);
            }
        }
        for (int64_t w = 0; w < words; ++w, a += kLanes, b += kTileColumns) {
            __builtin_prefetch(b + kAhead, 0, 2);
            if constexpr (kLanes == 16) __builtin_prefetch(b + kAhead + kLanes, 0, 2);
            const Float b0 = Simd::load(reinterpret_cast<const float*>(b));
            const Float b1 = Simd::load(reinterpret_cast<const float*>(b) + kLanes);
#pragma GCC unroll 14
            for (int m = 0; m < M; ++m) {
                float word;
                std::memcpy(&word, a + m, 4);
                const Float left = Simd::set(word);
                sum[m][0] = Words::multiply_add(left, b0, sum[m][0]);
                sum[m][1] = Words::multiply_add(left, b1, sum[m][1]);
            }
        }
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            const int64_t column = to.column + v * kLanes, lanes = min(kLanes, to.columns - column);
            if (lanes <= 0) return;
            const Float bias = Simd::load(to.weight.bias + column), scale = Simd::load(to.weight.scale + column);
#pragma GCC unroll 14
            for (int m = 0; m < M; ++m) {
                Float value = sum[m][v];
                if constexpr (Words::kPack == 4)
                    value = Simd::fma(Simd::to_float(value), Simd::mul(Simd::set(to.row_scale[m]), scale), bias);
                else
                    value = Simd::add(value, bias);
                const int64_t at = m * to.stride + v * kLanes;
                Out* out = static_cast<Out*>(to.out) + at;
                if (lanes == kLanes) {
                    if constexpr (kResidual) value = Simd::add(Simd::load(to.residual + at), value);
                    Simd::store(out, value);
                } else {
                    if constexpr (kResidual) value = Simd::add(Simd::load(to.residual + at, lanes), value);
                    Simd::store(out, value, lanes);
                }
            }
        }
    }

    using Function = void (*)(const uint32_t*, const uint32_t*, int64_t, const TileOut&);
    static Function of_rows(int64_t m) {
        if constexpr (kTileRows == 14) {
            constexpr Function functions[] = {run<1>, run<2>, run<3>, run<4>, run<5>, run<6>, run<7>,
                                              run<8>, run<9>, run<10>, run<11>, run<12>, run<13>, run<14>};
            return functions[m - 1];
        } else {
            constexpr Function functions[] = {run<1>, run<2>, run<3>, run<4>, run<5>, run<6>};
            return functions[m - 1];
        }
    }
};

template <class Words>
struct Projection {
    static constexpr int64_t kPack = Words::kPack;
    const ProjectionCall& call;
    const hstu::Runtime& runtime;
    const PackedWeight weight{call, kPack};
    const int64_t row_words = round_up(weight.words, kLanes);
    const int64_t tile_words = row_words * kLanes + kLanes;  // [word][row], and the rows' scales
    int64_t tiles = 0, rows = 0;                             // of a tile, at most

    // Row `index` as floats, normalised if asked for; what is left of the last word is zero.
    void floats_of(int64_t index, float* out) const {
        by_type(call.in_type, [&](auto type) {
            const auto* in = static_cast<const typename decltype(type)::type*>(call.in) + index * call.depth;
            int64_t i = 0;
            for (; i + kLanes <= call.depth; i += kLanes) Simd::store(out + i, Simd::load(in + i));
            if (i < call.depth) Simd::store(out + i, Simd::load(in + i, call.depth - i));
        });
        if (!call.normalize) return;
        const float width = static_cast<float>(call.depth);
        const int64_t whole = call.depth / (4 * kLanes) * (4 * kLanes);
        const auto sum_of = [&](auto term) {  // four sums at a time: one alone would wait for itself
            Float sum[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
            for (int64_t i = 0; i < whole; i += 4 * kLanes)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) sum[j] = term(Simd::load(out + i + j * kLanes), kLanes, sum[j]);
            for (int64_t i = whole; i < call.depth; i += kLanes) sum[0] = term(Simd::load(out + i), call.depth - i, sum[0]);
            return Simd::sum(Simd::add(Simd::add(sum[0], sum[1]), Simd::add(sum[2], sum[3])));
        };
        const Float mean = Simd::set(sum_of([](Float x, int64_t, Float sum) { return Simd::add(sum, x); }) / width);
        const float squares = sum_of([&](Float x, int64_t lanes, Float sum) {
            Float difference = Simd::sub(x, mean);
            if (lanes < kLanes) difference = Simd::keep(difference, (1ull << lanes) - 1);
            return Simd::fma(difference, difference, sum);
        });
        const Float factor = Simd::set(1.0f / __builtin_sqrtf(squares / width + static_cast<float>(call.epsilon)));
        for (int64_t i = 0; i < call.depth; i += kLanes) {
            const Float value = Simd::mul(Simd::sub(Simd::load(out + i), mean), factor);
            const int64_t lanes = call.depth - i;
            Simd::store(out + i, lanes < kLanes ? Simd::keep(value, (1ull << lanes) - 1) : value);
        }
    }

    // A row of floats as int8, symmetrically, to which an offset is added; its scale is returned.
    template <int kOffset>
    float quantize(const float* x, int8_t* out) const {
        Float most[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
        const int64_t whole = call.depth / (4 * kLanes) * (4 * kLanes);
        for (int64_t i = 0; i < whole; i += 4 * kLanes)
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) most[j] = Simd::maximum(most[j], Simd::magnitude(Simd::load(x + i + j * kLanes)));
        for (int64_t i = whole; i < call.depth; i += kLanes) most[0] = Simd::maximum(most[0], Simd::magnitude(Simd::load(x + i)));
        const float scale =
            Simd::most(Simd::maximum(Simd::maximum(most[0], most[1]), Simd::maximum(most[2], most[3]))) / 127.0f;
        const Float inverse = Simd::set(scale > 0 ? 1.0f / scale : 0.0f);
        for (int64_t i = 0; i < call.depth; i += kLanes)
            Simd::template store_int8<kOffset>(out + i, Simd::mul(Simd::load(x + i), inverse));
        return scale;
    }

    // Tile `tile` of rows at `out`; `scratch` holds kLanes rows of words and one of floats.
    void pack_tile(int64_t tile, uint32_t* out, uint32_t* scratch) const {
        float* scale = reinterpret_cast<float*>(out + row_words * kLanes);
        float* floats = reinterpret_cast<float*>(scratch + kLanes * row_words);
        const int64_t first = tile * rows, count = min(rows, call.rows - first);
        for (int64_t r = 0; r < count; ++r) {
            uint32_t* words = scratch + r * row_words;
            if constexpr (kPack == 4) {
                int8_t* bytes = reinterpret_cast<int8_t*>(words);
                if (call.in_type == hstu::kInt8) {
                    const int8_t* in = static_cast<const int8_t*>(call.in) + (first + r) * call.depth;
                    for (int64_t i = 0; i < call.depth; ++i) bytes[i] = static_cast<int8_t>(in[i] ^ Words::kOffset);
                    scale[r] = call.in_scales[first + r];
                } else {
                    floats_of(first + r, floats);
                    scale[r] = quantize<Words::kOffset>(floats, bytes);
                }
            } else if constexpr (kPack == 1) {
                floats_of(first + r, reinterpret_cast<float*>(words));
            } else {
                floats_of(first + r, floats);
                for (int64_t i = 0; i < call.depth; i += kLanes) Words::store(words + i / kPack, Simd::load(floats + i));
            }
        }
        for (int64_t w = 0; w < row_words; w += kLanes)
            Simd::transpose(scratch + w, row_words, out + w * kLanes, kLanes, kLanes);
    }

    int64_t scratch_words() const { return kLanes * row_words + row_words * kPack + kLanes; }

    // Tiles [first, last), packed at `packed`, times panels [begin, end).
    void multiply(int64_t first, int64_t last, const uint32_t* packed, int64_t begin, int64_t end) const {
        const auto by = [&](auto tile_of) {
            using T = decltype(tile_of);
            for (int64_t panel = begin; panel < end; ++panel)
                for (int64_t tile = first; tile < last; ++tile) {
                    const uint32_t* a = packed + (tile - first) * tile_words;
                    const int64_t column = panel * kTileColumns, at = tile * rows * call.columns + column;
                    const int64_t size = call.out_type == hstu::kFloat32 ? 4 : 2;
                    const TileOut to{weight, reinterpret_cast<const float*>(a + row_words * kLanes),
                                     call.residual ? call.residual + at : nullptr,
                                     static_cast<char*>(call.out) + at * size, call.columns, column, call.columns};
                    T::of_rows(min(rows, call.rows - tile * rows))(
                        a, weight.values + panel * weight.words * kTileColumns, weight.words, to);
                }
        };
        if (call.out_type == hstu::kBfloat16) return by(Tile<Words, uint16_t, false>{});
        call.residual ? by(Tile<Words, float, true>{}) : by(Tile<Words, float, false>{});
    }

    void run() {
        if (call.rows <= 0) return;
        const int64_t panels = weight.columns / kTileColumns, workers = runtime.workers;
        tiles = ceil_div(call.rows, kTileRows);
        const int64_t most = max(1, kBlockBytes / (tile_words * 4));
        int64_t blocks = ceil_div(tiles, most);
        if (workers > 1 && tiles >= 2 * workers) {  // every worker has rows of its own
            blocks = round_up(max(blocks, tiles >= 4 * workers ? 2 * workers : workers), workers);
            if (tiles < 16 * workers) tiles = round_up(tiles, blocks);
        }
        rows = ceil_div(call.rows, tiles);
        tiles = ceil_div(call.rows, rows);
        if (workers == 1 || tiles >= 2 * workers) {
            const int64_t block = ceil_div(tiles, blocks);
            parallel(runtime, ceil_div(tiles, block), [&](int64_t item) {
                const int64_t first = item * block, last = min(tiles, first + block);
                uint32_t* packed = static_cast<uint32_t*>(runtime.local((block * tile_words + scratch_words()) * 4));
                for (int64_t tile = first; tile < last; ++tile)
                    pack_tile(tile, packed + (tile - first) * tile_words, packed + block * tile_words);
                multiply(first, last, packed, 0, panels);
            });
            return;
        }
        uint32_t* packed = static_cast<uint32_t*>(runtime.acquire((tiles * tile_words + scratch_words()) * 4));
        for (int64_t tile = 0; tile < tiles; ++tile)
            pack_tile(tile, packed + tile * tile_words, packed + tiles * tile_words);
        const int64_t part = max(1, ceil_div(panels, 4 * workers));
        parallel(runtime, ceil_div(panels, part), [&](int64_t item) {
            multiply(0, tiles, packed, item * part, min(panels, (item + 1) * part));
        });
        runtime.release(packed);
    }
};

template <class Words>
void project(const ProjectionCall& call, const hstu::Runtime& runtime) {
    Projection<Words>{call, runtime}.run();
}

}  // namespace
