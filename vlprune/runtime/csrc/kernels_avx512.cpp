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

constexpr int kVectors = 4, kVectorsGrouped = 4, kRowTokens = 3, kChains = 8;
constexpr bool kHalves = true;
inline H low(F v) { return _mm512_castps512_ps256(v); }
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

inline F at_least(F x, float low) { return _mm512_max_ps(_mm512_set1_ps(low), x); }
inline F within(F x, float most) { return _mm512_range_ps(x, _mm512_set1_ps(most), 2); }  // least magnitude, sign of x
inline F scaled(F p, F n) { return _mm512_scalef_ps(p, n); }
inline F reciprocal(F x) {
  const F r = _mm512_rcp14_ps(x);
  return r * (2.f - x * r);
}

#include "kernels.inl"

}  // namespace

const KernelSet kAvx512 = {"avx512", W, kVectors, kVectorsGrouped, kRowTokens, normalise, transpose,
    accumulate, activate, finish, row, head, head_floats};

}  // namespace vlprune
#endif
