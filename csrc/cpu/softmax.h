// The softmax of attention's scores, a row at a time, and its gradient.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "vectors.h"

namespace lbfast {

constexpr int64_t kLanes = Vec::size();
constexpr float kLowest = -std::numeric_limits<float>::max();  // what a mask adds, as in CLIP

struct Masks {
  bool causal;
  const bool* padded;  // [B, keys] or null
};

// Scores of one query -> what the softmax takes, in place; returns how many of the keys may count.
inline int64_t mask_scores(float* s, int64_t keys, int64_t query, const Masks& masks, int64_t b, float& scale) {
  if (masks.padded == nullptr) {
    return masks.causal ? std::min(keys, query + 1) : keys;
  }
  const bool* padded = masks.padded + b * keys;
  for (int64_t j = 0; j < keys; ++j) {  // both masks: -inf
    s[j] = s[j] * scale + (padded[j] ? kLowest : 0.0f) + (masks.causal && j > query ? kLowest : 0.0f);
  }
  scale = 1.0f;
  return keys;
}

#if defined(CPU_CAPABILITY_AVX512)
// Within 4e-6 of exp(x), x not above 0 by much, for what becomes bfloat16: 2^y = 2^floor(y) 2^(y - floor(y)).
inline __m512 exponential_of_short(__m512 x) {
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 f = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.0135341678f);  // 2^f on [0, 1)
  for (const float c : {0.0520114601f, 0.241442755f, 0.693003833f, 1.00000262f}) {
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(p, y);
}
#endif

// exp(x), x not above 0 by much; within 4e-6 of it for what becomes bfloat16.
template <typename T>
Vec exponential(const Vec& x) {
  if constexpr (std::is_same_v<T, float>) {
    return exponential_of(x);
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    return exponential_of_short(x);
#else
    return x.exp_u20();
#endif
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// As below for P of bfloat16: the largest of what is scaled is the largest that is scaled, or the least; a score that is
// no number makes the sum none, whatever the shift.
inline void softmax_row_short(const float* s, int64_t count, int64_t ld, float scale, at::BFloat16* p, float& shift,
                              float& sum, int64_t step) {
  const auto some = [&](int64_t j) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(count - j, 0, 16)) - 1);
  };
  const auto outermost = [&](float none, auto further) {
    __m512 top = _mm512_set1_ps(none), beside = top;
    int64_t j = 0;
    for (; j + 32 <= count; j += 32) {
      top = further(top, _mm512_loadu_ps(s + j));
      beside = further(beside, _mm512_loadu_ps(s + j + 16));
    }
    for (; j < count; j += 16) {
      top = further(top, _mm512_mask_loadu_ps(top, some(j), s + j));
    }
    return further(top, beside);
  };
  constexpr float kInfinite = std::numeric_limits<float>::infinity();
  shift = scale * (scale < 0.0f
                       ? _mm512_reduce_min_ps(outermost(
                             kInfinite, [](__m512 a, __m512 b) { return _mm512_min_ps(a, b); }))
                       : _mm512_reduce_max_ps(outermost(
                             -kInfinite, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); })));
  const __m512 factor = _mm512_set1_ps(scale), negative = _mm512_set1_ps(-shift);
  __m512 total = _mm512_setzero_ps(), other = total;
  int64_t j = 0;
  for (; j + 32 <= count; j += 32, p += step) {
    const __m512 a = exponential_of_short(_mm512_fmadd_ps(_mm512_loadu_ps(s + j), factor, negative));
    const __m512 b = exponential_of_short(_mm512_fmadd_ps(_mm512_loadu_ps(s + j + 16), factor, negative));
    total = _mm512_add_ps(total, a);
    other = _mm512_add_ps(other, b);
    store(Vec(a), Vec(b), p);
  }
  for (; j < ld; j += 32, p += step) {
    const auto part = [&](int64_t k) {
      const __m512 x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(some(k), s + k), factor, negative);
      return _mm512_maskz_mov_ps(some(k), exponential_of_short(x));
    };
    const __m512 a = part(j), b = part(j + 16);
    total = _mm512_add_ps(total, a);
    other = _mm512_add_ps(other, b);
    store(Vec(a), Vec(b), p);
  }
  sum = _mm512_reduce_add_ps(_mm512_add_ps(total, other));
}
#endif

