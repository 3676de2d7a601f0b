// Any processor the compiler knows: 4 floats by vector extensions (SSE2, NEON).
#include <utility>

#include "kernel_set.h"

namespace vlprune {
namespace {

constexpr int W = 4;
#include "vectors.inl"
using H = F;  // halves cost what wholes do
using HU = FU;

#if defined(__aarch64__)  // 32 registers
constexpr int kVectors = 16, kVectorsGrouped = 4, kRowTokens = 4, kChains = 16;
constexpr int kHeadRows = 6, kHeadVectors = 4;
#else
constexpr int kVectors = 8, kVectorsGrouped = 2, kRowTokens = 4, kChains = 8;
constexpr int kHeadRows = 6, kHeadVectors = 2;
#endif

constexpr int kHalfSums = 8;
constexpr bool kHalves = false;
inline H low(F v) { return v; }

struct Quad {
  F v;
};
inline Quad quad(const float* p) { return {*reinterpret_cast<const FU*>(p)}; }
inline float widen(uint16_t half);
inline Quad quad(const uint16_t* p) {
  uint16_t half[4];
  __builtin_memcpy(half, p, sizeof half);
  return {F{widen(half[0]), widen(half[1]), widen(half[2]), widen(half[3])}};
}
inline F widened(const uint16_t* p) { return quad(p).v; }
template <int U>
inline F lane(Quad w) {
#if defined(VLPRUNE_NO_SHUFFLEVECTOR)
  return __builtin_shuffle(w.v, I{U, U, U, U});
#else
  return __builtin_shufflevector(w.v, w.v, U, U, U, U);
#endif
}

inline F at_least(F x, float low) { return (F{} + low) > x ? F{} + low : x; }
inline F within(F x, float most) {
  x = x > most ? F{} + most : x;
  return x < -most ? F{} - most : x;
}
inline F scaled(F p, F n) {
  const I whole = __builtin_convertvector(n, I), half = whole >> 1;  // 2^n may be no normal number: two factors
  return p * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
}
inline F reciprocal(F x) { return 1.f / x; }

template <class T>
inline bool look_up_panel(const SparseWeights&, int64_t, const T*, const float*, float*) {
  return false;
}

#include "kernels.inl"

}  // namespace

const KernelSet kPortable = {"portable", W, kVectors, kVectorsGrouped, kRowTokens, normalise, transpose,
    accumulate, activate, finish, row, half_rows, head, head_floats};

}  // namespace vlprune
