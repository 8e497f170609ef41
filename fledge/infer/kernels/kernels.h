// What the kernels offer to ops.cpp: plain pointers in, plain pointers out; the callers have checked the shapes.

#pragma once

#include <cstdint>

namespace fledge {

constexpr int CHANNELS = 32;  // output channels side by side in a block of packed weights
// Work below this many bytes of weights is not worth waking a thread for.
constexpr int64_t TASK_BYTES = 65536;

// y (num_rows, num_channels) = x (num_rows, x_width) times w, packed as linear_int8.cpp says, `width` inputs a channel:
// x_width rounded up to a multiple of 16. `bias` may be null.
void linear_int8(const float* x, int64_t num_rows, int64_t x_width, const uint8_t* w, int64_t width,
                 const float* w_scales, const float* bias, float* y, int64_t num_channels);

}  // namespace fledge
