// Who does what, and when, in the warp-specialised attention kernel: work items, tiles, masks and the hand-over of
// buffers. Neither CUDA nor CuTe is needed: cutlass.cu compiles it for the GPU, and the tests compile it with the host's
// compiler, run it on threads with barriers of their own, and hold the result against naive.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SCHEDULE __host__ __device__ __forceinline__
#else
#define SCHEDULE inline
#endif

namespace hstu {

SCHEDULE int smaller(int a, int b) { return a < b ? a : b; }
SCHEDULE int larger(int a, int b) { return a > b ? a : b; }
SCHEDULE int blocks_of(int size, int block) { return (size + block - 1) / block; }

// One block of rows of one head of one user. Rows are counted from the user's first; targets stand at `history`.
struct Work {
  int user, head, first, length, history;
  int64_t begin;
};

// Work items in the order in which a persistent grid takes them. Heads of users come in groups of `together`, whose keys
// and values stay in the L2 cache; within a group the longest blocks come first, so that blocks end at the same time.
struct WorkList {
  int heads, users, blocks, together;

  SCHEDULE int64_t count() const { return int64_t(heads) * users * blocks; }

  // The block of rows, head and user of an item: every triple once.
  SCHEDULE void locate(int64_t item, int& block, int& head, int& user) const {
    int64_t const pairs = int64_t(heads) * users;
    int64_t const first_pair = item / (int64_t(together) * blocks) * together;
    int64_t const size = pairs - first_pair < together ? pairs - first_pair : together;
    int64_t const within = item - first_pair * blocks;
    int64_t const pair = first_pair + within % size;
    block = blocks - 1 - int(within / size);
    head = int(pair % heads);
    user = int(pair / heads);
  }

  // The item's work; false where the user has no such rows.
  SCHEDULE bool work(int64_t item, int block_rows, int64_t const* offsets, int64_t const* num_targets, Work& w) const {
    int block;
    locate(item, block, w.head, w.user);
    w.begin = offsets[w.user];
    w.length = int(offsets[w.user + 1] - w.begin);
    w.first = block * block_rows;
    if (w.first >= w.length) return false;
    w.history = w.length - int(num_targets[w.user]);
    return true;
  }
};

// The tiles of `columns` keys that a block of `rows` rows goes through: first those that need a mask (the end of the
// history, then the tiles on the diagonal where targets see themselves; one at least), then those that every row sees
// whole. Tiles that no row sees are not in it.
struct Tiles {
  int columns, whole, near, own, diagonal;

  SCHEDULE Tiles(Work const& w, int rows, int columns_) : columns(columns_) {
    int const last = smaller(w.first + rows, w.length);
    whole = smaller(w.first, w.history) / columns * columns;
    near = blocks_of(smaller(last, w.history) - whole, columns);
    diagonal = larger(w.first / columns * columns, whole + near * columns);
    own = last > w.history ? larger(blocks_of(last - diagonal, columns), 0) : 0;
  }
  SCHEDULE int masked() const { return near + own; }
  SCHEDULE int count() const { return near + own + whole / columns; }
  SCHEDULE int start(int step) const {
    if (step < near) return whole + step * columns;
    if (step < near + own) return diagonal + (step - near) * columns;
    return (step - near - own) * columns;
  }
};

// Whether row i sees row j: rows up to itself, but of the targets only itself.
SCHEDULE bool sees(int i, int j, int history) { return j == i || (j < i && j < history); }

// A place in a ring of buffers. `phase` is the parity of the barrier that says that the buffer is full; the one that says
// that it is empty is waited for with the other parity, so that the first round does not wait.
struct Slot {
  int index = 0;
  uint32_t phase = 0;
  SCHEDULE void next(int stages) {
    if (++index == stages) {
      index = 0;
      phase ^= 1;
    }
  }
};

// The loading warp: keys run one tile ahead of values. `load` has query(work), keys(work, start), values(work, start),
// each of which waits for an empty buffer and fills it.
template <class Load>
SCHEDULE void produce(Work const& w, Tiles const& tiles, Load& load) {
  load.query(w);
  load.keys(w, tiles.start(0));
  for (int step = 1; step < tiles.count(); ++step) {
    load.keys(w, tiles.start(step));
    load.values(w, tiles.start(step - 1));
  }
  load.values(w, tiles.start(tiles.count() - 1));
}

// A multiplying warpgroup: the products of scores of one tile run while the weights of the tile before meet its values,
// and weights are made (SiLU) while that second product runs. `m` has, in the order of a tile's life:
//   start_scores, which waits for the keys; finish_scores, which gives them back (`alone`: no other product is running);
//   weigh(work, start, masked); settle_weights; clear_values(from), where rows from `from` on are not this user's;
//   start_values, which waits for the values; finish_values, which gives them back.
// Q is given back after `weigh`, not before it: without a branch there, ptxas moves SiLU behind the wait for the second
// product, and nothing is left to run beside it.
template <class Multiply>
SCHEDULE void consume(Work const& w, Tiles const& tiles, Multiply& m) {
  int const count = tiles.count(), masked = tiles.masked();
  m.begin();
  m.start_scores();
  m.finish_scores(true);
  if (count == 1) m.release_query();
  m.weigh(w, tiles.start(0), true);
  m.settle_weights();
  if (tiles.start(0) + tiles.columns > w.length) m.clear_values(w.length - tiles.start(0));
  for (int step = 1; step < masked; ++step) {
    m.start_scores();
    m.start_values();
    m.finish_scores(false);
    m.weigh(w, tiles.start(step), true);
    if (step == count - 1) m.release_query();
    m.finish_values();
    m.settle_weights();
    if (tiles.start(step) + tiles.columns > w.length) m.clear_values(w.length - tiles.start(step));
  }
  for (int step = masked; step < count; ++step) {
    m.start_scores();
    m.start_values();
    m.finish_scores(false);
    m.weigh(w, tiles.start(step), false);
    if (step == count - 1) m.release_query();
    m.finish_values();
    m.settle_weights();
  }
  m.start_values();
  m.finish_values();
  m.store(w);
}

// Where the accumulators of a 64-row product stand: element e of thread t (0..127) of a warpgroup; source: PTX ISA,
// "Register fragments for wgmma.mma_async.m64nNk16", matrix D.
SCHEDULE constexpr int fragment_row(int thread, int e) { return thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8; }
SCHEDULE constexpr int fragment_column(int thread, int e) { return e / 4 * 8 + thread % 4 * 2 + e % 2; }

// Four threads, each with four words, end with word t of every one of them: the 4×4 transpose, by two exchanges.
template <class Exchange>
SCHEDULE void trade(uint32_t (&word)[4], int t, Exchange exchange) {
  for (int pair = 0; pair < 4; pair += 2) {
    uint32_t const got = exchange(t & 1 ? word[pair] : word[pair + 1], 1);
    (t & 1 ? word[pair] : word[pair + 1]) = got;
  }
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t const got = exchange(t & 2 ? word[pair] : word[pair + 2], 2);
    (t & 2 ? word[pair] : word[pair + 2]) = got;
  }
}

}  // namespace hstu
