// schedule.h as the GPU kernel runs it, on this machine: blocks of threads with barriers that count like the GPU's, rings
// of buffers, and products that read their operands as late as they may. A buffer that is filled while someone reads it,
// weights that change under a running product, or a barrier nobody comes to is an error, not a wrong number.
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "schedule.h"

namespace {

using hstu::Slot;
using hstu::Tiles;
using hstu::Work;
using hstu::WorkList;
constexpr double NaN = std::numeric_limits<double>::quiet_NaN();

std::atomic<bool> failed{false};
std::mutex message_lock;
std::string message;

void fail(char const* text) {
  std::lock_guard<std::mutex> hold(message_lock);
  if (!failed.exchange(true)) message = text;
}

// An mbarrier (PTX ISA, "Phase of the mbarrier object"): a wait for a parity ends once a phase of it is complete.
class Barrier {
 public:
  void init(int expected) { expected_ = pending_ = expected; }
  void arrive() {
    std::lock_guard<std::mutex> hold(lock_);
    if (--pending_ == 0) {
      pending_ = expected_;
      ++phase_;
      changed_.notify_all();
    }
  }
  void wait(uint32_t parity) {
    std::unique_lock<std::mutex> hold(lock_);
    auto complete = [&] { return (phase_ & 1) != parity || failed; };
    if (!changed_.wait_for(hold, std::chrono::seconds(20), complete)) fail("a barrier nobody comes to");
    if (failed) throw std::runtime_error("stopped");
  }

 private:
  std::mutex lock_;
  std::condition_variable changed_;
  int expected_ = 1, pending_ = 1;
  uint32_t phase_ = 0;
};

struct Buffer {
  std::vector<double> data;
  std::atomic<int> readers{0};
  Barrier full, empty;
};

struct Problem {
  double const *q, *k, *v;
  double* out;
  int64_t const *offsets, *num_targets;
  int rows, d, groups, columns, stages;
  double scale;
  WorkList list;
};

struct Block {  // what stands in one block's shared memory
  Buffer q;
  std::vector<Buffer> k, v;
  Block(Problem const& p) : k(p.stages), v(p.stages) {
    prepare(q, p, 64 * p.groups);
    for (auto& one : k) prepare(one, p, p.columns);
    for (auto& one : v) prepare(one, p, p.columns);
  }
  static void prepare(Buffer& b, Problem const& p, int rows) {
    b.data.assign(size_t(rows) * p.d, NaN);
    b.full.init(1);
    b.empty.init(4 * p.groups);
  }
};

struct Pause {
  std::minstd_rand random;
  void operator()() {
    if (random() % 3 == 0) std::this_thread::yield();
    if (random() % 29 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 40));
  }
};

struct Load {
  Problem const& p;
  Block& s;
  Pause pause;
  Slot q{}, k{}, v{};

  void fill(Buffer& b, double const* from, Work const& w, int start, uint32_t phase) {
    b.empty.wait(phase ^ 1);
    if (b.readers) fail("a buffer is filled while someone reads it");
    pause();
    int const rows = int(b.data.size()) / p.d;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < p.d; ++c) {
        int64_t const row = w.begin + start + r;  // beyond the last row of all the copy engine gives zeros
        b.data[r * p.d + c] = row < p.rows ? from[(row * p.list.heads + w.head) * p.d + c] : 0.0;
      }
    b.full.arrive();
  }
  void query(Work const& w) {
    fill(s.q, p.q, w, w.first, q.phase);
    q.next(1);
  }
  void keys(Work const& w, int start) {
    fill(s.k[k.index], p.k, w, start, k.phase);
    k.next(p.stages);
  }
  void values(Work const& w, int start) {
    fill(s.v[v.index], p.v, w, start, v.phase);
    v.next(p.stages);
  }
};

struct Multiply {
  Problem const& p;
  Block& s;
  int group;
  Pause pause;
  Slot q{}, k{}, v{};
  std::vector<double> scores, weights, values, promised;  // [thread][element]; promised: weights when a product began
  bool score_product = false, value_product = false;

