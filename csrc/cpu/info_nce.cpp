// InfoNCE on the CPU: tiles of logits that stay in cache, one exponential an element and pass, no B x B matrix.
//
// Contract: Implementation in lbfast/ops/info_nce.py. x [m, D] and y [n, D] are contiguous float or bfloat16; every
// statistic and gradient is float. The order of additions depends on shapes alone, not on the number of threads.
//
// Forward: threads own groups of columns; each tile of 128 x 64 logits gives a part of the row and column statistics.
// Backward, for each chunk of rows: (1) threads own tiles of columns: logits again, dS to the chunk's scratch, and
// dY_tile += dS^T X_chunk; (2) threads own rows: dX_rows += dS Y.
//
// Where the caller has room for all logits, the forward keeps them, [tile of columns][m][64], and phase (1) reads them.
//
// One exponential serves both softmaxes: with a shift K near all of a tile's row and column shifts, p_row and p_col
// are exp(z - K) times a factor of the row and one of the column. A tile whose shifts lie further apart than kSpread
// takes two exponentials instead.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "gemm.h"

namespace lbfast {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kRows = 128;        // rows of a tile
constexpr int64_t kCols = 64;         // columns of a tile
constexpr int64_t kDepth = 256;       // columns of dS that one product of the second backward phase takes
constexpr int64_t kStrips = 2;        // of rows that one packed part of y serves there: their dX stays in cache
constexpr int64_t kMaxGroups = 64;    // of columns in the forward: bounds the partial row statistics
constexpr float kSpread = 16.0f;      // exp(z - K) of what matters stays within rounding of exp's argument
constexpr float kNone = -std::numeric_limits<float>::max();  // logit of a pair that is left out
constexpr int64_t kLanes = Vec::size();
static_assert(kCols % kLanes == 0);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items of `work` multiply-adds each that are worth a thread's while.
int64_t grain(int64_t work) { return std::max<int64_t>(1, (int64_t{1} << 22) / std::max<int64_t>(1, work)); }

// Zeroed scratch that goes back to the system at once: a heap would keep it while the results are being written.
template <typename T>
class Scratch {
 public:
#if defined(__unix__) || defined(__APPLE__)
  explicit Scratch(int64_t size) : bytes_(size * sizeof(T)) {
    if (bytes_ > 0) {
      data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      TORCH_CHECK_WITH(OutOfMemoryError, data_ != MAP_FAILED, "info_nce: no memory for ", bytes_, " bytes of scratch");
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

// What describes the rectangle of logits beside its operands.
struct Block {
  float scale;
  int64_t diag;  // column of row 0's positive; negative: no positives here
  const int32_t* row_labels;
  const int32_t* col_labels;
  double target = 2;  // what dS has less of positives, both sides together
};

// Reduces a vector over its lanes.
template <typename Op>
float reduce(const Vec& v, Op op) {
  return at::vec::vec_reduce_all<float>([op](Vec& a, Vec& b) { return op(a, b); }, v);
}
float sum_lanes(const Vec& v) {
  return reduce(v, [](const Vec& a, const Vec& b) { return a + b; });
}
float max_lanes(const Vec& v) {
  return reduce(v, [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); });
}

// x @ y^T [rows, kCols] -> logits: scaled; pairs left out and columns past `cols` at kNone.
void finish_logits(float* z, int64_t rows, int64_t cols, int64_t row0, int64_t col0, const Block& block) {
  const Vec scale(block.scale);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = z + i * kCols;
    for (int64_t j = 0; j < kCols; j += kLanes) {
      (Vec::loadu(row + j) * scale).store(row + j);
    }
    std::fill(row + cols, row + kCols, kNone);
    if (block.row_labels != nullptr) {
      const int64_t positive = block.diag < 0 ? -1 : block.diag + row0 + i - col0;
      const bool here = positive >= 0 && positive < cols;
      const float kept = here ? row[positive] : 0.0f;
      const int32_t label = block.row_labels[row0 + i];
      const int32_t* labels = block.col_labels + col0;
      for (int64_t j = 0; j < cols; ++j) {
        row[j] = labels[j] == label ? kNone : row[j];
      }
      if (here) {
        row[positive] = kept;
      }
    }
  }
}

// Joins softmax statistics (shift, sum) with more of them; all n long.
void merge(float* shift, float* sum, const float* more_shift, const float* more_sum, int64_t n) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec a = Vec::loadu(shift + j), b = Vec::loadu(more_shift + j);
    const Vec top = at::vec::maximum(a, b);
    (Vec::loadu(sum + j) * (a - top).exp() + Vec::loadu(more_sum + j) * (b - top).exp()).store(sum + j);
    top.store(shift + j);
  }
  for (; j < n; ++j) {
    const bool nan = std::isnan(shift[j]) || std::isnan(more_shift[j]);
    const float top = nan ? std::numeric_limits<float>::quiet_NaN() : std::max(shift[j], more_shift[j]);
    sum[j] = sum[j] * std::exp(shift[j] - top) + more_sum[j] * std::exp(more_shift[j] - top);
    shift[j] = top;
  }
}

