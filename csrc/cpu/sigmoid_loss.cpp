// The sigmoid loss of pairs on the CPU: each pair stands for itself, so that one pass gives value and gradients.
//
// Contract: Implementation in lbfast/ops/sigmoid_loss.py. With p = x_i . y_j and z = scale p + bias, a negative adds
// log(1 + e^z) and has dS = sigmoid(z), the positive of a row log(1 + e^-z) and -sigmoid(-z). One exponential and one
// division serve both: with u = e^-|z| and w = u / (2 + u), log(1 + u) is 2 atanh(w), w at most 1/3.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "pairs.h"

namespace lbfast {
namespace {

using pairs::ceil_div;
using pairs::kCols;
using pairs::kLanes;
using pairs::Vec;

constexpr int64_t kVecs = kCols / kLanes;
constexpr int64_t kSums = 3;    // of the losses, of dS, and of dS p
constexpr int64_t kFlush = 16;  // rows that are added up in float: at first all pairs' losses are alike, and so would
                                // be the roundings of their sums

struct Block : pairs::Block {
  float scale, bias;
};

// A tile of products -> dS, 0 where a pair is left out or past `cols`; adds to sums [kSums].
void finish_tile(float* tile, int64_t rows, int64_t cols, int64_t row0, int64_t col0, const Block& block, double* sums) {
  const Vec scale(block.scale), bias(block.bias), zero(0.0f), one(1.0f), two(2.0f);
  Vec totals[kSums] = {zero, zero, zero};
  const auto flush = [&] {
    for (int64_t k = 0; k < kSums; ++k) {
      float lanes[kLanes];
      totals[k].store(lanes);
      for (const float lane : lanes) {
        sums[k] += lane;
      }
      totals[k] = zero;
    }
  };
  float weights[kCols];
  std::fill(weights, weights + cols, 1.0f);
  std::fill(weights + cols, weights + kCols, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = tile + i * kCols;
    if (block.row_labels != nullptr) {
      const int32_t label = block.row_labels[row0 + i];
      const int32_t* labels = block.col_labels + col0;
      for (int64_t j = 0; j < cols; ++j) {
        weights[j] = labels[j] == label ? 0.0f : 1.0f;
      }
    }
    const int64_t positive = block.positive(row0 + i, col0, cols);
    float product = 0.0f;
    if (positive >= 0) {
      product = row[positive];
      weights[positive] = 0.0f;
    }
    Vec of_row[kSums] = {zero, zero, zero};
    for (int64_t v = 0; v < kVecs; ++v) {
      const Vec p = Vec::loadu(row + v * kLanes), weight = Vec::loadu(weights + v * kLanes);
      const Vec z = at::vec::fmadd(p, scale, bias);
      const Vec u = z.abs().neg().exp();
      const Vec above = one + u, beyond = two + u;
      const Vec inverse = one / (above * beyond);
      const Vec w = u * above * inverse, w2 = w * w;
      Vec series = at::vec::fmadd(w2, Vec(1.0f / 13), Vec(1.0f / 11));
      for (const int odd : {9, 7, 5, 3, 1}) {
        series = at::vec::fmadd(w2, series, Vec(1.0f / static_cast<float>(odd)));
      }
      const Vec loss = at::vec::fmadd(two * w, series, at::vec::maximum(z, zero));
      const Vec ds = weight * (Vec::blendv(u, one, z >= zero) * beyond * inverse);
      of_row[0] = at::vec::fmadd(weight, loss, of_row[0]);
      of_row[1] = of_row[1] + ds;
      of_row[2] = at::vec::fmadd(ds, p, of_row[2]);
      ds.store(row + v * kLanes);
    }
    for (int64_t k = 0; k < kSums; ++k) {
      totals[k] = totals[k] + of_row[k];
    }
    if (i % kFlush == kFlush - 1) {
      flush();
    }
    if (positive >= 0) {
      weights[positive] = 1.0f;
      const double z = std::fma(product, block.scale, block.bias), ds = -1.0 / (1.0 + std::exp(z));
      sums[0] += std::max(-z, 0.0) + std::log1p(std::exp(-std::abs(z)));
      sums[1] += ds;
      sums[2] += ds * product;
      row[positive] = static_cast<float>(ds);
    }
  }
  flush();
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
    pairs::with_operand_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const auto finish = [&](int64_t, float* tile, float*, int64_t rows, int64_t cols, int64_t i, int64_t j) {
        finish_tile(tile, rows, cols, i, j, block, of_tiles + j / kCols * kSums);
      };
      pairs::gradients(x.const_data_ptr<T>(), y.const_data_ptr<T>(), m, n, {d}, workspace, nullptr, into.dx, into.dy,
                       finish);
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
