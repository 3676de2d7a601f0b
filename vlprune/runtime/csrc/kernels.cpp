// Cuts the work of an operator into parts for ONNX Runtime's thread pool; the parts are computed by a kernel set.
#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <thread>
#include <utility>

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

// Turns a lambda (part number) -> bool into what the pool runs; false = no memory.
template <class F>
void run(ParallelFor parallel, void* pool, size_t parts, const F& f) {
  struct Call {
    const F& f;
    std::atomic<bool> failed;
  } call{f, {false}};
  auto part = [](void* data, size_t index) {
    Call& call = *static_cast<Call*>(data);
    if (!call.f(index)) call.failed = true;
  };
  if (parts == 1)
    part(&call, 0);
  else
    parallel(pool, part, parts, &call);
  if (call.failed) throw std::bad_alloc();
}

// The tokens of a call cut into tiles of whole vectors, as equal as can be.
struct Tiles {
  int64_t tokens, vectors, count;
  int width;

  // `share`: the number of tiles is a multiple of it where there are enough vectors.
  Tiles(int64_t tokens, int width, int most, int64_t share)
      : tokens(tokens), vectors((tokens + width - 1) / width), count((vectors + most - 1) / most), width(width) {
    count = std::min((count + share - 1) / share * share, vectors);
  }

  // Vectors of the thread that has most to do.
  int64_t busiest(int64_t share) const {
    const int64_t rounds = (count + share - 1) / share, longer = vectors % count;  // tiles with a vector more
    return rounds * (vectors / count) + (longer + share - 1) / share;
  }

  int64_t first_vector(int64_t tile) const { return tile * vectors / count; }
  int64_t first_token(int64_t tile) const { return first_vector(tile) * width; }
  int vectors_of(int64_t tile) const { return static_cast<int>(first_vector(tile + 1) - first_vector(tile)); }
  int tokens_of(int64_t tile) const {
    return static_cast<int>(std::min(first_token(tile + 1), tokens) - first_token(tile));
  }
};

// Few tokens are transposed first, by all threads, and then computed panel by panel: no thread idles, and each reads only
// its part of the weights. When that much no longer fits the cache of a core (kSmall floats of the usual 1 MB), each thread
// transposes and computes tiles of its own, if they can be shared out evenly, or nearly (kUneven).
constexpr int64_t kSmall = 192 * 1024;
constexpr double kUneven = 1.15;
constexpr int64_t kPiece = 768;        // columns
constexpr int64_t kTransposed = 256;  // columns per part of the first step

// The threads a pool may have. ONNX Runtime does not tell, but by default it has one per core.
int64_t threads() {
  static const int64_t count = std::max(1u, std::thread::hardware_concurrency());
  return count;
}

int64_t blocks_of(const SparseWeights& w) { return (w.K + w.block - 1) / w.block; }
int64_t panels_of(const SparseWeights& w) { return (w.N + w.panel - 1) / w.panel; }