// Statistics of one tile of logits, along both axes.
struct TileStats {
  float row_shift[kRows], row_sum[kRows], col_shift[kCols], col_sum[kCols];
};

void tile_stats(const float* z, int64_t rows, int64_t cols, TileStats& out) {
  constexpr int64_t kVecs = kCols / kLanes;
  Vec col_max[kVecs];
  for (auto& v : col_max) {
    v = Vec(kNone);
  }
  float lowest = std::numeric_limits<float>::infinity(), highest = kNone;
  bool nan = false;
  for (int64_t i = 0; i < rows; ++i) {
    Vec row_max(kNone);
    for (int64_t v = 0; v < kVecs; ++v) {
      const Vec value = Vec::loadu(z + i * kCols + v * kLanes);
      row_max = at::vec::maximum(row_max, value);
      col_max[v] = at::vec::maximum(col_max[v], value);
    }
    const float top = max_lanes(row_max);
    out.row_shift[i] = top;
    nan |= std::isnan(top);
    lowest = std::min(lowest, top);
    highest = std::max(highest, top);
  }
  for (int64_t v = 0; v < kVecs; ++v) {
    col_max[v].store(out.col_shift + v * kLanes);
  }
  for (int64_t j = 0; j < cols; ++j) {
    lowest = std::min(lowest, out.col_shift[j]);
  }
  Vec col_sum[kVecs];
  for (auto& v : col_sum) {
    v = Vec(0.0f);
  }
  if (!nan && highest - lowest <= kSpread) {
    const Vec shift(highest);
    for (int64_t i = 0; i < rows; ++i) {
      Vec row_sum(0.0f);
      for (int64_t v = 0; v < kVecs; ++v) {
        const Vec e = (Vec::loadu(z + i * kCols + v * kLanes) - shift).exp();
        row_sum = row_sum + e;
        col_sum[v] = col_sum[v] + e;
      }
      out.row_sum[i] = sum_lanes(row_sum);
    }
    std::fill(out.row_shift, out.row_shift + rows, highest);
    std::fill(out.col_shift, out.col_shift + kCols, highest);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      Vec row_sum(0.0f);
      const Vec shift(out.row_shift[i]);
      for (int64_t v = 0; v < kVecs; ++v) {
        const Vec value = Vec::loadu(z + i * kCols + v * kLanes);
        row_sum = row_sum + (value - shift).exp();
        col_sum[v] = col_sum[v] + (value - Vec::loadu(out.col_shift + v * kLanes)).exp();
      }
      out.row_sum[i] = sum_lanes(row_sum);
    }
  }
  for (int64_t v = 0; v < kVecs; ++v) {
    col_sum[v].store(out.col_sum + v * kLanes);
  }
}

