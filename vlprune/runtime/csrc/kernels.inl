// The kernels, written once for every instruction set. A file that includes this defines before, in an unnamed
// namespace (so that the linker never mixes code of two instruction sets):
//
//   constexpr int W                         floats of a vector; then vectors.inl: F, FU, I, Lanes
//   struct Quad; Quad quad(const float*), quad(const uint16_t*)   four weights, halves widened
//   template <int U> F lane(Quad)           weight U in every lane
//   F widened(const uint16_t*)              W halves
//   constexpr int kVectors, kVectorsGrouped, kRowTokens           see KernelSet
//   constexpr int kChains                   independent additions that keep the processor busy
//   constexpr int kHalfSums                 sums of a dense layer that fit the registers, a multiple of 4 and of W
//   constexpr int kHeadRows, kHeadVectors   the block of the attention products that fits the registers
//   constexpr bool kHalves; H, HU           half vectors are half the work; a vector of W / 2 floats, without alignment
//   H low(F)                                its first half
//   F at_least(F, float)                    maximum; NaN stays
//   F within(F x, float most)               x, its magnitude at most that; anything for NaN
//   F scaled(F p, F n)                      p 2^n for whole n in [-150, 128], infinity and subnormals included
//   F reciprocal(F)                         1 / x to 2e-7 for normal x whose reciprocal is normal; NaN stays
//   template <class T> bool look_up_panel(weights, panel, const T* values, x, sums)
//                                           one token's sums [panel's rows] with x in registers, or false: not possible
//
// No function of the standard library is called that might be inlined here and shared with other files.

// --- vectors ----------------------------------------------------------------------------------------------------------

inline F load(const float* p) { return *reinterpret_cast<const FU*>(p); }
inline void store(float* p, F v) { *reinterpret_cast<FU*>(p) = v; }
inline F all(float v) { return F{} + v; }

// Floats of a row that are fetched ahead where rows lie too far apart for the processor to do it.
constexpr int64_t kAhead = 192;
constexpr int64_t kAheadBytes = 4096;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Weights and counts may lie at any address: an initializer can be a piece of a mapped file.
template <class T>
inline T at(const T* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

inline float widen(float v) { return v; }
inline float widen(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  // The exponent of a half ends 112 below that of a float; multiplying also puts subnormal halves right.
  uint32_t bits = (half & 0x7fffu) << 13;
  if (bits >= 0x0f800000u) bits += 0x70000000u;  // infinity, NaN
  float value;
  __builtin_memcpy(&value, &bits, 4);
  if (bits < 0x0f800000u) value *= 5.192296858534828e33f;  // 2^112
  return half & 0x8000u ? -value : value;
#endif
}

// 2^x to about 2 ulp for x <= 128; zero and NaN as they should be.
inline F power_of_two(F x) {
  x = at_least(x, -150.f);
  const F magic = all(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const F n = (x + magic) - magic;
  const F r = x - n;
  // Fitted on [-0.5, 0.5]: relative error 9e-8, with float arithmetic 1.7e-7; 2^0 is 1.
  F p = r * 1.326472731307149e-3f + 9.671512991189957e-3f;
  p = p * r + 5.550733581185341e-2f;
  p = p * r + 2.402224242687225e-1f;
  p = p * r + 6.931470036506653e-1f;
  p = p * r + 1.f;
  return scaled(p, n);
}

// e^x to about 1 ulp; infinity, zero and NaN as they should be.
inline F exponential(F x) {
  x = at_least(-at_least(-x, -89.f), -104.f);
  const F magic = all(12582912.f);
  const F n = (x * 1.44269504088896341f + magic) - magic;
  const F r = x - n * 0.693145751953125f - n * 1.42860682030941723e-6f;
  F p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return scaled(p * r * r + r + 1.f, n);
}

inline F activated(F x, int activation) {
  switch (activation) {
    case kRelu:
      return x < 0.f ? F{} : x;  // NaN stays
    case kQuickGelu:
      return x / (exponential(x * -1.702f) + 1.f);
    case kGeluTanh:  // 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
      return x / (exponential(x * (x * x * 0.044715f + 1.f) * -1.5957691216057308f) + 1.f);
    case kGelu: {
      // x (1 + erf(x / sqrt 2)) / 2. erf(z) / z is a rational function of z^2, fitted on [-3.9, 3.9] (error of erf 1.5e-8,
      // with float arithmetic 1.2e-7); beyond, erf differs from 1 by less than half an ulp.
      const F z = within(x * 0.70710678118654752f, 3.9f);
      const F u = z * z;
      F p = u * 2.05038452e-6f + 2.87455063e-4f;
      F q = u * 3.82305981e-5f + 1.18171901e-3f;
      p = p * u + 3.83681971e-3f;
      q = q * u + 1.51090924e-2f;
      p = p * u + 5.29667421e-2f;
      q = q * u + 1.14757694e-1f;
      p = p * u + 1.91939825e-1f;
      q = q * u + 5.0343402e-1f;
      p = p * u + 1.12837903f;
      q = q * u + 1.f;
      const F half = x * 0.5f;
      return half * (z * p * reciprocal(q)) + half;
    }
    default:
      return x;
  }
}

// --- transposes -------------------------------------------------------------------------------------------------------


// Rows i and i + W/2 are interleaved, log2(W) times: a transposed block.
template <int... L>
inline void zip(F a, F b, F* low, F* high, std::integer_sequence<int, L...>) {
#if defined(VLPRUNE_NO_SHUFFLEVECTOR)  // GCC before 12
  *low = __builtin_shuffle(a, b, I{(L / 2 + L % 2 * W)...});
  *high = __builtin_shuffle(a, b, I{(L / 2 + W / 2 + L % 2 * W)...});
#else
  *low = __builtin_shufflevector(a, b, (L / 2 + L % 2 * W)...);
  *high = __builtin_shufflevector(a, b, (L / 2 + W / 2 + L % 2 * W)...);
#endif
}

inline void transpose_block(F (&block)[W]) {
  F other[W];
  for (int stage = 1; stage < W; stage *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) zip(block[i], block[i + W / 2], &other[2 * i], &other[2 * i + 1], Lanes());
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) block[i] = other[i];
  }
}

