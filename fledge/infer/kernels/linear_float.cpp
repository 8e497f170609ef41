// y = x W^T + b in float32 for few rows, with the weights as they lie in the model: nothing is packed or copied, so that
// weights which have just been trained are read as they are.
//
// Libraries of matrix products pack their operands first, which pays for many rows and costs more than the product for
// the one to some dozens of a decoding step. Here a tile of rows meets a tile of channels; lanes run along the inputs and
// are added up at the end. The sum of a row and a channel is formed in one order, whatever the tile, so a row's result
// does not depend on the rows beside it, to the last bit.

#include <ATen/Parallel.h>

#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace fledge {
namespace {

// Sums of a tile; as many as stay in registers beside what they meet.
constexpr int CHANNELS = LANES == 16 ? 4 : 2;
constexpr int MAX_ROWS = CHANNELS;
static_assert(MAX_ROWS * CHANNELS <= FLOATS, "a tile's sums are the lanes of one vector");

struct Problem {
  const float* x;
  const float* w;
  const float* bias;
  float* y;
  int64_t width, num_channels;
};

// The first `count` of 16 lanes, the others 0.
F32 load_part(const float* from, int64_t count) {
  float lane[FLOATS] = {};
  std::memcpy(lane, from, 4 * count);
  return load(lane);
}

template <int ROWS, int CHANS>
void tile(const Problem& problem, int64_t row, int64_t first) {
  const int64_t width = problem.width, whole = width / FLOATS * FLOATS;
  const float* x = problem.x + row * width;
  const float* w = problem.w + first * width;
  F32 acc[ROWS][CHANS];
  unrolled<ROWS>([&](auto r) INLINE { unrolled<CHANS>([&](auto c) INLINE { acc[r][c] = F32{}; }); });
  const auto meet = [&](auto from) INLINE {
    F32 weights[CHANS];
    unrolled<CHANS>([&](auto c) INLINE { weights[c] = from(w + c * width); });
    unrolled<ROWS>([&](auto r) INLINE {
      const F32 inputs = from(x + r * width);
      unrolled<CHANS>([&](auto c) INLINE { acc[r][c] = fma(inputs, weights[c], acc[r][c]); });
    });
  };
  for (int64_t k = 0; k < whole; k += FLOATS) meet([&](const float* of) INLINE { return load(of + k); });
  if (whole < width) meet([&](const float* of) INLINE { return load_part(of + whole, width - whole); });
  F32 parts[FLOATS] = {};
  unrolled<ROWS>([&](auto r) INLINE { unrolled<CHANS>([&](auto c) INLINE { parts[r * CHANS + c] = acc[r][c]; }); });
  float total[FLOATS];
  store(total, sums(parts));
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < CHANS; ++c)
      problem.y[(row + r) * problem.num_channels + first + c] =
          total[r * CHANS + c] + (problem.bias ? problem.bias[first + c] : 0.0f);
}

}  // namespace

void linear_float(const float* x, int64_t num_rows, int64_t width, const float* w, const float* bias, float* y,
                  int64_t num_channels) {
  const Problem problem{x, w, bias, y, width, num_channels};
  const int64_t num_blocks = (num_channels + CHANNELS - 1) / CHANNELS;
  const int64_t block_bytes = 4 * width * CHANNELS * std::min<int64_t>(num_rows, 8);
  at::parallel_for(0, num_blocks, std::max<int64_t>(1, TASK_BYTES / block_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * CHANNELS, count = std::min<int64_t>(CHANNELS, num_channels - first);
      tiles<MAX_ROWS>(num_rows, [&](int64_t row, auto rows) {
        as_constant<CHANNELS>(count, [&](auto channels) { tile<rows, channels>(problem, row, first); });
      });
    }
  });
}

}  // namespace fledge
