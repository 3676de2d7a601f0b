// One set of kernels per instruction set: kernels_<isa>.cpp fills such a table from the templates in kernels.inl.
#pragma once

#include "kernels.h"

namespace vlprune {

struct KernelSet {
  const char* name;
  int width;            // W
  int vectors;          // vectors per token tile, at most: 1-row groups
  int vectors_grouped;  // the same for 4-row groups, whose sums take four times the registers
  int row_tokens;       // up to so many tokens, 4 at most, go through `row` instead of through tiles

  // norm(x [K]) -> y [K].
  void (*normalise)(const Norm& norm, const float* x, int64_t K, float* y);
  // Up to W tokens of x [tokens, K], columns k0 to k1 -> tile [k1 - k0, W], rows `side` floats apart: tokens side by
  // side, the missing ones zero; with `norm`, normalised on the way.
  void (*transpose)(const float* x, int64_t K, int tokens, int64_t k0, int64_t k1, const Norm* norm, float* tile,
                    int64_t side);

  // Adds column blocks b0 to b1 of one panel to `sums` [panel, vectors * W], which block 0 starts at the bias. `tile`
  // begins at block b0. y, if not null, is where `finish` will write next: it is fetched meanwhile, as is the residual.
  void (*accumulate)(const SparseWeights& weights, int64_t panel, const float* tile, int vectors, int64_t b0, int64_t b1,
                     float* sums, int tokens, const float* residual, const float* y);

  // The sums of one panel: activated in place, they are a part of a second layer's tile ...
  void (*activate)(const SparseWeights& weights, int64_t panel, int vectors, float* sums);
  // ... or activated, transposed, the residual added, for y.
  void (*finish)(const SparseWeights& weights, int64_t panel, const float* sums, int tokens, int vectors,
                 const float* residual, float* y);

  // The outputs of one panel for few tokens: x [K] for one token, else [K, 4], tokens side by side. `sums`: memory for
  // kRowFloats floats per row of the panel.
  static constexpr int kRowFloats = 16;
  void (*row)(const SparseWeights& weights, int64_t panel, const float* x, int tokens, const float* residual, float* y,
              float* sums);

  // Outputs n0 to n1 of a dense layer for all tokens.
  void (*half_rows)(const HalfWeights& weights, int64_t n0, int64_t n1, const float* x, int64_t tokens, float* y);

  // One head of one sample. `memory`: attention_floats(shape) floats.
  void (*head)(const AttentionShape& shape, const float* q, const float* k, const float* v, const float* bias,
               float* out, float* memory);
  size_t (*head_floats)(const AttentionShape& shape);
};

extern const KernelSet kPortable;
#if defined(__x86_64__)
extern const KernelSet kAvx2;
extern const KernelSet kAvx512;
#endif

}  // namespace vlprune