// The sum of each of W vectors, side by side; they are overwritten.
inline F totals(F (&sums)[W]) {
  for (int left = W / 2; left >= 1; left /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < left; ++i) {
      F low, high;
      zip(sums[i], sums[i + left], &low, &high, Lanes());
      sums[i] = low + high;
    }
  return sums[0];
}

// `count` <= W floats of a row, zeros after them.
inline F load_part(const float* p, int64_t count) {
  if (count == W) return load(p);
  float part[W] = {};
  __builtin_memcpy(part, p, count * sizeof(float));
  return load(part);
}

inline void store_part(float* p, F v, int64_t count) {
  if (count == W) return store(p, v);
  float part[W];
  store(part, v);
  __builtin_memcpy(p, part, count * sizeof(float));
}

inline float total(F v) {
  float sum = 0;
  for (int i = 0; i < W; ++i) sum += v[i];
  return sum;
}

// Mean and 1 / sqrt(variance + epsilon) of each token's K features.
void moments(const float* x, int64_t K, int tokens, float epsilon, float* mean, float* inverse) {
  const int64_t whole = K / W * W;
  for (int t = 0; t < tokens; ++t) {
    const float* row = x + t * K;
    F sum[4] = {};
    for (int64_t k = 0; k < whole; k += W) sum[k / W % 4] += load(row + k);
    if (whole < K) sum[0] += load_part(row + whole, K - whole);
    mean[t] = total((sum[0] + sum[1]) + (sum[2] + sum[3])) / K;
    F squares[4] = {};
    for (int64_t k = 0; k < whole; k += W) {
      const F apart = load(row + k) - mean[t];
      squares[k / W % 4] += apart * apart;
    }
    float square = total((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (int64_t k = whole; k < K; ++k) square += (row[k] - mean[t]) * (row[k] - mean[t]);
    inverse[t] = 1 / __builtin_sqrtf(square / K + epsilon);
  }
}

void normalise(const Norm& norm, const float* x, int64_t K, float* y) {
  float mean, inverse;
  moments(x, K, 1, norm.epsilon, &mean, &inverse);
  for (int64_t k = 0; k < K; k += W) {
    const int64_t width = least(W, K - k);
    const F scale = load_part(norm.scale + k, width), bias = load_part(norm.bias + k, width);
    store_part(y + k, (load_part(x + k, width) - mean) * inverse * scale + bias, width);
  }
}

void transpose(const float* x, int64_t K, int tokens, int64_t k0, int64_t k1, const Norm* norm, float* tile,
               int64_t side) {
  float mean[W], inverse[W];
  if (norm) moments(x, K, tokens, norm->epsilon, mean, inverse);
  for (int64_t k = k0; k < k1; k += W) {
    const int64_t width = least(W, k1 - k);
    const float* from = x + k;
    F block[W];
    if (tokens == W && width == W) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (!norm) __builtin_prefetch(from + i * K + kAhead);
        block[i] = load(from + i * K);
      }
    } else {
      for (int i = 0; i < W; ++i) block[i] = i < tokens ? load_part(from + i * K, width) : F{};
    }
    if (norm) {
      const F scale = load_part(norm->scale + k, width), bias = load_part(norm->bias + k, width);
      for (int i = 0; i < tokens; ++i) block[i] = (block[i] - mean[i]) * inverse[i] * scale + bias;
    }
    transpose_block(block);
    float* to = tile + (k - k0) * side;
    for (int64_t i = 0; i < width; ++i) store(to + i * side, block[i]);
  }
}

