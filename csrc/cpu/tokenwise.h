// What an encoder does to each token by itself, from one attention to the next, in one pass over the tokens:
//
//   total += attended @ out.T + b
//   total += act(norm(total) @ fc1.T + b1) @ fc2.T + b2
//   total += constant of the token's frame
//   result = norm(total) @ reader.T + b
//
// each part where it is given; or, before the first of them, total = norm(attended @ reader.T + b + positions). A thread
// takes a piece of tokens through all of it, so that what lies between stays in its second-level cache, and takes the next
// piece when it is done: a core that others use takes fewer. The MLP runs in chunks of its width. Sums over K are in
// float32, or exact in int32; total is float32; the order of additions depends on the shapes alone, and a token's values
// on no other token.
//
// 8-bit products: an output's weights have a scale, w = scale_w q, and a token (in the MLP each chunk of it) a scale and
// an offset, found from its values: x = scale_x u - offset_x, u in 0..255. So
//   x @ w.T = scale_x scale_w (u @ q.T) - offset_x shift,   shift = scale_w sum(q).
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "crew.h"
#include "pages.h"
#include "panels.h"
#include "rows.h"

namespace lbfast {

using panels::kColumns;
using panels::kPanelStep;
using panels::Sum;

template <typename T>
constexpr int64_t kMost = sizeof(T) * kParts<T> > 2 ? 160 : 256;  // tokens of a piece
constexpr int64_t kLeast = 48;  // tokens of a piece that is made smaller for the sake of sharing
constexpr int64_t kScaled = 1024;  // of the MLP's width: inputs that share an 8-bit scale
template <typename T>
constexpr int64_t kChunk = kParts<T> > 1 ? 512 : kScaled;  // of the MLP's width at a time
// Steps of K at a time. On AMX few, so that what they read stays in the cache, and of float32, whose sums err the more the
// longer they are; else many, whose sums are written less often: 0.98 of peak on Zen 4, 0.96 by 8 steps.
template <typename T>
int64_t part_of(const panels::Kernel& kernel) {
  return kParts<T> == 1 && (kernel.amx || std::is_same_v<T, float>) ? 8 : 32;
}
static_assert(kColumns % kLanes == 0);

// A frozen linear layer: see lbfast/tokenwise.py.
struct Linear {
  const char* panels = nullptr;
  const float* bias = nullptr;
  const float* scales = nullptr;
  const float* shifts = nullptr;
  int64_t steps = 0, columns = 0;
};

// What becomes of a panel's sums: ends(r, j, x...) takes one or two vectors of row r's values from column j on. Some rows
// at a time, so that AMX can do it while the next panel is multiplied; others do it while the sums are in the first-level
// cache.
template <typename T, typename Ends>
class Endings {
 public:
  Endings(const Tiles<T>& a, const Linear& w, int64_t chunk, int64_t rows, const Ends& ends)
      : a_(a), w_(w), shifts_(w.shifts + chunk * panels::padded(w.columns)), biased_(chunk == 0), rows_(rows),
        row_(rows), ends_(ends) {}

  // Of sums [rows][32], columns j .. j + width; `each` rows a step.
  void begin(const Sum<T>* sums, int64_t j, int64_t width, int64_t each) {
    sums_ = sums;
    column_ = j;
    width_ = width;
    each_ = each;
    row_ = 0;
  }
  static void step(void* self) {
    auto* mine = static_cast<Endings*>(self);
    mine->advance(mine->row_ + mine->each_);
  }
  void finish() { advance(rows_); }
  // Rows up to `end`, of those that there are.
  void advance(int64_t end) {
    end = std::min(end, rows_);
    if (row_ >= end) {
      return;
    }
    const Ends ends = ends_;  // a copy that no store can change
    int64_t i = 0;
    for (; i + 2 * kLanes <= width_; i += 2 * kLanes) {
      const Columns first(*this, column_ + i), second(*this, column_ + i + kLanes);
      for (int64_t r = row_; r < end; ++r) {
        const Sum<T>* sums = sums_ + r * kColumns + i;
        ends(r, column_ + i, first.of(load(sums), a_, r), second.of(load(sums + kLanes), a_, r));
      }
    }
    for (; i < width_; i += kLanes) {
      const Columns only(*this, column_ + i);
      for (int64_t r = row_; r < end; ++r) {
        ends(r, column_ + i, only.of(load(sums_ + r * kColumns + i), a_, r));
      }
    }
    row_ = end;
  }

