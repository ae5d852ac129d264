// C (float32) = or += A @ B for a B that is packed once and multiplied many times, in one thread.
//
// Float: kernels of our own, of whatever vectors the machine has; B lies in panels of kWide columns, [panel][K][kWide].
// BFloat16: gemm.h; B lies in pairs of rows, [K / 2][N][2].
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

#include "gemm.h"

#if defined(__GNUC__)
#define LBFAST_APART __attribute__((noinline))  // one copy: no call of it is short
#else
#define LBFAST_APART
#endif

namespace lbfast::packed {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
constexpr int64_t kVecs = 2;                // of a panel's row
constexpr int64_t kWide = kVecs * kLanes;
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int64_t kHigh = 12;               // rows that the 32 registers sum at a time
#else
constexpr int64_t kHigh = 6;
#endif
constexpr int64_t kDeep = 192;              // K of one sum: longer ones in parts, which loses less; a panel stays in L1
constexpr int64_t kUnrolled = 8;            // of K: a line is asked for with each

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void soon(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 2);
#endif
}

// Memory that somebody needs soon, asked for line by line: `runs` of `lines` lines each, `step` bytes apart.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* from, int64_t runs, int64_t bytes, int64_t step)
      : at_(static_cast<const char*>(from)), runs_(runs), lines_(bytes / 64), step_(step) {}
  // So many lines, or `other` where none are left.
  const char* take(int64_t lines, const void* other) {
    if (runs_ <= 0) {
      return static_cast<const char*>(other);
    }
    const char* from = at_ + done_ * 64;
    done_ += lines;
    if (done_ >= lines_) {
      done_ = 0;
      at_ += step_;
      --runs_;
    }
    return from;
  }

 private:
  const char* at_ = nullptr;
  int64_t runs_ = 0, lines_ = 0, step_ = 0, done_ = 0;
};

// A as it lies: element (i, p) is at p / segment * jump + i * row + p % segment * column; segment is a multiple of
// kUnrolled. kRow and kColumn, where not 0, are what row and column are.
template <typename T, int64_t kRow = 0, int64_t kColumn = 0>
struct Left {
  const T* data;
  int64_t row, column, segment = int64_t{1} << 40, jump = 0;
  Left at(int64_t i, int64_t p) const {
    Left moved = *this;
    moved.data += p / segment * jump + i * row + p % segment * column;
    return moved;
  }
};

template <typename T>
using Rows = Left<T, 0, 1>;  // row-major

template <typename T>
Rows<T> rows_of(const T* data, int64_t ld) {
  return {data, ld, 1};
}

// A = source^T, source row-major in rows of kStride.
template <int64_t kStride>
Left<float, 1, kStride> turned(const float* source) {
  return {source, 1, kStride};
}

// B [k, n]: a window of what is packed.
template <typename T>
struct Right {
  T* data = nullptr;
  int64_t k = 0, n = 0;

  static int64_t size(int64_t k, int64_t n) {
    return kPair<T> == 1 ? k * ceil_div(n, kWide) * kWide : round_to_pair<T>(k) * n;
  }
  // Where row p begins, p a multiple of kPair.
  T* row(int64_t p) const { return data + p * (kPair<T> == 1 ? kWide : n); }

  // Rows first .. first + rows - 1 from src, row-major; `first` a multiple of kPair.
  void fill(const T* src, int64_t ld, int64_t first, int64_t rows) const {
    if constexpr (kPair<T> == 2) {
      pack_pairs(src, ld, rows, n, row(first));
    } else {
      for (int64_t i = 0; i < rows; ++i, src += ld) {
        for (int64_t j = 0; j < n; j += kWide) {
          float* to = row(first + i) + j * k;
          const int64_t cols = std::min(kWide, n - j);
          std::copy_n(src + j, cols, to);
          std::fill(to + cols, to + kWide, 0.0f);
        }
      }
    }
  }
  // All of it from its transposed, src [columns, k] row-major, k a multiple of kPair; what is missing to n is zero.
  void fill_transposed(const T* src, int64_t ld, int64_t columns) const {
    if constexpr (kPair<T> == 2) {
      pack_transposed(src, ld, columns, k, data, n);
    } else {
      for (int64_t j = 0; j < n; j += kWide) {
        pack_transposed(src + j * ld, ld, std::clamp<int64_t>(columns - j, 0, kWide), k, data + j * k, kWide);
      }
    }
  }
  // As rows of A: element (i, p) of B [k, n].
  Left<float, kWide, 1> as_left(int64_t i) const { return {data + i * kWide, kWide, 1, kWide, k * kWide}; }
};

