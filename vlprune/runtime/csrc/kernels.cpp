// Cuts the work of an operator into parts for ONNX Runtime's thread pool; the parts are computed by a kernel set.
#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
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
constexpr int64_t kTransposed = 256;  // columns per part of the first step

// The threads a pool may have. ONNX Runtime does not tell, but by default it has one per core.
int64_t threads() {
  static const int64_t count = std::max(1u, std::thread::hardware_concurrency());
  return count;
}

}  // namespace

const char* isa() { return choice().set->name; }
const char* choose_isa() { return choice().refusal; }

void sparse_linear(const SparseWeights& w, const float* x, int64_t tokens, const float* residual, float* y,
                   ParallelFor parallel, void* pool) {
  if (tokens == 0) return;
  const KernelSet& set = *choice().set;
  const int64_t panels = (w.N + w.panel - 1) / w.panel;
  auto moved = [&](const float* base, int64_t token) { return base ? base + token * w.N : nullptr; };

  if (tokens <= set.row_tokens) {
    run(parallel, pool, panels, [&](size_t panel) {
      float* sums = own_memory.floats(w.panel);
      if (!sums) return false;
      for (int64_t t = 0; t < tokens; ++t)
        set.row(w, panel, x + t * w.K, moved(residual, t), y + t * w.N, sums);
      return true;
    });
    return;
  }

  const int most = w.group == 1 ? set.vectors : set.vectors_grouped;
  const Tiles shared_out(tokens, set.width, most, threads());
  const bool small = shared_out.vectors * set.width * w.K <= kSmall;
  const bool own = !small && shared_out.busiest(threads()) * threads() <= kUneven * shared_out.vectors;
  const Tiles tiles = own ? shared_out : Tiles(tokens, set.width, most, 1);
  const int64_t largest = (tiles.vectors + tiles.count - 1) / tiles.count * set.width;  // tokens of a tile
  auto compute = [&](int64_t tile, int64_t panel, const float* transposed, float* sums) {
    const int64_t token = tiles.first_token(tile);
    set.panel(w, panel, transposed, tiles.tokens_of(tile), tiles.vectors_of(tile), moved(residual, token),
              y + token * w.N, sums);
  };

  if (own) {
    run(parallel, pool, tiles.count, [&](size_t tile) {
      float* memory = own_memory.floats((w.K + w.panel) * largest);
      if (!memory) return false;
      set.transpose(x + tiles.first_token(tile) * w.K, w.K, tiles.tokens_of(tile), tiles.vectors_of(tile), 0, w.K,
                    memory);
      for (int64_t panel = 0; panel < panels; ++panel) compute(tile, panel, memory, memory + w.K * largest);
      return true;
    });
    return;
  }

  float* transposed = shared_memory.floats(tiles.vectors * set.width * w.K);
  if (!transposed) throw std::bad_alloc();
  const int64_t pieces = (w.K + kTransposed - 1) / kTransposed;
  auto place = [&](int64_t tile) { return transposed + tiles.first_token(tile) * w.K; };
  run(parallel, pool, tiles.count * pieces, [&](size_t part) {
    const int64_t tile = part / pieces, k0 = part % pieces * kTransposed;
    set.transpose(x + tiles.first_token(tile) * w.K, w.K, tiles.tokens_of(tile), tiles.vectors_of(tile), k0,
                  std::min(k0 + kTransposed, w.K), place(tile));
    return true;
  });
  run(parallel, pool, tiles.count * panels, [&](size_t part) {
    float* sums = own_memory.floats(w.panel * largest);
    if (!sums) return false;
    const int64_t tile = small ? part % tiles.count : part / panels;
    compute(tile, small ? part / tiles.count : part % panels, place(tile), sums);
    return true;
  });
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