 private:
  // kLanes columns: what their sums are scaled by and what is added to them.
  struct Columns {
    Vec bias, scales, shifts;
    Columns(const Endings& of, int64_t j) : bias(of.biased_ ? load(of.w_.bias + j) : Vec(0.0f)) {
      if constexpr (std::is_same_v<T, uint8_t> || std::is_same_v<T, Thirds>) {
        scales = load(of.w_.scales + j);
      }
      if constexpr (std::is_same_v<T, uint8_t>) {
        shifts = load(of.shifts_ + j);
      }
    }
    Vec of(const Vec& sum, const Tiles<T>& a, int64_t r) const {
      if constexpr (std::is_same_v<T, uint8_t>) {
        return at::vec::fmadd(sum * Vec(a.scales[r]), scales, at::vec::fmadd(Vec(-a.offsets[r]), shifts, bias));
      } else if constexpr (std::is_same_v<T, Thirds>) {
        return at::vec::fmadd(sum, scales * Vec(a.scales[r]), bias);
      } else {
        return sum + bias;
      }
    }
  };

  const Tiles<T>& a_;
  const Linear& w_;
  const float* shifts_;
  const bool biased_;
  const int64_t rows_;
  int64_t row_, column_ = 0, width_ = 0, each_ = 0;
  const Sum<T>* sums_ = nullptr;
  const Ends& ends_;
};

// ends of A @ W.T + bias; or of A @ (a chunk of W's inputs).T, with the bias in the first chunk.
template <typename T, typename Ends>
void product(const panels::Kernel& kernel, const Tiles<T>& a, int64_t rows, const Linear& w, int64_t chunk,
             int64_t first_column, int64_t columns, Sum<T>* const (&sums)[2], const Ends& ends) {
  const int64_t high = kernel.amx ? 2 * kRows : a.tall, calls = (rows + high - 1) / high;
  constexpr int64_t kWhole = kParts<T> * kPanelStep;
  const int64_t first_step = chunk * (kChunk<T> / kDepth<T>), part = part_of<T>(kernel);
  const int64_t lines = (kPanelStep / kStep + calls - 1) / calls;  // of the next panel at each step, in each part
  const int64_t each = (rows + calls * a.steps - 1) / (calls * a.steps);
  Endings<T, Ends> endings(a, w, chunk, rows, ends);
  int64_t turn = 0;
  for (int64_t j = first_column; j < first_column + columns; j += kColumns) {
    const int64_t width = std::min(kColumns, first_column + columns - j);
    if (!kernel.amx) {
      endings.begin(sums[turn], j, width, each);
    }
    const char* b = w.panels + (j / kColumns * w.steps + first_step) * kWhole;
    for (int64_t s = 0; s < a.steps; s += part) {
      const int64_t steps = std::min(part, a.steps - s);
      for (int64_t i = 0, asked = 0; i < rows; i += high, asked += lines) {
        const bool more = asked < kPanelStep / kStep;
        kernel.multiply({reinterpret_cast<const char*>(a.at(i, s * kDepth<T>)), a.steps * kParts<T> * a.tall * kStep,
                         std::min(high, rows - i), b + s * kWhole, steps, sums[turn] + i * kColumns, s > 0,
                         b + (w.steps + s) * kWhole + asked * steps * kParts<T> * kStep, more ? lines : 0,
                         Endings<T, Ends>::step, &endings, kColumns, a.tall});
        if (!kernel.amx && s + steps == a.steps) {
          endings.advance(i + high);
        }
      }
    }
    if (kernel.amx) {
      endings.finish();
      endings.begin(sums[turn], j, width, each);
      turn ^= 1;
    }
  }
  endings.finish();
}

struct Span {
  float* total;
  int64_t tokens, width;
  const void* attended = nullptr;  // of the result's type, in rows
  int64_t attended_ld = 0;
  Linear out, fc1, fc2, reader;
  Norm before_mlp, before_reader;
  const float* constant = nullptr;  // (frames, width)
  int64_t frames = 1, per_frame = 1;
  void* result = nullptr;
  Activation activation = Activation::kGelu;
  float eps = 1e-5f;
  bool plain = false;  // result = act(attended @ reader.T + b), and nothing else
  const float* positions = nullptr;  // (places, columns): then total = norm(attended @ reader.T + b + positions) instead
  int64_t places = 1;
};

template <typename T>
struct Scratch {
  // For pieces of up to `rows` tokens; plain ones have no running sum.
  Scratch(const panels::Kernel& kernel, int64_t rows, int64_t width, bool plain) : ld(width + 16) {
    const int64_t totals = plain ? 0 : rows * ld;
    const int64_t whole = (rows + kernel.tiles(rows) + kRows - 1) / kRows * kRows;  // tiles are filled up
    const int64_t steps = (width + kDepth<T> - 1) / kDepth<T>, inner_steps = kChunk<T> / kDepth<T>;
    const int64_t chunks = std::is_same_v<T, uint8_t> ? rows * kChunk<T> : 0;  // 16 bits until their scale is known
    Arena& arena = Arena::mine(whole * (steps + inner_steps) * kParts<T> * kStep + 2 * rows * sizeof(T*) +
                               (4 * rows + 2 * whole * kColumns + width + totals) * sizeof(float) +
                               chunks * sizeof(at::BFloat16) + 12 * 64);
    for (Tiles<T>* tiles : {&a, &inner}) {
      tiles->steps = tiles == &a ? steps : inner_steps;
      tiles->data = arena.take<T>(whole * tiles->steps * kParts<T> * kDepth<T>);
      tiles->rows = arena.take<T*>(rows);
      tiles->scales = arena.take<float>(rows);
      tiles->offsets = arena.take<float>(rows);
    }
    sums[0] = arena.take<Sum<T>>(whole * kColumns);
    sums[1] = arena.take<Sum<T>>(whole * kColumns);
    chunk = arena.take<at::BFloat16>(chunks);
    row = arena.take<float>(width);
    total = arena.take<float>(totals);
  }
  Tiles<T> a, inner;
  Sum<T>* sums[2];
  at::BFloat16* chunk;
  float *row, *total;
  int64_t ld;  // of total's rows, which begin in other sets of the cache each
};

// Tokens first .. first + rows of a span, in one thread; of a plain one `columns` from first_column on.
template <typename T, typename Out>
void run(const panels::Kernel& kernel, const Span& span, int64_t first, int64_t rows, int64_t first_column,
         int64_t columns, Scratch<T>& scratch) {
  using Precision = std::conditional_t<std::is_same_v<T, Thirds>, float, T>;
  const int64_t width = span.width;
  scratch.a.share(rows, kernel.tall(rows));
  const auto read_attended = [&] {
    for (int64_t r = 0; r < rows; ++r) {
      const Out* row = static_cast<const Out*>(span.attended) + (first + r) * span.attended_ld;
      write_row(scratch.a, r, width, [&](int64_t k) { return load(row + k); });
    }
  };
  if (span.positions != nullptr) {
    read_attended();
    float* const whole = span.total + first * columns;
    product<T>(kernel, scratch.a, rows, span.reader, 0, 0, columns, scratch.sums,
               [whole, columns, first, positions = span.positions, places = span.places](int64_t r, int64_t j,
                                                                                         const auto&... x) {
                 const float* position = positions + (first + r) % places * columns + j;
                 float* to = whole + r * columns + j;
                 for (const Vec& one : {x...}) {
                   store(one + load(position), to);
                   position += kLanes;
                   to += kLanes;
                 }
               });
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = whole + r * columns;
      const Normed normed(row, columns, span.before_reader, span.eps);
      for (int64_t k = 0; k < columns; k += kLanes) {
        store(normed(k), row + k);
      }
    }
    return;
  }
  Out* result = static_cast<Out*>(span.result) + first * span.reader.columns;
  if (span.plain) {
    read_attended();
    product<T>(kernel, scratch.a, rows, span.reader, 0, first_column, columns, scratch.sums,
               [result, ld = span.reader.columns, by = span.activation](int64_t r, int64_t j, const auto&... x) {
                 store(activate<Precision>(x, by)..., result + r * ld + j);
               });
    return;
  }
  float *const whole = span.total + first * width, *const total = scratch.total;
  const int64_t ld = scratch.ld;
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(whole + r * width, width, total + r * ld);
  }
  const auto add_to_total = [total, ld](int64_t r, int64_t j, const auto&... x) {
    float* to = total + r * ld + j;
    for (const Vec& one : {x...}) {
      store(load(to) + one, to);
      to += kLanes;
    }
  };
  if (span.attended != nullptr) {
    read_attended();
    product<T>(kernel, scratch.a, rows, span.out, 0, 0, width, scratch.sums, add_to_total);
  }
  if (span.fc1.panels != nullptr) {
    write_norm(scratch.a, total, ld, rows, width, span.before_mlp, span.eps, scratch.row);
    std::fill_n(scratch.inner.scales, rows, 1.0f);
    for (int64_t chunk = 0; chunk < span.fc1.columns; chunk += kChunk<T>) {
      const int64_t wide = std::min(kChunk<T>, span.fc1.columns - chunk);
      Tiles<T>& inner = scratch.inner;
      inner.steps = (wide + kDepth<T> - 1) / kDepth<T>;
      inner.share(rows, scratch.a.tall);
      product<T>(kernel, scratch.a, rows, span.fc1, 0, chunk, wide, scratch.sums,
                 [inner, chunk, by = span.activation, short_lived = scratch.chunk](int64_t r, int64_t j,
                                                                                   const auto&... x) {
                   if constexpr (std::is_same_v<T, uint8_t>) {
                     at::BFloat16* to = short_lived + r * kChunk<T> + j - chunk;
                     soon(to + kColumns);
                     store(activate<Precision>(x, by)..., to);
                   } else {
                     inner.put(r, j - chunk, activate<Precision>(x, by)...);
                   }
                 });
      if constexpr (std::is_same_v<T, uint8_t>) {
        for (int64_t r = 0; r < rows; ++r) {
          write_row(inner, r, wide, [&](int64_t k) { return load(scratch.chunk + r * kChunk<T> + k); });
        }
      }
      product<T>(kernel, inner, rows, span.fc2, chunk / kChunk<T>, 0, width, scratch.sums, add_to_total);
    }
  }
  if (span.constant != nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* constant = span.constant + (first + r) / span.per_frame % span.frames * width;
      for (int64_t k = 0; k < width; k += kLanes) {
        store(load(total + r * ld + k) + load(constant + k), total + r * ld + k);
      }
    }
  }
  if (span.attended != nullptr || span.fc1.panels != nullptr || span.constant != nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(total + r * ld, width, whole + r * width);
    }
  }
  if (span.reader.panels != nullptr) {
    write_norm(scratch.a, total, ld, rows, width, span.before_reader, span.eps, scratch.row);
    product<T>(kernel, scratch.a, rows, span.reader, 0, 0, span.reader.columns, scratch.sums,
               [result, ld = span.reader.columns](int64_t r, int64_t j, const auto&... x) {
                 Out* to = result + r * ld + j;
                 soon(to + kColumns);
                 store(x..., to);
               });
  }
}

