// The left side of patch embedding's GEMM: each kept patch of strided pixels as one row, of the weight's dtype.
//
//   rows[b, t, 1 + i] = patch kept[b, i] of frames t * tube .. of clip b;  rows[b, t, 0] = 0, the class token's
//
// and each row may be filled up with 0. uint8 pixels become x - 128, which bfloat16 holds exactly; `patch_fold` gives the
// weight and bias for them. The rest of the op is in lbfast/ops/patch_embed.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <c10/util/safe_numerics.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "crew.h"

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
constexpr float kCentre = 128.0f;
constexpr int64_t kTokens = 64;  // that a thread takes at a time

// n numbers from floats, n rounded up to two vectors (both buffers are that long).
void narrow(const float* from, at::BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    at::vec::convert_from_float<at::BFloat16>(Vec::loadu(from + i), Vec::loadu(from + i + kLanes)).store(to + i);
  }
}

template <typename In>
void widen(const In* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<float>(from[i]) - (std::is_same_v<In, uint8_t> ? kCentre : 0.0f);
  }
}

struct Shape {
  int64_t batch, channels, frames, tube, patch, columns, patches, kept;
  int64_t row;  // numbers of one, at least a patch's
  std::array<int64_t, 5> strides;  // of (B, C, T, H, W)
};

template <typename In, typename Out>
void patch_rows(const In* pixels, const int64_t* kept, Out* rows, const Shape& s) {
  const int64_t width = s.channels * s.tube * s.patch * s.patch;
  const int64_t padded = (width + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  const auto [stride_b, stride_c, stride_t, stride_h, stride_w] = s.strides;
  const int64_t tokens = 1 + s.kept;
  const int64_t count = s.batch * s.frames * tokens, pieces = (count + kTokens - 1) / kTokens;
  const auto piece = [&](int64_t begin, int64_t end) {
    std::vector<In> patch(padded);
    std::vector<float> wide(padded);
    std::vector<Out> narrowed(padded);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = row % tokens, t = row / tokens % s.frames, b = row / tokens / s.frames;
      Out* const out = rows + row * s.row;
      std::memset(out + width, 0, (s.row - width) * sizeof(Out));
      if (token == 0) {
        std::memset(out, 0, width * sizeof(Out));
        continue;
      }
      const int64_t index = kept == nullptr ? token - 1 : kept[b * s.kept + token - 1];
      TORCH_CHECK_INDEX(
          index >= 0 && index < s.patches, "patch_embed: kept: expected 0..", s.patches - 1, ", got ", index);
      const int64_t y = index / s.columns * s.patch, x = index % s.columns * s.patch;
      In* to = patch.data();
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t f = t * s.tube; f < (t + 1) * s.tube; ++f) {
          const In* from = pixels + b * stride_b + c * stride_c + f * stride_t + y * stride_h + x * stride_w;
          for (int64_t line = 0; line < s.patch; ++line, from += stride_h, to += s.patch) {
            if (stride_w == 1) {
              std::memcpy(to, from, s.patch * sizeof(In));
            } else {
              for (int64_t i = 0; i < s.patch; ++i) {
                to[i] = from[i * stride_w];
              }
            }
          }
        }
      }
      if constexpr (std::is_same_v<In, Out>) {
        std::memcpy(out, patch.data(), width * sizeof(Out));
      } else if constexpr (std::is_same_v<Out, float>) {
        widen(patch.data(), out, width);
      } else {
        widen(patch.data(), wide.data(), width);
        narrow(wide.data(), narrowed.data(), width);
        std::memcpy(out, narrowed.data(), width * sizeof(Out));
      }
    }
  };
  lbfast::crew::share(pieces, [&](std::atomic<int64_t>& next) {
    for (int64_t i = next++; i < pieces; i = next++) {
      piece(i * kTokens, std::min(count, (i + 1) * kTokens));
    }
  });
}

template <typename In>
void patch_rows_to(const In* pixels, const int64_t* kept, at::Tensor& rows, const Shape& s) {
  if (rows.scalar_type() == at::kFloat) {
    patch_rows(pixels, kept, rows.mutable_data_ptr<float>(), s);
  } else {
    patch_rows(pixels, kept, rows.mutable_data_ptr<at::BFloat16>(), s);
  }
}

