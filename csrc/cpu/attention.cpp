// Attention over the tokens of one image, frame, spectrogram or caption, read in place from (B, N, H, D) views.
//
//   fwd: P = softmax(scale Q K^T + masks), O = P V; the shift and the sum of each row's softmax are kept
//   bwd: P again; dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)) scale, dQ = dS K, dK = dS^T Q
//
// A head's keys and values are packed once and stay in the second-level cache with a strip of up to 64 queries' scores
// against all of them: one pass of the softmax, no running statistics. Scores and sums are float32; P and dS take the
// dtype of the products, and O is divided by the sum last. The order of additions depends on shapes alone.
// The schemas, fakes and autograd are in lbfast/ops/attention.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <type_traits>

#include "attention.h"
#include "attention_amx.h"
#include "checks.h"
#include "crew.h"
#include "gemm.h"
#include "softmax.h"

namespace lbfast {
namespace {

using namespace attention;

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
T* beside(float* scores, Buffers& arena, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    return scores;
  } else {
    return arena.take<T>(count);
  }
}

// Rows first .. end of a head, which lie apart in a fused projection: the machine does not ask for them by itself.
template <typename In>
void ask_for(const View<In>& x, int64_t b, int64_t h, int64_t first, int64_t end, int64_t dim) {
  for (int64_t n = first; n < end; ++n) {
    for (int64_t d = 0; d < dim; d += 64 / sizeof(In)) {
      soon(x.at(b, n, h) + d);
    }
  }
}

template <typename In, typename T>
void forward(const Shape& shape, const View<In>& q, const View<In>& k, const View<In>& v, const View<In>& out,
             float* stats, const Masks& masks, float scale) {
  const int64_t strips = shape.strips(), dim = shape.dim, ld = shape.ld, keys = shape.keys;
  const int64_t deep = round_to_pair<T>(keys);
  const Pieces pieces(shape);
  crew::share(pieces.count, [&](std::atomic<int64_t>& next) {
    Buffers arena((2 * deep + ld + shape.strip) * dim * sizeof(T) + shape.strip * (ld + dim + 1) * (4 + sizeof(T)) +
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
    for (int64_t i = pieces.first(next), then; i >= 0; i = then) {
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
      then = pieces.after(i, next);
      const int64_t other = then < 0 ? head : then / strips, other_b = other / shape.heads, other_h = other % shape.heads;
      for (int64_t r = 0; r < at.count; ++r) {
        if (other != head) {
          const int64_t first = r * keys / at.count, end = (r + 1) * keys / at.count;
          ask_for(k, other_b, other_h, first, end, dim);
          ask_for(v, other_b, other_h, first, end, dim);
        }
        float* s = scores + r * ld;
        float row_scale = scale, &shift = row_stats[2 * r], &sum = row_stats[2 * r + 1];
        const int64_t counted = mask_scores(s, keys, at.first + r, masks, b, row_scale);
        softmax_row(s, counted, at.width, row_scale, p + r * ld, shift, sum);
        inverse[r] = 1.0f / sum;
      }
      gemm(at.count, dim, round_to_pair<T>(at.seen), p, ld, values, dim, sums, dim, false);
      store_rows(sums, dim, inverse, at.count, dim, out.at(b, at.first, h), out.n);
    }
    gemm_release<T>();
  }, std::is_same_v<T, float> && !has_f32_brgemm());
}

template <typename In, typename T>
void backward(const Shape& shape, const View<In>& dout, const View<In>& q, const View<In>& k, const View<In>& v,
              const float* stats, const View<In>& dq, const View<In>& dk, const View<In>& dv, const Masks& masks,
              float scale) {
  const int64_t strips = shape.strips(), dim = shape.dim, ld = shape.ld, keys = shape.keys, strip = shape.strip;
  const int64_t deep = round_to_pair<T>(keys);
  at::parallel_for(0, shape.batch * shape.heads, 1, [&](int64_t begin, int64_t end) {
    Buffers arena((2 * deep + 2 * ld + 4 * strip) * dim * sizeof(T) + (2 * keys + strip) * dim * 4 +
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
                          p + r * ld, ds + r * ld);
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
        store_rows(sums_q, dim, nullptr, at.count, dim, dq.at(b, at.first, h), dq.n);
      }
      store_rows(sums_k, dim, nullptr, keys, dim, dk.at(b, 0, h), dk.n);
      store_rows(sums_v, dim, nullptr, keys, dim, dv.at(b, 0, h), dv.n);
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
      const Masks masks{causal, mask.defined() ? mask.data_ptr<bool>() : nullptr};
      Shape shape(q, k);
#if defined(LBFAST_ATTENTION_ON_AMX)
      if constexpr (std::is_same_v<T, at::BFloat16>) {
        if (amx() != nullptr) {
          shape.strip = kStripOfAmx;
          forward_amx(shape, View<In>(q), View<In>(k), View<In>(v), View<In>(out), stats.data_ptr<float>(), masks,
                      static_cast<float>(scale));
          return;
        }
      }
#endif
      forward<In, T>(shape, View<In>(q), View<In>(k), View<In>(v), View<In>(out), stats.data_ptr<float>(), masks,
                     static_cast<float>(scale));
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
