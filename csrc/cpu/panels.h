// Products of a few rows with frozen weights: C [32, 32] += A @ B^T on what the machine has, in one thread.
//
// Everything is laid out in steps of 64 bytes of K: 64 numbers of 8 bits, 32 of 16 or 16 of 32.
//   A  tiles of up to 16 rows, as many as the kernel sums at a time, [steps][rows][64 bytes]
//   B  panels of 32 columns, [steps][2 halves][16 words][16 columns][4 bytes]: a word is the 4 bytes that one column
//      has of K, so that a line of 64 bytes serves 16 columns, and 16 lines are a tile of AMX as they lie
// 8-bit A is unsigned, B signed, and their sums are exact.
//
// float32 on AMX, in thirds: x = x0 + x1 + x2 of 16 bits each, rounded to nearest, which leaves nothing of 24 digits, and
//   x w = x0 w0 + x0 w1 + x1 w0 + x1 w1 + x0 w2 + x2 w0,
// less what is below 2^-24 of it: a rounding, in a sum of many. AMX multiplies 16 bits 16 times as fast as the vector
// units do 32, so that 6 products take 0.4 of their time. A step has 3 parts: A [steps][3][rows][64 bytes], B
// [steps][3][2 halves]...
#pragma once

#include <ATen/cpu/Utils.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if (defined(__clang__) && __clang_major__ >= 15) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12)
#define LBFAST_KNOWS_AMX_AND_AVX_VNNI
#endif

namespace lbfast::panels {

constexpr int64_t kRows = 16;                     // of a tile of A, at most; of AMX always
constexpr int64_t kColumns = 32;                  // of a panel of B
constexpr int64_t kStep = 64;                     // bytes of K
constexpr int64_t kTileStep = kRows * kStep;      // bytes of a whole tile's step
constexpr int64_t kPanelStep = kColumns * kStep;  // bytes of a panel's step
constexpr int64_t kTallOfAvx512 = 14;             // rows that 32 registers sum beside 2 lines of B and a word of A
constexpr int64_t kTallOfAvx2 = 6;                // that 16 registers sum, of half a panel

constexpr int64_t padded(int64_t columns) { return (columns + kColumns - 1) / kColumns * kColumns; }

// float32 as three numbers of 16 bits.
struct Thirds {
  uint16_t bits;
};

template <typename T>
constexpr int64_t kParts = std::is_same_v<T, Thirds> ? 3 : 1;  // of a step

template <typename T>
constexpr int64_t kDepth = kStep / static_cast<int64_t>(sizeof(T));  // numbers of a step

template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, uint8_t>, int32_t, float>;

// One call's operands: `rows` of A, of one tile or for AMX of two, which lie a_tile bytes apart, in tiles of `tall` rows.
// c is [rows][32], rows `ld` apart; AMX writes whole tiles. At each step `lines` lines from `next` on are asked for, and
// by kernels of AMX, which multiplies beside the vector units, work(state) is called.
struct Call {
  const char* a;
  int64_t a_tile;
  int64_t rows;
  const char* b;
  int64_t steps;
  void* c;
  bool add;
  const char* next;
  int64_t lines;
  void (*work)(void*);
  void* state;
  int64_t ld = kColumns;
  int64_t tall = kRows;
};

using Multiply = void (*)(const Call&);

struct Kernel {
  const char* name;
  Multiply multiply;
  int64_t most;  // rows of a tile
  bool amx;      // tiles of whole 16 rows, two a call, to be readied and released by each thread

