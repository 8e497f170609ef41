// y = x W^T + b with 4-bit weights in groups of 32 inputs, w = q * scale + minimum (what GGUF calls Q4_1; Q4_0 is the
// case minimum = -8 * scale), and int8 activations with a scale for each group of a row. Scales are half precision.
//
// Packed: blocks of 16 channels; in a block, group after group, 320 bytes each: four times 64 bytes that hold, for
// every channel, four inputs in the low halves and the four inputs 16 further on in the high halves; then 16 scales and
// 16 minima. Sums within a group are exact integers; groups are added up in their order whatever the tile, so a row's
// result is the same to the last bit in every batch and with any number of threads.

#include <ATen/Parallel.h>

#include <algorithm>

#include "activations.h"
#include "kernels.h"
#include "simd.h"

namespace fledge {
namespace {

constexpr int CHANNELS = INT4_CHANNELS;
constexpr int64_t GROUP = INT4_GROUP;
static_assert(CHANNELS == FLOATS);
constexpr int64_t QUADS = 4;  // times 64 bytes of a group
constexpr int64_t QUAD_BYTES = 4 * CHANNELS;
constexpr int64_t GROUP_BYTES = QUADS * QUAD_BYTES + 4 * CHANNELS;
// As many rows at once as their sums fit into the registers beside the weights of a group.
constexpr int MAX_ROWS = LANES == 16 ? 12 : 2;

struct Problem {
  const int8_t* bytes;    // (rows, width)
  const float* scales;    // (rows, groups)
  const int32_t* totals;  // of the bytes of each group
  const float* bias;
  float* y;
  int64_t num_groups, num_channels;
};

// The sums of one group, row by row, as floats.
template <int ROWS>
INLINE inline void group_sums(const uint8_t* group, const int8_t* x, int64_t stride, F32 (&out)[ROWS]) {
  constexpr int VECTORS = FLOATS / LANES;
  I32 whole[ROWS][VECTORS];
  unrolled<VECTORS>([&](auto v) INLINE {
    Bytes low[QUADS], high[QUADS];
    unrolled<QUADS>([&](auto j) INLINE {
      const Bytes both = load_bytes(group + j * QUAD_BYTES + 4 * v * LANES);
      low[j] = low_nibbles(both);
      high[j] = high_nibbles(both);
    });
    unrolled<ROWS>([&](auto r) INLINE {
      I32 acc = zero();
      unrolled<QUADS>([&](auto j) INLINE { acc = dot(acc, low[j], shared(x + r * stride + 4 * j)); });
      unrolled<QUADS>([&](auto j) INLINE { acc = dot(acc, high[j], shared(x + r * stride + GROUP / 2 + 4 * j)); });
      whole[r][v] = acc;
    });
  });
  unrolled<ROWS>([&](auto r) INLINE { out[r] = to_floats(whole[r]); });
}

template <int ROWS>
void tile(const uint8_t* w, const Problem& problem, int64_t row, int64_t first) {
  const int64_t num_groups = problem.num_groups, stride = num_groups * GROUP;
  const int8_t* x = problem.bytes + row * stride;
  F32 acc[ROWS];
  unrolled<ROWS>([&](auto r) INLINE { acc[r] = F32{}; });
  for (int64_t g = 0; g < num_groups; ++g) {
    const uint8_t* group = w + g * GROUP_BYTES;
    const float* scales = problem.scales + row * num_groups + g;
    const int32_t* totals = problem.totals + row * num_groups + g;
    const Half* numbers = reinterpret_cast<const Half*>(group + QUADS * QUAD_BYTES);
    const F32 scale = load(numbers), minimum = load(numbers + CHANNELS);
    F32 exact[ROWS];
    group_sums<ROWS>(group, x + g * GROUP, stride, exact);
    unrolled<ROWS>([&](auto r) INLINE {
      const float own = scales[r * num_groups];
      acc[r] = fma(exact[r] * fill(own), scale, acc[r]);
      acc[r] = fma(fill(own * float(totals[r * num_groups])), minimum, acc[r]);
    });
  }
  alignas(64) float lanes[ROWS][CHANNELS];
  unrolled<ROWS>([&](auto r) INLINE { store(lanes[r], acc[r]); });
  const int64_t count = std::min<int64_t>(CHANNELS, problem.num_channels - first);
  for (int r = 0; r < ROWS; ++r) {
    float* y = problem.y + (row + r) * problem.num_channels + first;
    for (int64_t i = 0; i < count; ++i) y[i] = problem.bias ? lanes[r][i] + problem.bias[first + i] : lanes[r][i];
  }
}

}  // namespace

void linear_int4(const float* x, int64_t num_rows, int64_t x_width, const uint8_t* w, int64_t num_groups,
                 const float* bias, float* y, int64_t num_channels) {
  const Activations activations = quantize_rows(x, num_rows, x_width, num_groups, GROUP);
  const Problem problem{activations.bytes.data(), activations.scales.data(), activations.totals.data(), bias, y,
                        num_groups, num_channels};
  const int64_t num_blocks = (num_channels + CHANNELS - 1) / CHANNELS, block_bytes = num_groups * GROUP_BYTES;
  at::parallel_for(0, num_blocks, std::max<int64_t>(1, TASK_BYTES / block_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      tiles<MAX_ROWS>(num_rows, [&](int64_t row, auto rows) {
        tile<rows>(w + block * block_bytes, problem, row, block * CHANNELS);
      });
  });
}

}  // namespace fledge
