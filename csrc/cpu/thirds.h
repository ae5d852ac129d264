// Products of float32 on AMX in thirds, as csrc/cpu/panels.h has them, of operands that are split here: sums [32, 32] of
// A @ B, in one thread. AMX takes what is below 2^-126 for 0: rows are divided by a power of two first, so that their
// largest number is from 1 to 2, and what is lost is below 2^-100 of it.
//
// Numbers are the 16 bits of each part, in steps of 32 of K:
//   A  strips of 16 rows, [strip][step][3 parts][16 rows][32]
//   B  panels of 32 columns, [panel][step][3 parts][2 halves][16 words][16 columns][2]: a word has two numbers of K
// A has an even number of strips. Beyond the end of K one of both is 0 and the other no NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "panels.h"
#include "vectors.h"

#if defined(LBFAST_AMX)

namespace lbfast::thirds {

constexpr int64_t kParts = 3;
constexpr int64_t kDeep = 32;                    // numbers of K in a step
constexpr int64_t kHigh = 32, kWide = 32;        // of the sums
constexpr int64_t kTile = 512;                   // numbers of a tile of AMX
constexpr int64_t kLeft = kParts * kTile;        // of a strip's step
constexpr int64_t kRight = 2 * kParts * kTile;   // of a panel's step
static_assert(kWide == panels::kColumns && kHigh == 2 * panels::kRows);

inline int64_t steps_of(int64_t k) { return (k + kDeep - 1) / kDeep; }

// The power of two at or below `largest`, 2^-126 at least; 1 where it is no number.
inline float power_below(float largest) {
  if (!std::isfinite(largest)) {
    return 1.0f;
  }
  return std::ldexp(1.0f, std::max(largest > 0.0f ? std::ilogb(largest) : -126, -126));
}

#define LBFAST_THIRDS __attribute__((target("avx512bf16")))

LBFAST_THIRDS inline __m512i to_bits(__m512 low, __m512 high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

// read(r, k, lanes), 16 numbers of row r from column k on, those of `lanes` or 0 -> rows of A in strips `strip` apart.
template <typename Read>
LBFAST_THIRDS void to_left(int64_t rows, int64_t width, uint16_t* to, int64_t strip, const Read& read) {
  for (int64_t r = 0; r < rows; ++r) {
    uint16_t* row = to + r / 16 * strip + r % 16 * kDeep;
    for (int64_t k = 0; k < width; k += kDeep, row += kLeft) {
      __m512 low = read(r, k, first_lanes(width - k)), high = read(r, k + 16, first_lanes(width - k - 16));
#pragma GCC unroll 3
      for (int64_t part = 0; part < kParts; ++part) {
        const __m512i bits = to_bits(low, high);
        _mm512_storeu_si512(row + part * kTile, bits);
        const __m512i first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(bits));
        const __m512i second = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bits, 1));
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_slli_epi32(second, 16)));
      }
    }
  }
}

// read, as above, of rows of K -> B from row `first` of K on, which is even, in panels `panel` apart.
template <typename Read>
LBFAST_THIRDS void to_right(int64_t first, int64_t rows, int64_t width, uint16_t* to, int64_t panel, const Read& read) {
  const __m512i both = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                        5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i above = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  for (int64_t r = 0; r < rows; r += 2) {
    uint16_t* step = to + (first + r) / kDeep * kRight + (first + r) % kDeep / 2 * 32;
    for (int64_t k = 0; k < width; k += 16) {
      uint16_t* words = step + k / kWide * panel + k % kWide / 16 * kTile;
      const __mmask16 lanes = first_lanes(width - k);
      __m512 low = read(r, k, lanes), high = r + 1 < rows ? read(r + 1, k, lanes) : _mm512_setzero_ps();
#pragma GCC unroll 3
      for (int64_t part = 0; part < kParts; ++part) {
        const __m512i bits = _mm512_permutexvar_epi16(both, to_bits(low, high));
        _mm512_storeu_si512(words + part * 2 * kTile, bits);
        low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
        high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(bits, above)));
      }
    }
  }
}

// A tile of A <-> half a panel's part of B.
inline void turn(const uint16_t* from, uint16_t* to) {
  at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(from), 16, reinterpret_cast<float*>(to), 16, 16, 16);
}

// read, as above, of rows that are columns of B.
template <typename Read>
void to_right_turned(int64_t columns, int64_t width, uint16_t* to, int64_t panel, const Read& read) {
  alignas(64) uint16_t tiles[kLeft] = {};
  for (int64_t j = 0; j < columns; j += 16) {
    uint16_t* half = to + j / kWide * panel + j % kWide / 16 * kTile;
    for (int64_t k = 0; k < width; k += kDeep) {
      to_left(std::min<int64_t>(16, columns - j), std::min(kDeep, width - k), tiles, kLeft,
              [&](int64_t r, int64_t column, __mmask16 lanes) { return read(j + r, k + column, lanes); });
      for (int64_t part = 0; part < kParts; ++part) {
        turn(tiles + part * kTile, half + k / kDeep * kRight + part * 2 * kTile);
      }
    }
  }
}

