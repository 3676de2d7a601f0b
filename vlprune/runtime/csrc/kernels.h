// What the operators compute with: the same on every machine, whatever instruction set is in use.
//
// Letters: T tokens (rows of x), K in_features, N out_features, W floats of a vector register.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vlprune {

enum Activation { kNone, kGelu, kGeluTanh, kQuickGelu, kRelu };

// The weights of a SparseLinear node. Pointers go into the initializers of the model: nothing is copied, and nothing is
// assumed about alignment. Who makes one has checked that all numbers fit together; here nothing is checked again.
struct SparseWeights {
  const void* values;        // [group * columns kept], float or IEEE half
  bool half;
  const uint8_t* indices;    // [columns kept] column inside its block, ascending within a row
  const uint8_t* rows;       // per panel, per block: all rows (or groups of rows) of the panel, longest first
  const uint16_t* counts;    // the columns kept of each
  const float* bias;         // [N] or null
  int64_t K, N;
  int block, panel, group;   // columns of a block, rows of a panel, rows that share their columns (1 or 4)
  int activation;            // Activation
  const int64_t* offsets;    // [panels * blocks + 1] where a panel's block begins in `indices`; values: group * that
};

// A LayerNorm before the layer: scale [K], bias [K]; the mean and variance are those of a token's K features.
struct Norm {
  const float *scale, *bias;
  float epsilon;
};

// Runs fn(data, 0), ..., fn(data, total - 1), in any order, on as many threads as the pool has.
using ParallelFor = void (*)(void* pool, void (*fn)(void*, size_t), size_t total, void* data);

// y [T, N] = activation(norm(x [T, K]) W^T + bias) + residual [T, N]; norm, bias and residual may be null.
// Throws std::bad_alloc when its working memory, kept per thread from the first call on, cannot be had.
void sparse_linear(const SparseWeights& weights, const Norm* norm, const float* x, int64_t tokens,
                   const float* residual, float* y, ParallelFor parallel, void* pool);

// y [T, N] = second(first(norm(x))) + residual, where first.N = second.K and only `first` has an activation: what lies between
// stays transposed, and with its thread where there are tokens enough.
void sparse_mlp(const SparseWeights& first, const SparseWeights& second, const Norm* norm, const float* x,
                int64_t tokens, const float* residual, float* y, ParallelFor parallel, void* pool);

// The weights of a HalfLinear node: dense, as an output layer tied to word embeddings is.
struct HalfWeights {
  const uint16_t* values;  // [N, K] IEEE half, at any address
  const float* bias;       // [N] or null
  int64_t K, N;
};

// y [T, N] = x [T, K] W^T + bias.
void half_linear(const HalfWeights& weights, const float* x, int64_t tokens, float* y, ParallelFor parallel, void* pool);

// Strides are in floats. Heads lie side by side in a row of q (distance d); k and v say where theirs lie.
struct AttentionShape {
  int64_t batch, heads, tq, tk, d;
  int64_t q_token, q_batch;
  int64_t k_token, k_head, k_batch;
  int64_t v_token, v_head, v_batch;
  int64_t bias_batch, bias_head, bias_q, bias_k;  // 0 where the bias is the same for all
  float scale;
};

// out [batch, tq, heads * d] = softmax(scale q k^T + bias) v; bias may be null. Throws like sparse_linear.
void attention(const AttentionShape& shape, const float* q, const float* k, const float* v, const float* bias,
               float* out, ParallelFor parallel, void* pool);

// The kernel set in use, "avx512", "avx2" or "portable": the best this processor has, or what the environment variable
// VLPRUNE_ISA asks for.
const char* isa();

// Null, or why the set that VLPRUNE_ISA asks for cannot be used.
const char* choose_isa();

}  // namespace vlprune
