// Rows of numbers on their way into a product of csrc/cpu/panels.h and out of it: widened and rounded, activated, normed,
// and written as tiles, in 8 bits with a scale and an offset for each row.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "panels.h"
#include "vectors.h"

namespace lbfast {

using panels::kDepth;
using panels::kParts;
using panels::kRows;
using panels::kStep;
using panels::Thirds;
constexpr int64_t kLanes = Vec::size();

enum class Activation { kNone, kGelu, kQuickGelu };

inline Vec load(const float* from) { return Vec::loadu(from); }
inline Vec load(const int32_t* from) {
  return at::vec::convert<float>(at::vec::Vectorized<int32_t>::loadu(from));
}
inline Vec load(const at::BFloat16* from) {
  Vec out;
  at::vec::load_fp32_from_bf16(from, out);
  return out;
}

inline void store(const Vec& x, float* to) { x.store(to); }
inline void store(const Vec& x, at::BFloat16* to) {
  at::vec::convert_from_float<at::BFloat16>(x, x).store(to, static_cast<int>(kLanes));
}
// 0..255, to nearest
inline void store(const Vec& x, uint8_t* to) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(x), _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(whole));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i whole = _mm256_cvtps_epi32(x);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#else
  alignas(64) float values[kLanes];
  at::vec::clamp(x.round(), Vec(0.0f), Vec(255.0f)).store(values);
  for (int64_t i = 0; i < kLanes; ++i) {
    to[i] = static_cast<uint8_t>(values[i]);
  }
#endif
}

#if defined(LBFAST_AMX)
// x in three parts, `apart` numbers from each other: what one leaves is the next one's.
__attribute__((target("avx512bf16"))) inline void store(const Vec& x, Thirds* to, int64_t apart) {
  __m512 rest = x;
  for (int64_t part = 0; part < 3; ++part) {
    const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(rest));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + part * apart), bits);
    rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
  }
}
#endif

inline float sum_of(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, x);
}
inline float least(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::minimum(a, b); }, x);
}
inline float most(const Vec& x) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, x);
}

// x Phi(x). Phi within 7.5e-8 for products in float (Abramowitz and Stegun, 26.2.17). For others by an odd polynomial
// that is nearly 0 and 1 at its ends, and not below: within 8e-5 for 16 bits (up to 4.2), 3e-4 for 8 (up to 3.8), below
// what these keep.
template <typename T>
inline Vec gelu(const Vec& x) {
  if constexpr (std::is_same_v<T, float>) {
    const Vec one(1.0f), end(1e3f);  // far beyond what is not 0; NaN stays
    const Vec t = reciprocal_of(at::vec::fmadd(at::vec::minimum(x.abs(), end), Vec(0.23164189f), one));
    Vec p(0.530702715f);
    for (const float c : {-0.726576014f, 0.710706871f, -0.142248368f, 0.127414796f}) {
      p = at::vec::fmadd(p, t, Vec(c));
    }
    const Vec beyond = p * t * exponential_of(x * x * Vec(-0.5f));  // Phi(-|x|)
    return x * Vec::blendv(beyond, one - beyond, x > Vec(0.0f));
  } else {
    constexpr bool kShort = std::is_same_v<T, uint8_t>;
    const Vec end(kShort ? 3.8f : 4.2f), near = at::vec::clamp(x, end.neg(), end), t = near * near;
    Vec p(kShort ? 4.21502885e-8f : 8.49115407e-11f);
    if constexpr (kShort) {
      for (const float c : {-2.56548064e-6f, 6.68672509e-5f, -0.000996694963f, 0.00967109222f, -0.0666346746f,
                            0.399505072f}) {
        p = at::vec::fmadd(p, t, Vec(c));
      }
    } else {
      for (const float c : {-7.6412901e-9f, 3.01842642e-7f, -6.9849877e-6f, 0.000107528728f, -0.00119460479f,
                            0.010109314f, -0.0668355435f, 0.399189926f}) {
        p = at::vec::fmadd(p, t, Vec(c));
      }
    }
    const Vec phi = at::vec::fmadd(near, p, Vec(0.5f));
#if defined(CPU_CAPABILITY_AVX512)
    return x * Vec(_mm512_max_ps(phi, _mm512_setzero_ps()));  // of no number 0, which times it is none
#else
    return x * at::vec::maximum(phi, Vec(0.0f));
#endif
  }
}

