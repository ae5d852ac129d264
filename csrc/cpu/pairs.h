// Tiles of the products of x [m, D] with y [n, D], and the gradients of a loss that is a function of each: what the
// contrastive losses of this folder share. Operands are contiguous float or bfloat16, sums and gradients float. Tiles
// stay in cache; no m x n matrix is stored. The order of additions depends on shapes alone, not on the threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "gemm.h"
#include "packed.h"
#include "pairs_amx.h"
#include "pairs_base.h"
#include "vectors.h"

namespace lbfast::pairs {

// Of one call: x [m, D] and y [n, D], contiguous.
template <typename T>
struct Operands {
  const T *x, *y;
  int64_t m, n, d;

  std::pair<int64_t, int64_t> rectangle(int64_t prefixes, int64_t workspace, bool dx) const {
    return pairs::rectangle(m, n, {prefixes, d, d}, workspace / static_cast<int64_t>(sizeof(T)), dx);
  }
};

// Reduces a vector over its lanes.
template <typename Op>
float reduce(const Vec& v, Op op) {
  return at::vec::vec_reduce_all<float>([op](Vec& a, Vec& b) { return op(a, b); }, v);
}
inline float sum_lanes(const Vec& v) {
  return reduce(v, [](const Vec& a, const Vec& b) { return a + b; });
}
inline float max_lanes(const Vec& v) {
  return reduce(v, [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); });
}

inline void convert(const float* src, float* dst, int64_t n) { std::copy(src, src + n, dst); }
inline void convert(const float* src, at::BFloat16* dst, int64_t n) {  // n a multiple of 2 kLanes
  for (int64_t k = 0; k < n; k += 2 * kLanes) {
    store(Vec::loadu(src + k), Vec::loadu(src + k + kLanes), dst + k);
  }
}

// Rows of an operand, packed section by section.
template <typename T>
class PackedRows {
 public:
  PackedRows(int64_t rows, const std::vector<Section>& sections) : sections_(sections), scratch_(size(rows, sections)) {
    T* data = scratch_.data();
    for (const Section& s : sections) {
      parts_.push_back({data, rows, s.size});
      data += packed::Right<T>::size(rows, s.size);
    }
  }
  const packed::Right<T>& operator[](int64_t section) const { return parts_[section]; }
  void fill(const T* rows, int64_t d, int64_t first, int64_t count) const {
    for (size_t s = 0; s < parts_.size(); ++s) {
      parts_[s].fill(rows + sections_[s].from, d, first, count);
    }
  }

 private:
  static int64_t size(int64_t rows, const std::vector<Section>& sections) {
    int64_t all = 0;
    for (const Section& s : sections) {
      all += packed::Right<T>::size(rows, s.size);
    }
    return all;
  }
  const std::vector<Section>& sections_;
  Scratch<T> scratch_;
  std::vector<packed::Right<T>> parts_;
};

// Threads own groups of columns: x @ y^T of a tile [rows, kCols], row0 and col0 its first row and column, to
// `finish(group, p, products, rows, cols, row0, col0)`. `kept`, or null: where the products go and stay, [tile of
// columns][m][kCols]; with one prefix. `ends`: as below.
template <typename T, typename Finish>
void products(const Operands<T>& of, const std::vector<int64_t>& ends, float* kept, const Finish& finish) {
  const std::vector<Section> sections = sections_of(ends);
  const auto [x, y, m, n, d] = of;
  const int64_t tiles = ceil_div(n, kCols), wide = tiles_in_group(n);
  at::parallel_for(0, groups_of(n), grain(wide * kCols * m * d), [&](int64_t begin, int64_t end) {
    std::vector<T> columns(wide * kCols * d);
    std::vector<float> scratch(kept == nullptr ? kRows * kCols : 0);
    const auto of_tile = [&](int64_t t) { return packed::Right<T>{&columns[t * kCols * d], d, kCols}; };
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * wide, last = std::min(tiles, first + wide);
      for (int64_t t = first; t < last; ++t) {
        of_tile(t - first).fill_transposed(y + t * kCols * d, d, std::min(kCols, n - t * kCols));
      }
      for (int64_t i = 0; i < m; i += kRows) {
        const int64_t height = std::min(kRows, m - i), then = i + kRows < m ? i + kRows : 0;
        packed::Ahead ahead(x + then * d, 1, std::min(kRows, m - then) * d * sizeof(T), 0);
        for (int64_t t = first; t < last; ++t) {
          const int64_t j = t * kCols, width = std::min(kCols, n - j);
          float* tile = kept == nullptr ? scratch.data() : kept + (t * m + i) * kCols;
          for (size_t p = 0; p < sections.size(); ++p) {
            const auto [from, size] = sections[p];
            packed::multiply(height, kCols, size, packed::rows_of(x + i * d + from, d), of_tile(t - first), from, 0,
                             tile, kCols, p > 0, ahead);
            finish(g, p, tile, height, width, i, j);
          }
        }
      }
    }
    gemm_release<T>();
  });
}

