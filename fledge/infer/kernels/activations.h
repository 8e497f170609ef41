// Activations to signed bytes: symmetric, one scale for a row or for each group of it.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

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

}  // namespace fledge
