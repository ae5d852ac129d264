// The sigmoid loss of pairs on the CPU: each pair stands for itself, so that one pass gives value and gradients.
//
// Contract: Implementation in lbfast/ops/sigmoid_loss.py. With p = x_i . y_j and z = scale p + bias, a negative adds
// log(1 + e^z) and has dS = sigmoid(z), the positive of a row log(1 + e^-z) and -sigmoid(-z). With u = e^-|z|, sigmoid
// is 1 or u over 1 + u, and the loss max(z, 0) + log(1 + u). Of some rows only the product of 1 + u is kept, as what it
// has over 1, in which small u lose nothing: one logarithm serves them all.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "pairs.h"
#include "vectors.h"

namespace lbfast {
namespace {

using pairs::ceil_div;
using pairs::kCols;
using pairs::kLanes;

constexpr int64_t kVecs = kCols / kLanes;
constexpr int64_t kSums = 3;    // of the losses, of dS, and of dS p
constexpr int64_t kFlush = 16;  // rows that are added up in float: at first all pairs' losses are alike, and so would
                                // be the roundings of their sums; no product of so many 1 + u is too large

struct Block : pairs::Block {
  float scale, bias;
};

// Sums in double, lane by lane.
struct Totals {
  double lanes[kSums][kLanes] = {};