  int64_t tiles(int64_t rows) const { return (rows + most - 1) / most; }
  // Rows of a tile, where `rows` are shared as evenly as can be.
  int64_t tall(int64_t rows) const { return amx ? kRows : (rows + tiles(rows) - 1) / tiles(rows); }
};

// Wherever a compiler is: the words of a line one after another.
template <typename T>
void multiply_plain(const Call& call) {
  auto* c = static_cast<float*>(call.c);
  for (int64_t i = 0; i < call.rows; ++i) {
    const char* row = call.a + i * kStep;
    float sums[kColumns] = {};
    for (int64_t s = 0; s < call.steps; ++s) {
      const auto* a = reinterpret_cast<const float*>(row + s * call.tall * kStep);
      const auto* b = reinterpret_cast<const float*>(call.b + s * kPanelStep);
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t w = 0; w < 16; ++w) {
          for (int64_t j = 0; j < 16; ++j) {
            sums[half * 16 + j] += a[w] * b[(half * 16 + w) * 16 + j];
          }
        }
      }
    }
    for (int64_t j = 0; j < kColumns; ++j) {
      c[i * call.ld + j] = sums[j] + (call.add ? c[i * call.ld + j] : 0.0f);
    }
  }
}

#if defined(__x86_64__) && defined(CPU_CAPABILITY_AVX512) && defined(LBFAST_KNOWS_AMX_AND_AVX_VNNI)

#define LBFAST_AMX __attribute__((target("amx-tile,amx-int8,amx-bf16")))

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  TileShapes() {
    std::fill(bytes, bytes + 8, uint16_t{64});
    std::fill(rows, rows + 8, uint8_t{16});
  }
};

LBFAST_AMX inline void ready_tiles() {
  static const TileShapes shapes;
  _tile_loadconfig(&shapes);
}

LBFAST_AMX inline void release_tiles() { _tile_release(); }

#define LBFAST_DOT(c, a, b)                   \
  if constexpr (std::is_same_v<T, uint8_t>) { \
    _tile_dpbusd(c, a, b);                    \
  } else {                                    \
    _tile_dpbf16ps(c, a, b);                  \
  }

// The four products of a part of A, tiles 4 and 5, and one of B, 6 and 7. Loads stand between products, where they can:
// in front of them they would wait for each other.
#define LBFAST_DOTS     \
  LBFAST_DOT(0, 4, 6)   \
  LBFAST_DOT(1, 4, 7)   \
  if (two) {            \
    LBFAST_DOT(2, 5, 6) \
    LBFAST_DOT(3, 5, 7) \
  }
#define LBFAST_LOAD_A(part)                         \
  _tile_loadd(4, a + (part) * kTileStep, 64);       \
  if (two) {                                        \
    _tile_loadd(5, below + (part) * kTileStep, 64); \
  }
#define LBFAST_LOAD_B(part)                    \
  _tile_loadd(6, b + (part) * kPanelStep, 64); \
  _tile_loadd(7, b + (part) * kPanelStep + 1024, 64);

