// What tiles of pairs are on any machine: their sizes, the rectangles whose dS lies in scratch, and that scratch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/Exception.h>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "packed.h"
#include "vectors.h"

namespace lbfast::pairs {

constexpr int64_t kRows = 192;        // rows of a tile
constexpr int64_t kCols = 96;         // columns of a tile
constexpr int64_t kEvenRows = 8 * kRows, kEvenCols = 16 * kCols;  // what some threads share evenly
constexpr int64_t kDepth = 4 * kCols;  // of dS that lie together, in blocks [kRows, kDepth]
constexpr int64_t kSlice = 256;       // numbers of a row whose gradient lies in cache while dS and y go by
constexpr int64_t kMaxGroups = 64;    // of columns in the forward: bounds partial statistics of rows
constexpr int64_t kLanes = Vec::size();
static_assert(kRows % packed::kHigh == 0 && kCols % packed::kHigh == 0 && kCols % packed::kWide == 0);
static_assert(kCols % kLanes == 0);

using packed::ceil_div;

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
#if defined(MADV_HUGEPAGE)
      madvise(data_, bytes_, MADV_HUGEPAGE);  // rows of a tile lie on many pages; without large ones it is slower
#endif
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

// A part of the D numbers, from one prefix's end to the next.
struct Section {
  int64_t from, size;
};

inline std::vector<Section> sections_of(const std::vector<int64_t>& ends) {
  std::vector<Section> sections;
  for (size_t p = 0; p < ends.size(); ++p) {
    const int64_t from = p == 0 ? 0 : ends[p - 1];
    sections.push_back({from, ends[p] - from});
  }
  return sections;
}

// Slopes z [prefixes][kRows][kCols], `height` rows of them: what a section takes is its prefix's and each longer one's.
inline void add_longer(float* z, int64_t prefixes, int64_t height) {
  constexpr int64_t kApart = kRows * kCols;
  for (int64_t p = prefixes - 2; p >= 0; --p) {
    float* less = z + p * kApart;
    for (int64_t k = 0; k < height * kCols; k += kLanes) {
      (Vec::loadu(less + k) + Vec::loadu(less + kApart + k)).store(less + k);
    }
  }
}

// Tiles of columns that one thread of the forward takes together, for their rows of x are read once.
inline int64_t tiles_in_group(int64_t n) {
  const int64_t tiles = ceil_div(n, kCols);
  return ceil_div(tiles, std::clamp<int64_t>(tiles, 1, kMaxGroups));
}
inline int64_t groups_of(int64_t n) { return ceil_div(ceil_div(n, kCols), tiles_in_group(n)); }

// What a rectangle's pair, row and column take of the room that there is.
struct Cost {
  int64_t pair, row, column;
};

// Rows and columns of the rectangle whose dS lies in scratch, with its rows of x and y packed beside it.
inline std::pair<int64_t, int64_t> rectangle(int64_t m, int64_t n, const Cost& cost, int64_t room, bool dx) {
  const auto fitting = [](int64_t size, int64_t all, int64_t step, int64_t even) {
    const int64_t fit = size / (size < even ? step : even) * (size < even ? step : even);
    return std::min(std::max(fit, step), ceil_div(all, step) * step);
  };
  if (!dx) {
    return {fitting(room / cost.row, m, kRows, kEvenRows), ceil_div(n, kCols) * kCols};
  }
  const double pair = static_cast<double>(cost.pair), half = static_cast<double>(cost.row + cost.column) / 2;
  const auto side = static_cast<int64_t>((std::sqrt(half * half + pair * static_cast<double>(room)) - half) / pair);
  const int64_t cols = fitting(side, n, kCols, kEvenCols);
  return {fitting((room - cols * cost.column) / (cost.pair * cols + cost.row), m, kRows, kEvenRows), cols};
}

}  // namespace lbfast::pairs
