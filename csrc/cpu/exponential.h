// exp of float32 numbers, inline: a library's would be a call, before which every register that is in use is stored.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace lbfast {

using Vec = at::vec::Vectorized<float>;

// exp(x), within 1.1 ulp where that is a normal number; 0, infinity and NaN where they belong.
inline Vec exponential(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  // x = n ln 2 + f; beyond +-200 the result is 0 or infinite anyway, and n may not lose f
  const __m512 near = _mm512_min_ps(_mm512_set1_ps(200.0f), _mm512_max_ps(_mm512_set1_ps(-200.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(near, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), near);  // 15 bits of ln 2, so that this is exact
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), f);
  __m512 p = _mm512_set1_ps(1.383683574e-3f);  // e^f on +-ln 2 / 2, within 2e-9
  for (const float c : {8.374824051e-3f, 4.166822619e-2f, 0.1666642007f, 0.4999999208f, 1.0f, 1.0f}) {
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(p, n);
#else
  return x.exp();
#endif
}

}  // namespace lbfast