template <typename T>
void stats_kernel(const T* x, const T* y, int64_t m, int64_t n, int64_t d, const Block& block, float* rows,
                  float* cols, float* positives, float* logits) {
  const int64_t tiles = ceil_div(n, kCols);
  const int64_t wide = ceil_div(tiles, std::min(tiles, kMaxGroups));  // tiles in a group
  const int64_t groups = ceil_div(tiles, wide);
  std::vector<float> part_shift(groups * m, kNone), part_sum(groups * m, 0.0f);
  at::parallel_for(0, groups, grain(wide * kCols * m * d), [&](int64_t begin, int64_t end) {
    std::vector<T> packed(wide * d * kCols);
    std::vector<float> scratch(kRows * kCols);
    TileStats stats;
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = g * wide, last = std::min(tiles, first + wide);
      for (int64_t t = first; t < last; ++t) {
        pack_transposed(y + t * kCols * d, d, std::min(kCols, n - t * kCols), d, &packed[(t - first) * d * kCols],
                        kCols);
      }
      for (int64_t i = 0; i < m; i += kRows) {
        const int64_t height = std::min(kRows, m - i);
        for (int64_t t = first; t < last; ++t) {
          const int64_t j = t * kCols, width = std::min(kCols, n - j);
          float* z = logits == nullptr ? scratch.data() : logits + (t * m + i) * kCols;
          gemm(height, kCols, d, x + i * d, d, &packed[(t - first) * d * kCols], kCols, z, kCols, false);
          finish_logits(z, height, width, i, j, block);
          if (block.diag >= 0) {
            const int64_t low = std::max(i, j - block.diag), high = std::min(i + height, j + width - block.diag);
            for (int64_t r = low; r < high; ++r) {
              positives[r] = z[(r - i) * kCols + block.diag + r - j];
            }
          }
          tile_stats(z, height, width, stats);
          merge(&part_shift[g * m + i], &part_sum[g * m + i], stats.row_shift, stats.row_sum, height);
          merge(cols + j, cols + n + j, stats.col_shift, stats.col_sum, width);
        }
      }
    }
    gemm_release<T>();
  });
  for (int64_t g = 0; g < groups; ++g) {
    merge(rows, rows + m, &part_shift[g * m], &part_sum[g * m], m);
  }
}

// A tile of logits -> dS = p_row + p_col - target delta, in place.
void tile_grads(float* z, int64_t rows, int64_t cols, int64_t row0, int64_t col0, const Block& block,
                  const float* row_shift, const float* row_sum, const float* col_shift, const float* col_sum) {
  constexpr int64_t kVecs = kCols / kLanes;
  float lowest = std::numeric_limits<float>::infinity(), highest = kNone;
  bool nan = false;
  for (int64_t i = 0; i < rows; ++i) {
    lowest = std::min(lowest, row_shift[i]);
    highest = std::max(highest, row_shift[i]);
    nan |= std::isnan(row_shift[i]);
  }
  for (int64_t j = 0; j < cols; ++j) {
    lowest = std::min(lowest, col_shift[j]);
    highest = std::max(highest, col_shift[j]);
    nan |= std::isnan(col_shift[j]);
  }
  float shift_of[kCols], factor_of[kCols];  // of columns
  const bool near = !nan && highest - lowest <= 2 * kSpread;
  const float middle = near ? lowest + (highest - lowest) / 2 : 0.0f;
  for (int64_t j = 0; j < kCols; ++j) {
    shift_of[j] = j < cols ? col_shift[j] : 0.0f;
    factor_of[j] = j < cols ? (near ? std::exp(middle - col_shift[j]) : 1.0f) / col_sum[j] : 0.0f;
  }
  Vec shifts[kVecs], factors[kVecs];
  for (int64_t v = 0; v < kVecs; ++v) {
    shifts[v] = Vec::loadu(shift_of + v * kLanes);
    factors[v] = Vec::loadu(factor_of + v * kLanes);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* row = z + i * kCols;
    const int64_t positive = block.diag < 0 ? -1 : block.diag + row0 + i - col0;
    const bool here = positive >= 0 && positive < cols;
    const float logit = here ? row[positive] : 0.0f;
    const Vec shift(near ? middle : row_shift[i]);
    const Vec factor((near ? std::exp(middle - row_shift[i]) : 1.0f) / row_sum[i]);
    for (int64_t v = 0; v < kVecs; ++v) {
      const Vec value = Vec::loadu(row + v * kLanes);
      const Vec e = (value - shift).exp();
      const Vec p = near ? e * (factor + factors[v]) : e * factor + (value - shifts[v]).exp() * factors[v];
      p.store(row + v * kLanes);
    }
    if (here) {  // p - target cancels: in double, from each side's own shift
      const double exact = std::exp(static_cast<double>(logit) - row_shift[i]) / row_sum[i] +
          std::exp(static_cast<double>(logit) - col_shift[positive]) / col_sum[positive] - block.target;
      row[positive] = static_cast<float>(exact);
    }
  }
}

void convert(const float* src, float* dst, int64_t n) { std::copy(src, src + n, dst); }
void convert(const float* src, at::BFloat16* dst, int64_t n) { at::vec::convert(src, dst, n); }

