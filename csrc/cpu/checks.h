// What stands at the door of each native op: its kernels read memory by sizes that nobody checks again.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

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

// Raises unless what is written shares no memory with what is read.
inline void expect_apart(const char* name, const at::Tensor& written, std::initializer_list<at::Tensor> others) {
  for (const at::Tensor& other : others) {
    TORCH_CHECK_VALUE(at::get_overlap_status(written, other) == at::MemOverlapStatus::No || written.numel() == 0 ||
                          other.numel() == 0,
                      name, ": expected memory of its own, got some that another argument has too");
  }
}

}  // namespace lbfast