// For each rectangle of pairs: (1) threads own tiles of columns: x @ y^T of a tile to `finish(p, products, ds, rows,
// cols, row0, col0)`, which leaves dS in ds, its columns past `cols` 0; dS goes to the scratch, and dY_tile += dS^T X;
// then one thread does `join(row0, rows, col0, cols)`; (2) threads own slices of rows: dX_rows += dS Y. dx or dy may be
// null. `kept`, or null: what is there to finish instead of the products, as above.
//
// `ends`: where nested prefixes of the D numbers end, the last at D. Their products are partial sums of one, finished
// one after another, p = 0, 1, ...; numbers that several prefixes have are multiplied by the sum of these prefixes' dS.
// With one prefix, ds is where the products are.
template <typename T, typename Finish, typename Join>
void gradients(const Operands<T>& of, const std::vector<int64_t>& ends, int64_t workspace, const float* kept, float* dx,
               float* dy, const Finish& finish, const Join& join) {
  constexpr bool kFloat = std::is_same_v<T, float>;
  const std::vector<Section> sections = sections_of(ends);
  const T *x = of.x, *y = of.y;
  const int64_t m = of.m, n = of.n, d = of.d, prefixes = static_cast<int64_t>(ends.size()), kTile = kRows * kCols;
  const auto [high, wide] = of.rectangle(prefixes, workspace, dx != nullptr);
  const int64_t blocks = ceil_div(wide, kDepth);
  Scratch<T> ds_scratch(dx != nullptr ? prefixes * high * blocks * kDepth : 0);
  T* ds = ds_scratch.data();  // [prefixes, high / kRows, blocks, kRows, kDepth]
  const auto ds_of = [&, high = high](int64_t p, int64_t i, int64_t j) {
    return ds + ((p * high + i) * blocks + j / kDepth * kRows) * kDepth + j % kDepth;
  };
  const PackedRows<T> x_packed(dy != nullptr ? high : 0, sections), y_packed(dx != nullptr ? wide : 0, sections);
  std::vector<std::pair<int64_t, Section>> slices;  // of a section: its number, and the slice within it
  for (int64_t p = 0; p < prefixes; ++p) {
    for (int64_t from = 0; from < sections[p].size; from += kSlice) {
      slices.push_back({p, {from, std::min(kSlice, sections[p].size - from)}});
    }
  }
  for (int64_t c = 0; c < m; c += high) {
    const int64_t rows = std::min(high, m - c);
    if (dy != nullptr) {
      at::parallel_for(0, ceil_div(rows, kRows), grain(kRows * d), [&](int64_t begin, int64_t end) {
        const int64_t first = begin * kRows;
        x_packed.fill(x + (c + first) * d, d, first, std::min(rows, end * kRows) - first);
      });
    }
    for (int64_t e = 0; e < n; e += wide) {
      const int64_t cols = std::min(wide, n - e);
      at::parallel_for(0, ceil_div(cols, kCols), grain(2 * kCols * rows * d), [&](int64_t begin, int64_t end) {
        const int64_t narrow = kFloat ? 0 : kTile;
        std::vector<T> columns(d * kCols), rounded(narrow), paired(narrow), turned(narrow);
        std::vector<float> sums(prefixes > 1 ? kTile : 0), z(prefixes * kTile);
        std::vector<packed::Ahead> ahead(prefixes);
        const packed::Right<T> y_tile{columns.data(), d, kCols};
        for (int64_t j = e + begin * kCols; j < std::min(e + cols, e + end * kCols); j += kCols) {
          const int64_t width = std::min(kCols, n - j);
          if (kept == nullptr) {
            y_tile.fill_transposed(y + j * d, d, width);
          }
          if (dx != nullptr) {
            y_packed.fill(y + j * d, d, j - e, width);
          }
          for (int64_t i = c; i < c + rows; i += kRows) {
            const int64_t height = std::min(kRows, c + rows - i);
            for (int64_t p = 0; p < prefixes; ++p) {
              float* of_prefix = &z[p * kTile];
              float* tile = prefixes > 1 ? sums.data() : of_prefix;
              const auto [from, size] = sections[p];
              if (kept != nullptr) {
                std::copy_n(kept + (j / kCols * m + i) * kCols, height * kCols, tile);
              } else if (kFloat && dy != nullptr) {
                if constexpr (kFloat) {
                  const int64_t then = i + kRows < c + rows ? i + kRows - c : 0;
                  const packed::Right<T>& part = x_packed[p];
                  ahead[p] = {part.row(then), ceil_div(size, packed::kWide), kRows * packed::kWide * 4,
                              part.k * packed::kWide * 4};
                  packed::multiply(height, kCols, size, part.as_left(i - c), y_tile, from, 0, tile, kCols, p > 0,
                                   ahead[p]);
                }
              } else {
                packed::multiply(height, kCols, size, packed::rows_of(x + i * d + from, d), y_tile, from, 0, tile,
                                 kCols, p > 0, ahead[p]);
              }
              finish(p, tile, of_prefix, height, width, i, j);
            }
            add_longer(z.data(), prefixes, height);
            for (int64_t p = 0; p < prefixes; ++p) {
              float* of_prefix = &z[p * kTile];
              const int64_t depth = round_to_pair<T>(height);
              const T* slopes;
              if constexpr (kFloat) {
                slopes = of_prefix;
              } else {
                convert(of_prefix, rounded.data(), height * kCols);
                slopes = rounded.data();
              }
              if (dx != nullptr) {
                T* to = ds_of(p, i - c, j - e);
                for (int64_t r = 0; r < height; ++r) {
                  std::copy_n(slopes + r * kCols, kCols, to + r * kDepth);
                }
              }
              if (dy == nullptr) {
                continue;
              }
              float* to = dy + j * d + sections[p].from;
              if constexpr (kFloat) {
                packed::multiply(width, sections[p].size, depth, packed::turned<kCols>(slopes), x_packed[p], i - c, 0,
                                 to, d, true, ahead[p]);
              } else {
                // pairs of rows turn as one
                pack_pairs(slopes, kCols, height, kCols, paired.data());
                at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(paired.data()), kCols,
                                              reinterpret_cast<float*>(turned.data()), kRows / 2, depth / 2, kCols);
                packed::multiply(width, sections[p].size, depth, packed::rows_of(turned.data(), kRows), x_packed[p],
                                 i - c, 0, to, d, true, ahead[p]);
              }
            }
          }
        }
        gemm_release<T>();
      });
      join(c, rows, e, cols);
      if (dx == nullptr) {
        continue;
      }
      const auto count = static_cast<int64_t>(slices.size());
      at::parallel_for(0, ceil_div(rows, kRows) * count, grain(kRows * cols * kSlice), [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t i = item / count * kRows;
          const auto& [p, slice] = slices[item % count];
          const packed::Right<T>& right = y_packed[p];
          for (int64_t j = 0; j < cols; j += kDepth) {
            const int64_t depth = std::min(kDepth, cols - j);
            packed::Ahead ahead;
            if constexpr (kFloat) {
              if (j + depth < cols) {
                ahead = {right.row(j + depth) + slice.from * right.k, ceil_div(slice.size, packed::kWide),
                         kDepth * packed::kWide * 4, right.k * packed::kWide * 4};
              }
            }
            packed::multiply(std::min(kRows, rows - i), slice.size, round_to_pair<T>(depth),
                             packed::rows_of<T>(ds_of(p, i, j), kDepth), right, j, slice.from,
                             dx + (c + i) * d + sections[p].from + slice.from, d, true, ahead);
          }
        }
        gemm_release<T>();
      });
    }
  }
}