// --- sparse x dense ---------------------------------------------------------------------------------------------------

// The sums of one output feature over a tile of NV vectors, in registers; of the last vector only the first half counts
// where `Half` is true.
template <int NV, bool Half>
struct Sums {
  static constexpr int kFull = NV - Half;
  F full[kFull > 0 ? kFull : 1];
  H half;

  void fill(F v) {
#pragma GCC unroll 16
    for (int i = 0; i < kFull; ++i) full[i] = v;
    if constexpr (Half) half = low(v);
  }
  void read(const float* p) {
#pragma GCC unroll 16
    for (int i = 0; i < kFull; ++i) full[i] = load(p + i * W);
    if constexpr (Half) half = *reinterpret_cast<const HU*>(p + kFull * W);
  }
  void write(float* p) const {
#pragma GCC unroll 16
    for (int i = 0; i < kFull; ++i) store(p + i * W, full[i]);
    if constexpr (Half) *reinterpret_cast<HU*>(p + kFull * W) = half;
  }
  void add_product(F weight, const float* x) {
#pragma GCC unroll 16
    for (int i = 0; i < kFull; ++i) full[i] += weight * load(x + i * W);
    if constexpr (Half) half += low(weight) * *reinterpret_cast<const HU*>(x + kFull * W);
  }
  void add(const Sums& other) {
#pragma GCC unroll 16
    for (int i = 0; i < kFull; ++i) full[i] += other.full[i];
    if constexpr (Half) half += other.half;
  }
};

// Weights are read once from front to end, but the processor's own prefetching stops at every page, and a weight that is
// not there stops everything. So as much is fetched as the row takes, one page ahead.
template <class T>
inline void fetch_weights(const T* values, const uint8_t* indices, int count, int group) {
  for (int i = 0; i < count * group; i += 64 / static_cast<int>(sizeof(T)))
    __builtin_prefetch(reinterpret_cast<const char*>(values + i) + kAheadBytes);
  for (int i = 0; i < count; i += 64) __builtin_prefetch(indices + i + kAheadBytes / 4);
}

// One column block of a panel, each row by itself: sums [rows, NV * W] += weights x tile. In the first block the sums
// start at the bias. Four weights are loaded at once and spread within registers, because a load that spreads costs as
// much as a load of x, and loads are what bounds this loop. With few vectors per token tile, the sums of successive
// weights are kept apart, so that no addition waits for the one before.
template <int NV, bool Half, class T>
void rows_of_block(const float* tile, float* sums, const T* values, const uint8_t* indices, const uint8_t* rows,
                   const uint16_t* counts, int n, bool first, const float* bias) {
  constexpr int kApart = NV * 4 <= kChains ? 4 : NV * 2 <= kChains ? 2 : 1;
  constexpr int64_t side = NV * W;
  for (int r = 0; r < n; ++r) {
    const int row = rows[r];
    float* out = sums + row * side;
    Sums<NV, Half> sum[kApart];
    if (first)
      sum[0].fill(all(bias ? at(bias + row) : 0.f));
    else
      sum[0].read(out);
#pragma GCC unroll 4
    for (int a = 1; a < kApart; ++a) sum[a].fill(F{});
    const int count = at(counts + r);
    fetch_weights(values, indices, count, 1);
    for (const T* end = values + (count & ~3); values != end; values += 4, indices += 4) {
      uint32_t four;
      __builtin_memcpy(&four, indices, 4);
      const Quad w = quad(values);
      sum[0].add_product(lane<0>(w), tile + (four & 255) * side);
      sum[1 % kApart].add_product(lane<1>(w), tile + (four >> 8 & 255) * side);
      sum[2 % kApart].add_product(lane<2>(w), tile + (four >> 16 & 255) * side);
      sum[3 % kApart].add_product(lane<3>(w), tile + (four >> 24) * side);
    }
    for (int rest = count & 3; rest; --rest, ++values, ++indices)
      sum[0].add_product(all(widen(at(values))), tile + *indices * side);
#pragma GCC unroll 4
    for (int a = 1; a < kApart; ++a) sum[0].add(sum[a]);
    sum[0].write(out);
  }
}

// The same for groups of four rows that share their columns: a load of x serves all four.
template <int NV, bool Half, class T>
void groups_of_block(const float* tile, float* sums, const T* values, const uint8_t* indices, const uint8_t* groups,
                     const uint16_t* counts, int n, bool first, const float* bias) {
  constexpr int64_t side = NV * W;
  for (int r = 0; r < n; ++r) {
    const int row = 4 * groups[r];
    float* out = sums + row * side;
    Sums<NV, Half> sum[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      if (first)
        sum[g].fill(all(bias ? at(bias + row + g) : 0.f));
      else
        sum[g].read(out + g * side);
    }
    const int count = at(counts + r);
    fetch_weights(values, indices, count, 4);
    for (const uint8_t* end = indices + count; indices != end; ++indices, values += 4) {
      const float* x = tile + *indices * side;
      const Quad w = quad(values);
      sum[0].add_product(lane<0>(w), x);
      sum[1].add_product(lane<1>(w), x);
      sum[2].add_product(lane<2>(w), x);
      sum[3].add_product(lane<3>(w), x);
    }
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) sum[g].write(out + g * side);
  }
}

