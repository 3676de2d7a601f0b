// AVX2 with FMA and F16C: 8 floats, 16 registers.
#if defined(__x86_64__)
#include <immintrin.h>

#include "kernel_set.h"

namespace vlprune {
namespace {

constexpr int W = 8;
typedef float F __attribute__((vector_size(32)));
typedef float FU __attribute__((vector_size(32), aligned(1), may_alias));
typedef int32_t I __attribute__((vector_size(32), may_alias));
template <int...>
struct Sequence {};
using Lanes = Sequence<0, 1, 2, 3, 4, 5, 6, 7>;

constexpr int kVectors = 8, kVectorsGrouped = 2, kRowTokens = 2, kChains = 8;
constexpr int kHeadRows = 6, kHeadVectors = 2;

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

inline F at_least(F x, float low) { return _mm256_max_ps(_mm256_set1_ps(low), x); }
inline F scaled(F p, F n) {
  const I whole = (I)_mm256_cvtps_epi32(n), half = whole >> 1;  // 2^n may be no normal number: two factors
  return p * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
}
inline F reciprocal(F x) {
  const F r = _mm256_rcp_ps(x);
  return r * (2.f - x * r);
}

#include "kernels.inl"

}  // namespace

const KernelSet kAvx2 = {"avx2", W, kVectors, kVectorsGrouped, kRowTokens, transpose,
    accumulate, activate, finish, row, head, head_floats};

}  // namespace vlprune
#endif
