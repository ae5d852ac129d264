// `products` and `gradients` of pairs.h in float32 where AMX is: their products are sums of bfloat16's (thirds.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "pairs_base.h"
#include "thirds.h"

#if defined(LBFAST_AMX)

namespace lbfast::pairs {

constexpr int64_t kTogether = 2;      // tiles of columns of the forward, for which rows of x are read once
constexpr int64_t kSliceOfAmx = 384;  // numbers of a row whose gradient is added to while dS lies in thirds
static_assert(kRows % thirds::kHigh == 0 && kCols % thirds::kWide == 0 && kDepth % thirds::kDeep == 0);
static_assert(kLanes == 16);

// The powers of two that rows [rows, d] are divided by; none where a row has a number that is not finite, or its
// largest is not from 2^-60 to 2^60: products of such powers might not be numbers where those of the rows are.
inline std::optional<std::vector<float>> powers_of(const float* x, int64_t rows, int64_t d) {
  constexpr float kLeast = 0x1p-60f, kMost = 0x1p60f;
  std::vector<float> powers(rows);
  at::parallel_for(0, rows, grain(d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = x + i * d;
      __m512 most = _mm512_setzero_ps();
      __mmask16 wrong = 0;
      for (int64_t k = 0; k < d; k += kLanes) {
        const __m512 size = _mm512_abs_ps(_mm512_maskz_loadu_ps(thirds::first_lanes(d - k), row + k));
        wrong |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(kMost), _CMP_NLE_UQ);  // NaN too
        most = _mm512_max_ps(most, size);
      }
      const float largest = _mm512_reduce_max_ps(most);
      powers[i] = wrong || (largest > 0 && largest < kLeast) ? 0.0f : largest > 0 ? thirds::power_below(largest) : 1.0f;
    }
  });
  if (std::find(powers.begin(), powers.end(), 0.0f) != powers.end()) {
    return std::nullopt;
  }
  return powers;
}

// Prefixes' parts of a row, each in whole steps of thirds.
struct Parts {
  std::vector<Section> sections;
  std::vector<int64_t> first;  // step of each
  int64_t steps = 0;           // of all

  explicit Parts(const std::vector<int64_t>& ends) : sections(sections_of(ends)) {
    for (const Section& s : sections) {
      first.push_back(steps);
      steps += thirds::steps_of(s.size);
    }
  }
  int64_t steps_of(int64_t p) const { return thirds::steps_of(sections[p].size); }
  int64_t strip() const { return steps * thirds::kLeft; }
  int64_t panel() const { return steps * thirds::kRight; }
};

// Of one call: x [m, D] and y [n, D], contiguous, rows i of x being divided by x_powers[i] and so on.
struct OnAmx {
  const float *x, *y;
  int64_t m, n, d;
  std::vector<float> x_powers, y_powers;

  // None where the machine or the numbers are not fit for it.
  static std::optional<OnAmx> made(const float* x, const float* y, int64_t m, int64_t n, int64_t d) {
    if (!panels::has_amx()) {
      return std::nullopt;
    }
    auto x_powers = powers_of(x, m, d), y_powers = powers_of(y, n, d);
    if (!x_powers || !y_powers) {
      return std::nullopt;
    }
    return OnAmx{x, y, m, n, d, *std::move(x_powers), *std::move(y_powers)};
  }

  std::pair<int64_t, int64_t> rectangle(int64_t prefixes, int64_t workspace, bool dx) const {
    // x and y lie there in three parts of 2 bytes
    return pairs::rectangle(m, n, {4 * prefixes, 6 * d, 6 * d}, workspace, dx);
  }
};

// Rows of x, row i divided by powers[i]: what thirds.h reads.
struct Reader {
  const float* x;
  int64_t ld;
  const float* powers;

  __m512 operator()(int64_t i, int64_t k, __mmask16 lanes) const {
    return _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i * ld + k), _mm512_set1_ps(1.0f / powers[i]));
  }
};

struct alignas(64) Line {
  uint16_t numbers[32];
};

// Memory of a thread for so many numbers.
class Buffer {
 public:
  explicit Buffer(int64_t size) : lines_(ceil_div(size, 32)) {}
  uint16_t* data() { return lines_.data()->numbers; }

 private:
  std::vector<Line> lines_;
};

