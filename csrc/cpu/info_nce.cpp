// InfoNCE on the CPU: tiles of logits that stay in cache, one exponential an element and pass, no B x B matrix.
//
// Contract: Implementation in lbfast/ops/info_nce.py. x [m, D] and y [n, D] are contiguous float or bfloat16; every
// statistic and gradient is float. The order of additions depends on shapes alone, not on the number of threads.
//
// Forward: threads own groups of columns; each tile of 192 x 96 logits gives a part of the row and column statistics.
// Backward, for each chunk of rows: (1) threads own tiles of columns: logits again, dS to the chunk's scratch, and
// dY_tile += dS^T X_chunk; (2) threads own rows: dX_rows += dS Y.
//
// Where the caller has room for all logits, the forward keeps them, [tile of columns][m][96], and phase (1) reads them.
//
// One exponential serves both softmaxes: with a shift K near all of a tile's row and column shifts, p_row and p_col
// are exp(z - K) times a factor of the row and one of the column. A tile whose shifts lie further apart than kSpread
// takes two exponentials instead.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "pairs.h"
#include "vectors.h"

namespace lbfast {
namespace {

using pairs::ceil_div;
using pairs::kCols;
using pairs::kLanes;
using pairs::kRows;

constexpr float kSpread = 16.0f;      // exp(z - K) of what matters stays within rounding of exp's argument
constexpr float kNone = -std::numeric_limits<float>::max();  // logit of a pair that is left out

struct Block : pairs::Block {
  float scale;
  double target = 2;  // what dS has less of positives, both sides together
};

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
      const int64_t positive = block.positive(row0 + i, col0, cols);
      const float kept = positive >= 0 ? row[positive] : 0.0f;
      const int32_t label = block.row_labels[row0 + i];
      const int32_t* labels = block.col_labels + col0;
      for (int64_t j = 0; j < cols; ++j) {
        row[j] = labels[j] == label ? kNone : row[j];
      }
      if (positive >= 0) {
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

// With `own`, each row and column is shifted by its own largest logit: what has no negatives left has a sum of just 1.
void tile_stats(const float* z, int64_t rows, int64_t cols, bool own, TileStats& out) {
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
    const float top = pairs::max_lanes(row_max);
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
  if (!nan && highest - lowest <= (own ? 0.0f : kSpread)) {
    const Vec shift(highest);
    for (int64_t i = 0; i < rows; ++i) {
      Vec row_sum(0.0f);
      for (int64_t v = 0; v < kVecs; ++v) {
        const Vec e = exponential_of(Vec::loadu(z + i * kCols + v * kLanes) - shift);
        row_sum = row_sum + e;
        col_sum[v] = col_sum[v] + e;
      }
      out.row_sum[i] = pairs::sum_lanes(row_sum);
    }
    std::fill(out.row_shift, out.row_shift + rows, highest);
    std::fill(out.col_shift, out.col_shift + kCols, highest);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      Vec row_sum(0.0f);
      const Vec shift(out.row_shift[i]);
      for (int64_t v = 0; v < kVecs; ++v) {
        const Vec value = Vec::loadu(z + i * kCols + v * kLanes);
        row_sum = row_sum + exponential_of(value - shift);
        col_sum[v] = col_sum[v] + exponential_of(value - Vec::loadu(out.col_shift + v * kLanes));
      }
      out.row_sum[i] = pairs::sum_lanes(row_sum);
    }
  }
  for (int64_t v = 0; v < kVecs; ++v) {
    col_sum[v].store(out.col_sum + v * kLanes);
  }
}

template <typename Operands>
void stats_kernel(const Operands& of, const Block& block, float* rows, float* cols, float* positives, float* logits) {
  const int64_t m = of.m, n = of.n, groups = pairs::groups_of(n);
  std::vector<float> part_shift(groups * m, kNone), part_sum(groups * m, 0.0f);
  const auto finish = [&](int64_t g, int64_t, float* z, int64_t height, int64_t width, int64_t i, int64_t j) {
    TileStats stats;
    finish_logits(z, height, width, i, j, block);
    if (block.diag >= 0) {
      const int64_t low = std::max(i, j - block.diag), high = std::min(i + height, j + width - block.diag);
      for (int64_t r = low; r < high; ++r) {
        positives[r] = z[(r - i) * kCols + block.diag + r - j];
      }
    }
    tile_stats(z, height, width, block.row_labels != nullptr, stats);
    merge(&part_shift[g * m + i], &part_sum[g * m + i], stats.row_shift, stats.row_sum, height);
    merge(cols + j, cols + n + j, stats.col_shift, stats.col_sum, width);
  };
  pairs::products(of, {of.d}, logits, finish);
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
    const int64_t positive = block.positive(row0 + i, col0, cols);
    const float logit = positive >= 0 ? row[positive] : 0.0f;
    const Vec shift(near ? middle : row_shift[i]);
    const Vec factor((near ? std::exp(middle - row_shift[i]) : 1.0f) / row_sum[i]);
    for (int64_t v = 0; v < kVecs; ++v) {
      const Vec value = Vec::loadu(row + v * kLanes);
      const Vec e = exponential_of(value - shift);
      const Vec p = near ? e * (factor + factors[v]) : e * factor + exponential_of(value - shifts[v]) * factors[v];
      p.store(row + v * kLanes);
    }
    if (positive >= 0) {  // p - target cancels: in double, from each side's own shift
      const double exact = std::exp(static_cast<double>(logit) - row_shift[i]) / row_sum[i] +
          std::exp(static_cast<double>(logit) - col_shift[positive]) / col_sum[positive] - block.target;
      row[positive] = static_cast<float>(exact);
    }
  }
}

int64_t ld_of(int64_t n) { return ceil_div(n, kCols) * kCols; }

Block checked_block(const at::Tensor& x, const at::Tensor& y, double scale, int64_t diag,
                    const pairs::MaybeTensor& row_labels, const pairs::MaybeTensor& col_labels, double target) {
  return {pairs::checked_block("info_nce", x, y, diag, row_labels, col_labels), static_cast<float>(scale), target};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_stats(const at::Tensor& x, const at::Tensor& y, double scale,
                                                              int64_t diag, const pairs::MaybeTensor& row_labels,
                                                              const pairs::MaybeTensor& col_labels,
                                                              const pairs::MaybeTensor& logits) {
  const Block block = checked_block(x, y, scale, diag, row_labels, col_labels, 2);
  const int64_t m = x.size(0), n = y.size(0);
  float* kept = pairs::pointer("info_nce: logits", logits, {m * ld_of(n)}, {x, y});
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor rows = at::zeros({2, m}, options), cols = at::zeros({2, n}, options);
  at::Tensor positives = at::zeros({diag >= 0 ? m : 0}, options);
  rows[0].fill_(kNone);
  cols[0].fill_(kNone);
  if (m > 0 && n > 0) {
    pairs::with_operands(x, y, [&](const auto& of) {
      stats_kernel(of, block, rows.mutable_data_ptr<float>(), cols.mutable_data_ptr<float>(),
                   positives.mutable_data_ptr<float>(), kept);
    });
  }
  return {rows, cols, positives};
}

void info_nce_grads(const at::Tensor& x, const at::Tensor& y, double scale, const at::Tensor& rows,
                    const at::Tensor& cols, int64_t diag, const pairs::MaybeTensor& row_labels,
                    const pairs::MaybeTensor& col_labels, const pairs::MaybeTensor& logits, int64_t workspace,
                    double target, const pairs::MaybeTensor& dx, const pairs::MaybeTensor& dy) {
  const Block block = checked_block(x, y, scale, diag, row_labels, col_labels, target);
  const int64_t m = x.size(0), n = y.size(0), d = x.size(1);
  expect_dense("info_nce: rows", rows, at::kFloat, {2, m});
  expect_dense("info_nce: cols", cols, at::kFloat, {2, n});
  const float* kept = nullptr;
  if (logits.has_value()) {
    expect_dense("info_nce: logits", *logits, at::kFloat, {m * ld_of(n)});
    kept = logits->const_data_ptr<float>();
  }
  const pairs::Sums sums = pairs::checked_sums("info_nce", x, y, dx, dy, {x, y, rows, cols});
  if (m > 0 && n > 0) {
    pairs::with_operands(x, y, [&](const auto& of) {
      const float *row_stats = rows.const_data_ptr<float>(), *col_stats = cols.const_data_ptr<float>();
      const auto finish = [&](int64_t, float* z, float*, int64_t height, int64_t width, int64_t i, int64_t j) {
        if (kept == nullptr) {
          finish_logits(z, height, width, i, j, block);
        }
        tile_grads(z, height, width, i, j, block, row_stats + i, row_stats + m + i, col_stats + j, col_stats + n + j);
      };
      pairs::gradients(of, {d}, workspace, kept, sums.dx, sums.dy, finish);
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
