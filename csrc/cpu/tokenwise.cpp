// lbfast::tokenwise and what belongs to it: their arguments, and the kernel that takes them.
// The schemas and the layout of the weights are in lbfast/tokenwise.py.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "tokenwise.h"

namespace lbfast {
namespace {

template <typename T>
const panels::Kernel& chosen(const std::string& name) {
  static const std::vector<panels::Kernel> here = panels::kernels<T>();
  for (const panels::Kernel& kernel : here) {
    if (name.empty() || name == kernel.name) {
      return kernel;
    }
  }
  TORCH_CHECK(false, "tokenwise: kernel: this CPU has none of this dtype", name.empty() ? "" : " named ", name);
}

// What frozen weights are laid out as: a dtype, or float32 in thirds, which bfloat16 tensors of 7 dimensions are.
struct Layout {
  at::ScalarType dtype;
  bool thirds;
  explicit Layout(const at::Tensor& panels) : dtype(panels.scalar_type()), thirds(dtype == at::kBFloat16 && panels.dim() == 7) {
    TORCH_CHECK(dtype == at::kChar || dtype == at::kBFloat16 || dtype == at::kFloat,
                "tokenwise: expected weights of int8, bfloat16 or float32, got ", dtype);
  }
  size_t tensors() const { return dtype == at::kChar ? 4 : thirds ? 3 : 2; }
  int64_t depth() const { return kStep / dtype_size(); }
  int64_t panel_step() const { return (thirds ? kParts<Thirds> : 1) * kPanelStep; }
  int64_t dtype_size() const { return static_cast<int64_t>(at::elementSize(dtype)); }
};

void run_on(const Layout& layout, at::ScalarType outside, const std::string& kernel, const Span& span) {
  const auto with = [&](auto in) {
    using T = decltype(in);
    if (outside == at::kFloat) {
      run_all<T, float>(chosen<T>(kernel), span);
    } else {
      run_all<T, at::BFloat16>(chosen<T>(kernel), span);
    }
  };
  if (layout.thirds) {
#if defined(LBFAST_AMX)
    with(Thirds{});
#else
    chosen<Thirds>(kernel);  // there is none
#endif
  } else if (layout.dtype == at::kChar) {
    with(uint8_t{});
  } else if (layout.dtype == at::kBFloat16) {
    with(at::BFloat16{});
  } else {
    with(float{});
  }
}

Activation activation_of(const std::string& name) {
  TORCH_CHECK(name == "gelu" || name == "quick_gelu", "tokenwise: activation: expected gelu or quick_gelu, got ", name);
  return name == "gelu" ? Activation::kGelu : Activation::kQuickGelu;
}

const float* floats(const at::Tensor& x, int64_t count, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.scalar_type() == at::kFloat && x.is_contiguous() && x.numel() == count,
              "tokenwise: ", name, ": expected ", count, " contiguous float32 on the CPU, got ", x.scalar_type(), " ",
              x.sizes());
  return x.const_data_ptr<float>();
}

// [panels, bias], in thirds [.., scales], and of 8 bits [.., scales, shifts], the latter of each chunk of inputs.
Linear linear_of(const at::TensorList parts, int64_t in, int64_t columns, const Layout& layout, const char* name,
                 int64_t chunks = 1) {
  TORCH_CHECK(parts.size() == layout.tensors(), "tokenwise: ", name, ": expected ", layout.tensors(), " tensors, got ",
              parts.size());
  const at::Tensor& weight = parts[0];
  const int64_t padded = panels::padded(columns);
  Linear made;
  made.steps = (in + layout.depth() - 1) / layout.depth();
  made.columns = columns;
  TORCH_CHECK(weight.device().is_cpu() && weight.scalar_type() == layout.dtype && weight.is_contiguous() &&
                  weight.numel() * layout.dtype_size() == padded / kColumns * made.steps * layout.panel_step(),
              "tokenwise: ", name, ": expected panels of ", columns, " x ", in, " ", layout.dtype,
              layout.thirds ? " in thirds" : "", ", got ", weight.scalar_type(), " ", weight.sizes());
  made.panels = static_cast<const char*>(weight.const_data_ptr());
  made.bias = floats(parts[1], padded, name);
  if (parts.size() > 2) {
    made.scales = floats(parts[2], padded, name);
  }
  if (parts.size() > 3) {
    made.shifts = floats(parts[3], chunks * padded, name);
  }
  return made;
}

void tokenwise(at::Tensor total, const std::optional<at::Tensor>& attended, const at::TensorList out,
               const at::TensorList mlp, const std::optional<at::Tensor>& constant, int64_t per_frame,
               const at::TensorList reader, const std::optional<at::Tensor>& result, std::string activation, double eps,
               std::string kernel) {
  TORCH_CHECK(total.device().is_cpu() && total.dim() == 2 && total.scalar_type() == at::kFloat && total.is_contiguous() &&
                  total.size(1) > 0 && total.size(1) % 16 == 0,
              "tokenwise: total: expected contiguous float32 (tokens, D), D a multiple of 16, on the CPU, got ",
              total.scalar_type(), " ", total.sizes());
  Span span;
  span.total = total.data_ptr<float>();
  span.tokens = total.size(0);
  span.width = total.size(1);
  span.eps = static_cast<float>(eps);
  span.activation = activation_of(activation);
  TORCH_CHECK(!out.empty() || !mlp.empty() || !reader.empty(), "tokenwise: expected out, mlp or reader, got none");
  TORCH_CHECK(!out.empty() || (mlp.empty() ? reader : mlp).size() > 2, "tokenwise: ", mlp.empty() ? "reader" : "mlp",
              ": expected a norm's 2 tensors and a product's, got ", (mlp.empty() ? reader : mlp).size());
  const Layout layout(!out.empty() ? out[0] : !mlp.empty() ? mlp[2] : reader[2]);
  const at::ScalarType outside = attended.has_value() ? attended->scalar_type()
                                 : result.has_value() ? result->scalar_type()
                                                      : at::kFloat;
  TORCH_CHECK(outside == at::kFloat || outside == at::kBFloat16,
              "tokenwise: expected attended and result of float32 or bfloat16, got ", outside);
  TORCH_CHECK(attended.has_value() != out.empty(), "tokenwise: expected attended and out together");
  if (attended.has_value()) {
    TORCH_CHECK(attended->device().is_cpu() && attended->dim() == 2 && attended->size(0) == span.tokens &&
                    attended->size(1) == span.width && attended->stride(1) == 1,
                "tokenwise: attended: expected rows of total's shape ", total.sizes(), ", got ", attended->sizes());
    span.attended = attended->const_data_ptr();
    span.attended_ld = attended->stride(0);
    span.out = linear_of(out, span.width, span.width, layout, "out");
  }
  const size_t parts = layout.tensors();
  if (!mlp.empty()) {
    TORCH_CHECK(mlp.size() == 2 + 2 * parts, "tokenwise: mlp: expected a norm's 2 tensors, fc1's and fc2's, got ",
                mlp.size());
    span.before_mlp = {floats(mlp[0], span.width, "mlp's norm"), floats(mlp[1], span.width, "mlp's norm")};
    const int64_t inner = mlp[3].numel();  // of whole panels, so that fc2's K is theirs
    span.fc1 = linear_of(mlp.slice(2, parts), span.width, inner, layout, "fc1");
    span.fc2 = linear_of(mlp.slice(2 + parts, parts), inner, span.width, layout, "fc2",
                      (inner + kScaled - 1) / kScaled);
  }
  if (constant.has_value()) {
    TORCH_CHECK(constant->dim() == 2 && constant->size(0) > 0 && per_frame > 0,
                "tokenwise: constant: expected (frames, D) and per_frame >= 1, got ", constant->sizes(), " and ",
                per_frame);
    span.frames = constant->size(0);
    span.per_frame = per_frame;
    span.constant = floats(*constant, span.frames * span.width, "constant");
  }
  TORCH_CHECK(result.has_value() != reader.empty(), "tokenwise: expected reader and result together");
  if (result.has_value()) {
    TORCH_CHECK(reader.size() == 2 + parts, "tokenwise: reader: expected a norm's 2 tensors and a product's, got ",
                reader.size());
    TORCH_CHECK(result->device().is_cpu() && result->dim() == 2 && result->size(0) == span.tokens &&
                    result->is_contiguous() && result->scalar_type() == outside && result->size(1) % 16 == 0,
                "tokenwise: result: expected contiguous (tokens, N), N a multiple of 16, of attended's dtype, got ",
                result->scalar_type(), " ", result->sizes());
    span.before_reader = {floats(reader[0], span.width, "reader's norm"), floats(reader[1], span.width, "reader's norm")};
    span.reader = linear_of(reader.slice(2, parts), span.width, result->size(1), layout, "reader");
    span.result = result->data_ptr();
  }
  if (span.tokens == 0) {
    return;
  }
  run_on(layout, outside, kernel, span);
}

// A span that is the product of x (M, K) alone, to `columns`.
Span plain_span(const at::Tensor& x, const at::TensorList product, int64_t columns, const char* name) {
  TORCH_CHECK(!product.empty(), "tokenwise: ", name, ": expected a product's tensors, got none");
  TORCH_CHECK(x.device().is_cpu() && x.dim() == 2 && x.stride(1) == 1 && x.size(1) % 16 == 0 && x.size(1) > 0,
              "tokenwise: ", name, ": expected rows (M, K), K a multiple of 16, on the CPU, got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "tokenwise: ", name,
              ": expected float32 or bfloat16, got ", x.scalar_type());
  Span span;
  span.plain = true;
  span.tokens = x.size(0);
  span.width = x.size(1);
  span.attended = x.const_data_ptr();
  span.attended_ld = x.stride(0);
  span.reader = linear_of(product, span.width, columns, Layout(product[0]), name);
  return span;
}

void linear(const at::Tensor& x, const at::TensorList product, std::string activation, at::Tensor result,
            std::string kernel) {
  TORCH_CHECK(result.device().is_cpu() && result.dim() == 2 && result.size(0) == x.size(0) && result.is_contiguous() &&
                  result.scalar_type() == x.scalar_type() && result.size(1) % 16 == 0 && result.size(1) > 0,
              "tokenwise_linear: result: expected contiguous (M, N), N a multiple of 16, of x's dtype, got ",
              result.scalar_type(), " ", result.sizes());
  Span span = plain_span(x, product, result.size(1), "linear's x");
  span.result = result.data_ptr();
  span.activation = activation == "none" ? Activation::kNone : activation_of(activation);
  if (span.tokens > 0) {
    run_on(Layout(product[0]), x.scalar_type(), kernel, span);
  }
}

void embed(const at::Tensor& patches, const at::TensorList product, const at::Tensor& positions,
           const at::TensorList norm, at::Tensor total, double eps, std::string kernel) {
  TORCH_CHECK(total.device().is_cpu() && total.dim() == 2 && total.size(0) == patches.size(0) &&
                  total.is_contiguous() && total.scalar_type() == at::kFloat && total.size(1) % 16 == 0 &&
                  total.size(1) > 0,
              "tokenwise_embed: total: expected contiguous float32 (M, D), D a multiple of 16, got ",
              total.scalar_type(), " ", total.sizes());
  TORCH_CHECK(positions.dim() == 2 && positions.size(0) > 0, "tokenwise_embed: positions: expected (N, D), got ",
              positions.sizes());
  TORCH_CHECK(norm.size() == 2, "tokenwise_embed: norm: expected 2 tensors, got ", norm.size());
  const int64_t columns = total.size(1);
  Span span = plain_span(patches, product, columns, "embed's patches");
  span.places = positions.size(0);
  span.positions = floats(positions, span.places * columns, "embed's positions");
  span.before_reader = {floats(norm[0], columns, "embed's norm"), floats(norm[1], columns, "embed's norm")};
  span.total = total.data_ptr<float>();
  span.eps = static_cast<float>(eps);
  if (span.tokens > 0) {
    run_on(Layout(product[0]), patches.scalar_type(), kernel, span);
  }
}

std::vector<std::string> names(at::ScalarType dtype) {
  std::vector<std::string> out;
  const auto add = [&](auto in) {
    for (const panels::Kernel& kernel : panels::kernels<decltype(in)>()) {
      out.emplace_back(kernel.name);
    }
  };
  if (dtype == at::kChar) {
    add(uint8_t{});
  } else if (dtype == at::kBFloat16) {
    add(at::BFloat16{});
  } else if (dtype == at::kFloat) {
    add(Thirds{});
    add(float{});
  }
  return out;
}

}  // namespace
}  // namespace lbfast

TORCH_LIBRARY_IMPL(lbfast, CPU, m) {
  m.impl("tokenwise", lbfast::tokenwise);
  m.impl("tokenwise_embed", lbfast::embed);
  m.impl("tokenwise_linear", lbfast::linear);
}

TORCH_LIBRARY_IMPL(lbfast, CompositeExplicitAutograd, m) {
  m.impl("tokenwise_kernels", lbfast::names);
  m.impl("large_pages", lbfast::large_pages);
}
