// AVX-512 (F, BW, DQ, VL): 16 floats, 32 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#include "kernel_set.h"

namespace vlprune {
namespace {

constexpr int W = 16;
#include "vectors.inl"
typedef float H __attribute__((vector_size(32)));
typedef float HU __attribute__((vector_size(32), aligned(1), may_alias));

constexpr int kVectors = 4, kVectorsGrouped = 4, kRowTokens = 4, kChains = 8;
constexpr bool kHalves = true;
inline H low(F v) { return _mm512_castps512_ps256(v); }
constexpr int kHalfSums = 16;
constexpr int kHeadRows = 6, kHeadVectors = 4;

struct Quad {
  __m512 v;
};
inline Quad quad(const float* p) { return {_mm512_broadcast_f32x4(_mm_loadu_ps(p))}; }
inline Quad quad(const uint16_t* p) {
  return {_mm512_broadcast_f32x4(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
template <int U>
inline F lane(Quad w) {
  return _mm512_permute_ps(w.v, U * 0x55);
}

inline F widened(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline F at_least(F x, float low) { return _mm512_max_ps(_mm512_set1_ps(low), x); }
inline F within(F x, float most) { return _mm512_range_ps(x, _mm512_set1_ps(most), 2); }  // least magnitude, sign of x
inline F scaled(F p, F n) { return _mm512_scalef_ps(p, n); }
inline F reciprocal(F x) {
  const F r = _mm512_rcp14_ps(x);
  return r * (2.f - x * r);
}

template <class T>
bool look_up_panel(const SparseWeights& w, int64_t panel, const T* values, const float* x, float* sums);

#include "kernels.inl"

// --- one token --------------------------------------------------------------------------------------------------------

// Gathers are slow on many processors; but the columns of a block fit the registers, two of which a permutation can
// look up at a time. PAIRS of them hold 32 * PAIRS columns.
template <int PAIRS>
inline F looked_up(const F (&columns)[2 * PAIRS], __m512i index) {
  F found[PAIRS];
#pragma GCC unroll 8
  for (int i = 0; i < PAIRS; ++i) found[i] = _mm512_permutex2var_ps(columns[2 * i], index, columns[2 * i + 1]);
  const __mmask16 odd = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
#pragma GCC unroll 8
  for (int i = 0; i + 1 < PAIRS; i += 2) found[i] = _mm512_mask_blend_ps(odd, found[i], found[i + 1]);
  if (PAIRS > 2) {
    const __mmask16 second = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
    found[0] = _mm512_mask_blend_ps(second, found[0], found[2]);
    if (PAIRS > 6) found[4] = _mm512_mask_blend_ps(second, found[4], found[6]);
  }
  if (PAIRS > 4) found[0] = _mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(128)), found[0], found[4]);
  return found[0];
}

inline F some(const float* p, __mmask16 which) { return _mm512_maskz_loadu_ps(which, p); }
inline F some(const uint16_t* p, __mmask16 which) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(which, p)); }

// sums [panel, W]: a row's products stay in lanes until all blocks are done.
template <int PAIRS, class T>
void look_up_blocks(const SparseWeights& w, int64_t panel, const float* x, float* sums) {
  const float* at_block = nullptr;
  F columns[2 * PAIRS];
  each_row<T>(w, panel, x, 1, [&](int row, int count, const T* values, const uint8_t* indices, const float* from) {
    if (from != at_block) {
      at_block = from;
      const int64_t width = least(w.block, w.K - (from - x));
#pragma GCC unroll 16
      for (int i = 0; i < 2 * PAIRS; ++i) {
        const int64_t here = width - i * W;
        columns[i] = here >= W ? load(from + i * W) : here > 0 ? load_part(from + i * W, here) : F{};
      }
    }
    F sum = load(sums + row * W);
    for (; count > 0; count -= W, values += W, indices += W) {
      const __mmask16 which = count >= W ? 0xffff : (1u << count) - 1;
      const __m512i index = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(which, indices));
      // Masked, as a lane that counts for nothing may find an infinity.
      sum = _mm512_mask3_fmadd_ps(some(values, which), looked_up<PAIRS>(columns, index), sum, which);
    }
    store(sums + row * W, sum);
  });
}

template <class T>
bool look_up_panel(const SparseWeights& w, int64_t panel, const T*, const float* x, float* sums) {
  const int64_t n0 = panel * w.panel, n = least(w.panel, w.N - n0);
  for (int64_t i = 0; i < n; ++i) store(sums + i * W, F{});
  if (w.block <= 128)
    look_up_blocks<4, T>(w, panel, x, sums);
  else if (w.block <= 192)
    look_up_blocks<6, T>(w, panel, x, sums);
  else
    look_up_blocks<8, T>(w, panel, x, sums);
  for (int64_t i = 0; i < n; i += W) {
    F block[W], sum = w.bias ? n - i >= W ? load(w.bias + n0 + i) : load_part(w.bias + n0 + i, n - i) : F{};
    for (int64_t r = 0; r < W; ++r) block[r] = i + r < n ? load(sums + (i + r) * W) : F{};
    sum += totals(block);
    n - i >= W ? store(sums + i, sum) : store_part(sums + i, sum, n - i);  // over rows that have been read
  }
  return true;
}

}  // namespace

const KernelSet kAvx512 = {"avx512", W, kVectors, kVectorsGrouped, kRowTokens, normalise, transpose,
    accumulate, activate, finish, row, half_rows, head, head_floats};

}  // namespace vlprune
#endif