// Sums of a panel [n, vectors * W], features by tokens -> y, tokens by features, activated, residual added.
void finish(const SparseWeights& w, int64_t panel, const float* sums, int tokens, int vectors, const float* residual,
            float* y) {
  const int side = vectors * W;
  const int64_t n0 = panel * w.panel, n = least(w.panel, w.N - n0);
  for (int64_t row = 0; row < n; row += W) {
    const int64_t width = least(W, n - row);
    for (int v = 0; v < vectors; ++v) {
      const int rows = tokens - v * W < W ? tokens - v * W : W;
      F block[W];
      const float* from = sums + row * side + v * W;
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) block[i] = i < width ? load(from + i * side) : F{};
      if (w.activation != kNone)
        for (int i = 0; i < W; ++i) block[i] = activated(block[i], w.activation);
      transpose_block(block);
      const int64_t at = v * W * w.N + n0 + row;
      if (width == W) {
        for (int i = 0; i < rows; ++i) {
          F out = block[i];
          if (residual) out += load(residual + at + i * w.N);
          store(y + at + i * w.N, out);
        }
      } else {
        for (int i = 0; i < rows; ++i) {
          F out = block[i];
          if (residual) out += load_part(residual + at + i * w.N, width);
          store_part(y + at + i * w.N, out, width);
        }
      }
    }
  }
}

// How many tokens a tile has, and what a panel's outputs will need, fetched while its sums are computed; y is null when
// they are not for y.
struct Later {
  int64_t tokens;
  const float *residual, *y;
};

template <int NV, bool Half, class T>
void accumulate_as(const SparseWeights& w, int64_t panel, const float* tile, int64_t b0, int64_t b1, const Later& later,
                   float* sums) {
  const int64_t blocks = (w.K + w.block - 1) / w.block, n0 = panel * w.panel;
  const int n = static_cast<int>(least(w.panel, w.N - n0)) / w.group;
  const int64_t lists = (n0 / w.group) * blocks;  // entries of `rows` and `counts` before this panel
  const float* bias = w.bias ? w.bias + n0 : nullptr;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t start = w.offsets[panel * blocks + b], list = lists + b * n;
    const T* values = static_cast<const T*>(w.values) + start * w.group;
    const float* x = tile + (b - b0) * w.block * NV * W;
    const int64_t from = later.tokens * (b - b0) / (b1 - b0), to = later.tokens * (b - b0 + 1) / (b1 - b0);
    for (int64_t t = later.y ? from : to; t < to; ++t)
      for (int i = 0; i < n * w.group; i += 16) {
        __builtin_prefetch(later.y + t * w.N + n0 + i, 0, 2);
        if (later.residual) __builtin_prefetch(later.residual + t * w.N + n0 + i, 0, 2);
      }
    if constexpr (NV <= kVectorsGrouped) {
      if (w.group == 4) {
        groups_of_block<NV, Half, T>(x, sums, values, w.indices + start, w.rows + list, w.counts + list, n, b == 0, bias);
        continue;
      }
    }
    rows_of_block<NV, Half, T>(x, sums, values, w.indices + start, w.rows + list, w.counts + list, n, b == 0, bias);
  }
}

template <int NV, bool Half>
void accumulate_in(const SparseWeights& w, int64_t panel, const float* tile, int64_t b0, int64_t b1, const Later& later,
                   float* sums) {
  return w.half ? accumulate_as<NV, Half, uint16_t>(w, panel, tile, b0, b1, later, sums)
                : accumulate_as<NV, Half, float>(w, panel, tile, b0, b1, later, sums);
}

template <int NV>
void accumulate_for(const SparseWeights& w, int64_t panel, const float* tile, int vectors, int64_t b0, int64_t b1,
                    const Later& later, float* sums) {
  if constexpr (NV > 0) {
    if (vectors != NV) return accumulate_for<NV - 1>(w, panel, tile, vectors, b0, b1, later, sums);
    if (kHalves && later.tokens <= NV * W - W / 2)
      return accumulate_in<NV, kHalves>(w, panel, tile, b0, b1, later, sums);
    return accumulate_in<NV, false>(w, panel, tile, b0, b1, later, sums);
  }
}