template <typename T>
void grads_kernel(const T* x, const T* y, int64_t m, int64_t n, int64_t d, const Block& block, const float* rows,
                    const float* cols, int64_t workspace, const float* logits, float* dx, float* dy) {
  const int64_t tiles = ceil_div(n, kCols), ld = tiles * kCols;
  const int64_t fit = workspace / (ld * static_cast<int64_t>(sizeof(T))) / kRows * kRows;
  const int64_t chunk = std::min(std::max(fit, kRows), ceil_div(m, kRows) * kRows);
  constexpr bool packs = kPair<T> == 2;
  Scratch<T> ds_scratch(dx != nullptr ? chunk * ld : 0), pairs_scratch(packs && dy != nullptr ? chunk * d : 0);
  T* ds = ds_scratch.data();          // [chunk, ld]
  T* x_pairs = pairs_scratch.data();  // [chunk / 2, D, 2]
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
      std::vector<float> z(kRows * kCols), z_turned(kCols * kRows);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t j = t * kCols, width = std::min(kCols, n - j);
        if (logits == nullptr) {
          pack_transposed(y + j * d, d, width, d, packed.data(), kCols);
        }
        for (int64_t i = c; i < c + high; i += kRows) {
          const int64_t height = std::min(kRows, c + high - i);
          if (logits == nullptr) {
            gemm(height, kCols, d, x + i * d, d, packed.data(), kCols, z.data(), kCols, false);
            finish_logits(z.data(), height, width, i, j, block);
          } else {
            std::copy_n(logits + (t * m + i) * kCols, height * kCols, z.data());
          }
          tile_grads(z.data(), height, width, i, j, block, rows + i, rows + m + i, cols + j, cols + n + j);
          if (dx != nullptr) {
            for (int64_t r = 0; r < height; ++r) {
              convert(&z[r * kCols], &ds[(i - c + r) * ld + j], kCols);
            }
          }
          if (dy != nullptr) {
            const int64_t depth = round_to_pair<T>(height);
            if (depth != height) {
              std::fill(&z[height * kCols], &z[height * kCols] + kCols, 0.0f);
            }
            float* out = z_turned.data();
            at::vec::transpose_mxn<float>(z.data(), kCols, out, kRows, depth, kCols);
            const T* b;
            if constexpr (packs) {
              convert(out, turned.data(), kCols * kRows);
              b = x_pairs + (i - c) * d;
              gemm(width, d, depth, turned.data(), kRows, b, d, dy + j * d, d, true);
            } else {
              b = x + i * d;
              gemm(width, d, depth, out, kRows, b, d, dy + j * d, d, true);
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
              gemm(std::min(kRows, stop - i), d, round_to_pair<T>(depth), &ds[i * ld + j], ld, b, d,
                   dx + (c + i) * d, d, true);
            }
          }
        }
        gemm_release<T>();
      });
    }
  }
}

using MaybeTensor = std::optional<at::Tensor>;

const int32_t* labels_of(const char* name, const MaybeTensor& labels, int64_t size) {
  if (!labels.has_value()) {
    return nullptr;
  }
  expect_dense(name, *labels, at::kInt, {size});
  return labels->const_data_ptr<int32_t>();
}

int64_t ld_of(int64_t n) { return ceil_div(n, kCols) * kCols; }

// Raises where the operands, and what describes the block, don't fit each other.
Block checked_block(const at::Tensor& x, const at::Tensor& y, double scale, int64_t diag, const MaybeTensor& row_labels,
                    const MaybeTensor& col_labels, double target) {
  expect_operand("info_nce: x", x, 2);
  expect_dense("info_nce: x", x, x.scalar_type(), x.sizes());
  const int64_t m = x.size(0), d = x.size(1);
  TORCH_CHECK_VALUE(d > 0, "info_nce: x: expected (m, D), D > 0, got ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || (d % 2 == 0 && has_bf16_gemm()),
                    "info_nce: x: expected float32, or an even D and a machine with products of bfloat16, got ",
                    x.scalar_type(), " of D = ", d);
  TORCH_CHECK_VALUE(y.dim() == 2, "info_nce: y: expected (n, D), got ", y.sizes());
  const int64_t n = y.size(0);
  expect_dense("info_nce: y", y, x.scalar_type(), {n, d});
  TORCH_CHECK_VALUE(diag < 0 || diag <= n - m, "info_nce: diag: expected at most n - m = ", n - m, ", got ", diag);
  TORCH_CHECK_VALUE(row_labels.has_value() == col_labels.has_value(),
                    "info_nce: row_labels, col_labels: expected both or neither");
  return {static_cast<float>(scale), diag, labels_of("info_nce: row_labels", row_labels, m),
          labels_of("info_nce: col_labels", col_labels, n), target};
}

