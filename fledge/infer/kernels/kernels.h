// What the kernels offer to ops.cpp: plain pointers in, plain pointers out; the callers have checked the shapes.

#pragma once

#include <cstdint>

namespace fledge {

// Output channels side by side in a block of packed weights.
constexpr int INT8_CHANNELS = 32;
constexpr int INT4_CHANNELS = 16;
// Work below this many bytes of weights is not worth waking a thread for.
constexpr int64_t TASK_BYTES = 65536;

// Inputs that share a scale: of the activations in both, of the weights too (and a minimum) in int4.
constexpr int64_t INT8_GROUP = 128;
constexpr int64_t INT4_GROUP = 32;

// y (num_rows, num_channels) = x (num_rows, x_width) times w, packed as linear_int8.cpp says, `num_groups` groups of
// inputs a channel: x_width / 128 rounded up. `bias` may be null.
void linear_int8(const float* x, int64_t num_rows, int64_t x_width, const uint8_t* w, int64_t num_groups,
                 const float* w_scales, const float* bias, float* y, int64_t num_channels);

// As above with 4-bit weights, packed as linear_int4.cpp says; x_width / 32 groups, rounded up.
void linear_int4(const float* x, int64_t num_rows, int64_t x_width, const uint8_t* w, int64_t num_groups,
                 const float* bias, float* y, int64_t num_channels);

// y (num_rows, num_channels) = x (num_rows, width) times w (num_channels, width), all float32. `bias` may be null.
void linear_float(const float* x, int64_t num_rows, int64_t width, const float* w, const float* bias, float* y,
                  int64_t num_channels);

// A number of half precision (IEEE 754 binary16), as it stands in memory.
struct Half {
  uint16_t bits;
};

// The memory of the cache at one attention site: (blocks, block_size, num_groups, width), keys and values, float or Half.
template <class Number>
struct Pages {
  const Number* keys;
  const Number* values;
  int64_t block_size, num_groups, key_width, value_width;
};

// Query n sees positions 0 to lengths[n] - 1; position p stands in block tables[n][p / block_size].
struct Queries {
  const int64_t* tables;  // (count, table_width)
  const int64_t* lengths;
  int64_t count, table_width, num_heads;
};

// y (count, num_heads, value_width) from q (count, num_heads, key_width). `window` 0 shows everything.
template <class Number>
void paged_attention(const float* q, const Queries& queries, const Pages<Number>& pages, float scale, int64_t window,
                     float* y);

}  // namespace fledge