void accumulate(const SparseWeights& w, int64_t panel, const float* tile, int vectors, int64_t b0, int64_t b1,
                float* sums, int tokens, const float* residual, const float* y) {
  accumulate_for<kVectors>(w, panel, tile, vectors, b0, b1, Later{tokens, residual, y}, sums);
}

void activate(const SparseWeights& w, int64_t panel, int vectors, float* sums) {
  if (w.activation == kNone) return;
  const int64_t end = least(w.panel, w.N - panel * w.panel) * vectors * W;
  for (int64_t i = 0; i < end; i += W) store(sums + i, activated(load(sums + i), w.activation));
}

// --- few tokens -------------------------------------------------------------------------------------------------------

typedef float Four __attribute__((vector_size(16)));
typedef float FourU __attribute__((vector_size(16), aligned(1), may_alias));

inline Four four(const float* p) { return *reinterpret_cast<const FourU*>(p); }
inline Four four(const uint16_t* p) {
#if defined(__F16C__)
  return (Four)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return Four{widen(at(p)), widen(at(p + 1)), widen(at(p + 2)), widen(at(p + 3))};
#endif
}

// What the sums begin with: the bias, for each of `side` tokens.
inline void begin(const SparseWeights& w, int64_t n0, int64_t n, int side, float* sums) {
  for (int64_t i = 0; i < n; ++i)
    for (int t = 0; t < side; ++t) sums[i * side + t] = w.bias ? at(w.bias + n0 + i) : 0.f;
}

// Hands run(row, count, values, indices, x) every row of a panel, block by block; x begins at the block's columns.
template <class T, class Run>
inline void each_row(const SparseWeights& w, int64_t panel, const float* x, int side, const Run& run) {
  const int64_t blocks = (w.K + w.block - 1) / w.block, n0 = panel * w.panel;
  const int n = static_cast<int>(least(w.panel, w.N - n0)) / w.group;
  int64_t list = (n0 / w.group) * blocks;
  const int64_t start = w.offsets[panel * blocks];
  const T* values = static_cast<const T*>(w.values) + start * w.group;
  const uint8_t* indices = w.indices + start;
  for (int64_t b = 0; b < blocks; ++b, x += w.block * side) {
    for (int r = 0; r < n; ++r, ++list) {
      const int count = at(w.counts + list);
      __builtin_prefetch(reinterpret_cast<const char*>(values) + kAheadBytes);
      __builtin_prefetch(indices + kAheadBytes);
      run(w.rows[list], count, values, indices, x);
      values += count * w.group;
      indices += count;
    }
  }
}

template <class T>
inline float dot(const T* values, const uint8_t* indices, int count, const float* x) {
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  int i = 0;
  for (; i + 4 <= count; i += 4) {
    s0 += widen(at(values + i)) * x[indices[i]];
    s1 += widen(at(values + i + 1)) * x[indices[i + 1]];
    s2 += widen(at(values + i + 2)) * x[indices[i + 2]];
    s3 += widen(at(values + i + 3)) * x[indices[i + 3]];
  }
  for (; i < count; ++i) s0 += widen(at(values + i)) * x[indices[i]];
  return (s0 + s1) + (s2 + s3);
}

// One token: x [K] -> sums [n].
template <class T>
void one(const SparseWeights& w, int64_t panel, const float* x, float* sums) {
  const int64_t n0 = panel * w.panel, n = least(w.panel, w.N - n0);
  if (w.group == 4) {
    begin(w, n0, n, 1, sums);
    return each_row<T>(w, panel, x, 1, [&](int row, int count, const T* values, const uint8_t* indices, const float* x) {
      Four sum = four(sums + 4 * row), other{};
      int i = 0;
      for (; i + 2 <= count; i += 2) {
        sum += four(values + 4 * i) * x[indices[i]];
        other += four(values + 4 * i + 4) * x[indices[i + 1]];
      }
      if (i < count) sum += four(values + 4 * i) * x[indices[i]];
      *reinterpret_cast<FourU*>(sums + 4 * row) = sum + other;
    });
  }
  if (look_up_panel(w, panel, static_cast<const T*>(w.values), x, sums)) return;
  begin(w, n0, n, 1, sums);
  each_row<T>(w, panel, x, 1, [&](int row, int count, const T* values, const uint8_t* indices, const float* x) {
    sums[row] += dot(values, indices, count, x);
  });
}

