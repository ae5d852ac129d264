// Nested InfoNCE on the CPU: the losses of several prefixes of the D numbers of each row, for little more than one.
//
// Contract: lbfast/ops/_nested.py. The product of two rows' prefixes is a partial sum of the product of the rows: one
// product gives all logits, z_p = scale * x_factor_p * y_factor_p * (sum over the prefix), the factors being the
// reciprocal norms of the prefixes. |z| is at most |scale|: one shift serves all exponentials, no largest one is looked
// for. Positives stay out of the sums, and what dS has for them comes from outside.
//
// There is an exponential for each prefix, and beside products of bfloat16 they are what counts: they are powers of two,
// whose slope is the tile's, and a tile without positives and labels has no weights.
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

constexpr int64_t kVecs = kCols / kLanes;

struct Block : pairs::Block {
  float scale, shift;                  // of cosines, for powers of two: 2^(scale cosine - shift)
  const float *x_factors, *y_factors;  // of one prefix: [m] and [n]

  // Whether all pairs of a tile weigh 1.
  bool whole(int64_t rows, int64_t cols, int64_t row0, int64_t col0) const {
    const int64_t first = diag + row0 - col0;  // column of the first row's positive
    return cols == kCols && row_labels == nullptr && (diag < 0 || first >= cols || first + rows <= 0);
  }
};

// 2^x, relatively within 1.5e-7.
inline Vec power_of_two(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512 f = _mm512_reduce_ps(x, kFloor);  // x - floor(x); scalef takes the floor
  __m512 p = _mm512_set1_ps(1.86713005e-3f);     // 2^f on [0, 1]
  for (const float c : {9.01703071e-3f, 5.57999127e-2f, 0.240164444f, 0.693151295f, 1.0f}) {
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(p, x);
#else
  return x.exp2();
#endif
}

// What the pairs of a row of a tile weigh: 1, or 0 where they are left out or past the end.
class Weights {
 public:
  Weights(const Block& block, int64_t col0, int64_t cols) : block_(block), col0_(col0), cols_(cols) {
    std::fill(of_, of_ + cols, 1.0f);
    std::fill(of_ + cols, of_ + kCols, 0.0f);
  }
  // Column of the row's positive in the tile, or negative; the positive weighs nothing.
  int64_t row(int64_t row) {
    if (block_.row_labels != nullptr) {
      const int32_t label = block_.row_labels[row];
      for (int64_t j = 0; j < cols_; ++j) {
        of_[j] = block_.col_labels[col0_ + j] == label ? 0.0f : 1.0f;
      }
    } else if (last_ >= 0) {
      of_[last_] = 1.0f;
    }
    last_ = block_.positive(row, col0_, cols_);
    if (last_ >= 0) {
      of_[last_] = 0.0f;
    }
    return last_;
  }
  Vec at(int64_t v) const { return Vec::loadu(of_ + v * kLanes); }

 private:
  const Block& block_;
  int64_t col0_, cols_, last_ = -1;
  float of_[kCols];
};

// Numbers of a tile's columns, 0 past the end.
void load_columns(const float* from, int64_t cols, Vec (&to)[kVecs]) {
  float padded[kCols] = {};
  std::copy_n(from, cols, padded);
  for (int64_t v = 0; v < kVecs; ++v) {
    to[v] = Vec::loadu(padded + v * kLanes);
  }
}

void add_columns(const Vec (&sums)[kVecs], int64_t cols, float* to) {
  float padded[kCols];
  for (int64_t v = 0; v < kVecs; ++v) {
    sums[v].store(padded + v * kLanes);
  }
  for (int64_t j = 0; j < cols; ++j) {
    to[j] += padded[j];
  }
}

// Adds sums of exp(z - shift) of a tile's negatives to row_sums [rows] and col_sums [cols]; positives [rows] get their
// cosines. kWhole: see Block::whole.
template <bool kWhole>
void tile_sums(const float* tile, int64_t rows, int64_t cols, int64_t row0, int64_t col0, const Block& block,
               float* row_sums, float* col_sums, float* positives) {
  Vec factors[kVecs], sums[kVecs];
  load_columns(block.y_factors + col0, cols, factors);
  for (auto& sum : sums) {
    sum = Vec(0.0f);
  }
  Weights weights(block, col0, cols);
  const Vec shift(-block.shift);
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = tile + i * kCols;
    const float factor = block.x_factors[row0 + i];
    const Vec scaled(factor * block.scale);
    if constexpr (!kWhole) {
      const int64_t positive = weights.row(row0 + i);
      if (positive >= 0) {
        positives[i] = row[positive] * (factor * block.y_factors[col0 + positive]);
      }
    }
    Vec sum(0.0f);
    for (int64_t v = 0; v < kVecs; ++v) {
      // the backward's, to the last bit
      Vec e = power_of_two(at::vec::fmadd(Vec::loadu(row + v * kLanes), scaled * factors[v], shift));
      if constexpr (!kWhole) {
        e = e * weights.at(v);
      }
      sum = sum + e;
      sums[v] = sums[v] + e;
    }
    row_sums[i] += pairs::sum_lanes(sum);
  }
  add_columns(sums, cols, col_sums);
}

