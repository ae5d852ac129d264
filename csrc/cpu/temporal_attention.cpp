// Attention over the T frames of a clip at each (position, head), read in place from (B, T, N, H, D) views.
//
//   fwd: P = softmax(scale Q K^T), O = P V
//   bwd: dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)) scale, dQ = dS K, dK = dS^T Q; P is computed again
//
// A (T, D) tile of one head stays in L1 as float32; a thread takes whole positions, so that it reads and writes
// rows of H * D values. Sums are in float32 and their order is fixed: results do not depend on the thread count.
// The schemas, fakes and autograd are in lbfast/ops/temporal_attention.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <type_traits>

#include "checks.h"
#include "crew.h"
#include "vectors.h"

namespace {

using lbfast::Vec;
constexpr int64_t kLanes = Vec::size();
constexpr int64_t kMaxFrames = 32;
constexpr int64_t kMaxDim = 128;

// Sizes of one tile. Non-zero template arguments are the compiler's to unroll; 0 means known at run time only.
template <int kT, int kVecs>
struct Tile {
  int64_t frames_, vecs_;
  int64_t frames() const { return kT ? kT : frames_; }
  int64_t vecs() const { return kVecs ? kVecs : vecs_; }
  int64_t width() const { return vecs() * kLanes; }
};

struct alignas(64) Rows {
  float data[kMaxFrames * kMaxDim];
};

// [s][t]: frame s is looked at by frame t, so that statistics over s run down the columns.
struct alignas(64) Scores {
  float data[kMaxFrames * kMaxFrames];
};

template <typename scalar_t>
struct View {
  scalar_t* data;
  int64_t b, t, n, h;  // strides in elements
  explicit View(const at::Tensor& x)
      : data(x.data_ptr<scalar_t>()), b(x.stride(0)), t(x.stride(1)), n(x.stride(2)), h(x.stride(3)) {}
  scalar_t* at(int64_t ib, int64_t in, int64_t ih) const { return data + ib * b + in * n + ih * h; }
};

inline Vec load(const float* p) {
  return Vec::loadu(p);
}

inline Vec load(const at::BFloat16* p) {
  Vec out;
  at::vec::load_fp32_from_bf16(p, out);
  return out;
}

template <typename scalar_t, typename TileT>
void load_rows(const TileT& tile, const scalar_t* from, int64_t stride, int64_t dim, Rows& to) {
  for (int64_t t = 0; t < tile.frames(); ++t) {
    const scalar_t* row = from + t * stride;
    float* out = to.data + t * tile.width();
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      load(row + d).store(out + d);
    }
    for (; d < tile.width(); ++d) {
      out[d] = d < dim ? static_cast<float>(row[d]) : 0.f;
    }
  }
}

inline void store_row(const Vec* values, int64_t dim, float* to) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    values[d / kLanes].store(to + d, static_cast<int>(std::min(kLanes, dim - d)));
  }
}

inline void store_row(const Vec* values, int64_t dim, at::BFloat16* to) {
  for (int64_t d = 0; d < dim; d += 2 * kLanes) {
    const Vec& high = d + kLanes < dim ? values[d / kLanes + 1] : values[d / kLanes];
    at::vec::convert_from_float<at::BFloat16>(values[d / kLanes], high)
        .store(to + d, static_cast<int>(std::min(2 * kLanes, dim - d)));
  }
}

// out[s][t] = scale * <a[t], b[s]>
template <typename TileT>
void products(const TileT& tile, const Rows& a, const Rows& b, float scale, Scores& out) {
  for (int64_t t = 0; t < tile.frames(); ++t) {
    const float* row = a.data + t * tile.width();
    for (int64_t s = 0; s < tile.frames(); ++s) {
      const float* other = b.data + s * tile.width();
      Vec sum(0.f);
      for (int64_t c = 0; c < tile.vecs(); ++c) {
        sum = at::vec::fmadd(Vec::loadu(row + c * kLanes), Vec::loadu(other + c * kLanes), sum);
      }
      const float total = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum);
      out.data[s * tile.frames() + t] = scale * total;
    }
  }
}

