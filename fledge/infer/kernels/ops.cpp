// The kernels as torch operators of the namespace `fledge`, for the CPU. kernels.py declares their schemas.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "kernels.h"

namespace {

using at::Tensor;

const float* floats(const std::optional<Tensor>& x) { return x.has_value() ? x->const_data_ptr<float>() : nullptr; }

Tensor with_last(const Tensor& x, int64_t width) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = width;
  return at::empty(shape, x.options());
}

Tensor linear_int8(const Tensor& x, const Tensor& w, const Tensor& scales, const std::optional<Tensor>& bias) {
  const Tensor rows = x.contiguous();
  const int64_t x_width = rows.size(-1), num_groups = w.size(1) * 4 / fledge::INT8_GROUP, num_channels = scales.size(0);
  TORCH_CHECK(rows.scalar_type() == at::kFloat, "fledge::linear_int8: x must be float32");
  TORCH_CHECK(w.dim() == 4 && w.size(2) == fledge::INT8_CHANNELS && w.size(3) == 4 && w.is_contiguous() &&
                  scales.is_contiguous() && (!bias.has_value() || bias->is_contiguous()),
              "fledge::linear_int8: weights are not packed");
  TORCH_CHECK((x_width + fledge::INT8_GROUP - 1) / fledge::INT8_GROUP * fledge::INT8_GROUP == w.size(1) * 4 &&
                  num_channels <= w.size(0) * fledge::INT8_CHANNELS &&
                  (!bias.has_value() || bias->size(0) == num_channels),
              "fledge::linear_int8: shapes differ");
  Tensor y = with_last(rows, num_channels);
  if (y.numel() > 0)
    fledge::linear_int8(rows.const_data_ptr<float>(), rows.numel() / x_width, x_width, w.const_data_ptr<uint8_t>(),
                        num_groups, scales.const_data_ptr<float>(), floats(bias), y.mutable_data_ptr<float>(), num_channels);
  return y;
}

Tensor linear_int4(const Tensor& x, const Tensor& w, int64_t num_channels, const std::optional<Tensor>& bias) {
  const Tensor rows = x.contiguous();
  const int64_t x_width = rows.size(-1), num_groups = w.size(1);
  TORCH_CHECK(rows.scalar_type() == at::kFloat, "fledge::linear_int4: x must be float32");
  TORCH_CHECK(w.dim() == 3 && w.size(2) == 20 * fledge::INT4_CHANNELS && w.is_contiguous() &&
                  (!bias.has_value() || bias->is_contiguous()),
              "fledge::linear_int4: weights are not packed");
  TORCH_CHECK((x_width + fledge::INT4_GROUP - 1) / fledge::INT4_GROUP == num_groups &&
                  num_channels <= w.size(0) * fledge::INT4_CHANNELS && (!bias.has_value() || bias->size(0) == num_channels),
              "fledge::linear_int4: shapes differ");
  Tensor y = with_last(rows, num_channels);
  if (y.numel() > 0)
    fledge::linear_int4(rows.const_data_ptr<float>(), rows.numel() / x_width, x_width, w.const_data_ptr<uint8_t>(),
                        num_groups, floats(bias), y.mutable_data_ptr<float>(), num_channels);
  return y;
}

Tensor linear_float(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Tensor rows = x.contiguous();
  TORCH_CHECK(rows.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat && weight.is_contiguous() &&
                  (!bias.has_value() || (bias->scalar_type() == at::kFloat && bias->is_contiguous())),
              "fledge::linear_float: all float32, weights contiguous");
  TORCH_CHECK(weight.dim() == 2 && rows.size(-1) == weight.size(1) &&
                  (!bias.has_value() || bias->numel() == weight.size(0)),
              "fledge::linear_float: shapes differ");
  Tensor y = with_last(rows, weight.size(0));
  if (y.numel() > 0)
    fledge::linear_float(rows.const_data_ptr<float>(), y.numel() / weight.size(0), weight.size(1),
                         weight.const_data_ptr<float>(), floats(bias), y.mutable_data_ptr<float>(), weight.size(0));
  return y;
}

// A block number outside the cache would read foreign memory: it is refused, not trusted.
void check_tables(const Tensor& tables, const Tensor& lengths, int64_t num_blocks, int64_t block_size) {
  const int64_t* table = tables.const_data_ptr<int64_t>();
  const int64_t* length = lengths.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < lengths.size(0); ++n) {
    const int64_t used = (length[n] + block_size - 1) / block_size;
    TORCH_CHECK(length[n] >= 1 && used <= tables.size(1), "fledge::paged_attention: length ", length[n],
                " does not fit its table");
    for (int64_t m = 0; m < used; ++m) {
      const int64_t block = table[n * tables.size(1) + m];
      TORCH_CHECK(block >= 0 && block < num_blocks, "fledge::paged_attention: there is no block ", block);
    }
  }
}

template <class Number, class Stored>
fledge::Pages<Number> pages_of(const Tensor& keys, const Tensor& values) {
  const auto* from = reinterpret_cast<const Number*>(keys.const_data_ptr<Stored>());
  const auto* value_from = reinterpret_cast<const Number*>(values.const_data_ptr<Stored>());
  return {from, value_from, keys.size(1), keys.size(2), keys.size(3), values.size(3)};
}

Tensor paged_attention(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& tables,
                       const Tensor& lengths, double scale, int64_t window) {
  const Tensor queries = q.contiguous(), blocks = tables.contiguous(), seen = lengths.contiguous();
  const bool is_half = keys.scalar_type() == at::kHalf;
  TORCH_CHECK(queries.scalar_type() == at::kFloat && (is_half || keys.scalar_type() == at::kFloat) &&
                  values.scalar_type() == keys.scalar_type() && keys.is_contiguous() && values.is_contiguous(),
              "fledge::paged_attention: float32 queries over float32 or float16 pages, contiguous");
  TORCH_CHECK(queries.dim() == 3 && keys.dim() == 4 && values.dim() == 4 && blocks.dim() == 2 && seen.dim() == 1 &&
                  keys.size(3) == queries.size(2) && queries.size(1) % keys.size(2) == 0 &&
                  values.sizes().slice(0, 3) == keys.sizes().slice(0, 3) && blocks.size(0) == queries.size(0) &&
                  seen.size(0) == queries.size(0),
              "fledge::paged_attention: shapes differ");
  check_tables(blocks, seen, keys.size(0), keys.size(1));
  Tensor y = with_last(queries, values.size(3));
  const fledge::Queries rows{blocks.const_data_ptr<int64_t>(), seen.const_data_ptr<int64_t>(), queries.size(0),
                             blocks.size(1), queries.size(1)};
  const auto attend = [&](const auto& pages) {
    fledge::paged_attention(queries.const_data_ptr<float>(), rows, pages, float(scale), window,
                            y.mutable_data_ptr<float>());
  };
  if (is_half)
    attend(pages_of<fledge::Half, at::Half>(keys, values));
  else
    attend(pages_of<float, float>(keys, values));
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(fledge, CPU, m) {
  m.impl("linear_int8", linear_int8);
  m.impl("linear_int4", linear_int4);
  m.impl("linear_float", linear_float);
  m.impl("paged_attention", paged_attention);
}