// read, as above, of rows of K whose columns are rows of A.
template <typename Read>
void to_left_turned(int64_t rows, int64_t width, uint16_t* to, int64_t strip, const Read& read) {
  alignas(64) uint16_t panel[kRight];
  for (int64_t r = 0; r < rows; r += kDeep) {
    const int64_t count = std::min(kDeep, rows - r);
    for (int64_t k = 0; k < width; k += kWide) {
      if (count < kDeep) {
        std::fill_n(panel, kRight, uint16_t{0});
      }
      to_right(0, count, std::min(kWide, width - k), panel, kRight,
               [&](int64_t row, int64_t column, __mmask16 lanes) { return read(r + row, k + column, lanes); });
      for (int64_t half = 0; half < 2 && k + 16 * half < width; ++half) {
        uint16_t* tiles = to + (k / 16 + half) * strip + r / kDeep * kLeft;
        for (int64_t part = 0; part < kParts; ++part) {
          turn(panel + (2 * part + half) * kTile, tiles + part * kTile);
        }
      }
    }
  }
}

// Strips of A whose columns are K -> a panel of B whose rows are K: `rows` rows, of step 0 of the strips.
LBFAST_THIRDS inline void left_to_right(int64_t rows, const uint16_t* from, int64_t strip, uint16_t* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t r = 0; r < rows; r += 2) {
    const uint16_t* pair = from + r / 16 * strip + r % 16 * kDeep;
    uint16_t* words = to + r / kDeep * kRight + r % kDeep / 2 * 32;
    for (int64_t part = 0; part < kParts; ++part) {
      const uint16_t* row = pair + part * kTile;
      const __m512i first = _mm512_loadu_si512(row), second = _mm512_loadu_si512(row + kDeep);
      _mm512_storeu_si512(words + 2 * part * kTile, _mm512_permutex2var_epi16(first, low, second));
      _mm512_storeu_si512(words + (2 * part + 1) * kTile, _mm512_permutex2var_epi16(first, high, second));
    }
  }
}

inline void nothing(void*) {}

// sums [32][32] of two strips and a panel, of 1,024 of K at a time: of many numbers a sum in one go loses digits.
inline void sum(int64_t steps, const uint16_t* a, int64_t strip, const uint16_t* b, float* sums) {
  constexpr int64_t kAtOnce = 32;
  for (int64_t s = 0; s == 0 || s < steps; s += kAtOnce) {
    panels::multiply_amx<panels::Thirds>({reinterpret_cast<const char*>(a + s * kLeft), strip * 2, kHigh,
                                          reinterpret_cast<const char*>(b + s * kRight), std::min(kAtOnce, steps - s),
                                          sums, s > 0, nullptr, 0, nothing, nullptr});
  }
}

// The same for one panel of B, to ends(i, sums).
template <typename Ends>
void multiply_panel(int64_t m, int64_t steps, const uint16_t* a, int64_t strip, const uint16_t* b, const Ends& ends) {
  alignas(64) float sums[kHigh * kWide];
  for (int64_t i = 0; i < m; i += kHigh) {
    sum(steps, a + i / 16 * strip, strip, b, sums);
    ends(i, sums);
  }
}

// Sums of A [m, K] @ B [K, n], `steps` of K, to ends(i, j, sums [32][32]), what lies at row i and column j.
template <typename Ends>
void multiply(int64_t m, int64_t n, int64_t steps, const uint16_t* a, int64_t strip, const uint16_t* b, int64_t panel,
              const Ends& ends) {
  for (int64_t j = 0; j < n; j += kWide) {
    multiply_panel(m, steps, a, strip, b + j / kWide * panel, [&](int64_t i, const float* sums) { ends(i, j, sums); });
  }
}

// to [rows, columns], `ld` apart, += factor * sums, at most 32 x 32.
inline void add(const float* sums, float factor, int64_t rows, int64_t columns, float* to, int64_t ld) {
  const __mmask16 low = first_lanes(columns), high = first_lanes(columns - 16);
  const __m512 times = _mm512_set1_ps(factor);
  for (int64_t r = 0; r < std::min(kHigh, rows); ++r, sums += kWide, to += ld) {
    const __m512 first = _mm512_maskz_loadu_ps(low, to), second = _mm512_maskz_loadu_ps(high, to + 16);
    _mm512_mask_storeu_ps(to, low, _mm512_fmadd_ps(times, _mm512_load_ps(sums), first));
    _mm512_mask_storeu_ps(to + 16, high, _mm512_fmadd_ps(times, _mm512_load_ps(sums + 16), second));
  }
}

}  // namespace lbfast::thirds

#endif