// Up to four tokens, which share every load of a weight: x [K, 4] -> sums [n, 4].
template <class T>
void few(const SparseWeights& w, int64_t panel, const float* x, float* sums) {
  const int64_t n0 = panel * w.panel;
  begin(w, n0, least(w.panel, w.N - n0), 4, sums);
  each_row<T>(w, panel, x, 4, [&](int row, int count, const T* values, const uint8_t* indices, const float* x) {
    float* to = sums + 4 * w.group * row;
    if (w.group == 4) {
      Four s0 = four(to), s1 = four(to + 4), s2 = four(to + 8), s3 = four(to + 12);
      for (int i = 0; i < count; ++i) {
        const Four xi = four(x + 4 * indices[i]);
        const T* v = values + 4 * i;
        s0 += widen(at(v)) * xi, s1 += widen(at(v + 1)) * xi, s2 += widen(at(v + 2)) * xi, s3 += widen(at(v + 3)) * xi;
      }
      const Four sums4[4] = {s0, s1, s2, s3};
      __builtin_memcpy(to, sums4, sizeof sums4);
      return;
    }
    Four s0 = four(to), s1{}, s2{}, s3{};
    int i = 0;
    for (; i + 4 <= count; i += 4) {
      s0 += widen(at(values + i)) * four(x + 4 * indices[i]);
      s1 += widen(at(values + i + 1)) * four(x + 4 * indices[i + 1]);
      s2 += widen(at(values + i + 2)) * four(x + 4 * indices[i + 2]);
      s3 += widen(at(values + i + 3)) * four(x + 4 * indices[i + 3]);
    }
    for (; i < count; ++i) s0 += widen(at(values + i)) * four(x + 4 * indices[i]);
    *reinterpret_cast<FourU*>(to) = (s0 + s1) + (s2 + s3);
  });
}

void row(const SparseWeights& w, int64_t panel, const float* x, int tokens, const float* residual, float* y,
         float* sums) {
  const int64_t n0 = panel * w.panel, n = least(w.panel, w.N - n0);
  if (tokens == 1)
    w.half ? one<uint16_t>(w, panel, x, sums) : one<float>(w, panel, x, sums);
  else
    w.half ? few<uint16_t>(w, panel, x, sums) : few<float>(w, panel, x, sums);
  float* column = sums;
  for (int t = 0; t < tokens; ++t) {
    if (tokens > 1) {
      column = sums + 4 * w.panel;
      for (int64_t i = 0; i < n; ++i) column[i] = sums[4 * i + t];
    }
    for (int64_t i = 0; i < n; i += W) {
      const int64_t width = least(W, n - i), to = t * w.N + n0 + i;
      F out = activated(width == W ? load(column + i) : load_part(column + i, width), w.activation);
      if (residual) out += width == W ? load(residual + to) : load_part(residual + to, width);
      if (width == W)
        store(y + to, out);
      else
        store_part(y + to, out, width);
    }
  }
}

// --- dense layers of halves -------------------------------------------------------------------------------------------

// Products of R rows of weights with TOKENS rows of x, each spread over a vector: sums[t][r]. Each is added up in CHAINS
// parts, which keep the processor busy.
template <int R, int TOKENS, int CHAINS>
inline void half_products(const uint16_t* const (&weights)[R], const float* const (&x)[TOKENS], int64_t K,
                          F (&sums)[TOKENS][R]) {
  F parts[CHAINS][TOKENS][R];
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; ++c)
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) parts[c][t][r] = F{};
  auto step = [&](int64_t k, F (&to)[TOKENS][R]) {
    F input[TOKENS];
#pragma GCC unroll 16
    for (int t = 0; t < TOKENS; ++t) input[t] = load(x[t] + k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(reinterpret_cast<const char*>(weights[r] + k) + kAheadBytes);
      const F weight = widened(weights[r] + k);
#pragma GCC unroll 16
      for (int t = 0; t < TOKENS; ++t) to[t][r] += weight * input[t];
    }
  };
  int64_t k = 0;
  for (; k + CHAINS * W <= K; k += CHAINS * W) {
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; ++c) step(k + c * W, parts[c]);
  }
  for (; k + W <= K; k += W) step(k, parts[0]);
  if (const int64_t rest = K - k)
    for (int r = 0; r < R; ++r) {
      uint16_t part[W] = {};
      __builtin_memcpy(part, weights[r] + k, rest * sizeof *part);
      for (int t = 0; t < TOKENS; ++t) parts[0][t][r] += widened(part) * load_part(x[t] + k, rest);
    }
#pragma GCC unroll 16
  for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      sums[t][r] = parts[0][t][r];
#pragma GCC unroll 16
      for (int c = 1; c < CHAINS; ++c) sums[t][r] += parts[c][t][r];
    }
}