// This thread's tiles of AMX.
struct Tiles {
  Tiles() { panels::ready_tiles(); }
  ~Tiles() { panels::release_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The largest number of a tile, rows `ld` apart, each times power(r, k, lanes); or what is none.
template <typename Power>
float largest_of(const float* tile, int64_t rows, int64_t columns, int64_t ld, const Power& power) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 none = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t k = 0; k < columns; k += kLanes) {
      const __mmask16 lanes = thirds::first_lanes(columns - k);
      const __m512 size = _mm512_mul_ps(_mm512_abs_ps(_mm512_maskz_loadu_ps(lanes, tile + r * ld + k)), power(r, k, lanes));
      none |= _mm512_cmp_ps_mask(size, size, _CMP_UNORD_Q);
      most = _mm512_max_ps(most, size);
    }
  }
  return none ? std::nanf("") : _mm512_reduce_max_ps(most);
}

// The logits' products of rows of x with a tile of columns, one prefix's part after the other.
class Logits {
 public:
  Logits(const OnAmx& of, const Parts& parts)
      : of_(of), parts_(parts), columns_(kCols / thirds::kWide * parts.panel()) {}

  // The tile of columns from number j on.
  void take_columns(int64_t j) {
    const int64_t width = std::min(kCols, of_.n - j);
    for (size_t p = 0; p < parts_.sections.size(); ++p) {
      const auto [from, size] = parts_.sections[p];
      thirds::to_right_turned(width, size, columns_.data() + parts_.first[p] * thirds::kRight, parts_.panel(),
                              Reader{of_.y + j * of_.d + from, of_.d, of_.y_powers.data() + j});
    }
    std::copy_n(of_.y_powers.data() + j, width, powers_);
    std::fill(powers_ + width, powers_ + kCols, 0.0f);
  }

  // `rows` of x from row i on, which lie at `a` as A -> tile [rows][kCols], added to it where there is a part before.
  void multiply(int64_t p, int64_t i, int64_t rows, const uint16_t* a, float* tile) {
    const float* row_powers = of_.x_powers.data() + i;
    const int64_t steps = parts_.steps_of(p);
    thirds::multiply(rows, kCols, steps, a + parts_.first[p] * thirds::kLeft, parts_.strip(),
                     columns_.data() + parts_.first[p] * thirds::kRight, parts_.panel(),
                     [&](int64_t r, int64_t j, const float* sums) {
                       const __m512 low = _mm512_loadu_ps(powers_ + j), high = _mm512_loadu_ps(powers_ + j + 16);
                       const int64_t end = std::min(rows, r + thirds::kHigh);
                       for (float* to = tile + r * kCols + j; r < end; ++r, sums += thirds::kWide, to += kCols) {
                         const __m512 power = _mm512_set1_ps(row_powers[r]);
                         __m512 first = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(sums), power), low);
                         __m512 second = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(sums + 16), power), high);
                         if (p > 0) {
                           first = _mm512_add_ps(first, _mm512_loadu_ps(to));
                           second = _mm512_add_ps(second, _mm512_loadu_ps(to + 16));
                         }
                         _mm512_storeu_ps(to, first);
                         _mm512_storeu_ps(to + 16, second);
                       }
                     });
  }

 private:
  const OnAmx& of_;
  const Parts& parts_;
  Buffer columns_;
  float powers_[kCols];
};

// `count` rows of x from row `first` on -> A, as the logits take it; both are multiples of 16 but for the last count.
inline void rows_to_left(const OnAmx& of, const Parts& parts, int64_t first, int64_t count, uint16_t* to) {
  for (size_t p = 0; p < parts.sections.size(); ++p) {
    const auto [from, size] = parts.sections[p];
    thirds::to_left(count, size, to + parts.first[p] * thirds::kLeft, parts.strip(),
                    Reader{of.x + first * of.d + from, of.d, of.x_powers.data() + first});
  }
}

// `count` rows [., d] -> B from row `first` of K on, a column for each number, in panels `panel` apart.
inline void rows_to_right(const float* x, const float* powers, int64_t d, const Parts& parts, int64_t first,
                          int64_t count, uint16_t* to, int64_t panel) {
  for (size_t p = 0; p < parts.sections.size(); ++p) {
    const auto [from, size] = parts.sections[p];
    thirds::to_right(first, count, size, to + parts.first[p] * panel, panel, Reader{x + from, d, powers});
  }
}

