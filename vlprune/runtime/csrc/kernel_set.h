// One set of kernels per instruction set: kernels_<isa>.cpp fills such a table from the templates in kernels.inl.
#pragma once

#include "kernels.h"

namespace vlprune {

struct KernelSet {
  const char* name;
  int width;            // W
  int vectors;          // vectors per token tile, at most: 1-row groups
  int vectors_grouped;  // the same for 4-row groups, whose sums take four times the registers
  int row_tokens;       // up to so many tokens go one by one through `rows` instead of through tiles

  // x [tokens, K], columns k0 to k1 -> tile [K, vectors * W]: tokens side by side, the missing ones zero.
  void (*transpose)(const float* x, int64_t K, int tokens, int vectors, int64_t k0, int64_t k1, float* tile);

  // The outputs of one panel for the tokens of one tile. `sums` is working memory: [panel, vectors * W] floats.
  void (*panel)(const SparseWeights& weights, int64_t panel, const float* tile, int tokens, int vectors,
                const float* residual, float* y, float* sums);

  // The outputs of one panel for one token. `sums`: [panel] floats.
  void (*row)(const SparseWeights& weights, int64_t panel, const float* x, const float* residual, float* y,
              float* sums);

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