template <typename Operands, typename Finish>
void gradients(const Operands& of, const std::vector<int64_t>& ends, int64_t workspace, const float* kept, float* dx,
               float* dy, const Finish& finish) {
  gradients(of, ends, workspace, kept, dx, dy, finish, [](auto...) {});
}

using MaybeTensor = std::optional<at::Tensor>;

inline const int32_t* labels_of(const std::string& name, const MaybeTensor& labels, int64_t size) {
  if (!labels.has_value()) {
    return nullptr;
  }
  expect_dense(name.c_str(), *labels, at::kInt, {size});
  return labels->const_data_ptr<int32_t>();
}

// Raises, naming `op`, where the operands, and what describes the block, don't fit each other.
inline Block checked_block(const std::string& op, const at::Tensor& x, const at::Tensor& y, int64_t diag,
                           const MaybeTensor& row_labels, const MaybeTensor& col_labels) {
  const std::string x_name = op + ": x", y_name = op + ": y";
  expect_operand(x_name.c_str(), x, 2);
  expect_dense(x_name.c_str(), x, x.scalar_type(), x.sizes());
  const int64_t m = x.size(0), d = x.size(1);
  TORCH_CHECK_VALUE(d > 0, x_name, ": expected (m, D), D > 0, got ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || (d % 2 == 0 && has_bf16_gemm()), x_name,
                    ": expected float32, or an even D and a machine with products of bfloat16, got ", x.scalar_type(),
                    " of D = ", d);
  TORCH_CHECK_VALUE(y.dim() == 2, y_name, ": expected (n, D), got ", y.sizes());
  const int64_t n = y.size(0);
  expect_dense(y_name.c_str(), y, x.scalar_type(), {n, d});
  TORCH_CHECK_VALUE(diag < 0 || diag <= n - m, op, ": diag: expected at most n - m = ", n - m, ", got ", diag);
  TORCH_CHECK_VALUE(row_labels.has_value() == col_labels.has_value(), op,
                    ": row_labels, col_labels: expected both or neither");
  return {diag, labels_of(op + ": row_labels", row_labels, m), labels_of(op + ": col_labels", col_labels, n)};
}

