// Attention over the tokens of one image, frame, spectrogram or caption, read in place from (B, N, H, D) views.
//
//   fwd: P = softmax(scale Q K^T + masks), O = P V; the shift and the sum of each row's softmax are kept
//   bwd: P again; dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)) scale, dQ = dS K, dK = dS^T Q
//
// A head's keys and values are packed once and stay in the second-level cache with a strip of up to 64 queries' scores
// against all of them: one pass of the softmax, no running statistics. Scores and sums are float32; P and dS take the
// dtype of the products, and O is divided by the sum last. The order of additions depends on shapes alone.
// The schemas, fakes and autograd are in lbfast/ops/attention.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>

#include "checks.h"
#include "gemm.h"

namespace lbfast {
namespace {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
constexpr int64_t kStrip = 64;              // queries at a time, fewer where there are many keys:
constexpr int64_t kScoreBytes = 256 << 10;  // so much for a strip's scores
constexpr int64_t kFewest = 16;
constexpr float kLowest = -std::numeric_limits<float>::max();  // what a mask adds, as in CLIP

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One thread's buffers, one after another, each on a cache line of its own.
class Arena {
 public:
  explicit Arena(int64_t bytes) : size_(bytes + 64), data_(new char[size_]) {
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

struct Masks {
  bool causal;
  const bool* padded;  // [B, keys] or null
};

inline void store(const Vec& a, const Vec& b, float* to) {
  a.store(to);
  b.store(to + kLanes);
}

inline void store(const Vec& a, const Vec& b, at::BFloat16* to) {
  at::vec::convert_from_float<at::BFloat16>(a, b).store(to);
}

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
void store_rows(const float* from, const float* factors, int64_t rows, int64_t dim, In* to, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = from + i * dim;
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

// B of A @ B from dense rows [k, n]: itself for float, pairs of rows for bfloat16.
inline const float* in_pairs(const float* rows, int64_t, int64_t, float*) { return rows; }
inline const at::BFloat16* in_pairs(const at::BFloat16* rows, int64_t k, int64_t n, at::BFloat16* packed) {
  pack_pairs(rows, n, k, n, packed);
  return packed;
}

// [rows, cols] -> [cols, rows]
inline void transpose(const float* from, int64_t ld, int64_t rows, int64_t cols, float* to, int64_t ld_to) {
  at::vec::transpose_mxn<float>(from, ld, to, ld_to, static_cast<int>(rows), static_cast<int>(cols));
}
inline void transpose(const at::BFloat16* from, int64_t ld, int64_t rows, int64_t cols, at::BFloat16* to,
                      int64_t ld_to) {
  constexpr int64_t kTile = 32;
  for (int64_t i = 0; i < rows; i += kTile) {
    for (int64_t j = 0; j < cols; j += kTile) {
      at::vec::transpose_mxn<at::BFloat16>(from + i * ld + j, ld, to + j * ld_to + i, ld_to,
                                           static_cast<int>(std::min(kTile, rows - i)),
                                           static_cast<int>(std::min(kTile, cols - j)));
    }
  }
}

// A buffer for P beside the scores: the scores' own where both are float.
template <typename T>
T* beside(float* scores, Arena& arena, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return scores;
  } else {
    return arena.take<T>(count);
  }
}

// Scores of one query -> what the softmax takes, in place; returns how many of the keys may count.
inline int64_t mask_scores(float* s, int64_t keys, int64_t query, const Masks& masks, int64_t b, float& scale) {
  if (masks.padded == nullptr) {
    return masks.causal ? std::min(keys, query + 1) : keys;
  }
  const bool* padded = masks.padded + b * keys;
  for (int64_t j = 0; j < keys; ++j) {  // both masks: -inf
    s[j] = s[j] * scale + (padded[j] ? kLowest : 0.0f) + (masks.causal && j > query ? kLowest : 0.0f);
  }
  scale = 1.0f;
  return keys;
}

// Within 3e-7 of exp(x) for what becomes bfloat16, x not above 0 by much.
template <typename T>
Vec exponential(const Vec& x) {
  if constexpr (std::is_same_v<T, float>) {
    return x.exp();
  } else {
#if defined(CPU_CAPABILITY_AVX512)
    const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(y, whole);
    __m512 p = _mm512_set1_ps(1.34004e-3f);  // 2^f on [-1/2, 1/2]
    for (const float c : {9.67604e-3f, 5.550327e-2f, 0.24022107f, 0.69314721f, 1.00000008f}) {
      p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    }
    return _mm512_scalef_ps(p, whole);
#else
    return x.exp_u20();
#endif
  }
}

// exp(scale s - shift) of one row -> p, zeros up to ld; s has ld values and p may be s.
template <typename T>
void softmax_row(const float* s, int64_t count, int64_t ld, float scale, T* p, float& shift, float& sum) {
  const Vec factor(scale);
  Vec top(-std::numeric_limits<float>::infinity()), beside = top;
  int64_t j = 0;
  for (; j + 2 * kLanes <= count; j += 2 * kLanes) {
    top = at::vec::maximum(top, Vec::loadu(s + j) * factor);
    beside = at::vec::maximum(beside, Vec::loadu(s + j + kLanes) * factor);
  }
  top = at::vec::maximum(top, beside);
  for (; j + kLanes <= count; j += kLanes) {
    top = at::vec::maximum(top, Vec::loadu(s + j) * factor);
  }
  if (j < count) {
    top = Vec::set(top, at::vec::maximum(top, Vec::loadu(s + j, static_cast<int>(count - j)) * factor), count - j);
  }
  shift = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
  const Vec negative(-shift), zero(0.0f);
  Vec total(0.0f), other(0.0f);
  const auto part = [&](int64_t k) { return exponential<T>(at::vec::fmadd(Vec::loadu(s + k), factor, negative)); };
  for (j = 0; j + 2 * kLanes <= count; j += 2 * kLanes) {
    const Vec a = part(j), b = part(j + kLanes);
    total = total + a;
    other = other + b;
    store(a, b, p + j);
  }
  for (; j < ld; j += 2 * kLanes) {
    Vec a = zero, b = zero;
    if (j < count) {
      a = Vec::set(zero, part(j), std::min(kLanes, count - j));
    }
    if (j + kLanes < count) {
      b = Vec::set(zero, part(j + kLanes), std::min(kLanes, count - j - kLanes));
    }
    total = total + a;
    other = other + b;
    store(a, b, p + j);
  }
  total = total + other;
  sum = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, total);
}

// Scores and dP of one row -> P and dS, zeros up to ld, s overwritten by P as float; p may be s, ds may be dp.
// Divided, and less the sum of what is there: where one key counts, P is 1 and dS is 0.
template <typename T>
void softmax_bwd_row(float* s, const float* dp, int64_t count, int64_t ld, float scale_s, float scale, float shift,
                     float sum, T* p, T* ds) {
  const Vec factor(scale_s), negative(-shift), total(sum), zero(0.0f);
  Vec deltas(0.0f);
  for (int64_t j = 0; j < ld; j += kLanes) {
    Vec e = zero;
    if (j < count) {
      e = exponential<T>(at::vec::fmadd(Vec::loadu(s + j), factor, negative)) / total;
      const Vec weighted = e * Vec::loadu(dp + j);
      deltas = deltas + (j + kLanes <= count ? weighted : Vec::set(zero, weighted, count - j));
      e = j + kLanes <= count ? e : Vec::set(zero, e, count - j);
    }
    e.store(s + j);
  }
  const Vec delta(at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, deltas)), scaled(scale);
  const auto gradient = [&](int64_t j, const Vec& pj) {
    const Vec d = pj * (Vec::loadu(dp + j) - delta) * scaled;
    return j + kLanes <= count ? d : Vec::set(zero, d, std::max<int64_t>(0, count - j));
  };
  for (int64_t j = 0; j < ld; j += 2 * kLanes) {
    const Vec p0 = Vec::loadu(s + j), p1 = Vec::loadu(s + j + kLanes);
    const Vec d0 = gradient(j, p0), d1 = gradient(j + kLanes, p1);
    store(p0, p1, p + j);
    store(d0, d1, ds + j);
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

template <typename In, typename T>
void forward(const Shape& shape, const View<In>& q, const View<In>& k, const View<In>& v, const View<In>& out,
             float* stats, const Masks& masks, float scale) {
  const int64_t strips = shape.strips(), dim = shape.dim, ld = shape.ld, keys = shape.keys;
  const int64_t deep = round_to_pair<T>(keys);
  at::parallel_for(0, shape.batch * shape.heads * strips, 1, [&](int64_t begin, int64_t end) {
    Arena arena((2 * deep + ld + shape.strip) * dim * sizeof(T) + shape.strip * (ld + dim + 1) * (4 + sizeof(T)) +
                1024);
    T* rows = arena.take<T>(deep * dim);
    T* packed_v = arena.take<T>(deep * dim);
    T* packed_k = arena.take<T>(ld * dim);
    T* queries = arena.take<T>(shape.strip * dim);
    float* scores = arena.take<float>(shape.strip * ld);
    T* p = beside<T>(scores, arena, shape.strip * ld);
    float* sums = arena.take<float>(shape.strip * dim);
    float* inverse = arena.take<float>(shape.strip);
    const T* values = nullptr;
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / strips, b = head / shape.heads, h = head % shape.heads;
      if (head != packed) {
        const Rows<T> key_rows = rows_of(k.at(b, 0, h), k.n, keys, dim, rows);
        pack_transposed(key_rows.data, key_rows.ld, keys, dim, packed_k, ld);
        if constexpr (std::is_same_v<In, T> && !std::is_same_v<T, float>) {
          pack_pairs(v.at(b, 0, h), v.n, keys, dim, packed_v);
          values = packed_v;
        } else {
          load_rows(v.at(b, 0, h), v.n, keys, dim, rows);
          values = in_pairs(rows, keys, dim, packed_v);
        }
        packed = head;
      }
      const Strip at(shape, masks, i % strips);
      const Rows<T> query_rows = rows_of(q.at(b, at.first, h), q.n, at.count, dim, queries);
      gemm(at.count, at.products, dim, query_rows.data, query_rows.ld, packed_k, ld, scores, ld, false);
      float* row_stats = stats + (head * shape.queries + at.first) * 2;
      for (int64_t r = 0; r < at.count; ++r) {
        float* s = scores + r * ld;
        float row_scale = scale, &shift = row_stats[2 * r], &sum = row_stats[2 * r + 1];
        const int64_t counted = mask_scores(s, keys, at.first + r, masks, b, row_scale);
        softmax_row(s, counted, at.width, row_scale, p + r * ld, shift, sum);
        inverse[r] = 1.0f / sum;
      }
      gemm(at.count, dim, round_to_pair<T>(at.seen), p, ld, values, dim, sums, dim, false);
      store_rows(sums, inverse, at.count, dim, out.at(b, at.first, h), out.n);
    }
    gemm_release<T>();
  });
}

template <typename In, typename T>
void backward(const Shape& shape, const View<In>& dout, const View<In>& q, const View<In>& k, const View<In>& v,
              const float* stats, const View<In>& dq, const View<In>& dk, const View<In>& dv, const Masks& masks,
              float scale) {
  const int64_t strips = shape.strips(), dim = shape.dim, ld = shape.ld, keys = shape.keys, strip = shape.strip;
  const int64_t deep = round_to_pair<T>(keys);
  at::parallel_for(0, shape.batch * shape.heads, 1, [&](int64_t begin, int64_t end) {
    Arena arena((2 * deep + 2 * ld + 4 * strip) * dim * sizeof(T) + (2 * keys + strip) * dim * 4 +
                strip * ld * (8 + 4 * sizeof(T)) + 2048);
    T* rows = arena.take<T>(deep * dim);
    T* paired_k = arena.take<T>(deep * dim);
    T* packed_k = arena.take<T>(ld * dim);
    T* packed_v = arena.take<T>(ld * dim);
    T* queries = arena.take<T>(strip * dim);
    T* paired_q = arena.take<T>(strip * dim);
    T* grads = arena.take<T>(strip * dim);
    T* paired_grads = arena.take<T>(strip * dim);
    float* sums_k = arena.take<float>(keys * dim);
    float* sums_v = arena.take<float>(keys * dim);
    float* sums_q = arena.take<float>(strip * dim);
    float* scores = arena.take<float>(strip * ld);
    float* dp = arena.take<float>(strip * ld);
    T* p = beside<T>(scores, arena, strip * ld);
    T* ds = beside<T>(dp, arena, strip * ld);
    T* across = arena.take<T>(strip * ld);
    for (int64_t head = begin; head < end; ++head) {
      const int64_t b = head / shape.heads, h = head % shape.heads;
      load_rows(v.at(b, 0, h), v.n, keys, dim, rows);
      pack_transposed(rows, dim, keys, dim, packed_v, ld);
      load_rows(k.at(b, 0, h), k.n, keys, dim, rows);
      pack_transposed(rows, dim, keys, dim, packed_k, ld);
      const T* key_rows = in_pairs(rows, keys, dim, paired_k);
      for (int64_t i = strips - 1; i >= 0; --i) {  // from the last, whose queries see every key
        const Strip at(shape, masks, i);
        load_rows(q.at(b, at.first, h), q.n, at.count, dim, queries);
        load_rows(dout.at(b, at.first, h), dout.n, at.count, dim, grads);
        gemm(at.count, at.products, dim, queries, dim, packed_k, ld, scores, ld, false);
        gemm(at.count, at.products, dim, grads, dim, packed_v, ld, dp, ld, false);
        const float* row_stats = stats + (head * shape.queries + at.first) * 2;
        for (int64_t r = 0; r < at.count; ++r) {
          float row_scale = scale;
          const int64_t counted = mask_scores(scores + r * ld, keys, at.first + r, masks, b, row_scale);
          softmax_bwd_row(scores + r * ld, dp + r * ld, counted, at.width, row_scale, scale, row_stats[2 * r],
                          row_stats[2 * r + 1], p + r * ld, ds + r * ld);
        }
        const int64_t even = round_to_pair<T>(at.count);
        if (even > at.count) {
          std::fill_n(p + at.count * ld, at.width, T(0));
          std::fill_n(ds + at.count * ld, at.width, T(0));
        }
        const auto sum_over_queries = [&](const T* weights, const T* from, T* paired, float* sums) {
          transpose(weights, ld, even, at.seen, across, strip);
          gemm(at.seen, dim, even, across, strip, in_pairs(from, at.count, dim, paired), dim, sums, dim,
               i < strips - 1);
        };
        sum_over_queries(p, grads, paired_grads, sums_v);
        sum_over_queries(ds, queries, paired_q, sums_k);
        gemm(at.count, dim, round_to_pair<T>(at.seen), ds, ld, key_rows, dim, sums_q, dim, false);
        store_rows(sums_q, nullptr, at.count, dim, dq.at(b, at.first, h), dq.n);
      }
      store_rows(sums_k, nullptr, keys, dim, dk.at(b, 0, h), dk.n);
      store_rows(sums_v, nullptr, keys, dim, dv.at(b, 0, h), dv.n);
    }
    gemm_release<T>();
  });
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& padded,
           bool causal) {
  expect_operand("attention: q", q, 4);
  TORCH_CHECK_VALUE(q.size(3) % 2 == 0, "attention: q: expected an even D, got ", q.sizes());
  TORCH_CHECK_VALUE(k.dim() == 4 && k.size(1) > 0, "attention: k: expected (B, M, H, D), M > 0, got ", k.sizes());
  expect("attention: k", k, q.scalar_type(), {q.size(0), k.size(1), q.size(2), q.size(3)});
  expect("attention: v", v, q.scalar_type(), k.sizes());
  TORCH_CHECK_VALUE(!causal || q.size(1) == k.size(1), "attention: causal: expected as many queries as keys, got ",
                    q.size(1), " and ", k.size(1));
  if (padded.has_value()) {
    expect("attention: padded", *padded, at::kBool, {k.size(0), k.size(1)});
  }
}

at::Tensor readable(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// Calls body(In{}, T{}): the dtype of the tensors, and that of the products.
template <typename Body>
void with_types(at::ScalarType dtype, const Body& body) {
  if (dtype == at::kFloat) {
    body(float{}, float{});
  } else if (has_bf16_gemm()) {
    body(at::BFloat16{}, at::BFloat16{});
  } else {
    body(at::BFloat16{}, float{});
  }
}

std::tuple<at::Tensor, at::Tensor> fwd(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                                       const std::optional<at::Tensor>& padded, bool causal, double scale) {
  check(q_in, k_in, v_in, padded, causal);
  const at::Tensor q = readable(q_in), k = readable(k_in), v = readable(v_in);
  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor stats = at::empty({q.size(0), q.size(2), q.size(1), 2}, q.options().dtype(at::kFloat));
  const at::Tensor mask = padded.has_value() ? padded->contiguous() : at::Tensor();
  if (out.numel() > 0) {
    with_types(q.scalar_type(), [&](auto in, auto product) {
      using In = decltype(in);
      using T = decltype(product);
      forward<In, T>(Shape(q, k), View<In>(q), View<In>(k), View<In>(v), View<In>(out), stats.data_ptr<float>(),
                     {causal, mask.defined() ? mask.data_ptr<bool>() : nullptr}, static_cast<float>(scale));
    });
  }
  return {out, stats};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bwd(const at::Tensor& do_in, const at::Tensor& q_in,
                                                   const at::Tensor& k_in, const at::Tensor& v_in,
                                                   const std::optional<at::Tensor>& padded, const at::Tensor& /* out */,
                                                   const at::Tensor& stats, bool causal, double scale) {
  check(q_in, k_in, v_in, padded, causal);
  expect("attention: do", do_in, q_in.scalar_type(), q_in.sizes());
  expect_dense("attention: stats", stats, at::kFloat, {q_in.size(0), q_in.size(2), q_in.size(1), 2});
  const at::Tensor q = readable(q_in), k = readable(k_in), v = readable(v_in), dout = readable(do_in);
  at::Tensor dq = at::empty(q.sizes(), q.options());
  at::Tensor dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
  const at::Tensor mask = padded.has_value() ? padded->contiguous() : at::Tensor();
  if (q.numel() == 0) {
    return {dq, dk.zero_(), dv.zero_()};
  }
  with_types(q.scalar_type(), [&](auto in, auto product) {
    using In = decltype(in);
    using T = decltype(product);
    backward<In, T>(Shape(q, k), View<In>(dout), View<In>(q), View<In>(k), View<In>(v),
                    stats.const_data_ptr<float>(), View<In>(dq), View<In>(dk), View<In>(dv),
                    {causal, mask.defined() ? mask.data_ptr<bool>() : nullptr}, static_cast<float>(scale));
  });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace lbfast

TORCH_LIBRARY_IMPL(lbfast, CPU, m) {
  m.impl("attention_native", lbfast::fwd);
  m.impl("attention_native_bwd", lbfast::bwd);
}