// exp(scale s - shift) of one row -> p, zeros up to ld; s has ld values and p may be s. Of p two vectors lie together,
// and the next two `step` values further.
template <typename T>
void softmax_row(const float* s, int64_t count, int64_t ld, float scale, T* p, float& shift, float& sum,
                 int64_t step = 2 * kLanes) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    return softmax_row_short(s, count, ld, scale, p, shift, sum, step);
  }
#endif
  const Vec factor(scale);
  Vec top(-std::numeric_limits<float>::infinity()), beside = top;
  int64_t j = 0;
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    top = at::vec::maximum(top, Vec::loadu(s + j) * factor);
    beside = at::vec::maximum(beside, Vec::loadu(s + j + kLanes) * factor);
  }
  top = at::vec::maximum(top, beside);
  for (; j + kLanes <= count; j += kLanes) {
    top = at::vec::maximum(top, Vec::loadu(s + j) * factor);
  }
  if (j < count) {
    top = Vec::set(top, at::vec::maximum(top, Vec::loadu(s + j, static_cast<int>(count - j)) * factor), count - j);
  }
  shift = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
  const Vec negative(-shift), zero(0.0f);
  Vec total(0.0f), other(0.0f);
  const auto part = [&](int64_t k) { return exponential<T>(at::vec::fmadd(Vec::loadu(s + k), factor, negative)); };
  for (j = 0; j + 2 * kLanes <= count; j += 2 * kLanes, p += step) {
    const Vec a = part(j), b = part(j + kLanes);
    total = total + a;
    other = other + b;
    store(a, b, p);
  }
  for (; j < ld; j += 2 * kLanes, p += step) {
    Vec a = zero, b = zero;
    if (j < count) {
      a = Vec::set(zero, part(j), std::min(kLanes, count - j));
    }
    if (j + kLanes < count) {
      b = Vec::set(zero, part(j + kLanes), std::min(kLanes, count - j - kLanes));
    }
    total = total + a;
    other = other + b;
    store(a, b, p);
  }
  total = total + other;
  sum = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, total);
}

// Scores and dP of one row -> P and dS, zeros up to ld; s is overwritten, p may be s, ds may be dp.
// P is divided by the sum of these scores' own exponentials: a forward whose product rounds otherwise gives the shift
// alone. So P adds up to 1, dS to 0, and one key has just that.
template <typename T>
void softmax_bwd_row(float* s, const float* dp, int64_t count, int64_t ld, float scale_s, float scale, float shift,
                     T* p, T* ds) {
  if (count == 1) {
    const float none = 0.0f * s[0], gradient = none + 0.0f * dp[0];  // not of NaN and infinities
    std::fill_n(p, ld, T(0.0f));
    std::fill_n(ds, ld, T(0.0f));
    p[0] = T(1.0f + none);
    ds[0] = T(gradient);
    return;
  }
  const auto sum_of = [](const Vec& v) {
    return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, v);
  };
  const Vec factor(scale_s), negative(-shift), zero(0.0f);
  Vec sum = zero, weighted = zero;
  for (int64_t j = 0; j < ld; j += kLanes) {
    Vec e = zero;
    if (j < count) {
      e = exponential<T>(at::vec::fmadd(Vec::loadu(s + j), factor, negative));
      Vec part = e * Vec::loadu(dp + j);
      if (j + kLanes > count) {
        e = Vec::set(zero, e, count - j);
        part = Vec::set(zero, part, count - j);
      }
      sum = sum + e;
      weighted = weighted + part;
    }
    e.store(s + j);
  }
  const Vec total(sum_of(sum)), delta(sum_of(weighted) / sum_of(sum)), scaled(scale);
  const auto gradient = [&](int64_t j, const Vec& pj) {
    const Vec d = pj * (Vec::loadu(dp + j) - delta) * scaled;
    return j + kLanes <= count ? d : Vec::set(zero, d, std::max<int64_t>(0, count - j));
  };
  for (int64_t j = 0; j < ld; j += 2 * kLanes) {
    const Vec p0 = Vec::loadu(s + j) / total, p1 = Vec::loadu(s + j + kLanes) / total;
    const Vec d0 = gradient(j, p0), d1 = gradient(j + kLanes, p1);
    store(p0, p1, p + j);
    store(d0, d1, ds + j);
  }
}

}  // namespace lbfast
