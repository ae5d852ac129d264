// Decoded pixels to a model's input in one pass: resized, cropped, scaled and shifted for each channel.
//
//   out[c, n, y, x] = scale[c] * sum_ij rows[y, i] cols[x, j] image[c, n, first_row[y] + i, first_col[x] + j] + offset[c]
//
// A band of output rows at a time: 16 of them lie side by side in a vector, first between the two sums, where the band's
// input columns are [columns, 16], then as the output's. So both sums are fused multiply-adds of whole vectors, of
// colours that lie beside each other too, and of a large picture no more than a band is ever in floats. The filters are
// made in lbfast/processing/resize.py. One thread: pictures are decoded by as many processes as there are cores.

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "checks.h"

namespace {

constexpr int64_t kBand = 16;    // output rows at a time, and numbers of a vector
constexpr int64_t kChunk = 128;  // bytes of a row at a time

// The compiler makes two of one where the machine's vectors are half as wide.
using Floats = float __attribute__((vector_size(4 * kBand)));

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
inline void store(const Floats& x, float* to) { std::memcpy(to, &x, sizeof(x)); }

// 16 bytes as floats. What GCC makes of a plain loop shuffles the bytes in three steps.
inline Floats widen(const uint8_t* from) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return reinterpret_cast<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
#else
  float x[kBand];
#if defined(CPU_CAPABILITY_AVX2)
  for (int64_t i = 0; i < kBand; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(x + i, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
  }
#else
  for (int64_t i = 0; i < kBand; ++i) {
    x[i] = from[i];
  }
#endif
  return load(x);
#endif
}

// Output i is the sum of `taps` inputs from first[i] on.
struct Filter {
  const int64_t* first;
  const float* weight;  // [outputs, taps]
  int64_t outputs, taps;
};

// A picture, or one channel of it: `channels` bytes of each pixel are used.
struct Picture {
  const uint8_t* data;
  int64_t row_stride, pixel_stride, channels;
};

// sums [count, kChunk] = for output rows y .. y + count the weighted sums of their inputs, of n <= kChunk bytes of each.
// An input row is converted once, for all outputs that it is part of; two at a time, which halves the passes over `sums`.
void sum_rows(const uint8_t* data, int64_t stride, const Filter& rows, int64_t y, int64_t count, int64_t n, float* sums) {
  constexpr int64_t kVectors = kChunk / kBand;
  std::memset(sums, 0, count * kChunk * sizeof(float));
  uint8_t copy[2 * kChunk] = {};
  const int64_t* const first = rows.first + y;
  int64_t begin = 0;
  for (int64_t row = first[0]; row < first[count - 1] + rows.taps; row += 2) {
    while (first[begin] + rows.taps <= row) {
      ++begin;
    }
    if (first[begin] > row + 1) {  // nothing needs the rows up to the next output's first
      row = first[begin] - 2;
      continue;
    }
    const bool last = row + 1 == first[count - 1] + rows.taps;  // then there may be no row after it: its weight is 0
    const uint8_t* from[2] = {data + row * stride, data + (last ? row : row + 1) * stride};
    if (n < kChunk) {
      for (int64_t i = 0; i < 2; ++i) {
        std::memcpy(copy + i * kChunk, from[i], n);
        from[i] = copy + i * kChunk;
      }
    }
    Floats above[kVectors], below[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) {
      above[v] = widen(from[0] + v * kBand);
      below[v] = widen(from[1] + v * kBand);
    }
    for (int64_t r = begin; r < count && first[r] <= row + 1; ++r) {
      const float* weight = rows.weight + (y + r) * rows.taps;
      const int64_t tap = row - first[r];
      const float w0 = tap >= 0 ? weight[tap] : 0.0f, w1 = tap + 1 < rows.taps ? weight[tap + 1] : 0.0f;
      float* sum = sums + r * kChunk;
      for (int64_t v = 0; v < kVectors; ++v) {
        store(load(sum + v * kBand) + w0 * above[v] + w1 * below[v], sum + v * kBand);
      }
    }
  }
}

inline void transpose(const float* from, int64_t ld, int64_t rows, int64_t cols, float* to, int64_t ld_to) {
  at::vec::transpose_mxn<float>(from, ld, to, ld_to, static_cast<int>(rows), static_cast<int>(cols));
}

inline void round(const float* from, uint8_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<uint8_t>(std::clamp(std::nearbyint(from[i]), 0.0f, 255.0f));
  }
}