template <typename T, typename Out>
void run_all(const panels::Kernel& kernel, const Span& span) {
  const int64_t threads = std::max<int64_t>(1, at::get_num_threads());
  // pieces of nearly one size, as many to each thread: two at least where reading the weights again costs little, so that
  // a thread that has a core for itself can take more
  const int64_t least = kernel.amx || sizeof(T) > 2 || span.tokens < 2 * threads * kLeast ? 1 : 2;
  const int64_t rounds = std::max(least, (span.tokens + threads * kMost<T> - 1) / (threads * kMost<T>));
  const int64_t unit = kernel.amx ? kRows : 1;
  const int64_t units = (span.tokens + unit - 1) / unit, pieces = std::min(units, threads * rounds);
  const int64_t rows = (units + pieces - 1) / pieces * unit;
  // of few tokens, whose time the weights take, threads share these
  const int64_t panels = panels::padded(span.reader.columns) / kColumns;
  const bool apart = span.plain && span.positions == nullptr && pieces < threads;
  const int64_t across = apart ? std::min(panels, 2 * threads / pieces) : 1;
  crew::share(pieces * across, [&](std::atomic<int64_t>& next) {
    Scratch<T> scratch(kernel, rows, span.width, span.plain);
#if defined(LBFAST_AMX)
    if (kernel.amx) {
      panels::ready_tiles();
    }
#endif
    for (int64_t i = next++; i < pieces * across; i = next++) {
      const int64_t piece = i / across, part = i % across;
      const int64_t first = piece * units / pieces * unit, end = (piece + 1) * units / pieces * unit;
      const int64_t left = part * panels / across * kColumns, right = (part + 1) * panels / across * kColumns;
      run<T, Out>(kernel, span, first, std::min(end, span.tokens) - first, left,
                  std::min(right, span.reader.columns) - left, scratch);
    }
#if defined(LBFAST_AMX)
    if (kernel.amx) {
      panels::release_tiles();
    }
#endif
  });
}

}  // namespace lbfast
