// What stands at the door of each native op: its kernels read memory by sizes that nobody checks again.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>
#include <utility>

namespace lbfast {

// Raises, naming the argument, unless x lies on the CPU in that dtype and shape, at any strides.
inline void expect(const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(x.defined() && x.device().is_cpu() && x.layout() == at::kStrided, name,
                    ": expected a tensor on the CPU");
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, name, ": expected ", dtype, ", got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.sizes() == sizes, name, ": expected ", sizes, ", got ", x.sizes());
}

// The same, and contiguous.
inline void expect_dense(const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  expect(name, x, dtype, sizes);
  TORCH_CHECK_VALUE(x.is_contiguous(), name, ": expected a contiguous tensor, got strides ", x.strides());
}

// Raises unless x is float32 or bfloat16, of so many axes, on the CPU.
inline void expect_operand(const char* name, const at::Tensor& x, int64_t axes) {
  TORCH_CHECK_VALUE(x.dim() == axes, name, ": expected ", axes, " axes, got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, name,
                   ": expected float32 or bfloat16, got ", x.scalar_type());
  expect(name, x, x.scalar_type(), x.sizes());
}

// The first and the last byte of a tensor's numbers; strides are never negative.
inline std::pair<uintptr_t, uintptr_t> reach(const at::Tensor& x) {
  int64_t last = 0;
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    last += (x.size(axis) - 1) * x.stride(axis);
  }
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  return {begin, begin + static_cast<uintptr_t>(last + 1) * x.element_size() - 1};
}

// Raises unless what is written shares no memory with what is read: from first byte to last, gaps between included.
inline void expect_apart(const char* name, const at::Tensor& written, std::initializer_list<at::Tensor> others) {
  for (const at::Tensor& other : others) {
    if (written.numel() == 0 || other.numel() == 0) {
      continue;
    }
    const auto [first, last] = reach(written);
    const auto [begin, end] = reach(other);
    TORCH_CHECK_VALUE(last < begin || end < first, name,
                      ": expected memory of its own, got some that another argument has too");
  }
}

}  // namespace lbfast