// One prefix's weights and results, for all rows and columns.
struct Sides {
  const float *row_weights, *col_weights;  // [m], [n]: p is exp(z - shift) times their sum
  const float* exact;                      // [m]: dS of positives
  float* col_dots;                         // [n]
};

// A tile of products -> G = dS x_factor y_factor; row_dots [rows] = sums of dS cos, added to for columns.
template <bool kWhole>
void tile_grads(const float* tile, float* out, int64_t rows, int64_t cols, int64_t row0, int64_t col0,
                const Block& block, const Sides& sides, float* row_dots) {
  Vec factors[kVecs], col_weights[kVecs], dots[kVecs];
  load_columns(block.y_factors + col0, cols, factors);
  load_columns(sides.col_weights + col0, cols, col_weights);
  for (auto& dot : dots) {
    dot = Vec(0.0f);
  }
  Weights weights(block, col0, cols);
  const Vec shift(-block.shift);
  float col_dots[kCols] = {};
  for (int64_t i = 0; i < rows; ++i) {
    const float *row = tile + i * kCols, factor = block.x_factors[row0 + i];
    const int64_t positive = kWhole ? -1 : weights.row(row0 + i);
    const float product = positive >= 0 ? row[positive] : 0.0f;
    const Vec row_weight(sides.row_weights[row0 + i]), of_row(factor), scaled(factor * block.scale);
    Vec dot(0.0f);
    for (int64_t v = 0; v < kVecs; ++v) {
      const Vec products = Vec::loadu(row + v * kLanes);
      Vec e = power_of_two(at::vec::fmadd(products, scaled * factors[v], shift));
      if constexpr (!kWhole) {
        e = e * weights.at(v);
      }
      const Vec g = e * (row_weight + col_weights[v]) * (of_row * factors[v]);
      dot = at::vec::fmadd(g, products, dot);
      dots[v] = at::vec::fmadd(g, products, dots[v]);
      g.store(out + i * kCols + v * kLanes);
    }
    row_dots[i] = pairs::sum_lanes(dot);
    if (positive >= 0) {
      const float both = factor * block.y_factors[col0 + positive], ds = sides.exact[row0 + i];
      out[i * kCols + positive] = ds * both;
      row_dots[i] += ds * product * both;
      col_dots[positive] += ds * product * both;
    }
  }
  add_columns(dots, cols, sides.col_dots + col0);
  for (int64_t j = 0; j < cols; ++j) {
    sides.col_dots[col0 + j] += col_dots[j];
  }
}

template <typename Operands>
void sums_kernel(const Operands& of, const std::vector<int64_t>& ends, const std::vector<Block>& blocks, float* rows,
                 float* cols, float* positives) {
  const int64_t m = of.m, n = of.n, prefixes = static_cast<int64_t>(ends.size()), groups = pairs::groups_of(n);
  std::vector<float> parts(groups * prefixes * m, 0.0f);
  const auto finish = [&](int64_t g, int64_t p, float* tile, int64_t height, int64_t width, int64_t i, int64_t j) {
    const auto sums = blocks[p].whole(height, width, i, j) ? tile_sums<true> : tile_sums<false>;
    sums(tile, height, width, i, j, blocks[p], &parts[(g * prefixes + p) * m + i], cols + p * n + j,
         positives + p * m + i);
  };
  pairs::products(of, ends, nullptr, finish);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t k = 0; k < prefixes * m; ++k) {
      rows[k] += parts[g * prefixes * m + k];
    }
  }
}

constexpr double kEpsilon = 1e-12;  // shorter rows count as so long, as in F.normalize