// softmax over s of every column t, in place
template <typename TileT>
void softmax(const TileT& tile, Scores& scores) {
  const int64_t frames = tile.frames();
  float top[kMaxFrames], sum[kMaxFrames];
  for (int64_t t = 0; t < frames; ++t) {
    top[t] = scores.data[t];
    sum[t] = 0.f;
  }
  for (int64_t s = 1; s < frames; ++s) {
    for (int64_t t = 0; t < frames; ++t) {
      top[t] = std::max(top[t], scores.data[s * frames + t]);
    }
  }
  for (int64_t s = 0; s < frames; ++s) {
    for (int64_t t = 0; t < frames; ++t) {
      scores.data[s * frames + t] -= top[t];
    }
  }
  for (int64_t i = 0; i < frames * frames; i += kLanes) {
    const int count = static_cast<int>(std::min(kLanes, frames * frames - i));
    lbfast::exponential_of(Vec::loadu(scores.data + i, count)).store(scores.data + i, count);
  }
  for (int64_t s = 0; s < frames; ++s) {
    for (int64_t t = 0; t < frames; ++t) {
      sum[t] += scores.data[s * frames + t];
    }
  }
  for (int64_t t = 0; t < frames; ++t) {
    sum[t] = 1.f / sum[t];
  }
  for (int64_t s = 0; s < frames; ++s) {
    for (int64_t t = 0; t < frames; ++t) {
      scores.data[s * frames + t] *= sum[t];
    }
  }
}

// dP -> dS = P (dP - rowsum(P dP)) scale, in place
template <typename TileT>
void softmax_bwd(const TileT& tile, const Scores& p, float scale, Scores& dp) {
  const int64_t frames = tile.frames();
  float delta[kMaxFrames] = {};
  for (int64_t s = 0; s < frames; ++s) {
    for (int64_t t = 0; t < frames; ++t) {
      delta[t] += p.data[s * frames + t] * dp.data[s * frames + t];
    }
  }
  for (int64_t s = 0; s < frames; ++s) {
    for (int64_t t = 0; t < frames; ++t) {
      dp.data[s * frames + t] = p.data[s * frames + t] * (dp.data[s * frames + t] - delta[t]) * scale;
    }
  }
}

// to[i] = sum over j of weight(i, j) * rows[j]; weight is w[j][i], or w[i][j] where kTransposed
template <bool kTransposed, typename scalar_t, typename TileT>
void combine(const TileT& tile, const Scores& w, const Rows& rows, int64_t dim, scalar_t* to, int64_t stride) {
  const int64_t frames = tile.frames();
  for (int64_t i = 0; i < frames; ++i) {
    Vec sums[kMaxDim / kLanes];
    for (int64_t c = 0; c < tile.vecs(); ++c) {
      sums[c] = Vec(0.f);
    }
    for (int64_t j = 0; j < frames; ++j) {
      const Vec weight(w.data[kTransposed ? i * frames + j : j * frames + i]);
      for (int64_t c = 0; c < tile.vecs(); ++c) {
        sums[c] = at::vec::fmadd(weight, Vec::loadu(rows.data + j * tile.width() + c * kLanes), sums[c]);
      }
    }
    store_row(sums, dim, to + i * stride);
  }
}

// Calls body(tile, b, n, h) for every head of every position, positions spread over the threads.
template <typename Body>
void for_each_tile(const at::Tensor& q, const Body& body) {
  const int64_t frames = q.size(1), positions = q.size(2), heads = q.size(3);
  const int64_t vecs = (q.size(4) + kLanes - 1) / kLanes;
  const auto run = [&](auto tile) {
    const int64_t count = q.size(0) * positions, threads = std::max<int64_t>(1, at::get_num_threads());
    const int64_t each = std::max<int64_t>(1, count / (8 * threads)), pieces = (count + each - 1) / each;
    lbfast::crew::share(pieces, [&](std::atomic<int64_t>& next) {
      for (int64_t piece = next++; piece < pieces; piece = next++) {
        for (int64_t i = piece * each; i < std::min(count, (piece + 1) * each); ++i) {
          for (int64_t h = 0; h < heads; ++h) {
            body(tile, i / positions, i % positions, h);
          }
        }
      }
    });
  };
  constexpr int kVecs64 = 64 / kLanes, kVecs80 = 80 / kLanes;
  if (vecs == kVecs64 && frames == 8) {
    run(Tile<8, kVecs64>{frames, vecs});
  } else if (vecs == kVecs64 && frames == 16) {
    run(Tile<16, kVecs64>{frames, vecs});
  } else if (vecs == kVecs80 && frames == 8) {
    run(Tile<8, kVecs80>{frames, vecs});
  } else {
    run(Tile<0, 0>{frames, vecs});
  }
}