// Outputs of up to kHalfSums / TOKENS rows from n on, for TOKENS tokens from t on; those before n1 and t1 are written.
template <int R, int TOKENS, int CHAINS>
inline void half_block(const HalfWeights& w, int64_t n, int64_t n1, const float* x, int64_t t, int64_t t1, float* y) {
  constexpr int kRows = kHalfSums / TOKENS;
  const float* inputs[TOKENS];
  for (int i = 0; i < TOKENS; ++i) inputs[i] = x + least(t + i, t1 - 1) * w.K;
  F sums[TOKENS][kRows];
  for (int r = 0; r < kRows; r += R) {
    const uint16_t* weights[R];
    for (int i = 0; i < R; ++i) weights[i] = w.values + least(n + r + i, n1 - 1) * w.K;
    F products[TOKENS][R];
    half_products<R, TOKENS, CHAINS>(weights, inputs, w.K, products);
    for (int i = 0; i < TOKENS; ++i)
      for (int j = 0; j < R; ++j) sums[i][r + j] = products[i][j];
  }
  float outputs[TOKENS][kRows];
  for (int first = 0; first < kHalfSums; first += W) {
    F some[W];
    for (int i = 0; i < W; ++i) some[i] = (&sums[0][0])[first + i];
    store(&outputs[0][0] + first, totals(some));
  }
  const int64_t rows = least(n1 - n, kRows), tokens = least(t1 - t, TOKENS);
  for (int64_t i = 0; i < tokens; ++i)
    for (int64_t r = 0; r < rows; ++r) y[(t + i) * w.N + n + r] = outputs[i][r] + (w.bias ? at(w.bias + n + r) : 0.f);
}

// Few tokens wait for the weights, which come row after row; many for the additions.
void half_rows(const HalfWeights& w, int64_t n0, int64_t n1, const float* x, int64_t tokens, float* y) {
  if (tokens == 1)
    for (int64_t n = n0; n < n1; n += kHalfSums) half_block<1, 1, 4>(w, n, n1, x, 0, 1, y);
  else if (tokens <= 4)
    for (int64_t n = n0; n < n1; n += kHalfSums / 4) half_block<1, 4, 2>(w, n, n1, x, 0, tokens, y);
  else
    for (int64_t t = 0; t < tokens; t += 4)
      for (int64_t n = n0; n < n1; n += kHalfSums / 4) half_block<kHalfSums / 4, 4, 1>(w, n, n1, x, t, tokens, y);
}

// --- attention --------------------------------------------------------------------------------------------------------

// c [MR, NC * W] = a [MR, depth] b [depth, NC * W], rows lda, ldb, ldc floats apart.
template <int MR, int NC>
inline void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                          int64_t ldc) {
  F sum[MR][NC];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < NC; ++i) sum[r][i] = F{};
  for (int64_t k = 0; k < depth; ++k) {
    F right[NC];
#pragma GCC unroll 16
    for (int i = 0; i < NC; ++i) right[i] = load(b + k * ldb + i * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const F left = all(a[r * lda + k]);
#pragma GCC unroll 16
      for (int i = 0; i < NC; ++i) sum[r][i] += left * right[i];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < NC; ++i) store(c + r * ldc + i * W, sum[r][i]);
}

template <int MR, int NC = kHeadVectors>
inline void product_block_of(int64_t width, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                             float* c, int64_t ldc) {
  if constexpr (NC > 0) {
    if (width != NC) return product_block_of<MR, NC - 1>(width, a, lda, b, ldb, depth, c, ldc);
    product_block<MR, NC>(a, lda, b, ldb, depth, c, ldc);
  }
}

// The same for any number of rows up to kHeadRows and of vectors.
template <int MR = kHeadRows>
void product(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
             int64_t ldc, int64_t vectors) {
  if constexpr (MR > 0) {
    if (rows != MR) return product<MR - 1>(rows, a, lda, b, ldb, depth, c, ldc, vectors);
    // Columns in blocks as equal as can be, 13 vectors as 3 + 3 + 3 + 4: a narrow rest would wait for its loads.
    const int64_t blocks = (vectors + kHeadVectors - 1) / kHeadVectors;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = vectors * i / blocks * W, width = vectors * (i + 1) / blocks - vectors * i / blocks;
      product_block_of<MR>(width, a, lda, b + first, ldb, depth, c + first, ldc);
    }
  }
}

inline float highest(F v) {
  float high = v[0];
  for (int i = 1; i < W; ++i) high = v[i] > high ? v[i] : high;
  return high;
}

// Scores of one query [vectors * W, of which tk count] -> e^(score - highest), zeros beyond; returns 1 / their sum.
float softmax(float* scores, int64_t tk, int64_t vectors) {
  const float lowest = -__builtin_inff();
  for (int64_t i = tk; i < vectors * W; ++i) scores[i] = lowest;
  F high = all(lowest);
  for (int64_t i = 0; i < vectors; ++i) {
    const F s = load(scores + i * W);
    high = s > high ? s : high;
  }
  const F most = all(highest(high));
  F sum = F{};
  for (int64_t i = 0; i < vectors; ++i) {
    const F e = power_of_two((load(scores + i * W) - most) * 1.44269504088896341f);
    store(scores + i * W, e);
    sum += e;
  }
  for (int64_t i = tk; i < vectors * W; ++i) {  // NaN there, when all scores are -infinity
    scores[i] = 0;
  }
  return 1 / total(sum);
}

