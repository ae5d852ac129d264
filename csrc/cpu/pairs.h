// Tiles of the products of x [m, D] with y [n, D], and the gradients of a loss that is a function of each: what the
// contrastive losses of this folder share. Operands are contiguous float or bfloat16, sums and gradients float. Tiles
// stay in cache; no m x n matrix is stored. The order of additions depends on shapes alone, not on the threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "gemm.h"

namespace lbfast::pairs {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kRows = 128;        // rows of a tile
constexpr int64_t kCols = 64;         // columns of a tile
constexpr int64_t kDepth = 256;       // columns of dS that one product of the second backward phase takes
constexpr int64_t kStrips = 2;        // of rows that one packed part of y serves there: their dX stays in cache
constexpr int64_t kLanes = Vec::size();
static_assert(kCols % kLanes == 0);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items of `work` multiply-adds each that are worth a thread's while.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, (int64_t{1} << 22) / std::max<int64_t>(1, work)); }

// Zeroed scratch that goes back to the system at once: a heap would keep it while the results are being written.
template <typename T>
class Scratch {
 public:
#if defined(__unix__) || defined(__APPLE__)
  explicit Scratch(int64_t size) : bytes_(size * sizeof(T)) {
    if (bytes_ > 0) {
      data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      TORCH_CHECK_WITH(OutOfMemoryError, data_ != MAP_FAILED, "no memory for ", bytes_, " bytes of scratch");
    }
  }
  ~Scratch() {
    if (bytes_ > 0) {
      munmap(data_, bytes_);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() { return static_cast<T*>(data_); }

 private:
  size_t bytes_;
  void* data_ = nullptr;
#else
  explicit Scratch(int64_t size) : values_(size) {}
  T* data() { return values_.data(); }

 private:
  std::vector<T> values_;
#endif
};

// What describes a rectangle of pairs beside its operands.
struct Block {
  int64_t diag;  // column of row 0's positive; negative: no positives here
  const int32_t* row_labels;
  const int32_t* col_labels;

  // Column, within a tile whose first column is col0, of a row's positive; negative where it lies in another tile.
  int64_t positive(int64_t row, int64_t col0, int64_t cols) const {
    const int64_t column = diag < 0 ? -1 : diag + row - col0;
    return column >= 0 && column < cols ? column : -1;
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
inline void convert(const float* src, at::BFloat16* dst, int64_t n) { at::vec::convert(src, dst, n); }

// For each chunk of rows: (1) threads own tiles of columns: x @ y^T of a tile [rows, kCols], row0 and col0 its first
// row and column, to `finish(p, products, ds, rows, cols, row0, col0)`, which leaves dS in ds, its columns past `cols`
// 0; dS goes to the chunk's scratch, and dY_tile += dS^T X_chunk; (2) threads own rows: dX_rows += dS Y. dx and dy may
// be null; without both, the tiles are finished and no more. `kept`, or null: what is there to finish instead of the
// products, [tile of columns][m][kCols].
//
// `ends`: where nested prefixes of the D numbers end, the last at D. Their products are partial sums of one, finished
// one after another, p = 0, 1, ...; numbers that several prefixes have are multiplied by the sum of these prefixes' dS.
// With one prefix, ds is where the products are.
template <typename T, typename Finish>
void gradients(const T* x, const T* y, int64_t m, int64_t n, const std::vector<int64_t>& ends, int64_t workspace,
               const float* kept, float* dx, float* dy, const Finish& finish) {
  const int64_t d = ends.back(), prefixes = static_cast<int64_t>(ends.size());
  const int64_t tiles = ceil_div(n, kCols), ld = tiles * kCols;
  const int64_t fit = workspace / (prefixes * ld * static_cast<int64_t>(sizeof(T))) / kRows * kRows;
  const int64_t all = ceil_div(m, kRows) * kRows;
  const int64_t chunk = dx == nullptr && dy == nullptr ? all : std::min(std::max(fit, kRows), all);
  constexpr bool packs = kPair<T> == 2;
  Scratch<T> ds_scratch(dx != nullptr ? prefixes * chunk * ld : 0);
  Scratch<T> pairs_scratch(packs && dy != nullptr ? chunk * d : 0);
  T* ds = ds_scratch.data();          // [prefixes, chunk, ld]
  T* x_pairs = pairs_scratch.data();  // [chunk / 2, D, 2]
  const auto begin_of = [&](int64_t p) { return p == 0 ? 0 : ends[p - 1]; };
  for (int64_t c = 0; c < m; c += chunk) {
    const int64_t high = std::min(chunk, m - c);
    if constexpr (packs) {
      if (dy != nullptr) {
        at::parallel_for(0, ceil_div(high, kRows), grain(kRows * d), [&](int64_t begin, int64_t end) {
          const int64_t first = begin * kRows, last = std::min(high, end * kRows);
          pack_pairs(x + (c + first) * d, d, last - first, d, x_pairs + first * d);
        });
      }
    }
    at::parallel_for(0, tiles, grain(2 * kCols * high * d), [&](int64_t begin, int64_t end) {
      std::vector<T> packed(d * kCols), turned(kCols * kRows);
      std::vector<float> products(prefixes > 1 ? kRows * kCols : 0), z(prefixes * kRows * kCols);
      std::vector<float> z_turned(kCols * kRows);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t j = t * kCols, width = std::min(kCols, n - j);
        if (kept == nullptr) {
          pack_transposed(y + j * d, d, width, d, packed.data(), kCols);
        }
        for (int64_t i = c; i < c + high; i += kRows) {
          const int64_t height = std::min(kRows, c + high - i);
          for (int64_t p = 0; p < prefixes; ++p) {
            float* of_prefix = &z[p * kRows * kCols];
            float* tile = prefixes > 1 ? products.data() : of_prefix;
            const int64_t from = begin_of(p);
            if (kept == nullptr) {
              gemm(height, kCols, ends[p] - from, x + i * d + from, d, &packed[from * kCols], kCols, tile, kCols,
                   p > 0);
            } else {
              std::copy_n(kept + (t * m + i) * kCols, height * kCols, tile);
            }
            finish(p, tile, of_prefix, height, width, i, j);
          }
          for (int64_t p = prefixes - 2; p >= 0; --p) {
            float* less = &z[p * kRows * kCols];
            for (int64_t k = 0; k < height * kCols; k += kLanes) {
              (Vec::loadu(less + k) + Vec::loadu(less + kRows * kCols + k)).store(less + k);
            }
          }
          for (int64_t p = 0; p < prefixes; ++p) {
            float* of_prefix = &z[p * kRows * kCols];
            const int64_t from = begin_of(p), depth = round_to_pair<T>(height);
            if (dx != nullptr) {
              for (int64_t r = 0; r < height; ++r) {
                convert(&of_prefix[r * kCols], &ds[(p * chunk + i - c + r) * ld + j], kCols);
              }
            }
            if (dy == nullptr) {
              continue;
            }
            if (depth != height) {
              std::fill(&of_prefix[height * kCols], &of_prefix[height * kCols] + kCols, 0.0f);
            }
            float* out = z_turned.data();
            at::vec::transpose_mxn<float>(of_prefix, kCols, out, kRows, depth, kCols);
            float* sums = dy + j * d + from;
            const int64_t some = ends[p] - from;
            if constexpr (packs) {
              convert(out, turned.data(), kCols * kRows);
              gemm(width, some, depth, turned.data(), kRows, x_pairs + (i - c) * d + 2 * from, d, sums, d, true);
            } else {
              gemm(width, some, depth, out, kRows, x + i * d + from, d, sums, d, true);
            }
          }
        }
      }
      gemm_release<T>();
    });
    if (dx != nullptr) {
      at::parallel_for(0, ceil_div(high, kRows), grain(kRows * n * d), [&](int64_t begin, int64_t end) {
        std::vector<T> pairs(packs ? kDepth * d : 0);  // [kDepth / 2, D, 2] of y
        const int64_t stop = std::min(high, end * kRows);
        for (int64_t group = begin * kRows; group < stop; group += kStrips * kRows) {
          for (int64_t j = 0; j < n; j += kDepth) {
            const int64_t depth = std::min(kDepth, n - j);
            const T* b = y + j * d;
            if constexpr (packs) {
              pack_pairs(b, d, depth, d, pairs.data());
              b = pairs.data();
            }
            for (int64_t i = group; i < std::min(stop, group + kStrips * kRows); i += kRows) {
              for (int64_t p = 0; p < prefixes; ++p) {
                const int64_t from = begin_of(p);
                gemm(std::min(kRows, stop - i), ends[p] - from, round_to_pair<T>(depth),
                     &ds[(p * chunk + i) * ld + j], ld, b + kPair<T> * from, d, dx + (c + i) * d + from, d, true);
              }
            }
          }
        }
        gemm_release<T>();
      });
    }
  }
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

template <typename Function>
void with_operand_type(const at::Tensor& x, Function function) {
  if (x.scalar_type() == at::kFloat) {
    function(static_cast<float*>(nullptr));
  } else {
    function(static_cast<at::BFloat16*>(nullptr));
  }
}

}  // namespace lbfast::pairs