// Of a buffer that is written, or null.
float* pointer(const char* name, const MaybeTensor& t, at::IntArrayRef sizes, std::initializer_list<at::Tensor> read) {
  if (!t.has_value()) {
    return nullptr;
  }
  expect_dense(name, *t, at::kFloat, sizes);
  expect_apart(name, *t, read);
  return t->mutable_data_ptr<float>();
}

template <typename Function>
void with_operand_type(const at::Tensor& x, Function function) {
  if (x.scalar_type() == at::kFloat) {
    function(static_cast<float*>(nullptr));
  } else {
    function(static_cast<at::BFloat16*>(nullptr));
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_stats(const at::Tensor& x, const at::Tensor& y, double scale,
                                                              int64_t diag, const MaybeTensor& row_labels,
                                                              const MaybeTensor& col_labels,
                                                              const MaybeTensor& logits) {
  const Block block = checked_block(x, y, scale, diag, row_labels, col_labels, 2);
  const int64_t m = x.size(0), n = y.size(0), d = x.size(1);
  float* kept = pointer("info_nce: logits", logits, {m * ld_of(n)}, {x, y});
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor rows = at::zeros({2, m}, options), cols = at::zeros({2, n}, options);
  at::Tensor positives = at::zeros({diag >= 0 ? m : 0}, options);
  rows[0].fill_(kNone);
  cols[0].fill_(kNone);
  if (m > 0 && n > 0) {
    with_operand_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      stats_kernel<T>(x.const_data_ptr<T>(), y.const_data_ptr<T>(), m, n, d, block, rows.mutable_data_ptr<float>(),
                      cols.mutable_data_ptr<float>(), positives.mutable_data_ptr<float>(), kept);
    });
  }
  return {rows, cols, positives};
}

void info_nce_grads(const at::Tensor& x, const at::Tensor& y, double scale, const at::Tensor& rows,
                    const at::Tensor& cols, int64_t diag, const MaybeTensor& row_labels,
                    const MaybeTensor& col_labels, const MaybeTensor& logits, int64_t workspace, double target,
                    const MaybeTensor& dx, const MaybeTensor& dy) {
  const Block block = checked_block(x, y, scale, diag, row_labels, col_labels, target);
  const int64_t m = x.size(0), n = y.size(0), d = x.size(1);
  expect_dense("info_nce: rows", rows, at::kFloat, {2, m});
  expect_dense("info_nce: cols", cols, at::kFloat, {2, n});
  const float* kept = nullptr;
  if (logits.has_value()) {
    expect_dense("info_nce: logits", *logits, at::kFloat, {m * ld_of(n)});
    kept = logits->const_data_ptr<float>();
  }
  float* sums_x = pointer("info_nce: dx", dx, {m, d}, {x, y, rows, cols});
  float* sums_y = pointer("info_nce: dy", dy, {n, d}, {x, y, rows, cols});
  if (dx.has_value() && dy.has_value()) {
    expect_apart("info_nce: dx", *dx, {*dy});
  }
  if (m > 0 && n > 0) {
    with_operand_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      grads_kernel<T>(x.const_data_ptr<T>(), y.const_data_ptr<T>(), m, n, d, block, rows.const_data_ptr<float>(),
                      cols.const_data_ptr<float>(), workspace, kept, sums_x, sums_y);
    });
  }
}

}  // namespace
}  // namespace lbfast

TORCH_LIBRARY_FRAGMENT(lbfast, m) {
  m.def("has_bf16_gemm() -> bool", [] { return lbfast::has_bf16_gemm(); });
  m.def(
      "info_nce_stats(Tensor x, Tensor y, float scale, int diag, Tensor? row_labels, Tensor? col_labels,"
      " Tensor(a!)? logits) -> (Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_grads(Tensor x, Tensor y, float scale, Tensor rows, Tensor cols, int diag, Tensor? row_labels,"
      " Tensor? col_labels, Tensor? logits, int workspace, float target, Tensor(a!)? dx, Tensor(b!)? dy) -> ()");
}

TORCH_LIBRARY_IMPL(lbfast, CPU, m) {
  m.impl("info_nce_stats", lbfast::info_nce_stats);
  m.impl("info_nce_grads", lbfast::info_nce_grads);
}