template <typename T>
LBFAST_AMX void multiply_amx(const Call& call) {
  const int64_t ld = call.ld * 4;
  auto* c = static_cast<char*>(call.c);
  const char *a = call.a, *below = call.a + call.a_tile, *b = call.b, *next = call.next;
  const bool two = call.rows > kRows;
  const auto ask = [&] {
    for (int64_t i = 0; i < call.lines; ++i, next += 64) {
      _mm_prefetch(next, _MM_HINT_T1);
    }
  };
  const bool apart = call.add && std::is_same_v<T, Thirds>;  // six sums a number: of many, in parts, as others' are few
  if (call.add && !apart) {
    _tile_loadd(0, c, ld);
    _tile_loadd(1, c + 64, ld);
    if (two) {
      _tile_loadd(2, c + 16 * ld, ld);
      _tile_loadd(3, c + 16 * ld + 64, ld);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < call.steps; ++s) {
    if constexpr (std::is_same_v<T, Thirds>) {  // the least first; of the six, one operand changes at a time
      LBFAST_LOAD_B(2)
      LBFAST_LOAD_A(0)
      LBFAST_DOTS
      ask();
      LBFAST_LOAD_B(1)
      LBFAST_DOTS
      LBFAST_LOAD_B(0)
      LBFAST_DOTS
      ask();
      LBFAST_LOAD_A(2)
      LBFAST_DOTS
      LBFAST_LOAD_A(1)
      LBFAST_DOTS
      LBFAST_LOAD_B(1)
      LBFAST_DOTS
    } else {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, 64);
      LBFAST_DOT(0, 4, 6)
      _tile_loadd(7, b + 1024, 64);
      LBFAST_DOT(1, 4, 7)
      if (two) {
        _tile_loadd(5, below, 64);
        LBFAST_DOT(2, 5, 6)
        LBFAST_DOT(3, 5, 7)
      }
    }
    ask();
    call.work(call.state);
    a += kParts<T> * kTileStep;
    below += kParts<T> * kTileStep;
    b += kParts<T> * kPanelStep;
  }
  alignas(64) float part[2 * kRows * kColumns];
  char* to = apart ? reinterpret_cast<char*>(part) : c;
  const int64_t to_ld = apart ? kColumns * 4 : ld;
  _tile_stored(0, to, to_ld);
  _tile_stored(1, to + 64, to_ld);
  if (two) {
    _tile_stored(2, to + 16 * to_ld, to_ld);
    _tile_stored(3, to + 16 * to_ld + 64, to_ld);
  }
  if (apart) {
    for (int64_t r = 0; r < (two ? 2 : 1) * kRows; ++r) {
      auto* row = reinterpret_cast<float*>(c + r * ld);
      for (int64_t i = 0; i < kColumns; i += 16) {
        _mm512_storeu_ps(row + i, _mm512_add_ps(_mm512_loadu_ps(row + i), _mm512_load_ps(part + r * kColumns + i)));
      }
    }
  }
}

#undef LBFAST_LOAD_B
#undef LBFAST_LOAD_A
#undef LBFAST_DOTS
#undef LBFAST_DOT

#endif

#if defined(__x86_64__) && defined(CPU_CAPABILITY_AVX512)

// One line of B with one word of A, which all columns share.
#define LBFAST_AVX512 __attribute__((target("avx512vnni,avx512bf16"), always_inline)) inline
LBFAST_AVX512 __m512i dot(__m512i sum, int32_t a, __m512i b, uint8_t) {
  return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(a), b);
}
LBFAST_AVX512 __m512i dot(__m512i sum, int32_t a, __m512i b, at::BFloat16) {
  return reinterpret_cast<__m512i>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                    reinterpret_cast<__m512bh>(_mm512_set1_epi32(a)),
                                                    reinterpret_cast<__m512bh>(b)));
}
LBFAST_AVX512 __m512i dot(__m512i sum, int32_t a, __m512i b, float) {
  return reinterpret_cast<__m512i>(_mm512_fmadd_ps(reinterpret_cast<__m512>(_mm512_set1_epi32(a)),
                                                   reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(sum)));
}
LBFAST_AVX512 __m512i plus(__m512i a, __m512i b, int32_t) { return _mm512_add_epi32(a, b); }
LBFAST_AVX512 __m512i plus(__m512i a, __m512i b, float) {
  return reinterpret_cast<__m512i>(_mm512_add_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
}

// kTall rows of a tile: 2 kTall sums, 2 lines of B and a word of A in the registers. The next step's lines of both are
// asked for, which the machine would not guess at the ends of tiles and panels: 0.97 of peak on Zen 4, 0.88 without.
template <typename T, int64_t kTall>
__attribute__((target("avx512vnni,avx512bf16"))) void multiply_rows_avx512(const Call& call) {
  const char *a = call.a, *b = call.b, *next = call.next;
  const int64_t a_step = call.tall * kStep;
  __m512i low[kTall], high[kTall];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kTall; ++r) {
    low[r] = high[r] = _mm512_setzero_si512();
  }
  for (int64_t s = 0; s < call.steps; ++s) {
#pragma GCC unroll 2
    for (int64_t w = 0; w < 16; ++w) {
      _mm_prefetch(b + kPanelStep + w * 128, _MM_HINT_T0);
      _mm_prefetch(b + kPanelStep + w * 128 + 64, _MM_HINT_T0);
      if (w < kTall) {
        _mm_prefetch(a + a_step + w * kStep, _MM_HINT_T0);
      }
      const __m512i first = _mm512_loadu_si512(b + w * 64), second = _mm512_loadu_si512(b + (16 + w) * 64);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kTall; ++r) {
        const int32_t word = *reinterpret_cast<const int32_t*>(a + r * kStep + w * 4);
        low[r] = dot(low[r], word, first, T{});
        high[r] = dot(high[r], word, second, T{});
      }
    }
    a += a_step;
    b += kPanelStep;
    for (int64_t i = 0; i < call.lines; ++i, next += 64) {
      _mm_prefetch(next, _MM_HINT_T1);
    }
  }
  auto* c = static_cast<Sum<T>*>(call.c);