  Multiply(Problem const& problem, Block& block, int group_, uint32_t seed)
      : p(problem), s(block), group(group_), pause{std::minstd_rand(seed)}, scores(64 * p.columns, NaN),
        weights(64 * p.columns, NaN), values(64 * p.d, NaN) {}

  void release(Buffer& b) {
    --b.readers;
    pause();
    for (int warp = 0; warp < 4; ++warp) b.empty.arrive();
  }
  void begin() {
    std::fill(values.begin(), values.end(), 0.0);
    s.q.full.wait(q.phase);
    ++s.q.readers;
  }
  void release_query() {
    if (score_product) fail("Q is given back while it is read");
    release(s.q);
    q.next(1);
  }
  void start_scores() {
    s.k[k.index].full.wait(k.phase);
    ++s.k[k.index].readers;
    score_product = true;
    std::fill(scores.begin(), scores.end(), NaN);
  }
  void finish_scores(bool alone) {
    if (alone == value_product) fail("the wrong number of products is waited for");
    pause();
    Buffer const& keys = s.k[k.index];
    for (int thread = 0; thread < 128; ++thread)
      for (int e = 0; e < p.columns / 2; ++e) {
        int const i = 64 * group + hstu::fragment_row(thread, e), j = hstu::fragment_column(thread, e);
        double sum = 0;
        for (int c = 0; c < p.d; ++c) sum += s.q.data[i * p.d + c] * keys.data[j * p.d + c];
        scores[thread * (p.columns / 2) + e] = sum;
      }
    score_product = false;
    release(s.k[k.index]);
    k.next(p.stages);
  }
  void weigh(Work const& w, int start, bool masked) {
    if (score_product) fail("scores are read before they are there");
    for (int thread = 0; thread < 128; ++thread)
      for (int e = 0; e < p.columns / 2; ++e) {
        double& score = scores[thread * (p.columns / 2) + e];
        score = score / 2 * (1 + std::tanh(score / 2));
        int const i = w.first + 64 * group + hstu::fragment_row(thread, e);
        if (masked && !hstu::sees(i, start + hstu::fragment_column(thread, e), w.history)) score = 0.0;
      }
  }
  void settle_weights() {
    if (value_product) fail("weights change under a running product");
    weights = scores;
  }
  void clear_values(int from) {
    Buffer& b = s.v[v.index];
    b.full.wait(v.phase);
    ++b.readers;
    std::lock_guard<std::mutex> hold(clearing_);  // here the same zeros twice would be a race
    std::fill(b.data.begin() + from * p.d, b.data.end(), 0.0);
    --b.readers;
  }
  void start_values() {
    s.v[v.index].full.wait(v.phase);
    ++s.v[v.index].readers;
    value_product = true;
    promised = weights;
  }
  void finish_values() {
    pause();
    if (std::memcmp(promised.data(), weights.data(), weights.size() * sizeof(double)) != 0)
      fail("weights changed under a running product");
    Buffer const& b = s.v[v.index];
    // A in registers (PTX ISA, m64nNk16): of 8 elements a thread holds 2 columns × 2 rows × 2 halves of 16 columns.
    std::vector<double> a(64 * p.columns, NaN);
    for (int thread = 0; thread < 128; ++thread)
      for (int x = 0; x < p.columns / 2; ++x) {
        int const row = thread / 32 * 16 + thread % 32 / 4 + (x % 8 / 2 % 2) * 8;
        a[row * p.columns + x / 8 * 16 + thread % 4 * 2 + x % 2 + (x % 8 / 4) * 8] =
            weights[thread * (p.columns / 2) + x];
      }
    std::lock_guard<std::mutex> hold(clearing_);
    for (int thread = 0; thread < 128; ++thread)
      for (int e = 0; e < p.d / 2; ++e) {
        int const i = hstu::fragment_row(thread, e), c = hstu::fragment_column(thread, e);
        double sum = 0;
        for (int j = 0; j < p.columns; ++j) sum += a[i * p.columns + j] * b.data[j * p.d + c];
        values[thread * (p.d / 2) + e] += sum;
      }
    value_product = false;
    release(s.v[v.index]);
    v.next(p.stages);
  }
  void store(Work const& w) {
    for (int thread = 0; thread < 128; ++thread)
      for (int half = 0; half < 2; ++half) {
        int const i = w.first + 64 * group + hstu::fragment_row(thread, 2 * half);
        for (int four = 0; four < p.d / 32 && i < w.length; ++four)
          for (int from = 0; from < 4; ++from)  // after `trade`: word `from` came from that thread of the four
            for (int x = 0; x < 2; ++x) {
              int const e = (4 * four + thread % 4) * 4 + 2 * half + x, other = thread / 4 * 4 + from;
              int64_t const row = (w.begin + i) * p.list.heads + w.head;
              p.out[row * p.d + (4 * four + thread % 4) * 8 + 2 * from + x] =
                  p.scale * values[other * (p.d / 2) + e];
            }
      }
  }

