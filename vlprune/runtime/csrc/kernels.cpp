// Cuts the work of an operator into parts for ONNX Runtime's thread pool; the parts are computed by a kernel set.
#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <thread>

#include "kernel_set.h"

namespace vlprune {
namespace {

const KernelSet* best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return &kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return &kAvx2;
#endif
  return &kPortable;
}

struct Choice {
  const KernelSet* set;
  const char* refusal;
};

Choice choose() {
  const KernelSet* can = best();
  const char* asked = std::getenv("VLPRUNE_ISA");
  if (!asked || !*asked || !std::strcmp(asked, can->name)) return {can, nullptr};
  if (!std::strcmp(asked, kPortable.name)) return {&kPortable, nullptr};
#if defined(__x86_64__)
  if (!std::strcmp(asked, kAvx2.name) || !std::strcmp(asked, kAvx512.name)) {
    if (!std::strcmp(asked, kAvx2.name) && can == &kAvx512) return {&kAvx2, nullptr};
    return {can, "VLPRUNE_ISA asks for an instruction set that this processor lacks: unset it"};
  }
#endif
  return {can, "VLPRUNE_ISA is not one of avx512, avx2, portable: unset it"};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

// Working memory of a thread: grows to what the largest call needed, then stays.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data_); }

  // Null when there is no memory: a pool's threads must not throw.
  float* floats(size_t count) {
    if (count > size_) {
      std::free(data_);
      count = (count + 1023) / 1024 * 1024;
      data_ = static_cast<float*>(std::aligned_alloc(64, count * sizeof(float)));
      size_ = data_ ? count : 0;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  size_t size_ = 0;
};

thread_local Memory shared_memory;  // of the calling thread: what all parts of a call read
thread_local Memory own_memory;     // of each thread of the pool: what one part needs

// The threads a pool may have. ONNX Runtime does not tell, but by default it has one per core.
int64_t threads() {
  static const int64_t count = std::max(1u, std::thread::hardware_concurrency());
  return count;
}

// Sequences of steps, which the threads of the pool work through. A step begins when the one before it in its sequence is
// done; its parts may be computed in any order, by anyone. parts(sequence, step) tells how many there are, at least one;
// compute(sequence, step, part) gives false when it had no memory.
//
// Every thread has a sequence that it turns to first, in every call the same, so that it finds in its cache what it wrote
// in the call before; only when there is nothing to do there it takes a part of another. Thus a core that is slower, or
// begins later, holds up nobody for longer than a part takes.
template <class Parts, class Compute>
class Schedule {
 public:
  static constexpr int64_t kMost = 64;  // sequences

  Schedule(const Parts& parts, const Compute& compute) : parts_(parts), compute_(compute) {}

  void add(int64_t steps) { sequences_[count_++].steps = steps; }

  void run(ParallelFor parallel, void* pool) {
    if (threads() == 1)
      work(this, 0);
    else
      parallel(pool, work, threads(), this);
    if (failed_) throw std::bad_alloc();
  }

 private:
  struct alignas(64) Sequence {
    std::atomic<uint64_t> claimed{0};  // the step, and behind it the parts of it that somebody has begun
    std::atomic<int64_t> done{0};      // parts of the step
    std::atomic<bool> taken{false};    // some thread turns to it first
    int64_t steps = 0;
  };
  static constexpr int kShift = 32;

  static void work(void* data, size_t) {
    Schedule& schedule = *static_cast<Schedule*>(data);
    const int64_t home = schedule.take();
    for (int waits = 0;;) {
      switch (schedule.compute_next(home)) {
        case kComputed:
          waits = 0;
          break;
        case kWait:  // for parts that other threads are at
          if (++waits % 1024 == 0) std::this_thread::yield();
          break;
        case kFinished:
          return;
      }
    }
  }

  // The sequence a thread had in its last call, if no other thread has taken it.
  int64_t take() {
    thread_local int64_t last = 0;
    for (int64_t i = 0; i < count_; ++i)
      if (!sequences_[(last + i) % count_].taken.exchange(true)) return last = (last + i) % count_;
    return last % count_;
  }

  enum Outcome { kComputed, kWait, kFinished };

  Outcome compute_next(int64_t home) {
    Outcome outcome = kFinished;
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t index = (home + i) % count_;
      Sequence& sequence = sequences_[index];
      int64_t step = sequence.claimed.load(std::memory_order_acquire) >> kShift;
      if (step == sequence.steps) continue;
      outcome = kWait;
      if (begun(sequence.claimed.load(std::memory_order_acquire)) >= parts_(index, step)) continue;
      const uint64_t claim = sequence.claimed.fetch_add(1, std::memory_order_acq_rel);
      step = claim >> kShift;  // which may have begun since
      if (step == sequence.steps) continue;
      const int64_t parts = parts_(index, step);
      if (begun(claim) >= parts) continue;
      if (!compute_(index, step, begun(claim))) failed_ = true;
      if (sequence.done.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) {
        sequence.done.store(0, std::memory_order_relaxed);
        sequence.claimed.store(static_cast<uint64_t>(step + 1) << kShift, std::memory_order_release);
      }
      return kComputed;
    }
    return outcome;
  }

  static int64_t begun(uint64_t claimed) { return claimed & ((uint64_t{1} << kShift) - 1); }

  const Parts& parts_;
  const Compute& compute_;
  int64_t count_ = 0;
  std::atomic<bool> failed_{false};
  Sequence sequences_[kMost];
};

// Parts that wait for nothing: compute(part) for all of them.
template <class Compute>
void run(ParallelFor parallel, void* pool, int64_t parts, const Compute& compute) {
  const int64_t ranges = std::min({threads(), parts, int64_t{64}});
  auto first = [&](int64_t range) { return range * parts / ranges; };
  auto count = [&](int64_t range, int64_t) { return first(range + 1) - first(range); };
  auto part = [&](int64_t range, int64_t, int64_t index) { return compute(first(range) + index); };
  Schedule<decltype(count), decltype(part)> schedule(count, part);
  for (int64_t i = 0; i < ranges; ++i) schedule.add(1);
  schedule.run(parallel, pool);
}

// The tokens of a call cut into tiles of whole vectors, as equal as can be.
struct Tiles {
  int64_t tokens, vectors, count;
  int width;

  Tiles(int64_t tokens, int width, int most)
      : tokens(tokens), vectors((tokens + width - 1) / width), count((vectors + most - 1) / most), width(width) {}

  int64_t first_vector(int64_t tile) const { return tile * vectors / count; }
  int64_t first_token(int64_t tile) const { return first_vector(tile) * width; }
  int vectors_of(int64_t tile) const { return static_cast<int>(first_vector(tile + 1) - first_vector(tile)); }
  int tokens_of(int64_t tile) const {
    return static_cast<int>(std::min(first_token(tile + 1), tokens) - first_token(tile));
  }
};

// Floats of a tile that are transposed, or lie between two layers, at a time.
constexpr int64_t kPiece = 48 * 1024;

int64_t blocks_of(const SparseWeights& w) { return (w.K + w.block - 1) / w.block; }
int64_t panels_of(const SparseWeights& w) { return (w.N + w.panel - 1) / w.panel; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Few tokens, each panel by itself.
void rows(const KernelSet& set, const SparseWeights* first, const SparseWeights& w, const Norm* norm, const float* x,
          int64_t tokens, const float* residual, float* y, ParallelFor parallel, void* pool) {
  const int64_t K = first ? first->K : w.K, between = first ? w.K : 0, side = tokens > 1 ? 4 : 1;
  const int64_t normed = norm ? K : 0, beside = side > 1 ? std::max(K, between) * side : 0;
  float* memory = shared_memory.floats(tokens * (between + normed) + beside + 1);
  if (!memory) throw std::bad_alloc();
  float *hidden = memory, *inputs = hidden + tokens * between, *interleaved = inputs + tokens * normed;
  if (norm) {
    for (int64_t t = 0; t < tokens; ++t) set.normalise(*norm, x + t * K, K, inputs + t * K);
    x = inputs;
  }
  auto layer = [&](const SparseWeights& weights, const float* from, const float* add, float* to) {
    if (side > 1) {
      for (int64_t k = 0; k < weights.K; ++k)
        for (int64_t t = 0; t < side; ++t) interleaved[k * side + t] = t < tokens ? from[t * weights.K + k] : 0.f;
      from = interleaved;
    }
    run(parallel, pool, panels_of(weights), [&](int64_t panel) {
      float* sums = own_memory.floats(weights.panel * KernelSet::kRowFloats);
      if (sums) set.row(weights, panel, from, static_cast<int>(tokens), add, to, sums);
      return sums != nullptr;
    });
  };
  if (first) layer(*first, x, nullptr, hidden);
  layer(w, first ? hidden : x, residual, y);
}

// Both layers, or with `first` null only one, whose input is then x.
//
// Each thread has tiles of its own, one at a time, whose sums, and a piece of the columns they are summed over, stay in
// its cache. A piece is transposed, or computed by the first layer, and then multiplied, panel by panel.
void layers(const SparseWeights* first, const SparseWeights& w, const Norm* norm, const float* x, int64_t tokens,
            const float* residual, float* y, ParallelFor parallel, void* pool) {
  if (tokens == 0) return;
  const KernelSet& set = *choice().set;
  if (tokens <= set.row_tokens) return rows(set, first, w, norm, x, tokens, residual, y, parallel, pool);

  const bool grouped = w.group != 1 || (first && first->group != 1);
  const Tiles tiles(tokens, set.width, grouped ? set.vectors_grouped : set.vectors);
  const int64_t largest = divide_up(tiles.vectors, tiles.count) * set.width;  // tokens of a tile
  const int64_t K = first ? first->K : w.K, panels = panels_of(w);
  const int64_t unit = first ? std::lcm<int64_t>(w.block, first->panel) : w.block;
  const int64_t piece = std::min(std::max<int64_t>(kPiece / largest / unit, 1) * unit, w.K);
  const int64_t pieces = divide_up(w.K, piece);

  // Steps of a tile: with a first layer, the transpose; then two for each piece.
  const int64_t before = first ? 1 : 0, steps = before + 2 * pieces;
  const int64_t input = first ? K : 0;                  // columns kept besides a piece
  const int64_t kept = pieces > 1 ? w.N : 0;            // sums kept from piece to piece
  const int64_t floats = (input + piece + kept) * largest;
  const int64_t sequences = std::min({threads(), tiles.count, int64_t{64}});
  float* memory = shared_memory.floats(sequences * floats);
  if (!memory) throw std::bad_alloc();

  auto first_tile = [&](int64_t sequence) { return sequence * tiles.count / sequences; };
  auto parts = [&](int64_t sequence, int64_t step) {
    const int64_t vectors = tiles.vectors_of(first_tile(sequence) + step / steps), half = step % steps - before;
    if (half < 0) return vectors;
    const int64_t width = std::min(piece, w.K - half / 2 * piece);
    return half % 2 ? panels : first ? divide_up(width, first->panel) : vectors;
  };
  auto compute = [&](int64_t sequence, int64_t step, int64_t part) {
    const int64_t tile = first_tile(sequence) + step / steps, token = tiles.first_token(tile);
    const int count = tiles.tokens_of(tile), vectors = tiles.vectors_of(tile);
    const int64_t side = vectors * set.width;
    float *from = memory + sequence * floats, *columns = from + input * largest, *kept_sums = columns + piece * largest;
    auto transpose = [&](int64_t k0, int64_t k1, float* to) {
      const int64_t begin = part * set.width;
      set.transpose(x + (token + begin) * K, K, static_cast<int>(std::min<int64_t>(count - begin, set.width)), k0, k1,
                    norm, to + begin, side);
      return true;
    };
    step %= steps;
    if (step < before) return transpose(0, K, from);
    const int64_t k0 = (step - before) / 2 * piece, k1 = std::min(k0 + piece, w.K);
    if ((step - before) % 2 == 0) {
      if (!first) return transpose(k0, k1, columns);
      const int64_t panel = k0 / first->panel + part;
      float* to = columns + part * first->panel * side;
      set.accumulate(*first, panel, from, vectors, 0, blocks_of(*first), to, count, nullptr, nullptr);
      set.activate(*first, panel, vectors, to);
      return true;
    }
    const bool last = k1 == w.K;
    float* sums = kept ? kept_sums + part * w.panel * side : own_memory.floats(w.panel * largest);
    if (!sums) return false;
    const float* add = residual ? residual + token * w.N : nullptr;
    set.accumulate(w, part, columns, vectors, k0 / w.block, divide_up(k1, w.block), sums, count, add,
                   last ? y + token * w.N : nullptr);
    if (last) set.finish(w, part, sums, count, vectors, add, y + token * w.N);
    return true;
  };
  Schedule<decltype(parts), decltype(compute)> schedule(parts, compute);
  for (int64_t i = 0; i < sequences; ++i) schedule.add((first_tile(i + 1) - first_tile(i)) * steps);
  schedule.run(parallel, pool);
}

}  // namespace

const char* isa() { return choice().set->name; }
const char* choose_isa() { return choice().refusal; }

void sparse_linear(const SparseWeights& weights, const Norm* norm, const float* x, int64_t tokens,
                   const float* residual, float* y, ParallelFor parallel, void* pool) {
  layers(nullptr, weights, norm, x, tokens, residual, y, parallel, pool);
}

void sparse_mlp(const SparseWeights& first, const SparseWeights& second, const Norm* norm, const float* x,
                int64_t tokens, const float* residual, float* y, ParallelFor parallel, void* pool) {
  layers(&first, second, norm, x, tokens, residual, y, parallel, pool);
}

void half_linear(const HalfWeights& weights, const float* x, int64_t tokens, float* y, ParallelFor parallel,
                 void* pool) {
  // Rows enough to share what is read of x, and few enough that they stay in the cache for all tokens.
  constexpr int64_t kRows = 64;
  const KernelSet& set = *choice().set;
  run(parallel, pool, divide_up(weights.N, kRows), [&](int64_t part) {
    set.half_rows(weights, part * kRows, std::min((part + 1) * kRows, weights.N), x, tokens, y);
    return true;
  });
}

void attention(const AttentionShape& s, const float* q, const float* k, const float* v, const float* bias, float* out,
               ParallelFor parallel, void* pool) {
  if (s.batch == 0 || s.heads == 0 || s.tq == 0 || s.d == 0) return;
  const KernelSet& set = *choice().set;
  const size_t floats = set.head_floats(s);
  run(parallel, pool, s.batch * s.heads, [&](int64_t part) {
    const int64_t b = part / s.heads, h = part % s.heads;
    float* memory = own_memory.floats(floats);
    if (!memory) return false;
    set.head(s, q + b * s.q_batch + h * s.d, k + b * s.k_batch + h * s.k_head, v + b * s.v_batch + h * s.v_head,
             bias ? bias + b * s.bias_batch + h * s.bias_head : nullptr, out + (b * s.tq * s.heads + h) * s.d, memory);
    return true;
  });
}

}  // namespace vlprune