template <typename Finish>
void products(const OnAmx& of, const std::vector<int64_t>& ends, float* kept, const Finish& finish) {
  const Parts parts(ends);
  const int64_t m = of.m, n = of.n, tiles = ceil_div(n, kCols), wide = tiles_in_group(n);
  const int64_t high = std::min(ceil_div(m, kRows) * kRows, kEvenRows);
  Scratch<uint16_t> x_left(high / 16 * parts.strip());
  const auto x_row = [&](int64_t i) { return x_left.data() + i / 16 * parts.strip(); };
  for (int64_t c = 0; c < m; c += high) {
    const int64_t rows = std::min(high, m - c);
    at::parallel_for(0, ceil_div(rows, 16), grain(16 * of.d), [&](int64_t begin, int64_t end) {
      rows_to_left(of, parts, c + begin * 16, std::min(rows, end * 16) - begin * 16, x_row(begin * 16));
    });
    at::parallel_for(0, groups_of(n), grain(wide * kCols * rows * of.d), [&](int64_t begin, int64_t end) {
      const Tiles ready;
      std::vector<Logits> logits(kTogether, Logits(of, parts));
      std::vector<float> scratch(kept == nullptr ? kRows * kCols : 0);
      const int64_t last = std::min(tiles, end * wide);
      for (int64_t first = begin * wide; first < last; first += kTogether) {
        const int64_t together = std::min(kTogether, last - first);
        for (int64_t t = 0; t < together; ++t) {
          logits[t].take_columns((first + t) * kCols);
        }
        for (int64_t i = c; i < c + rows; i += kRows) {
          for (int64_t t = first; t < first + together; ++t) {
            const int64_t height = std::min(kRows, c + rows - i);
            float* tile = kept == nullptr ? scratch.data() : kept + (t * m + i) * kCols;
            for (int64_t p = 0; p < static_cast<int64_t>(ends.size()); ++p) {
              logits[t - first].multiply(p, i, height, x_row(i - c), tile);
              finish(t / wide, p, tile, height, std::min(kCols, n - t * kCols), i, t * kCols);
            }
          }
        }
      }
    });
  }
}

