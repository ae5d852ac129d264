// C (float32) = or += A @ B for operands that lie in cache, in one thread, on whatever the machine has.
//
// A is row-major [M, K]. B is [K, N] row-major for float, and for bfloat16 in pairs of rows: [K / 2, N, 2], K even.
// oneDNN's micro-kernels serve where the machine has AVX-512 (AMX where it has that too); elsewhere BLAS, in float.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <vector>

namespace lbfast {

// True where bfloat16 products run on the machine's own instructions, and give what they should: tried once.
inline bool has_bf16_gemm() {
  static const bool answer = [] {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__)
    if (!__builtin_cpu_supports("avx512bf16")) {
      return false;
    }
    constexpr int64_t m = 3, n = 16, k = 32;
    std::vector<at::BFloat16> a(m * k), b(k * n);
    std::vector<float> c(m * n);
    for (int64_t i = 0; i < m * k; ++i) {
      a[i] = static_cast<float>(i % 7) - 3;
    }
    for (int64_t p = 0; p < k; ++p) {
      for (int64_t j = 0; j < n; ++j) {
        b[(p / 2 * n + j) * 2 + p % 2] = static_cast<float>((p + 3 * j) % 5) - 2;
      }
    }
    try {
      at::native::cpublas::brgemm(m, n, k, k, n, n, false, a.data(), b.data(), c.data());
      at::native::cpublas::brgemm_release();
    } catch (...) {  // oneDNN's own errors too: ONEDNN_MAX_CPU_ISA may forbid what the machine has
      return false;
    }
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        float exact = 0;
        for (int64_t p = 0; p < k; ++p) {
          exact += (static_cast<float>((i * k + p) % 7) - 3) * (static_cast<float>((p + 3 * j) % 5) - 2);
        }
        if (c[i * n + j] != exact) {
          return false;
        }
      }
    }
    return true;
#else
    return false;
#endif
  }();
  return answer;
}

// True where oneDNN has float micro-kernels for this machine.
inline bool has_f32_brgemm() {
  static const bool answer = [] {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
    std::vector<float> a(16 * 16, 1), b(16 * 16, 1), c(16 * 16);
    try {
      at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, a.data(), b.data(), c.data());
      at::native::cpublas::brgemm_release(false);
    } catch (...) {
      return false;
    }
    return c[0] == 16;
#else
    return false;
#endif
  }();
  return answer;
}

inline void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc, bool add) {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  if (has_f32_brgemm()) {
    constexpr int64_t kDeep = 256;  // long sums in parts: an accumulator of one part loses less
    for (int64_t p = 0; p < k; p += kDeep) {
      at::native::cpublas::brgemm(m, n, std::min(kDeep, k - p), lda, ldb, ldc, add || p > 0, a + p, b + p * ldb, c);
    }
    return;
  }
#endif
  const auto matrix = [](const float* data, int64_t rows, int64_t cols, int64_t ld) {
    return at::from_blob(const_cast<float*>(data), {rows, cols}, {ld, 1}, at::kFloat);
  };
  at::Tensor out = matrix(c, m, n, ldc);
  if (add) {
    out.addmm_(matrix(a, m, k, lda), matrix(b, k, n, ldb));
  } else {
    at::mm_out(out, matrix(a, m, k, lda), matrix(b, k, n, ldb));
  }
}

inline void gemm(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const at::BFloat16* b,
                 int64_t ldb, float* c, int64_t ldc, bool add) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c);
#else
  TORCH_INTERNAL_ASSERT(false, "has_bf16_gemm() was not asked");
#endif
}

// Gives the thread's matrix unit (AMX tiles) back; after a thread's last gemm.
template <typename T>
inline void gemm_release() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
#endif
}

// Rows of B that one stored row holds: 1, or 2 where rows are stored in pairs.
template <typename T>
constexpr int64_t kPair = std::is_same_v<T, float> ? 1 : 2;

template <typename T>
constexpr int64_t round_to_pair(int64_t k) {
  return (k + kPair<T> - 1) / kPair<T> * kPair<T>;
}

// Packs B = src^T: src [n, k] row-major -> [k, ld] (in pairs), columns n .. ld - 1 zero. k is a multiple of kPair.
template <typename T>
inline void pack_transposed(const T* src, int64_t ld_src, int64_t n, int64_t k, T* dst, int64_t ld) {
  // a pair of 16-bit numbers moves as one of 32 bits
  const auto* words = reinterpret_cast<const float*>(src);
  auto* out = reinterpret_cast<float*>(dst);
  const int64_t rows = k / kPair<T>;
  if (n < ld) {
    std::fill(out, out + rows * ld, 0.0f);
  }
  if (kPair<T> == 1 || ld_src % 2 == 0) {
    at::vec::transpose_mxn<float>(words, ld_src / kPair<T>, out, ld, n, rows);
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t p = 0; p < k; ++p) {
      dst[(p / 2 * ld + j) * 2 + p % 2] = src[j * ld_src + p];
    }
  }
}

// Packs B = src [k, n] row-major in pairs of rows; a missing last row is zero. Not for float, which needs no packing.
inline void pack_pairs(const at::BFloat16* src, int64_t ld_src, int64_t k, int64_t n, at::BFloat16* dst) {
  const auto* in = reinterpret_cast<const uint16_t*>(src);
  auto* out = reinterpret_cast<uint32_t*>(dst);
  for (int64_t p = 0; p < k; p += 2) {
    const uint16_t* low = in + p * ld_src;
    const uint16_t* high = p + 1 < k ? low + ld_src : nullptr;
    for (int64_t j = 0; j < n; ++j) {
      out[p / 2 * n + j] = low[j] | (high ? static_cast<uint32_t>(high[j]) << 16 : 0u);
    }
  }
}

}  // namespace lbfast