  void add(int64_t k, const Vec& more) {
    float values[kLanes];
    more.store(values);
    for (int64_t i = 0; i < kLanes; ++i) {
      lanes[k][i] += values[i];
    }
  }
};

// Rows of a tile of products, at most kFlush -> dS, 0 where a pair weighs nothing; weights(i), of row i: [kCols].
template <bool kWeighted, typename Weights>
void finish_rows(float* tile, int64_t rows, const Block& block, const Weights& weights, Totals& totals) {
  const Vec scale(block.scale), bias(block.bias), zero(0.0f), one(1.0f);
  Vec over[kVecs], losses = zero, slopes = zero, dots = zero;  // over: what the product of 1 + u has over 1
  for (auto& v : over) {
    v = zero;
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* row = tile + i * kCols;
    const float* weight = kWeighted ? weights(i) : nullptr;
    Vec loss = zero, slope = zero, dot = zero;
#pragma GCC unroll 16
    for (int64_t v = 0; v < kVecs; ++v) {
      const Vec p = Vec::loadu(row + v * kLanes);
      const Vec z = at::vec::fmadd(p, scale, bias);
      Vec u = exponential_of(z.abs().neg()), above = at::vec::maximum(z, zero);
      Vec ds = Vec::blendv(u, one, z >= zero) * reciprocal_of(one + u);
      if constexpr (kWeighted) {
        const Vec w = Vec::loadu(weight + v * kLanes);
        u = u * w;
        above = above * w;
        ds = ds * w;
      }
      over[v] = at::vec::fmadd(over[v], u, over[v] + u);
      loss = loss + above;
      slope = slope + ds;
      dot = at::vec::fmadd(ds, p, dot);
      ds.store(row + v * kLanes);
    }
    losses = losses + loss;
    slopes = slopes + slope;
    dots = dots + dot;
  }
  for (const auto& v : over) {
    totals.add(0, v.log1p());
  }
  totals.add(0, losses);
  totals.add(1, slopes);
  totals.add(2, dots);
}

// A tile of products -> dS, 0 where a pair is left out or past `cols`; adds to sums [kSums].
void finish_tile(float* tile, int64_t rows, int64_t cols, int64_t row0, int64_t col0, const Block& block,
                 double* sums) {
  Totals totals;
  const bool crossed = block.diag >= 0 && block.diag + row0 < col0 + cols && block.diag + row0 + rows > col0;
  const bool weighted = crossed || block.row_labels != nullptr || cols < kCols;
  float weights[kCols], products[kFlush];
  std::fill(weights, weights + cols, 1.0f);
  std::fill(weights + cols, weights + kCols, 0.0f);
  int64_t last = -1;  // the positive whose weight is 0
  for (int64_t begin = 0; begin < rows; begin += kFlush) {
    float* part = tile + begin * kCols;
    const int64_t count = std::min(kFlush, rows - begin), first = row0 + begin;
    if (!weighted) {
      finish_rows<false>(part, count, block, [](int64_t) { return nullptr; }, totals);
      continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t positive = block.positive(first + i, col0, cols);
      products[i] = positive >= 0 ? part[i * kCols + positive] : 0.0f;
    }
    const auto of_row = [&](int64_t i) {
      if (block.row_labels != nullptr) {
        const int32_t label = block.row_labels[first + i];
        const int32_t* labels = block.col_labels + col0;
        for (int64_t j = 0; j < cols; ++j) {
          weights[j] = labels[j] == label ? 0.0f : 1.0f;
        }
      } else if (last >= 0) {
        weights[last] = 1.0f;
      }
      last = block.positive(first + i, col0, cols);
      if (last >= 0) {
        weights[last] = 0.0f;
      }
      return weights;
    };
    finish_rows<true>(part, count, block, of_row, totals);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t positive = block.positive(first + i, col0, cols);
      if (positive >= 0) {
        const double z = std::fma(products[i], block.scale, block.bias), ds = -1.0 / (1.0 + std::exp(z));
        sums[0] += std::max(-z, 0.0) + std::log1p(std::exp(-std::abs(z)));
        sums[1] += ds;
        sums[2] += ds * products[i];
        part[i * kCols + positive] = static_cast<float>(ds);
      }
    }
  }
  for (int64_t k = 0; k < kSums; ++k) {
    for (const double lane : totals.lanes[k]) {
      sums[k] += lane;
    }
  }
}

at::Tensor sigmoid_loss_pass(const at::Tensor& x, const at::Tensor& y, double scale, double bias, int64_t diag,
                             const pairs::MaybeTensor& row_labels, const pairs::MaybeTensor& col_labels,
                             int64_t workspace, const pairs::MaybeTensor& dx, const pairs::MaybeTensor& dy) {
  const Block block{pairs::checked_block("sigmoid_loss", x, y, diag, row_labels, col_labels), static_cast<float>(scale),
                    static_cast<float>(bias)};
  const pairs::Sums into = pairs::checked_sums("sigmoid_loss", x, y, dx, dy, {x, y});
  const int64_t m = x.size(0), n = y.size(0), d = x.size(1);
  at::Tensor sums = at::zeros({ceil_div(n, kCols), kSums}, x.options().dtype(at::kDouble));  // of tiles of columns
  double* of_tiles = sums.mutable_data_ptr<double>();
  if (m > 0 && n > 0) {
    pairs::with_operands(x, y, [&](const auto& of) {
      const auto finish = [&](float* tile, int64_t rows, int64_t cols, int64_t i, int64_t j) {
        finish_tile(tile, rows, cols, i, j, block, of_tiles + j / kCols * kSums);
      };
      if (into.dx == nullptr && into.dy == nullptr) {
        pairs::products(of, {d}, nullptr,
                        [&](int64_t, int64_t, float* tile, auto... where) { finish(tile, where...); });
      } else {
        pairs::gradients(of, {d}, workspace, nullptr, into.dx, into.dy,
                         [&](int64_t, float* tile, float*, auto... where) { finish(tile, where...); });
      }
    });
  }
  return sums.sum(0);
}

}  // namespace
}  // namespace lbfast

TORCH_LIBRARY_FRAGMENT(lbfast, m) {
  m.def(
      "sigmoid_loss_pass(Tensor x, Tensor y, float scale, float bias, int diag, Tensor? row_labels,"
      " Tensor? col_labels, int workspace, Tensor(a!)? dx, Tensor(b!)? dy) -> Tensor");
}

TORCH_LIBRARY_IMPL(lbfast, CPU, m) { m.impl("sigmoid_loss_pass", lbfast::sigmoid_loss_pass); }
