// Activations to signed bytes: symmetric, a scale for each group of a row, so that no row depends on another.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

namespace fledge {

constexpr float QMAX = 127;
// Below this the reciprocal of the scale could overflow; such a row is worth zero.
constexpr float LEAST = 1e-30f;

// Writes round(x / scale) for `count` numbers and returns scale = max|x| / 127; `total` receives the sum of the bytes.
// Numbers that are not finite give bytes of zero and a scale that is NaN: what is made of them is NaN, never a crash.
inline float quantize(const float* x, int64_t count, int8_t* bytes, int32_t* total) {
  uint32_t top = 0;  // the bits of |x| are ordered as |x| is, infinity and NaN above all numbers
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  float largest;
  std::memcpy(&largest, &top, 4);
  *total = 0;
  if (top >= 0x7f800000u || largest < LEAST) {
    std::memset(bytes, 0, count);
    return top >= 0x7f800000u ? std::numeric_limits<float>::quiet_NaN() : 0.0f;
  }
  const float inverse = QMAX / largest;
  int32_t added = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t rounded = int32_t(std::nearbyint(x[i] * inverse));
    bytes[i] = int8_t(rounded);
    added += rounded;
  }
  *total = added;
  return largest / QMAX;
}

struct Activations {
  std::vector<int8_t> bytes;    // (rows, groups x group), zeros behind a row's end
  std::vector<float> scales;    // (rows, groups)
  std::vector<int32_t> totals;  // of the bytes of each group
};

inline Activations quantize_rows(const float* x, int64_t num_rows, int64_t x_width, int64_t num_groups, int64_t group) {
  const int64_t count = num_rows * num_groups;
  Activations to{std::vector<int8_t>(count * group), std::vector<float>(count), std::vector<int32_t>(count)};
  const int64_t rows_a_task = std::max<int64_t>(1, TASK_BYTES / x_width);
  at::parallel_for(0, num_rows, rows_a_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t at = row * num_groups + g, length = std::min(group, x_width - g * group);
        to.scales[at] = quantize(x + row * x_width + g * group, length, &to.bytes[at * group], &to.totals[at]);
      }
  });
  return to;
}

}  // namespace fledge