struct HeadSizes {
  int64_t keys, wide;  // tk and d in whole vectors, as floats
  explicit HeadSizes(const AttentionShape& s) : keys((s.tk + W - 1) / W * W), wide((s.d + W - 1) / W * W) {}
};

size_t head_floats(const AttentionShape& s) {
  const HeadSizes z(s);
  // keys transposed, values, then for kHeadRows queries: the queries, their scores, their outputs
  return s.d * z.keys + s.tk * z.wide + kHeadRows * (s.d + z.keys + z.wide);
}

// The products of one query [d] with all keys, read where they lie; the values, which are needed next, are fetched.
void one_query(const AttentionShape& s, const float* query, const float* k, const float* v, float* scores) {
  for (int64_t t = 0; t < s.tk; t += W) {
    F sums[W];
    for (int j = 0; j < W; ++j) {
      sums[j] = F{};
      if (t + j >= s.tk) continue;
      const float* key = k + (t + j) * s.k_token;
      for (int64_t i = 0; i < s.d; i += W) {
        __builtin_prefetch(key + i + W * s.k_token);
        __builtin_prefetch(v + (t + j) * s.v_token + i);
        const int64_t width = least(W, s.d - i);
        sums[j] += load_part(query + i, width) * load_part(key + i, width);
      }
    }
    store(scores + t, totals(sums));
  }
}

void head(const AttentionShape& s, const float* q, const float* k, const float* v, const float* bias, float* out,
          float* memory) {
  const int64_t apart = s.heads * s.d;  // from a row of `out` to the next
  if (s.tk == 0) {
    for (int64_t t = 0; t < s.tq; ++t)
      for (int64_t i = 0; i < s.d; ++i) out[t * apart + i] = 0;
    return;
  }
  const HeadSizes z(s);
  float* keys = memory;                    // [d, z.keys]
  float* values = keys + s.d * z.keys;     // [tk, z.wide]
  float* queries = values + s.tk * z.wide;  // [kHeadRows, d]
  float* scores = queries + kHeadRows * s.d;
  float* outputs = scores + kHeadRows * z.keys;

  // Rows far apart fall on the same lines of the cache: what is read once per query block is copied together first.
  for (int64_t t = 0; t < s.tk && s.tq > 1; t += W) {
    const int64_t rows = least(W, s.tk - t);
    for (int64_t i = 0; i < s.d; i += W) {
      const int64_t width = least(W, s.d - i);
      F block[W];
      if (rows == W && width == W) {
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) {
          __builtin_prefetch(k + (t + j + 2 * W) * s.k_token + i);  // rows lie too far apart for the processor to do it
          block[j] = load(k + (t + j) * s.k_token + i);
        }
      } else {
        for (int j = 0; j < W; ++j) block[j] = j < rows ? load_part(k + (t + j) * s.k_token + i, width) : F{};
      }
      transpose_block(block);
      for (int64_t j = 0; j < width; ++j) store(keys + (i + j) * z.keys + t, block[j]);
    }
  }
  const bool copied = s.tq > kHeadRows || s.d % W;
  if (copied) {
    for (int64_t t = 0; t < s.tk; ++t)
      for (int64_t i = 0; i < s.d; i += W) {
        __builtin_prefetch(v + (t + 2 * W) * s.v_token + i);
        store(values + t * z.wide + i,
              s.d - i >= W ? load(v + t * s.v_token + i) : load_part(v + t * s.v_token + i, s.d - i));
      }
  }
  const float* right = copied ? values : v;
  const int64_t right_apart = copied ? z.wide : s.v_token;

  for (int64_t t = 0; t < s.tq; t += kHeadRows) {
    const int64_t rows = least(kHeadRows, s.tq - t);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < s.d; ++i) {
        if (i % W == 0) {
          __builtin_prefetch(q + (t + r + 2 * kHeadRows) * s.q_token + i);
          __builtin_prefetch(out + (t + r) * apart + i, 1);
        }
        queries[r * s.d + i] = s.scale * q[(t + r) * s.q_token + i];
      }
    if (s.tq == 1)
      one_query(s, queries, k, v, scores);
    else
      product(rows, queries, s.d, keys, z.keys, s.d, scores, z.keys, z.keys / W);
    float inverse[kHeadRows];
    for (int64_t r = 0; r < rows; ++r) {
      if (bias) {
        const float* add = bias + (t + r) * s.bias_q;
        for (int64_t i = 0; i < s.tk; ++i) scores[r * z.keys + i] += add[i * s.bias_k];
      }
      inverse[r] = softmax(scores + r * z.keys, s.tk, z.keys / W);
    }
    product(rows, scores, z.keys, right, right_apart, s.tk, outputs, z.wide, z.wide / W);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < s.d; ++i) out[(t + r) * apart + i] = outputs[r * z.wide + i] * inverse[r];
  }
}
