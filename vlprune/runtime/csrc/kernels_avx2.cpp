// AVX2 with FMA and F16C: 8 floats, 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include <utility>

#include "kernel_set.h"

namespace vlprune {
namespace {

constexpr int W = 8;
#include "vectors.inl"
using H = F;  // halves cost what wholes do
using HU = FU;

constexpr int kVectors = 8, kVectorsGrouped = 2, kRowTokens = 4, kChains = 8;
constexpr int kHalfSums = 8;
constexpr int kHeadRows = 6, kHeadVectors = 2;

constexpr bool kHalves = false;
inline H low(F v) { return v; }

struct Quad {
  __m256 v;
};
inline Quad quad(const float* p) { return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p))}; }
inline Quad quad(const uint16_t* p) {
  const __m128 four = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_insertf128_ps(_mm256_castps128_ps256(four), four, 1)};
}
template <int U>
inline F lane(Quad w) {
  return _mm256_permute_ps(w.v, U * 0x55);
}

inline F widened(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline F at_least(F x, float low) { return _mm256_max_ps(_mm256_set1_ps(low), x); }
inline F within(F x, float most) {
  return _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-most)), _mm256_set1_ps(most));
}
inline F scaled(F p, F n) {
  const I whole = (I)_mm256_cvtps_epi32(n), half = whole >> 1;  // 2^n may be no normal number: two factors
  return p * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
}
inline F reciprocal(F x) {
  const F r = _mm256_rcp_ps(x);
  return r * (2.f - x * r);
}

template <class T>
inline bool look_up_panel(const SparseWeights&, int64_t, const T*, const float*, float*) {
  return false;
}

#include "kernels.inl"

}  // namespace

const KernelSet kAvx2 = {"avx2", W, kVectors, kVectorsGrouped, kRowTokens, normalise, transpose,
    accumulate, activate, finish, row, half_rows, head, head_floats};

}  // namespace vlprune
#endif
