// Attention's forward in bfloat16 where AMX is.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "attention.h"
#include "crew.h"
#include "pages.h"
#include "panels.h"

#if defined(__x86_64__) && defined(CPU_CAPABILITY_AVX512) && defined(LBFAST_KNOWS_AMX_AND_AVX_VNNI)
#define LBFAST_ATTENTION_ON_AMX

namespace lbfast::attention {

using panels::kColumns;
using panels::kPanelStep;
using panels::kRows;
using panels::kStep;
using panels::kTileStep;
constexpr int64_t kStripOfAmx = 2 * kRows;  // queries at a time: two tiles
constexpr int64_t kDeep = panels::kDepth<at::BFloat16>;
constexpr int64_t kAhead = 8;   // rows
constexpr int64_t kWords = 16;  // of a step: pairs of numbers that lie beside each other in K

inline const panels::Kernel* amx() {
  static const std::vector<panels::Kernel> here = panels::kernels<at::BFloat16>();
  return !here.empty() && here.front().amx ? &here.front() : nullptr;
}

// rows of dim values -> tiles of A, in `steps` steps, zeros beyond dim.
inline void to_tiles(const at::BFloat16* from, int64_t stride, int64_t rows, int64_t dim, char* to, int64_t steps) {
  for (int64_t i = 0; i < rows; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(from + (i + kAhead) * stride), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(from + (i + kAhead) * stride + kDeep), _MM_HINT_T0);
    char* row = to + i / kRows * steps * kTileStep + i % kRows * kStep;
    for (int64_t d = 0; d < dim; d += kDeep) {
      const auto some = static_cast<__mmask32>((uint64_t{1} << std::min(kDeep, dim - d)) - 1);
      _mm512_storeu_si512(row + d / kDeep * kTileStep, _mm512_maskz_loadu_epi16(some, from + i * stride + d));
    }
  }
}

// Keys, rows of dim values with an even stride -> panels of B for Q K^T, a column each; what is beyond them stays.
inline void keys_to_panels(const at::BFloat16* from, int64_t stride, int64_t keys, int64_t dim, char* to, int64_t steps) {
  for (int64_t n = 0; n < keys; n += 16) {
    for (int64_t r = 0; r < 16; ++r) {
      for (int64_t s = 0; s < steps; ++s) {
        _mm_prefetch(reinterpret_cast<const char*>(from + (n + 16 + r) * stride + s * kDeep), _MM_HINT_T0);
      }
    }
    for (int64_t s = 0; s < steps; ++s) {
      auto* half = reinterpret_cast<float*>(to + (n / kColumns * steps + s) * kPanelStep + n % kColumns * kStep);
      at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(from + n * stride + s * kDeep), stride / 2, half, 16,
                                    static_cast<int>(std::min<int64_t>(16, keys - n)),
                                    static_cast<int>(std::min(kWords, (dim - s * kDeep) / 2)));
    }
  }
}

// Values, rows of dim numbers -> panels of B for P V, a column for each number; what is beyond them stays. Rows of a fused
// projection lie pages apart, which the machine does not ask for by itself.
inline void values_to_panels(const at::BFloat16* from, int64_t stride, int64_t keys, int64_t dim, char* to, int64_t steps) {
  const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);  // for unpacking, which keeps to its quarters
  for (int64_t n = 0; n < keys; n += 2) {
    for (int64_t d = 0; d < dim; d += kColumns) {
      const auto some = static_cast<__mmask32>((uint64_t{1} << std::min(kColumns, dim - d)) - 1);
      const at::BFloat16* row = from + n * stride + d;
      _mm_prefetch(reinterpret_cast<const char*>(row + kAhead * stride), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(row + (kAhead + 1) * stride), _MM_HINT_T0);
      const __m512i high = n + 1 < keys ? _mm512_maskz_loadu_epi16(some, row + stride) : _mm512_setzero_si512();
      const __m512i even = _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi16(some, row));
      const __m512i odd = _mm512_permutexvar_epi64(order, high);
      char* words = to + (d / kColumns * steps + n / kDeep) * kPanelStep + n % kDeep * 32;
      _mm512_storeu_si512(words, _mm512_unpacklo_epi16(even, odd));
      _mm512_storeu_si512(words + kPanelStep / 2, _mm512_unpackhi_epi16(even, odd));
    }
  }
}

// Scores of 16 keys, columns of B [steps] in half a panel: c [32][16], rows ld apart; of one tile of queries c [16][16].
LBFAST_AMX inline void multiply_keys(const char* queries, int64_t steps, bool two, const char* b, float* c, int64_t ld) {
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(6, b + s * kPanelStep, kStep);
    _tile_loadd(4, queries + s * kTileStep, kStep);
    _tile_dpbf16ps(0, 4, 6);
    if (two) {
      _tile_loadd(5, queries + (steps + s) * kTileStep, kStep);
      _tile_dpbf16ps(1, 5, 6);
    }
  }
  _tile_stored(0, c, ld * 4);
  if (two) {
    _tile_stored(1, c + kRows * ld, ld * 4);
  }
}

// P, tiles that lie `below` bytes apart, times a panel of values: c [32][32], rows ld apart.
LBFAST_AMX inline void multiply_values(const char* p, int64_t below, bool two, const char* b, int64_t steps, float* c,
                                       int64_t ld) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, p += kTileStep, b += kPanelStep) {
    _tile_loadd(6, b, kStep);
    _tile_loadd(4, p, kStep);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kPanelStep / 2, kStep);
    _tile_dpbf16ps(1, 4, 7);
    if (two) {
      _tile_loadd(5, p + below, kStep);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, ld * 4);
  _tile_stored(1, c + 16, ld * 4);
  if (two) {
    _tile_stored(2, c + kRows * ld, ld * 4);
    _tile_stored(3, c + kRows * ld + 16, ld * 4);
  }
}