// Both layers, or with `first` null only one, whose input is then x.
void layers(const SparseWeights* first, const SparseWeights& w, const float* x, int64_t tokens, const float* residual,
            float* y, ParallelFor parallel, void* pool) {
  if (tokens == 0) return;
  const KernelSet& set = *choice().set;
  const int64_t K = first ? first->K : w.K;
  const int64_t panels = panels_of(w), first_panels = first ? panels_of(*first) : 0;
  const int64_t between = first ? w.K : 0;
  const int64_t sums = std::max<int64_t>(w.panel, first ? first->panel : 0);
  auto moved = [&](const float* base, int64_t token) { return base ? base + token * w.N : nullptr; };

  if (tokens <= set.row_tokens) {
    float* hidden = nullptr;
    if (first) {
      hidden = shared_memory.floats(tokens * between);
      if (!hidden) throw std::bad_alloc();
      run(parallel, pool, first_panels, [&](size_t panel) {
        float* memory = own_memory.floats(sums);
        if (!memory) return false;
        for (int64_t t = 0; t < tokens; ++t)
          set.row(*first, panel, x + t * K, nullptr, hidden + t * between, memory);
        return true;
      });
    }
    const float* input = first ? hidden : x;
    run(parallel, pool, panels, [&](size_t panel) {
      float* memory = own_memory.floats(sums);
      if (!memory) return false;
      for (int64_t t = 0; t < tokens; ++t)
        set.row(w, panel, input + t * w.K, moved(residual, t), y + t * w.N, memory);
      return true;
    });
    return;
  }

  const bool grouped = w.group != 1 || (first && first->group != 1);
  const int most = grouped ? set.vectors_grouped : set.vectors;
  const Tiles shared_out(tokens, set.width, most, threads());
  const bool small = shared_out.vectors * set.width * std::max(K, w.K) <= kSmall;
  const bool own = !small && shared_out.busiest(threads()) * threads() <= kUneven * shared_out.vectors;
  const Tiles tiles = own ? shared_out : Tiles(tokens, set.width, most, 1);
  const int64_t largest = (tiles.vectors + tiles.count - 1) / tiles.count * set.width;  // tokens of a tile
  auto transpose = [&](int64_t tile, int64_t k0, int64_t k1, float* to) {
    set.transpose(x + tiles.first_token(tile) * K, K, tiles.tokens_of(tile), tiles.vectors_of(tile), k0, k1, to);
  };
  auto hidden_panel = [&](int64_t tile, int64_t panel, const float* from, float* to) {
    const int vectors = tiles.vectors_of(tile);
    set.accumulate(*first, panel, from, vectors, 0, blocks_of(*first), to, 0, nullptr, nullptr);
    set.activate(*first, panel, vectors, to);
  };

  if (own) {
    // A piece of the second layer's columns at a time: tile, piece and sums stay in the cache together.
    const int64_t step = first ? std::lcm<int64_t>(w.block, first->panel) : w.block;
    const int64_t piece = std::min(std::max<int64_t>(kPiece / step, 1) * step, w.K);
    const int64_t input = first ? K : 0;  // without a first layer the piece is all that is transposed at a time
    run(parallel, pool, tiles.count, [&](size_t tile) {
      float* from = own_memory.floats((input + piece + w.N) * largest);
      if (!from) return false;
      const int vectors = tiles.vectors_of(tile), count = tiles.tokens_of(tile);
      const int64_t token = tiles.first_token(tile), side = vectors * set.width;
      float *columns = from + input * largest, *sums = columns + piece * largest;
      if (first) transpose(tile, 0, K, from);
      for (int64_t k0 = 0; k0 < w.K; k0 += piece) {
        const int64_t k1 = std::min(k0 + piece, w.K);
        const bool last = k1 == w.K;
        if (first)
          for (int64_t k = k0; k < k1; k += first->panel)
            hidden_panel(tile, k / first->panel, from, columns + (k - k0) * side);
        else
          transpose(tile, k0, k1, columns);
        for (int64_t panel = 0; panel < panels; ++panel) {
          float* own_sums = sums + panel * w.panel * side;
          set.accumulate(w, panel, columns, vectors, k0 / w.block, (k1 + w.block - 1) / w.block, own_sums, count,
                         moved(residual, token), last ? y + token * w.N : nullptr);
          if (last) set.finish(w, panel, own_sums, count, vectors, moved(residual, token), y + token * w.N);
        }
      }
      return true;
    });
    return;
  }

  const int64_t side = tiles.vectors * set.width;
  float* transposed = shared_memory.floats(side * (K + between));
  if (!transposed) throw std::bad_alloc();
  float* hidden = transposed + side * K;
  const int64_t pieces = (K + kTransposed - 1) / kTransposed;
  run(parallel, pool, tiles.count * pieces, [&](size_t part) {
    const int64_t tile = part / pieces, k0 = part % pieces * kTransposed;
    transpose(tile, k0, std::min(k0 + kTransposed, K),
              transposed + tiles.first_token(tile) * K + k0 * tiles.vectors_of(tile) * set.width);
    return true;
  });
  // Part -> (tile, panel): tile by tile where a tile fills the cache, else panel by panel.
  auto split = [&](size_t part, int64_t count) {
    return small ? std::pair<int64_t, int64_t>(part % tiles.count, part / tiles.count)
                 : std::pair<int64_t, int64_t>(part / count, part % count);
  };
  if (first)
    run(parallel, pool, tiles.count * first_panels, [&](size_t part) {
      const auto [tile, panel] = split(part, first_panels);
      hidden_panel(tile, panel, transposed + tiles.first_token(tile) * K,
                   hidden + tiles.first_token(tile) * between + panel * first->panel * tiles.vectors_of(tile) * set.width);
      return true;
    });
  const float* input = first ? hidden : transposed;
  run(parallel, pool, tiles.count * panels, [&](size_t part) {
    float* memory = own_memory.floats(w.panel * largest);
    if (!memory) return false;
    const auto [tile, panel] = split(part, panels);
    const int64_t token = tiles.first_token(tile);
    const int vectors = tiles.vectors_of(tile), count = tiles.tokens_of(tile);
    set.accumulate(w, panel, input + token * w.K, vectors, 0, blocks_of(w), memory, count, moved(residual, token),
                   y + token * w.N);
    set.finish(w, panel, memory, count, vectors, moved(residual, token), y + token * w.N);
    return true;
  });
}

}  // namespace

const char* isa() { return choice().set->name; }
const char* choose_isa() { return choice().refusal; }

void sparse_linear(const SparseWeights& weights, const float* x, int64_t tokens, const float* residual, float* y,
                   ParallelFor parallel, void* pool) {
  layers(nullptr, weights, x, tokens, residual, y, parallel, pool);
}

void sparse_mlp(const SparseWeights& first, const SparseWeights& second, const float* x, int64_t tokens,
                const float* residual, float* y, ParallelFor parallel, void* pool) {
  layers(&first, second, x, tokens, residual, y, parallel, pool);
}

void attention(const AttentionShape& s, const float* q, const float* k, const float* v, const float* bias, float* out,
               ParallelFor parallel, void* pool) {
  if (s.batch == 0 || s.heads == 0 || s.tq == 0 || s.d == 0) return;
  const KernelSet& set = *choice().set;
  const size_t floats = set.head_floats(s);
  run(parallel, pool, s.batch * s.heads, [&](size_t part) {
    const int64_t b = part / s.heads, h = part % s.heads;
    float* memory = own_memory.floats(floats);
    if (!memory) return false;
    set.head(s, q + b * s.q_batch + h * s.d, k + b * s.k_batch + h * s.k_head, v + b * s.v_batch + h * s.v_head,
             bias ? bias + b * s.bias_batch + h * s.bias_head : nullptr, out + (b * s.tq * s.heads + h) * s.d, memory);
    return true;
  });
}

}  // namespace vlprune