// One picture to `planes` planes; where it has one channel, that is all of them.
template <typename Out>
void resize(const Picture& in, const Filter& rows, const Filter& cols, int64_t planes, const double* scale,
            const double* offset, Out* out, int64_t plane_stride) {
  const auto [low, high] = std::minmax_element(cols.first, cols.first + cols.outputs);
  const int64_t begin = *low * in.pixel_stride;
  const int64_t n = (*high + cols.taps - *low - 1) * in.pixel_stride + in.channels;  // bytes of a row that are read
  std::vector<float> sums(kBand * kChunk), band((n + kChunk) * kBand), done(cols.outputs * kBand);
  std::vector<float> lines(std::is_same_v<Out, float> ? 0 : kBand * cols.outputs);
  for (int64_t y = 0; y < rows.outputs; y += kBand) {
    const int64_t count = std::min(kBand, rows.outputs - y);
    for (int64_t j = 0; j < n; j += kChunk) {
      sum_rows(in.data + begin + j, in.row_stride, rows, y, count, std::min(kChunk, n - j), sums.data());
      transpose(sums.data(), kChunk, kBand, kChunk, band.data() + j * kBand, kBand);  // rows beyond `count` are unused
    }
    for (int64_t c = 0; c < planes; ++c) {
      const float a = static_cast<float>(scale[c]), b = static_cast<float>(offset[c]);
      const float* channel = band.data() + (in.channels == 1 ? 0 : c) * kBand;
      const int64_t step = in.pixel_stride * kBand;
      for (int64_t x = 0; x < cols.outputs; ++x) {
        const float* from = channel + (cols.first[x] - *low) * step;
        const float* weight = cols.weight + x * cols.taps;
        Floats chain[4] = {};  // four chains, so that a sum need not wait for the one before
        int64_t k = 0;
        for (; k + 4 <= cols.taps; k += 4) {
          for (int64_t i = 0; i < 4; ++i) {
            chain[i] += weight[k + i] * load(from + (k + i) * step);
          }
        }
        for (; k < cols.taps; ++k) {
          chain[0] += weight[k] * load(from + k * step);
        }
        store(((chain[0] + chain[1]) + (chain[2] + chain[3])) * a + b, done.data() + x * kBand);
      }
      Out* const to = out + c * plane_stride + y * cols.outputs;
      if constexpr (std::is_same_v<Out, float>) {
        transpose(done.data(), kBand, cols.outputs, count, to, cols.outputs);
      } else {
        transpose(done.data(), kBand, cols.outputs, count, lines.data(), cols.outputs);
        round(lines.data(), to, count * cols.outputs);
      }
    }
  }
}

Filter filter(const char* name, const at::Tensor& first, const at::Tensor& weight, int64_t size) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0, "resize: ", name,
                    ": expected weights (outputs, taps), got ", weight.sizes());
  lbfast::expect_dense(name, weight, at::kFloat, weight.sizes());
  lbfast::expect_dense(name, first, at::kLong, {weight.size(0)});
  const Filter found{first.const_data_ptr<int64_t>(), weight.const_data_ptr<float>(), weight.size(0), weight.size(1)};
  const auto [low, high] = std::minmax_element(found.first, found.first + found.outputs);
  TORCH_CHECK_VALUE(std::is_sorted(found.first, found.first + found.outputs), "resize: ", name,
                    ": expected numbers that do not fall");
  TORCH_CHECK_INDEX(*low >= 0 && found.taps <= size && *high <= size - found.taps, "resize: ", name, ": expected 0..",
                    size - found.taps, ", got ", *low, "..", *high);
  return found;
}

template <typename Out>
void resize_all(const at::Tensor& image, const Filter& rows, const Filter& cols, at::ArrayRef<double> scale,
                at::ArrayRef<double> offset, const at::Tensor& out) {
  const int64_t planes = out.size(0);
  const bool grey = image.size(0) == 1 || image.stride(0) == 0, beside = !grey && image.stride(0) == 1;
  Picture in{nullptr, image.stride(2), image.stride(3), beside ? planes : 1};
  for (int64_t n = 0; n < image.size(1); ++n) {
    for (int64_t c = 0; c < (grey || beside ? 1 : planes); ++c) {
      in.data = image.const_data_ptr<uint8_t>() + c * image.stride(0) + n * image.stride(1);
      resize(in, rows, cols, grey || beside ? planes : 1, scale.data() + c, offset.data() + c,
             out.mutable_data_ptr<Out>() + c * out.stride(0) + n * out.stride(1), out.stride(0));
    }
  }
}

// image (C, N, H, W) uint8 -> out (C, N, height, width) float32, or uint8, rounded and clamped. Colours lie beside each
// other (stride 1, pixels any), are all the same memory (stride 0), or anywhere with pixels side by side.
void resized_crop_native(const at::Tensor& image, const at::Tensor& first_row, const at::Tensor& rows,
                         const at::Tensor& first_col, const at::Tensor& cols, at::ArrayRef<double> scale,
                         at::ArrayRef<double> offset, const at::Tensor& out) {
  TORCH_CHECK_VALUE(image.dim() == 4 && image.size(0) > 0, "resize: image: expected (C, N, H, W), got ", image.sizes());
  lbfast::expect("resize: image", image, at::kByte, image.sizes());
  const int64_t channels = image.size(0);
  TORCH_CHECK_VALUE(image.stride(3) == 1 || (image.stride(0) == 1 && image.stride(3) >= channels),
                    "resize: image: expected pixels or colours that lie beside each other, got strides ",
                    image.strides());
  const Filter by_row = filter("first_row", first_row, rows, image.size(2));
  const Filter by_col = filter("first_col", first_col, cols, image.size(3));
  const auto given = static_cast<int64_t>(scale.size());
  TORCH_CHECK_VALUE(given == channels && offset.size() == scale.size(), "resize: scale, offset: expected ", channels,
                    " numbers each, got ", given, " and ", offset.size());
  const bool bytes = out.scalar_type() == at::kByte;
  lbfast::expect_dense("resize: out", out, bytes ? at::kByte : at::kFloat,
                       {channels, image.size(1), by_row.outputs, by_col.outputs});
  lbfast::expect_apart("resize: out", out, {image, first_row, rows, first_col, cols});
  if (image.size(1) == 0) {
    return;
  }
  (bytes ? resize_all<uint8_t> : resize_all<float>)(image, by_row, by_col, scale, offset, out);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lbfast, m) {
  m.def(
      "resized_crop_native(Tensor image, Tensor first_row, Tensor rows, Tensor first_col, Tensor cols, float[] scale, "
      "float[] offset, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(lbfast, CPU, m) { m.impl("resized_crop_native", &resized_crop_native); }