 private:
  static std::mutex clearing_;
};
std::mutex Multiply::clearing_;

void run_block(Problem const& p, int block, int grid, uint32_t seed) {
  Block s(p);
  std::vector<std::thread> threads;
  auto each = [&](auto&& act) {
    Work w;
    try {
      for (int64_t item = block; item < p.list.count(); item += grid)
        if (p.list.work(item, 64 * p.groups, p.offsets, p.num_targets, w)) act(w, Tiles(w, 64 * p.groups, p.columns));
    } catch (std::runtime_error const&) {  // told by `fail` already
    }
  };
  threads.emplace_back([&] {
    Load load{p, s, Pause{std::minstd_rand(seed)}};
    each([&](Work const& w, Tiles const& tiles) { hstu::produce(w, tiles, load); });
  });
  for (int group = 0; group < p.groups; ++group)
    threads.emplace_back([&, group] {
      Multiply multiply(p, s, group, seed + 7 * group + 1);
      each([&](Work const& w, Tiles const& tiles) { hstu::consume(w, tiles, multiply); });
    });
  for (auto& thread : threads) thread.join();
}

}  // namespace

extern "C" char const* attend(double const* q, double const* k, double const* v, double* out, int64_t const* offsets,
                              int64_t const* num_targets, int rows, int heads, int users, int longest, int d, int groups,
                              int columns, int stages, int together, int grid, double scale, uint32_t seed) {
  failed = false;
  message.clear();
  WorkList const list{heads, users, hstu::blocks_of(longest, 64 * groups), together};
  Problem const p{q, k, v, out, offsets, num_targets, rows, d, groups, columns, stages, scale, list};
  for (int block = 0; block < grid; ++block) run_block(p, block, grid, seed + 1000 * block);
  return message.c_str();
}

extern "C" void locate(int heads, int users, int blocks, int together, int64_t item, int* place) {
  WorkList{heads, users, blocks, together}.locate(item, place[0], place[1], place[2]);
}

// The starts of the tiles of a block of rows, the masked first; how many there are, and how many of them are masked.
extern "C" int tiles(int first, int rows, int columns, int length, int history, int* starts, int* masked) {
  Tiles const t(Work{0, 0, first, length, history, 0}, rows, columns);
  for (int step = 0; step < t.count(); ++step) starts[step] = t.start(step);
  *masked = t.masked();
  return t.count();
}

// Four threads trade words [4][4] as four lanes of a warp do.
extern "C" void trade(uint32_t* words) {
  uint32_t sent[4];
  std::atomic<int> here{0};
  auto meet = [&] {
    int const round = here.fetch_add(1) / 4;
    while (here.load() < 4 * (round + 1)) std::this_thread::yield();
  };
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < 4; ++lane)
    lanes.emplace_back([&, lane] {
      uint32_t mine[4];
      std::memcpy(mine, words + 4 * lane, sizeof(mine));
      hstu::trade(mine, lane, [&](uint32_t x, int with) {
        sent[lane] = x;
        meet();
        uint32_t const got = sent[lane ^ with];
        meet();
        return got;
      });
      std::memcpy(words + 4 * lane, mine, sizeof(mine));
    });
  for (auto& lane : lanes) lane.join();
}
