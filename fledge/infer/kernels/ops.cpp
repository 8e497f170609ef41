// The kernels as torch operators of the namespace `fledge`, for the CPU. kernels.py declares their schemas.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "kernels.h"

namespace {

using at::Tensor;

const float* floats(const std::optional<Tensor>& x) { return x.has_value() ? x->const_data_ptr<float>() : nullptr; }

Tensor linear_int8(const Tensor& x, const Tensor& w, const Tensor& scales, const std::optional<Tensor>& bias) {
  const Tensor rows = x.contiguous();
  const int64_t x_width = rows.size(-1), width = w.size(1) * 4, num_channels = scales.size(0);
  TORCH_CHECK(rows.scalar_type() == at::kFloat && w.is_contiguous() && scales.is_contiguous(), "fledge::linear_int8: dtype or layout");
  TORCH_CHECK(w.dim() == 4 && w.size(2) == fledge::CHANNELS && w.size(3) == 4, "fledge::linear_int8: weights are not packed");
  TORCH_CHECK(x_width <= width && width < x_width + 16 && num_channels <= w.size(0) * fledge::CHANNELS, "fledge::linear_int8: shapes differ");
  auto shape = rows.sizes().vec();
  shape.back() = num_channels;
  Tensor y = at::empty(shape, rows.options());
  if (y.numel() > 0)
    fledge::linear_int8(rows.const_data_ptr<float>(), rows.numel() / x_width, x_width, w.const_data_ptr<uint8_t>(), width,
                        scales.const_data_ptr<float>(), floats(bias), y.mutable_data_ptr<float>(), num_channels);
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fledge, CPU, m) {
  m.impl("linear_int8", linear_int8);
}