#pragma GCC unroll 16
  for (int64_t r = 0; r < kTall; ++r, c += call.ld) {
    if (call.add) {
      low[r] = plus(low[r], _mm512_loadu_si512(c), Sum<T>{});
      high[r] = plus(high[r], _mm512_loadu_si512(c + 16), Sum<T>{});
    }
    _mm512_storeu_si512(c, low[r]);
    _mm512_storeu_si512(c + 16, high[r]);
  }
}

template <typename T>
void multiply_avx512(const Call& call) {
  static constexpr auto by_rows = []<int64_t... i>(std::integer_sequence<int64_t, i...>) {
    return std::array<Multiply, sizeof...(i)>{multiply_rows_avx512<T, i + 1>...};
  }(std::make_integer_sequence<int64_t, kTallOfAvx512>{});
  by_rows[call.rows - 1](call);
}

#endif

#if defined(__x86_64__) && (defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512))

#if defined(LBFAST_KNOWS_AMX_AND_AVX_VNNI)
#define LBFAST_AVX2_TARGET target("avxvnni")
#else
#define LBFAST_AVX2_TARGET target("fma")
#endif
#define LBFAST_AVX2 __attribute__((LBFAST_AVX2_TARGET, always_inline)) inline
#if defined(LBFAST_KNOWS_AMX_AND_AVX_VNNI)
LBFAST_AVX2 __m256i dot(__m256i sum, int32_t a, __m256i b, uint8_t) {
  return _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi32(a), b);
}
#endif
LBFAST_AVX2 __m256i dot(__m256i sum, int32_t a, __m256i b, float) {
  return reinterpret_cast<__m256i>(_mm256_fmadd_ps(reinterpret_cast<__m256>(_mm256_set1_epi32(a)),
                                                   reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(sum)));
}
LBFAST_AVX2 __m256i plus(__m256i a, __m256i b, int32_t) { return _mm256_add_epi32(a, b); }
LBFAST_AVX2 __m256i plus(__m256i a, __m256i b, float) {
  return reinterpret_cast<__m256i>(_mm256_add_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}

template <typename T, int64_t kTall>
__attribute__((LBFAST_AVX2_TARGET)) void multiply_rows_avx2(const Call& call) {
  for (int64_t half = 0; half < 2; ++half) {
    const char *a = call.a, *b = call.b + half * 1024;
    __m256i low[kTall], high[kTall];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kTall; ++r) {
      low[r] = high[r] = _mm256_setzero_si256();
    }
    for (int64_t s = 0; s < call.steps; ++s) {
#pragma GCC unroll 2
      for (int64_t w = 0; w < 16; ++w) {
        const auto* line = reinterpret_cast<const __m256i*>(b + w * 64);
        const __m256i first = _mm256_loadu_si256(line), second = _mm256_loadu_si256(line + 1);
#pragma GCC unroll 16
        for (int64_t r = 0; r < kTall; ++r) {
          const int32_t word = *reinterpret_cast<const int32_t*>(a + r * kStep + w * 4);
          low[r] = dot(low[r], word, first, T{});
          high[r] = dot(high[r], word, second, T{});
        }
      }
      a += call.tall * kStep;
      b += kPanelStep;
    }
    auto* c = static_cast<Sum<T>*>(call.c) + half * 16;
#pragma GCC unroll 16
    for (int64_t r = 0; r < kTall; ++r, c += call.ld) {
      auto *to = reinterpret_cast<__m256i*>(c), *beside = to + 1;
      if (call.add) {
        low[r] = plus(low[r], _mm256_loadu_si256(to), Sum<T>{});
        high[r] = plus(high[r], _mm256_loadu_si256(beside), Sum<T>{});
      }
      _mm256_storeu_si256(to, low[r]);
      _mm256_storeu_si256(beside, high[r]);
    }
  }
}

