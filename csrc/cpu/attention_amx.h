// Attention's forward in bfloat16 where AMX is.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "attention.h"
#include "crew.h"
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
constexpr int64_t kWords = 16;  // of a step: pairs of numbers that lie beside each other in K

inline const panels::Kernel* amx() {
  static const std::vector<panels::Kernel> here = panels::kernels<at::BFloat16>();
  return !here.empty() && here.front().amx ? &here.front() : nullptr;
}

// rows of dim values -> tiles of A, in `steps` steps, zeros beyond dim.
inline void to_tiles(const at::BFloat16* from, int64_t stride, int64_t rows, int64_t dim, char* to, int64_t steps) {
  for (int64_t i = 0; i < rows; ++i) {
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
    for (int64_t s = 0; s < steps; ++s) {
      auto* half = reinterpret_cast<float*>(to + (n / kColumns * steps + s) * kPanelStep + n % kColumns * kStep);
      at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(from + n * stride + s * kDeep), stride / 2, half, 16,
                                    static_cast<int>(std::min<int64_t>(16, keys - n)),
                                    static_cast<int>(std::min(kWords, (dim - s * kDeep) / 2)));
    }
  }
}

// Values, rows of dim numbers -> panels of B for P V, a column for each number; what is beyond them stays.
inline void values_to_panels(const at::BFloat16* from, int64_t stride, int64_t keys, int64_t dim, char* to, int64_t steps) {
  for (int64_t d = 0; d < dim; d += 16) {
    const auto some = static_cast<__mmask16>((1u << std::min<int64_t>(16, dim - d)) - 1);
    for (int64_t n = 0; n < keys; n += 2) {
      const at::BFloat16* row = from + n * stride + d;
      const __m256i low = _mm256_maskz_loadu_epi16(some, row);
      const __m256i high = n + 1 < keys ? _mm256_maskz_loadu_epi16(some, row + stride) : _mm256_setzero_si256();
      const __m512i above = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
      char* words = to + (d / kColumns * steps + n / kDeep) * kPanelStep + d % kColumns * kStep + n % kDeep * 32;
      _mm512_storeu_si512(words, _mm512_or_si512(_mm512_cvtepu16_epi32(low), above));
    }
  }
}

// The same as `forward` on AMX: a strip is two tiles of queries, and P becomes tiles as the softmax writes it.
inline void forward_amx(const Shape& shape, const View<at::BFloat16>& q, const View<at::BFloat16>& k,
                        const View<at::BFloat16>& v, const View<at::BFloat16>& out, float* stats, const Masks& masks,
                        float scale) {
  const int64_t dim = shape.dim, keys = shape.keys, strips = shape.strips(), ld = shape.ld;
  const int64_t dim_steps = (dim + kDeep - 1) / kDeep, key_steps = ld / kDeep, columns = panels::padded(dim);
  const panels::Multiply multiply = amx()->multiply;
  const Pieces pieces(shape);
  crew::share(pieces.count, [&](std::atomic<int64_t>& next) {
    const int64_t key_bytes = ld / kColumns * dim_steps * kPanelStep;
    const int64_t value_bytes = columns / kColumns * key_steps * kPanelStep;
    Arena arena(key_bytes + value_bytes + 2 * (dim_steps + key_steps) * kTileStep + keys * dim * 2 +
                2 * kRows * (ld + columns + 1) * 4 + 1024);
    char* packed_k = arena.take<char>(key_bytes);
    char* packed_v = arena.take<char>(value_bytes);
    char* queries = arena.take<char>(2 * dim_steps * kTileStep);
    char* p = arena.take<char>(2 * key_steps * kTileStep);
    auto* rows = arena.take<at::BFloat16>(keys * dim);
    float* scores = arena.take<float>(2 * kRows * ld);
    float* sums = arena.take<float>(2 * kRows * columns);
    float* inverse = arena.take<float>(2 * kRows);
    std::memset(packed_k, 0, p - packed_k);  // with zeros where they have nothing, and are never written
    panels::ready_tiles();
    int64_t packed = -1;
    for (int64_t i = pieces.first(next); i >= 0; i = pieces.after(i, next)) {
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
      const auto product = [&](const char* a, int64_t a_steps, const char* panel, int64_t steps, float* c, int64_t to) {
        multiply({a, a_steps * kTileStep, at.count, panel, steps, c, false, nullptr, 0, [](void*) {}, nullptr, to});
      };
      to_tiles(q.at(b, at.first, h), q.n, at.count, dim, queries, dim_steps);
      for (int64_t j = 0; j < at.width; j += kColumns) {
        product(queries, dim_steps, packed_k + j / kColumns * dim_steps * kPanelStep, dim_steps, scores + j, ld);
      }
      float* row_stats = stats + (head * shape.queries + at.first) * 2;
      for (int64_t r = 0; r < at.count; ++r) {
        float* s = scores + r * ld;
        auto* row = reinterpret_cast<at::BFloat16*>(p + r / kRows * key_steps * kTileStep + r % kRows * kStep);
        float row_scale = scale, &shift = row_stats[2 * r], &sum = row_stats[2 * r + 1];
        const int64_t counted = mask_scores(s, keys, at.first + r, masks, b, row_scale);
        softmax_row(s, counted, at.width, row_scale, row, shift, sum, kTileStep / 2);
        inverse[r] = 1.0f / sum;
      }
      for (int64_t j = 0; j < columns; j += kColumns) {
        product(p, key_steps, packed_v + j / kColumns * key_steps * kPanelStep, at.width / kDeep, sums + j, columns);
      }
      store_rows(sums, columns, inverse, at.count, dim, out.at(b, at.first, h), out.n);
    }
    panels::release_tiles();
  });
}

}  // namespace lbfast::attention

#endif