// Reciprocal norms of the first ends[p] numbers of rows of x, [P, rows], from sums in double: what a norm errs by, all
// logits of its row do.
template <typename T>
void norms_kernel(const T* x, int64_t rows, const std::vector<int64_t>& ends, float* out) {
  constexpr int64_t kSums = 16;
  const int64_t d = ends.back();
  at::parallel_for(0, rows, pairs::grain(4 * d), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double squares = 0;
      int64_t from = 0;
      for (size_t p = 0; p < ends.size(); ++p) {
        double sums[kSums] = {};
        for (; from + kSums <= ends[p]; from += kSums) {
          for (int64_t k = 0; k < kSums; ++k) {
            const double value = static_cast<float>(x[i * d + from + k]);
            sums[k] += value * value;
          }
        }
        for (int64_t k = 0; from < ends[p]; ++from, ++k) {
          const double value = static_cast<float>(x[i * d + from]);
          sums[k] += value * value;
        }
        for (const double sum : sums) {
          squares += sum;
        }
        const double norm = std::sqrt(squares);
        out[static_cast<int64_t>(p) * rows + i] = static_cast<float>(1 / (norm < kEpsilon ? kEpsilon : norm));
      }
    }
  });
}

const float* numbers(const char* name, const at::Tensor& x, at::IntArrayRef sizes) {
  expect_dense(name, x, at::kFloat, sizes);
  return x.const_data_ptr<float>();
}

void check_ends(at::IntArrayRef ends, const at::Tensor& x) {
  const int64_t even = x.scalar_type() == at::kFloat ? 1 : 2;
  int64_t before = 0;
  for (const int64_t end : ends) {
    TORCH_CHECK_VALUE(end > before && end % even == 0,
                      "info_nce: ends: expected to rise, even for bfloat16, got ", ends);
    before = end;
  }
  TORCH_CHECK_VALUE(before == x.size(1), "info_nce: ends: expected the last at D = ", x.size(1), ", got ", ends);
}

// A block for each prefix. Raises where arguments don't fit each other.
std::vector<Block> checked_blocks(const at::Tensor& x, const at::Tensor& y, double scale, double shift,
                                  const at::Tensor& x_factors, const at::Tensor& y_factors, at::IntArrayRef ends,
                                  int64_t diag, const pairs::MaybeTensor& row_labels,
                                  const pairs::MaybeTensor& col_labels) {
  const pairs::Block block = pairs::checked_block("info_nce", x, y, diag, row_labels, col_labels);
  check_ends(ends, x);
  const int64_t m = x.size(0), n = y.size(0), prefixes = static_cast<int64_t>(ends.size());
  const float* rows = numbers("info_nce: x_factors", x_factors, {prefixes, m});
  const float* cols = numbers("info_nce: y_factors", y_factors, {prefixes, n});
  constexpr double kPowers = 1.4426950408889634;  // log2(e)
  std::vector<Block> blocks;
  for (int64_t p = 0; p < prefixes; ++p) {
    blocks.push_back({block, static_cast<float>(scale * kPowers), static_cast<float>(shift * kPowers), rows + p * m,
                      cols + p * n});
  }
  return blocks;
}