// Sums of a few rows of A with a panel.
template <int64_t kRows, int64_t kRow, int64_t kColumn>
LBFAST_APART void multiply_panel(int64_t k, const Left<float, kRow, kColumn>& left, const float* b, float* c,
                                 int64_t ldc, bool add, Ahead& ahead) {
  const int64_t row = kRow > 0 ? kRow : left.row, column = kColumn > 0 ? kColumn : left.column;
  const char* next = ahead.take(k / kUnrolled, b);
  Vec sums[kRows][kVecs];
#pragma GCC unroll 12
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVecs; ++v) {
      sums[r][v] = Vec(0.0f);
    }
    if (add) {
      soon(c + r * ldc);
      soon(c + r * ldc + kWide - 1);
    }
  }
  // four rows from a pointer: more would take registers, or sums of indices
  const float *a = left.data, *fourth = a + 4 * row, *eighth = a + 8 * row;
  const auto one = [&](int64_t u) __attribute__((always_inline)) {
    const Vec first = Vec::loadu(b + u * kWide), second = Vec::loadu(b + u * kWide + kLanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < kRows; ++r) {
      const float* from = r < 4 ? a : r < 8 ? fourth : eighth;
      const Vec factor(from[r % 4 * row + u * column]);
      sums[r][0] = at::vec::fmadd(factor, first, sums[r][0]);
      sums[r][1] = at::vec::fmadd(factor, second, sums[r][1]);
    }
  };
  const auto move = [&](int64_t count) __attribute__((always_inline)) {
    a += count;
    fourth += count;
    eighth += count;
  };
  for (int64_t begin = 0; begin < k; begin += left.segment) {
    const int64_t stop = std::min(left.segment, k - begin);
    int64_t p = 0;
    for (; p + kUnrolled <= stop; p += kUnrolled, next += 64) {
      soon(next);
#pragma GCC unroll 8
      for (int64_t u = 0; u < kUnrolled; ++u) {
        one(u);
      }
      move(kUnrolled * column);
      b += kUnrolled * kWide;
    }
    for (; p < stop; ++p) {
      one(0);
      move(column);
      b += kWide;
    }
    if (stop == left.segment) {
      move(left.jump - left.segment * column);
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVecs; ++v) {
      float* to = c + r * ldc + v * kLanes;
      (add ? sums[r][v] + Vec::loadu(to) : sums[r][v]).store(to);
    }
  }
}

template <int64_t kRows, typename A>
inline void multiply_rows(int64_t k, const A& left, const float* b, float* c, int64_t ldc, int64_t cols, bool add,
                          Ahead& ahead) {
  if (cols == kWide) {
    multiply_panel<kRows>(k, left, b, c, ldc, add, ahead);
    return;
  }
  float whole[kRows * kWide];
  multiply_panel<kRows>(k, left, b, whole, kWide, false, ahead);
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t j = 0; j < cols; ++j) {
      c[r * ldc + j] = whole[r * kWide + j] + (add ? c[r * ldc + j] : 0.0f);
    }
  }
}

// C [m, n] = or += A [m, k] @ rows first .. first + k - 1 and columns col .. col + n - 1 of B; col a multiple of kWide.
// A's k may begin anywhere in a segment only where it ends there.
template <int64_t kRow, int64_t kColumn>
void multiply(int64_t m, int64_t n, int64_t k, const Left<float, kRow, kColumn>& a, const Right<float>& b,
              int64_t first, int64_t col, float* c, int64_t ldc, bool add, Ahead& ahead) {
  for (int64_t p = 0; p < k; p += kDeep) {
    const int64_t depth = std::min(kDeep, k - p);
    const bool more = add || p > 0;
    for (int64_t j = 0; j < n; j += kWide) {
      const float* panel = b.row(first + p) + (col + j) * b.k;
      const int64_t cols = std::min(kWide, n - j);
      int64_t i = 0;
      for (; i + kHigh <= m; i += kHigh) {
        multiply_rows<kHigh>(depth, a.at(i, p), panel, c + i * ldc + j, ldc, cols, more, ahead);
      }
      for (; i + 4 <= m; i += 4) {
        multiply_rows<4>(depth, a.at(i, p), panel, c + i * ldc + j, ldc, cols, more, ahead);
      }
      for (; i < m; ++i) {
        multiply_rows<1>(depth, a.at(i, p), panel, c + i * ldc + j, ldc, cols, more, ahead);
      }
    }
  }
}

// The same in bfloat16: K of A has no gaps, first is even, and so is k, but for what a zero row of B makes even.
inline void multiply(int64_t m, int64_t n, int64_t k, const Rows<at::BFloat16>& a, const Right<at::BFloat16>& b,
                     int64_t first, int64_t col, float* c, int64_t ldc, bool add, Ahead&) {
  gemm(m, n, k, a.data, a.row, b.row(first) + 2 * col, b.n, c, ldc, add);
}

}  // namespace lbfast::packed