template <typename T>
inline Vec quick_gelu(const Vec& x) {
  const Vec e = x * Vec(-1.702f);
  return x / (Vec(1.0f) + (std::is_same_v<T, float> ? exponential_of(e) : e.exp_u20()));
}

template <typename T>
inline Vec activate(const Vec& x, Activation activation) {
  return activation == Activation::kGelu ? gelu<T>(x) : activation == Activation::kQuickGelu ? quick_gelu<T>(x) : x;
}

struct Norm {
  const float *weight = nullptr, *bias = nullptr;
};

// Rows of A in tiles, and for 8 bits their scales and offsets.
template <typename T>
struct Tiles {
  T* data = nullptr;
  T** rows = nullptr;  // where each begins
  float* scales = nullptr;
  float* offsets = nullptr;
  int64_t steps = 0, tall = 0;  // of a tile
  // For `count` rows, `high` of a tile.
  void share(int64_t count, int64_t high) {
    tall = high;
    for (int64_t r = 0; r < count; ++r) {
      rows[r] = data + (r / tall * steps * kParts<T> * tall + r % tall) * kDepth<T>;
    }
  }
  T* at(int64_t row, int64_t k) const {
    return rows[row] + k / kDepth<T> * (kParts<T> * tall * kDepth<T>) + k % kDepth<T>;
  }
  // One or two vectors of values from column k on, a multiple of theirs.
  void put(int64_t row, int64_t k, const Vec& x) const {
    if constexpr (std::is_same_v<T, Thirds>) {
      store(x, at(row, k), tall * kDepth<T>);
    } else {
      store(x, at(row, k));
    }
  }
  void put(int64_t row, int64_t k, const Vec& x, const Vec& y) const {
    if constexpr (std::is_same_v<T, at::BFloat16>) {
      store(x, y, at(row, k));
    } else {
      put(row, k, x);
      put(row, k + kLanes, y);
    }
  }
  // 0 from column k to the end of its step, against weights of 0: what lay here before may be no number.
  void fill_up(int64_t row, int64_t k) const {
    if (k % kDepth<T> != 0) {
      for (int64_t part = 0; part < kParts<T>; ++part) {
        std::memset(at(row, k) + part * tall * kDepth<T>, 0, (kDepth<T> - k % kDepth<T>) * sizeof(T));
      }
    }
  }
};

// A power of two that a row is divided by, exactly, so that no part of its numbers is too small for 16 bits or too large:
// its largest is from 1 to 2 then. Within 2^60 either way, which does, so that a row's and an output's have a product.
inline float power_below(float largest) {
  uint32_t bits;
  std::memcpy(&bits, &largest, 4);
  bits = std::clamp<uint32_t>(bits >> 23, 127 - 60, 127 + 60) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return power;
}

// The least and the largest of 0 and some numbers; where one of them is infinite or no number, `span` is neither.
struct Range {
  Vec low{0.0f}, high{0.0f}, strange{0.0f};
  void take(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
    low = _mm512_min_ps(x, low);
    high = _mm512_max_ps(x, high);
    strange = at::vec::fmadd(x, Vec(0.0f), strange);
#else
    low = at::vec::minimum(low, x);
    high = at::vec::maximum(high, x);
#endif
  }
  float bottom() const { return least(low); }
  float span() const { return most(high) - bottom() + sum_of(strange); }
};