at::Tensor info_nce_nested_norms(const at::Tensor& x, at::IntArrayRef ends) {
  expect_operand("info_nce: x", x, 2);
  expect_dense("info_nce: x", x, x.scalar_type(), x.sizes());
  check_ends(ends, x);
  at::Tensor out = at::zeros({static_cast<int64_t>(ends.size()), x.size(0)}, x.options().dtype(at::kFloat));
  const auto norms = [&](const auto* rows) {
    norms_kernel(rows, x.size(0), ends.vec(), out.mutable_data_ptr<float>());
  };
  if (x.scalar_type() == at::kFloat) {
    norms(x.const_data_ptr<float>());
  } else {
    norms(x.const_data_ptr<at::BFloat16>());
  }
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> info_nce_nested_sums(
    const at::Tensor& x, const at::Tensor& y, double scale, double shift, const at::Tensor& x_factors,
    const at::Tensor& y_factors, at::IntArrayRef ends, int64_t diag, const pairs::MaybeTensor& row_labels,
    const pairs::MaybeTensor& col_labels) {
  const std::vector<Block> blocks =
      checked_blocks(x, y, scale, shift, x_factors, y_factors, ends, diag, row_labels, col_labels);
  const int64_t m = x.size(0), n = y.size(0), prefixes = static_cast<int64_t>(ends.size());
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor rows = at::zeros({prefixes, m}, options), cols = at::zeros({prefixes, n}, options);
  at::Tensor positives = at::zeros({prefixes, m}, options);
  if (m > 0 && n > 0) {
    pairs::with_operands(x, y, [&](const auto& of) {
      sums_kernel(of, ends.vec(), blocks, rows.mutable_data_ptr<float>(), cols.mutable_data_ptr<float>(),
                  positives.mutable_data_ptr<float>());
    });
  }
  return {rows, cols, positives};
}

std::tuple<at::Tensor, at::Tensor> info_nce_nested_grads(
    const at::Tensor& x, const at::Tensor& y, double scale, double shift, const at::Tensor& x_factors,
    const at::Tensor& y_factors, at::IntArrayRef ends, const at::Tensor& row_weights, const at::Tensor& col_weights,
    const at::Tensor& exact, int64_t diag, const pairs::MaybeTensor& row_labels, const pairs::MaybeTensor& col_labels,
    int64_t workspace, const pairs::MaybeTensor& dx, const pairs::MaybeTensor& dy) {
  const std::vector<Block> blocks =
      checked_blocks(x, y, scale, shift, x_factors, y_factors, ends, diag, row_labels, col_labels);
  const int64_t m = x.size(0), n = y.size(0), prefixes = static_cast<int64_t>(ends.size());
  const float* by_row = numbers("info_nce: row_weights", row_weights, {prefixes, m});
  const float* by_col = numbers("info_nce: col_weights", col_weights, {prefixes, n});
  const float* of_positives = numbers("info_nce: exact", exact, {prefixes, m});
  const pairs::Sums into = pairs::checked_sums("info_nce", x, y, dx, dy,
                                               {x, y, x_factors, y_factors, row_weights, col_weights, exact});
  const auto options = x.options().dtype(at::kFloat);
  at::Tensor row_dots = at::zeros({prefixes, m}, options), col_dots = at::zeros({prefixes, n}, options);
  if (m > 0 && n > 0) {
    pairs::with_operands(x, y, [&](const auto& of) {
      const auto [high, wide] = of.rectangle(prefixes, workspace, into.dx != nullptr);
      const int64_t tiles = ceil_div(wide, kCols), rectangle = high;
      pairs::Scratch<float> scratch(tiles * prefixes * rectangle);  // row sums of tiles of columns, which threads own
      float *parts = scratch.data(), *sums = row_dots.mutable_data_ptr<float>();
      std::vector<Sides> sides;
      for (int64_t p = 0; p < prefixes; ++p) {
        sides.push_back({by_row + p * m, by_col + p * n, of_positives + p * m,
                         col_dots.mutable_data_ptr<float>() + p * n});
      }
      const auto part = [&](int64_t i, int64_t j, int64_t p) {
        return &parts[(j / kCols % tiles * prefixes + p) * rectangle + i % rectangle];
      };
      const auto finish = [&](int64_t p, float* tile, float* out, int64_t rows, int64_t cols, int64_t i, int64_t j) {
        const auto grads = blocks[p].whole(rows, cols, i, j) ? tile_grads<true> : tile_grads<false>;
        grads(tile, out, rows, cols, i, j, blocks[p], sides[p], part(i, j, p));
      };
      const auto join = [&](int64_t i, int64_t rows, int64_t j, int64_t cols) {
        for (int64_t t = j; t < j + cols; t += kCols) {
          for (int64_t p = 0; p < prefixes; ++p) {
            const float* more = part(i, t, p);
            for (int64_t r = 0; r < rows; ++r) {
              sums[p * m + i + r] += more[r];
            }
          }
        }
      };
      pairs::gradients(of, ends.vec(), workspace, nullptr, into.dx, into.dy, finish, join);
    });
  }
  return {row_dots, col_dots};
}

}  // namespace
}  // namespace lbfast

TORCH_LIBRARY_FRAGMENT(lbfast, m) {
  m.def("info_nce_nested_norms(Tensor x, int[] ends) -> Tensor");
  m.def(
      "info_nce_nested_sums(Tensor x, Tensor y, float scale, float shift, Tensor x_factors, Tensor y_factors,"
      " int[] ends, int diag, Tensor? row_labels, Tensor? col_labels) -> (Tensor, Tensor, Tensor)");
  m.def(
      "info_nce_nested_grads(Tensor x, Tensor y, float scale, float shift, Tensor x_factors, Tensor y_factors,"
      " int[] ends, Tensor row_weights, Tensor col_weights, Tensor exact, int diag, Tensor? row_labels,"
      " Tensor? col_labels, int workspace, Tensor(a!)? dx, Tensor(b!)? dy) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lbfast, CPU, m) {
  m.impl("info_nce_nested_norms", lbfast::info_nce_nested_norms);
  m.impl("info_nce_nested_sums", lbfast::info_nce_nested_sums);
  m.impl("info_nce_nested_grads", lbfast::info_nce_nested_grads);
}