template <typename Finish, typename Join>
void gradients(const OnAmx& of, const std::vector<int64_t>& ends, int64_t workspace, const float* kept, float* dx,
               float* dy, const Finish& finish, const Join& join) {
  const Parts parts(ends);
  const int64_t m = of.m, n = of.n, d = of.d, prefixes = static_cast<int64_t>(ends.size()), kTile = kRows * kCols;
  const auto [high, wide] = of.rectangle(prefixes, workspace, dx != nullptr);
  const int64_t blocks = ceil_div(wide, kDepth);
  // [prefixes, high / kRows, blocks, kRows, kDepth]
  Scratch<float> ds(dx != nullptr ? prefixes * high * blocks * kDepth : 0);
  const auto ds_of = [&, high = high](int64_t p, int64_t i, int64_t j) {
    return ds.data() + ((p * high + i) * blocks + j / kDepth * kRows) * kDepth + j % kDepth;
  };
  const int64_t y_panel = wide / thirds::kDeep * thirds::kRight;
  Scratch<uint16_t> x_left(high / 16 * parts.strip());
  const auto x_row = [&](int64_t i) { return x_left.data() + i / 16 * parts.strip(); };
  Scratch<uint16_t> y_right(dx != nullptr ? parts.steps * y_panel : 0);
  std::vector<std::pair<int64_t, Section>> slices;  // of a section: its number, and the slice within it
  for (int64_t p = 0; p < prefixes; ++p) {
    for (int64_t from = 0, size = parts.sections[p].size; from < size; from += kSliceOfAmx) {
      slices.push_back({p, {from, std::min(kSliceOfAmx, size - from)}});
    }
  }
  for (int64_t c = 0; c < m; c += high) {
    const int64_t rows = std::min(high, m - c);
    const float* row_powers = of.x_powers.data() + c;
    at::parallel_for(0, ceil_div(rows, thirds::kDeep), grain(thirds::kDeep * d), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * thirds::kDeep, count = std::min(rows, end * thirds::kDeep) - first;
      rows_to_left(of, parts, c + first, count, x_row(first));
    });
    for (int64_t e = 0; e < n; e += wide) {
      const int64_t cols = std::min(wide, n - e);
      at::parallel_for(0, ceil_div(cols, kCols), grain(2 * kCols * rows * d), [&](int64_t begin, int64_t end) {
        const Tiles ready;
        Logits logits(of, parts);
        constexpr int64_t kStrip = kRows / thirds::kDeep * thirds::kLeft;
        Buffer turned(kCols / 16 * kStrip), x_panel(kRows / thirds::kDeep * thirds::kRight);
        std::vector<float> sums(prefixes > 1 ? kTile : 0), z(prefixes * kTile);
        for (int64_t j = e + begin * kCols; j < std::min(e + cols, e + end * kCols); j += kCols) {
          const int64_t width = std::min(kCols, n - j);
          if (kept == nullptr) {
            logits.take_columns(j);
          }
          if (dx != nullptr) {
            rows_to_right(of.y + j * d, of.y_powers.data() + j, d, parts, j - e, width, y_right.data(), y_panel);
          }
          for (int64_t i = c; i < c + rows; i += kRows) {
            const int64_t height = std::min(kRows, c + rows - i);
            for (int64_t p = 0; p < prefixes; ++p) {
              float* of_prefix = &z[p * kTile];
              float* tile = prefixes > 1 ? sums.data() : of_prefix;
              if (kept != nullptr) {
                std::copy_n(kept + (j / kCols * m + i) * kCols, height * kCols, tile);
              } else {
                logits.multiply(p, i, height, x_row(i - c), tile);
              }
              finish(p, tile, of_prefix, height, width, i, j);
            }
            add_longer(z.data(), prefixes, height);
            for (int64_t p = 0; p < prefixes; ++p) {
              const float* slopes = &z[p * kTile];
              if (dx != nullptr) {
                float* to = ds_of(p, i - c, j - e);
                for (int64_t r = 0; r < height; ++r) {
                  std::copy_n(slopes + r * kCols, kCols, to + r * kDepth);
                }
              }
              if (dy == nullptr) {
                continue;
              }
              // rows of x count as they were divided
              const float* powers = row_powers + i - c;
              const auto of_row = [&](int64_t r, int64_t, __mmask16) { return _mm512_set1_ps(powers[r]); };
              const float power = thirds::power_below(largest_of(slopes, height, kCols, kCols, of_row));
              const __m512 inverse = _mm512_set1_ps(1.0f / power);
              thirds::to_left_turned(height, kCols, turned.data(), kStrip, [&](int64_t r, int64_t k, __mmask16 lanes) {
                const __m512 values = _mm512_maskz_loadu_ps(lanes, slopes + r * kCols + k);
                return _mm512_mul_ps(_mm512_mul_ps(values, _mm512_set1_ps(powers[r])), inverse);
              });
              const auto [from, size] = parts.sections[p];
              float* to = dy + j * d + from;
              const int64_t steps = thirds::steps_of(height);
              for (int64_t k = 0; k < size; k += thirds::kWide) {
                const int64_t step = parts.first[p] + k / thirds::kDeep;
                thirds::left_to_right(height, x_row(i - c) + step * thirds::kLeft, parts.strip(), x_panel.data());
                thirds::multiply_panel(width, steps, turned.data(), kStrip, x_panel.data(),
                                       [&](int64_t r, const float* added) {
                                         thirds::add(added, power, width - r, size - k, to + r * d + k, d);
                                       });
              }
            }
          }
        }
      });
      join(c, rows, e, cols);
      if (dx == nullptr) {
        continue;
      }
      const auto count = static_cast<int64_t>(slices.size());
      const float* col_powers = of.y_powers.data() + e;
      const int64_t work = kRows * cols * kSliceOfAmx;
      at::parallel_for(0, ceil_div(rows, kRows) * count, grain(work), [&](int64_t begin, int64_t end) {
        const Tiles ready;
        constexpr int64_t kStrip = kDepth / thirds::kDeep * thirds::kLeft;
        Buffer left(kRows / 16 * kStrip);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t i = item / count * kRows, height = std::min(kRows, rows - i);
          const auto& [p, slice] = slices[item % count];
          float* to = dx + (c + i) * d + parts.sections[p].from + slice.from;
          for (int64_t j = 0; j < cols; j += kDepth) {
            const int64_t depth = std::min(kDepth, cols - j);
            const float *block = ds_of(p, i, j), *powers = col_powers + j;
            const auto of_column = [&](int64_t, int64_t k, __mmask16 lanes) {
              return _mm512_maskz_loadu_ps(lanes, powers + k);
            };
            const float power = thirds::power_below(largest_of(block, height, depth, kDepth, of_column));
            const __m512 inverse = _mm512_set1_ps(1.0f / power);
            thirds::to_left(height, depth, left.data(), kStrip, [&](int64_t r, int64_t k, __mmask16 lanes) {
              const __m512 values = _mm512_maskz_loadu_ps(lanes, block + r * kDepth + k);
              return _mm512_mul_ps(_mm512_mul_ps(values, _mm512_maskz_loadu_ps(lanes, powers + k)), inverse);
            });
            const uint16_t* right = y_right.data() + (parts.first[p] + slice.from / thirds::kWide) * y_panel +
                                    j / thirds::kDeep * thirds::kRight;
            const int64_t steps = thirds::steps_of(depth);
            thirds::multiply(height, slice.size, steps, left.data(), kStrip, right, y_panel,
                             [&](int64_t r, int64_t k, const float* added) {
                               thirds::add(added, power, height - r, slice.size - k, to + r * d + k, d);
                             });
          }
        }
      });
    }
  }
}

}  // namespace lbfast::pairs

#endif