// A row of `width` values that read(k) gives, kLanes at a time, and their range -> row `r` of the tiles.
template <typename Read>
void write_within(const Tiles<uint8_t>& to, int64_t r, int64_t width, const Range& range, const Read& read) {
  const float bottom = range.bottom(), span = range.span();
  const float scale = span == 0.0f ? 1.0f : span / 255.0f;
  const float zero = std::nearbyint(-bottom / scale);
  to.scales[r] = scale;  // infinite or no number where the span is, and leaves no number behind
  to.offsets[r] = zero * scale;
  const Vec inverse(1.0f / scale), offset(zero);
  for (int64_t k = 0; k < width; k += kLanes) {
    store(at::vec::fmadd(read(k), inverse, offset), to.at(r, k));
  }
}

// A row of `width` values that read(k) gives, kLanes at a time -> row `r` of the tiles.
template <typename T, typename Read>
void write_row(const Tiles<T>& to, int64_t r, int64_t width, const Read& read) {
  if constexpr (std::is_same_v<T, uint8_t>) {
    Range range;
    for (int64_t k = 0; k < width; k += kLanes) {
      range.take(read(k));
    }
    write_within(to, r, width, range, read);
  } else if constexpr (std::is_same_v<T, Thirds>) {
    Vec largest(0.0f);
    for (int64_t k = 0; k < width; k += kLanes) {
      largest = at::vec::maximum(largest, read(k).abs());
    }
    to.scales[r] = power_below(most(largest));  // infinities and NaN stay what they are, and leave no number behind
    const Vec inverse(1.0f / to.scales[r]);
    for (int64_t k = 0; k < width; k += kLanes) {
      to.put(r, k, read(k) * inverse);
    }
  } else {
    for (int64_t k = 0; k < width; k += kLanes) {
      to.put(r, k, read(k));
    }
  }
  to.fill_up(r, width);
}

// The layer norm of a row of `width` numbers, kLanes at a time.
class Normed {
 public:
  Normed(const float* row, int64_t width, const Norm& norm, float eps) : row_(row), norm_(norm) {
    Vec sum(0.0f), squares(0.0f);
    for (int64_t k = 0; k < width; k += kLanes) {
      sum = sum + load(row + k);
    }
    mean_ = Vec(sum_of(sum) / static_cast<float>(width));
    for (int64_t k = 0; k < width; k += kLanes) {
      const Vec x = load(row + k) - mean_;
      squares = at::vec::fmadd(x, x, squares);
    }
    rstd_ = Vec(1.0f / std::sqrt(sum_of(squares) / static_cast<float>(width) + eps));
  }
  Vec operator()(int64_t k) const {
    return at::vec::fmadd((load(row_ + k) - mean_) * rstd_, load(norm_.weight + k), load(norm_.bias + k));
  }

 private:
  const float* row_;
  const Norm norm_;
  Vec mean_, rstd_;
};

// The norm of `rows` rows of total, ld apart, as A.
template <typename T>
void write_norm(const Tiles<T>& to, const float* total, int64_t ld, int64_t rows, int64_t width, const Norm& norm,
                float eps, float* buffer) {
  for (int64_t r = 0; r < rows; ++r) {
    const Normed normed(total + r * ld, width, norm, eps);
    const auto kept = [&](int64_t k) { return load(buffer + k); };
    if constexpr (std::is_same_v<T, uint8_t>) {
      Range range;
      for (int64_t k = 0; k < width; k += kLanes) {
        const Vec x = normed(k);
        range.take(x);
        store(x, buffer + k);
      }
      write_within(to, r, width, range, kept);
      to.fill_up(r, width);
    } else if constexpr (std::is_same_v<T, Thirds>) {
      for (int64_t k = 0; k < width; k += kLanes) {
        store(normed(k), buffer + k);
      }
      write_row(to, r, width, kept);
    } else {
      write_row(to, r, width, normed);
    }
  }
}

}  // namespace lbfast