// One strip's queries as tiles, and its scores, as far as they are made: 16 keys at a time, beside another's softmax.
struct Scores {
  char* queries;
  float* data;
  int64_t ld, steps, of = -1, made = 0;

  void begin(const View<at::BFloat16>& q, int64_t b, int64_t h, int64_t i, const Strip& at, int64_t dim) {
    to_tiles(q.at(b, at.first, h), q.n, at.count, dim, queries, steps);
    of = i;
    made = 0;
  }
  void advance(int64_t keys, const Strip& at, const char* packed) {
    for (; made < keys; made += 16) {
      const char* b = packed + made / kColumns * steps * kPanelStep + made % kColumns * kStep;
      multiply_keys(queries, steps, at.count > kRows, b, data + made, ld);
    }
  }
};

// The same as `forward` on AMX: a strip is two tiles of queries, and P becomes tiles as the softmax writes it. While the
// vector units have one strip's softmax, AMX has the next one's scores.
inline void forward_amx(const Shape& shape, const View<at::BFloat16>& q, const View<at::BFloat16>& k,
                        const View<at::BFloat16>& v, const View<at::BFloat16>& out, float* stats, const Masks& masks,
                        float scale) {
  const int64_t dim = shape.dim, keys = shape.keys, strips = shape.strips(), ld = shape.ld;
  const int64_t dim_steps = (dim + kDeep - 1) / kDeep, key_steps = ld / kDeep, columns = panels::padded(dim);
  const Pieces pieces(shape);
  crew::share(pieces.count, [&](std::atomic<int64_t>& next) {
    const int64_t key_bytes = ld / kColumns * dim_steps * kPanelStep;
    const int64_t value_bytes = columns / kColumns * key_steps * kPanelStep;
    Arena& arena = Arena::mine(key_bytes + value_bytes + 2 * (2 * dim_steps + key_steps) * kTileStep +
                                      keys * dim * 2 + 2 * kRows * (2 * ld + columns + 1) * 4 + 1024);
    char* packed_k = arena.take<char>(key_bytes);
    char* packed_v = arena.take<char>(value_bytes);
    char* queries = arena.take<char>(4 * dim_steps * kTileStep);
    char* p = arena.take<char>(2 * key_steps * kTileStep);
    auto* rows = arena.take<at::BFloat16>(keys * dim);
    Scores scores[2] = {{queries, arena.take<float>(2 * kRows * ld), ld, dim_steps},
                        {queries + 2 * dim_steps * kTileStep, arena.take<float>(2 * kRows * ld), ld, dim_steps}};
    float* sums = arena.take<float>(2 * kRows * columns);
    float* inverse = arena.take<float>(2 * kRows);
    std::memset(packed_k, 0, p - packed_k);  // with zeros where they have nothing, and are never written
    panels::ready_tiles();
    int64_t packed = -1, turn = 0;
    for (int64_t i = pieces.first(next), then; i >= 0; i = then, turn ^= 1) {
      const int64_t head = i / strips, b = head / shape.heads, h = head % shape.heads;
      if (head != packed) {
        Rows<at::BFloat16> key_rows{k.at(b, 0, h), k.n};
        if (k.n % 2 != 0) {
          load_rows(k.at(b, 0, h), k.n, keys, dim, rows);
          key_rows = {rows, dim};
        }
        keys_to_panels(key_rows.data, key_rows.ld, keys, dim, packed_k, dim_steps);
        values_to_panels(v.at(b, 0, h), v.n, keys, dim, packed_v, key_steps);
        packed = head;
      }
      const Strip at(shape, masks, i % strips);
      Scores &mine = scores[turn], &others = scores[turn ^ 1];
      if (mine.of != i) {
        mine.begin(q, b, h, i, at, dim);
      }
      mine.advance(at.products, at, packed_k);
      then = pieces.after(i, next);
      const bool ahead = then >= 0 && then / strips == head;
      const Strip following(shape, masks, ahead ? then % strips : 0);
      if (ahead) {
        others.begin(q, b, h, then, following, dim);
      }
      float* row_stats = stats + (head * shape.queries + at.first) * 2;
      for (int64_t r = 0; r < at.count; ++r) {
        float* s = mine.data + r * ld;
        auto* row = reinterpret_cast<at::BFloat16*>(p + r / kRows * key_steps * kTileStep + r % kRows * kStep);
        float row_scale = scale, &shift = row_stats[2 * r], &sum = row_stats[2 * r + 1];
        const int64_t counted = mask_scores(s, keys, at.first + r, masks, b, row_scale);
        softmax_row(s, counted, at.width, row_scale, row, shift, sum, kTileStep / 2);
        inverse[r] = 1.0f / sum;
        if (ahead) {
          others.advance((r + 1) * following.products / at.count, following, packed_k);
        }
      }
      for (int64_t j = 0; j < columns; j += kColumns) {
        multiply_values(p, key_steps * kTileStep, at.count > kRows, packed_v + j / kColumns * key_steps * kPanelStep,
                        at.width / kDeep, sums + j, columns);
      }
      store_rows(sums, columns, inverse, at.count, dim, out.at(b, at.first, h), out.n);
    }
    panels::release_tiles();
  });
}

}  // namespace lbfast::attention

#endif
