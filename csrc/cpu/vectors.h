// Exponentials, reciprocals and roundings of many numbers, without a call that would empty the registers; and asking for
// numbers ahead.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

namespace lbfast {

using Vec = at::vec::Vectorized<float>;

// Brings a line that the machine would not guess into the second-level cache.
inline void soon(const void* address) {
#if defined(__x86_64__)
  _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1);
#endif
}

// exp(x), within one unit in the last place; what is below 2^-126 is 0. Infinities and NaN are as they should be.
inline Vec exponential_of(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512 near = _mm512_min_ps(_mm512_set1_ps(200.0f), x);  // infinite beyond; of two, NaN is the second
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(near, _mm512_set1_ps(1.44269504f)), kNearest);
  __m512 f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), near);  // ln 2 in two parts, the first exact by whole
  f = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 p = _mm512_set1_ps(1.38145394e-3f);  // e^f on [-ln 2 / 2, ln 2 / 2]
  for (const float c : {8.36874545e-3f, 4.16683890e-2f, 0.166665211f, 0.49999994f, 1.0f, 1.0f}) {
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  }
  const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3365448f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(counts, p, whole);
#else
  return x.exp();
#endif
}

// 1 / x within one unit in the last place, x from 1 to 1e6.
inline Vec reciprocal_of(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 near = _mm512_rcp14_ps(x);
  return _mm512_fmadd_ps(near, _mm512_fnmadd_ps(x, near, _mm512_set1_ps(1.0f)), near);
#else
  return Vec(1.0f) / x;
#endif
}

// Two vectors, one after the other.
inline void store(const Vec& a, const Vec& b, float* to) {
  a.store(to);
  b.store(to + a.size());
}

#if defined(CPU_CAPABILITY_AVX512)
inline const bool has_rounding = (__builtin_cpu_init(), __builtin_cpu_supports("avx512bf16"));
#endif

inline void store(const Vec& a, const Vec& b, at::BFloat16* to) {
#if defined(CPU_CAPABILITY_AVX512)
  if (has_rounding) {
    __m512i rounded;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(static_cast<__m512>(a)), "v"(static_cast<__m512>(b)));
    _mm512_storeu_si512(to, rounded);
    return;
  }
#endif
  at::vec::convert_from_float<at::BFloat16>(a, b).store(to);
}

}  // namespace lbfast