// pixels (B, C, T, H, W), any strides; kept (B, K), contiguous -> (B * T / tube, 1 + K, C * tube * patch * patch), the last
// filled up to a multiple.
at::Tensor patch_rows_cpu(
    const at::Tensor& pixels,
    const std::optional<at::Tensor>& kept,
    int64_t tube,
    int64_t patch,
    at::ScalarType dtype,
    int64_t multiple) {
  TORCH_CHECK_VALUE(pixels.dim() == 5, "patch_embed: pixels: expected (B, C, T, H, W), got ", pixels.sizes());
  lbfast::expect("patch_embed: pixels", pixels, pixels.scalar_type(), pixels.sizes());
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kBFloat16, "patch_embed: dtype: expected float32 or bfloat16, got ", dtype);
  TORCH_CHECK_VALUE(
      tube > 0 && pixels.size(2) % tube == 0, "patch_embed: tube: expected a divisor of T = ", pixels.size(2), ", got ",
      tube);
  TORCH_CHECK_VALUE(patch > 0, "patch_embed: patch: expected at least 1, got ", patch);
  if (kept.has_value()) {
    TORCH_CHECK_VALUE(kept->dim() == 2, "patch_embed: kept: expected (B, K), got ", kept->sizes());
    lbfast::expect_dense("patch_embed: kept", *kept, at::kLong, {pixels.size(0), kept->size(1)});
  }
  uint64_t width = pixels.size(1);
  for (const int64_t size : {tube, patch, patch}) {
    TORCH_CHECK_VALUE(
        !c10::mul_overflows(width, static_cast<uint64_t>(size), &width) && width <= INT64_MAX / 8,
        "patch_embed: patch: expected C * tube * patch * patch numbers to fit in memory, got ", patch);
  }
  TORCH_CHECK_VALUE(
      multiple > 0 && multiple <= 1024, "patch_embed: multiple: expected 1 to 1024, got ", multiple);
  Shape s{};
  s.batch = pixels.size(0);
  s.channels = pixels.size(1);
  s.frames = pixels.size(2) / tube;
  s.tube = tube;
  s.patch = patch;
  s.columns = pixels.size(4) / patch;
  s.patches = pixels.size(3) / patch * s.columns;
  s.kept = kept.has_value() ? kept->size(1) : s.patches;
  for (int64_t i = 0; i < 5; ++i) {
    s.strides[i] = pixels.stride(i);
  }
  s.row = (static_cast<int64_t>(width) + multiple - 1) / multiple * multiple;
  at::Tensor rows = at::empty({s.batch * s.frames, 1 + s.kept, s.row}, pixels.options().dtype(dtype));
  if (rows.numel() == 0) {
    return rows;
  }
  const int64_t* indices = kept.has_value() ? kept->const_data_ptr<int64_t>() : nullptr;
  switch (pixels.scalar_type()) {
    case at::kByte:
      patch_rows_to(pixels.const_data_ptr<uint8_t>(), indices, rows, s);
      break;
    case at::kFloat:
      patch_rows_to(pixels.const_data_ptr<float>(), indices, rows, s);
      break;
    case at::kBFloat16:
      patch_rows_to(pixels.const_data_ptr<at::BFloat16>(), indices, rows, s);
      break;
    default:
      TORCH_CHECK_TYPE(false, "patch_embed: pixels: expected uint8, float32 or bfloat16, got ", pixels.scalar_type());
  }
  return rows;
}

// weight (D, C, n), scale and offset (C,) -> weight * scale, rounded once, and sum over (C, n) of weight * offset.
template <typename T>
void patch_fold(
    const T* weight,
    const float* scale,
    const float* offset,
    T* folded,
    float* bias,
    int64_t d,
    int64_t c,
    int64_t n) {
  at::parallel_for(0, d, 32, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float total = 0;
      for (int64_t channel = 0; channel < c; ++channel) {
        const T* const from = weight + (row * c + channel) * n;
        T* const to = folded + (row * c + channel) * n;
        Vec sums(0.0f);
        int64_t i = 0;
        for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
          if constexpr (std::is_same_v<T, float>) {
            const Vec a = Vec::loadu(from + i), b = Vec::loadu(from + i + kLanes);
            (a * Vec(scale[channel])).store(to + i);
            (b * Vec(scale[channel])).store(to + i + kLanes);
            sums = sums + a + b;
          } else {
            const auto [a, b] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from + i));
            at::vec::convert_from_float<T>(a * Vec(scale[channel]), b * Vec(scale[channel])).store(to + i);
            sums = sums + a + b;
          }
        }
        float sum = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sums);
        for (; i < n; ++i) {
          const float w = static_cast<float>(from[i]);
          to[i] = static_cast<T>(w * scale[channel]);
          sum += w;
        }
        total += sum * offset[channel];
      }
      bias[row] = total;
    }
  });
}

std::tuple<at::Tensor, at::Tensor> patch_fold_cpu(
    const at::Tensor& weight, const at::Tensor& scale, const at::Tensor& offset) {
  lbfast::expect_operand("patch_embed: weight", weight, 3);
  lbfast::expect_dense("patch_embed: weight", weight, weight.scalar_type(), weight.sizes());
  const int64_t d = weight.size(0), c = weight.size(1), n = weight.size(2);
  lbfast::expect_dense("patch_embed: scale", scale, at::kFloat, {c});
  lbfast::expect_dense("patch_embed: offset", offset, at::kFloat, {c});
  at::Tensor folded = at::empty({d, c * n}, weight.options());
  at::Tensor bias = at::empty({d}, weight.options().dtype(at::kFloat));
  const float* by = scale.const_data_ptr<float>();
  const float* at = offset.const_data_ptr<float>();
  float* sums = bias.mutable_data_ptr<float>();
  if (weight.scalar_type() == at::kFloat) {
    patch_fold(weight.const_data_ptr<float>(), by, at, folded.mutable_data_ptr<float>(), sums, d, c, n);
  } else {
    patch_fold(
        weight.const_data_ptr<at::BFloat16>(), by, at, folded.mutable_data_ptr<at::BFloat16>(), sums, d, c, n);
  }
  return {folded, bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lbfast, m) {
  m.def("patch_fold(Tensor weight, Tensor scale, Tensor offset) -> (Tensor, Tensor)");
  m.def("patch_rows(Tensor pixels, Tensor? kept, int tube, int patch, ScalarType dtype, int multiple=1) -> Tensor");
}

TORCH_LIBRARY_IMPL(lbfast, CPU, m) {
  m.impl("patch_fold", &patch_fold_cpu);
  m.impl("patch_rows", &patch_rows_cpu);
}