// Of a buffer that is written, or null.
inline float* pointer(const std::string& name, const MaybeTensor& t, at::IntArrayRef sizes,
                      std::initializer_list<at::Tensor> read) {
  if (!t.has_value()) {
    return nullptr;
  }
  expect_dense(name.c_str(), *t, at::kFloat, sizes);
  expect_apart(name.c_str(), *t, read);
  return t->mutable_data_ptr<float>();
}

// Sums of gradients that may be null: dx [m, D] and dy [n, D], apart from each other and from what is read.
struct Sums {
  float* dx;
  float* dy;
};

inline Sums checked_sums(const std::string& op, const at::Tensor& x, const at::Tensor& y, const MaybeTensor& dx,
                         const MaybeTensor& dy, std::initializer_list<at::Tensor> read) {
  const Sums sums{pointer(op + ": dx", dx, x.sizes(), read), pointer(op + ": dy", dy, y.sizes(), read)};
  if (dx.has_value() && dy.has_value()) {
    expect_apart((op + ": dx").c_str(), *dx, {*dy});
  }
  return sums;
}

// function(operands), of what serves x and y best here; neither is empty.
template <typename Function>
void with_operands(const at::Tensor& x, const at::Tensor& y, const Function& function) {
  const int64_t m = x.size(0), n = y.size(0), d = x.size(1);
  if (x.scalar_type() == at::kBFloat16) {
    function(Operands<at::BFloat16>{x.const_data_ptr<at::BFloat16>(), y.const_data_ptr<at::BFloat16>(), m, n, d});
    return;
  }
  const float *rows_of_x = x.const_data_ptr<float>(), *rows_of_y = y.const_data_ptr<float>();
#if defined(LBFAST_AMX)
  if (const std::optional<OnAmx> of = OnAmx::made(rows_of_x, rows_of_y, m, n, d)) {
    function(*of);
    return;
  }
#endif
  function(Operands<float>{rows_of_x, rows_of_y, m, n, d});
}

}  // namespace lbfast::pairs
