// What the forms of attention on a CPU share: operands in place, buffers, strips of queries and who takes them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "softmax.h"

namespace lbfast::attention {

constexpr int64_t kStrip = 64;              // queries at a time, fewer where there are many keys:
constexpr int64_t kScoreBytes = 256 << 10;  // so much for a strip's scores
constexpr int64_t kFewest = 16;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One thread's buffers, one after another, each on a cache line of its own.
class Buffers {
 public:
  explicit Buffers(int64_t bytes) : size_(bytes + 64), data_(new char[size_]) {
    next_ = data_.get() + (64 - reinterpret_cast<uintptr_t>(data_.get()) % 64) % 64;
  }
  template <typename T>
  T* take(int64_t count) {
    T* out = reinterpret_cast<T*>(next_);
    next_ += round_up(count * sizeof(T), 64);
    TORCH_INTERNAL_ASSERT(next_ <= data_.get() + size_);
    return out;
  }

 private:
  int64_t size_;
  std::unique_ptr<char[]> data_;
  char* next_;
};

template <typename In>
struct View {
  In* data;
  int64_t b, n, h;  // strides in elements
  explicit View(const at::Tensor& x)
      : data(x.data_ptr<In>()), b(x.stride(0)), n(x.stride(1)), h(x.stride(2)) {}
  In* at(int64_t ib, int64_t in, int64_t ih) const { return data + ib * b + in * n + ih * h; }
};

struct Shape {
  int64_t batch, queries, keys, heads, dim;
  int64_t strip;  // queries of a strip, even
  int64_t ld;     // of a row of scores
  Shape(const at::Tensor& q, const at::Tensor& k)
      : batch(q.size(0)), queries(q.size(1)), keys(k.size(1)), heads(q.size(2)), dim(q.size(3)) {
    ld = round_up(keys, 32);
    const int64_t most = std::clamp<int64_t>(kScoreBytes / (4 * ld), kFewest, kStrip);
    const int64_t strips = (queries + most - 1) / most;
    strip = round_up((queries + strips - 1) / std::max<int64_t>(1, strips), 2);
  }
  int64_t strips() const { return (queries + strip - 1) / strip; }
};

// rows of dim values: In -> T, packed densely
template <typename In, typename T>
void load_rows(const In* from, int64_t stride, int64_t rows, int64_t dim, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    if constexpr (std::is_same_v<In, T>) {
      std::memcpy(to + i * dim, from + i * stride, dim * sizeof(T));
    } else {
      at::vec::convert(from + i * stride, to + i * dim, dim);
    }
  }
}

template <typename T>
struct Rows {
  const T* data;
  int64_t ld;
};

// Rows of dim values as T: in place, or converted into `to`.
template <typename In, typename T>
Rows<T> rows_of(const In* from, int64_t stride, int64_t rows, int64_t dim, T* to) {
  if constexpr (std::is_same_v<In, T>) {
    return {from, stride};
  } else {
    load_rows(from, stride, rows, dim, to);
    return {to, dim};
  }
}

// float rows of dim values, times a factor each (null: 1) -> In
template <typename In>
void store_rows(const float* from, int64_t ld, const float* factors, int64_t rows, int64_t dim, In* to,
                int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = from + i * ld;
    In* out = to + i * stride;
    const float factor = factors == nullptr ? 1.0f : factors[i];
    int64_t d = 0;
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
      store(Vec::loadu(row + d) * Vec(factor), Vec::loadu(row + d + kLanes) * Vec(factor), out + d);
    }
    for (; d < dim; ++d) {
      out[d] = row[d] * factor;
    }
  }
}

// Queries [first, first + count) and the keys that any of them sees.
struct Strip {
  int64_t first, count, seen;
  int64_t products;  // columns of scores computed: the vectors that hold what is seen
  int64_t width;     // of P, zero past what is seen
  Strip(const Shape& shape, const Masks& masks, int64_t i) : first(i * shape.strip) {
    count = std::min(shape.strip, shape.queries - first);
    seen = masks.causal && masks.padded == nullptr ? std::min(shape.keys, first + count) : shape.keys;
    products = round_up(seen, 16);
    width = round_up(seen, 32);
  }
};

// Strips of all heads in pieces that threads take: a head each, whose keys are packed once, or less where heads are few.
struct Pieces {
  int64_t strips, each, count;
  explicit Pieces(const Shape& shape) : strips(shape.batch * shape.heads * shape.strips()) {
    const int64_t fair = strips / (2 * std::max<int64_t>(1, at::get_num_threads())), head = shape.strips();
    each = std::clamp<int64_t>(fair, 1, std::max<int64_t>(1, head));
    count = (strips + each - 1) / each;
  }
  // The first strip of the next piece that nobody has, -1 where none is left.
  int64_t first(std::atomic<int64_t>& next) const {
    const int64_t piece = next++;
    return piece < count ? piece * each : -1;
  }
  int64_t after(int64_t strip, std::atomic<int64_t>& next) const {
    return (strip + 1) % each != 0 && strip + 1 < strips ? strip + 1 : first(next);
  }
};

}  // namespace lbfast::attention