template <typename T>
void multiply_avx2(const Call& call) {
  static constexpr auto by_rows = []<int64_t... i>(std::integer_sequence<int64_t, i...>) {
    return std::array<Multiply, sizeof...(i)>{multiply_rows_avx2<T, i + 1>...};
  }(std::make_integer_sequence<int64_t, kTallOfAvx2>{});
  by_rows[call.rows - 1](call);
}

#endif

// Whether ONEDNN_MAX_CPU_ISA, which limits PyTorch's products, allows what the names given here stand for.
inline bool within(std::initializer_list<const char*> names) {
  const char* variable = std::getenv("ONEDNN_MAX_CPU_ISA");
  const std::string limit = variable == nullptr ? "" : variable;
  return limit.empty() || limit == "DEFAULT" || std::find(names.begin(), names.end(), limit) != names.end();
}

inline bool has_amx() {
#if defined(LBFAST_AMX)
  static const bool answer =
      __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
      at::cpu::init_amx() &&
      within({"AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX", "AVX10_1_512_AMX_FP16"});
  return answer;
#else
  return false;
#endif
}

// The kernels for A of T that run here, best first.
template <typename T>
std::vector<Kernel> kernels() {
  std::vector<Kernel> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
#if defined(LBFAST_AMX)
  if constexpr (!std::is_same_v<T, float>) {
    if (has_amx()) {
      found.push_back({"amx", multiply_amx<T>, kRows, true});
    }
  }
#endif
  if constexpr (!std::is_same_v<T, Thirds>) {
#if defined(__x86_64__)
#if defined(CPU_CAPABILITY_AVX512)
    const bool avx512 = within({"AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX", "AVX10_1_512_AMX_FP16",
                                "AVX512_CORE_FP16", "AVX10_1_512", "AVX512_CORE_BF16"});
    const bool vnni = avx512 || within({"AVX512_CORE_VNNI"});
    const bool able = std::is_same_v<T, float>     ? vnni || within({"AVX512_CORE"})
                      : std::is_same_v<T, uint8_t> ? vnni && __builtin_cpu_supports("avx512vnni")
                                                   : avx512 && __builtin_cpu_supports("avx512bf16");
    if (able) {
      found.push_back({"avx512", multiply_avx512<T>, kTallOfAvx512, false});
    }
#endif
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, float>) {
      found.push_back({"avx2", multiply_avx2<T>, kTallOfAvx2, false});
    }
#if defined(LBFAST_KNOWS_AMX_AND_AVX_VNNI)
    if constexpr (std::is_same_v<T, uint8_t>) {
      const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
      const std::string name = limit == nullptr ? "" : limit;
      if (__builtin_cpu_supports("avxvnni") && name != "SSE41" && name != "AVX" && name != "AVX2" &&
          name != "AVX512_CORE") {
        found.push_back({"avx2", multiply_avx2<T>, kTallOfAvx2, false});
      }
    }
#endif
#endif
#endif
    if constexpr (std::is_same_v<T, float>) {
      found.push_back({"plain", multiply_plain<T>, kRows, false});
    }
  }
  return found;
}

}  // namespace lbfast::panels