at::Tensor readable(const at::Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  lbfast::expect_operand("temporal_attention: q", q, 5);
  TORCH_CHECK_VALUE(
      q.size(1) <= kMaxFrames && q.size(4) <= kMaxDim,
      "temporal_attention: q: expected T <= ", kMaxFrames, " and D <= ", kMaxDim, ", got ", q.sizes());
  lbfast::expect("temporal_attention: k", k, q.scalar_type(), q.sizes());
  lbfast::expect("temporal_attention: v", v, q.scalar_type(), q.sizes());
}

// Calls body(scalar_t{}) for the dtype of checked tensors.
template <typename Body>
void with_type(const at::Tensor& q, const Body& body) {
  if (q.numel() == 0) {
    return;
  }
  if (q.scalar_type() == at::kFloat) {
    body(float{});
  } else {
    body(at::BFloat16{});
  }
}

at::Tensor fwd(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in, double scale) {
  check(q_in, k_in, v_in);
  const at::Tensor q = readable(q_in), k = readable(k_in), v = readable(v_in);
  at::Tensor out = at::empty(q.sizes(), q.options());
  const int64_t dim = q.size(4);
  with_type(q, [&](auto type) {
    using scalar_t = decltype(type);
    const View<scalar_t> vq(q), vk(k), vv(v), vo(out);
    for_each_tile(q, [&](auto tile, int64_t b, int64_t n, int64_t h) {
      Rows rq, rk, rv;
      Scores p;
      load_rows(tile, vq.at(b, n, h), vq.t, dim, rq);
      load_rows(tile, vk.at(b, n, h), vk.t, dim, rk);
      load_rows(tile, vv.at(b, n, h), vv.t, dim, rv);
      products(tile, rq, rk, static_cast<float>(scale), p);
      softmax(tile, p);
      combine<false>(tile, p, rv, dim, vo.at(b, n, h), vo.t);
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> bwd(
    const at::Tensor& do_in,
    const at::Tensor& q_in,
    const at::Tensor& k_in,
    const at::Tensor& v_in,
    double scale) {
  check(q_in, k_in, v_in);
  lbfast::expect("temporal_attention: do", do_in, q_in.scalar_type(), q_in.sizes());
  const at::Tensor q = readable(q_in), k = readable(k_in), v = readable(v_in), dout = readable(do_in);
  at::Tensor dq = at::empty(q.sizes(), q.options());
  at::Tensor dk = at::empty(q.sizes(), q.options());
  at::Tensor dv = at::empty(q.sizes(), q.options());
  const int64_t dim = q.size(4);
  with_type(q, [&](auto type) {
    using scalar_t = decltype(type);
    const View<scalar_t> vq(q), vk(k), vv(v), vdo(dout), vdq(dq), vdk(dk), vdv(dv);
    for_each_tile(q, [&](auto tile, int64_t b, int64_t n, int64_t h) {
      Rows rq, rk, rv, rdo;
      Scores p, ds;
      load_rows(tile, vq.at(b, n, h), vq.t, dim, rq);
      load_rows(tile, vk.at(b, n, h), vk.t, dim, rk);
      load_rows(tile, vv.at(b, n, h), vv.t, dim, rv);
      load_rows(tile, vdo.at(b, n, h), vdo.t, dim, rdo);
      products(tile, rq, rk, static_cast<float>(scale), p);
      softmax(tile, p);
      combine<true>(tile, p, rdo, dim, vdv.at(b, n, h), vdv.t);
      products(tile, rdo, rv, 1.f, ds);
      softmax_bwd(tile, p, static_cast<float>(scale), ds);
      combine<false>(tile, ds, rk, dim, vdq.at(b, n, h), vdq.t);
      combine<true>(tile, ds, rq, dim, vdk.at(b, n, h), vdk.t);
    });
  });
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(lbfast, CPU, m) {
  m.impl("temporal_attention_native", fwd);
  m.impl("temporal_attention_native_bwd", bwd);
}
