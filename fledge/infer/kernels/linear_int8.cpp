// y = x W^T + b with int8 weights (a scale for every output channel) and int8 activations, which have a scale for each
// 128 inputs of a row: one outlier, and language models have them, then spoils the rounding of its group only.
//
// Weights stand as w + 128 in unsigned bytes, in blocks of 32 channels: within a block, four consecutive inputs of
// channel 0, the same four of channel 1, ..., then the next four inputs. A block is one stream of memory, and the
// multiply-add of four byte pairs (VNNI) has its operands side by side. Sums within a group are exact integers; groups
// are added up in their order, with a product and a sum that round apart. So a row's result is the same to the last bit
// on every machine, whatever the tile, the number of rows or the number of threads.

#include <ATen/Parallel.h>

#include <algorithm>

#include "activations.h"
#include "kernels.h"
#include "simd.h"

namespace fledge {
namespace {

constexpr int CHANNELS = INT8_CHANNELS;
constexpr int64_t GROUP = INT8_GROUP;
constexpr int VECTORS = CHANNELS / LANES;
constexpr int HALVES = CHANNELS / FLOATS;
// As many rows at once as the sums of one group fit into the registers, beside the weights and what they meet.
constexpr int MAX_ROWS = LANES == 16 ? 12 : LANES == 8 ? 2 : 1;

struct Problem {
  const int8_t* bytes;    // (rows, width)
  const float* scales;    // (rows, groups)
  const int32_t* totals;  // of the bytes of each group
  const float* w_scales;
  const float* bias;
  float* y;
  int64_t num_groups, num_channels;
};

// Adds one group's part to `acc`, row by row a float for every channel. A function of its own, with `acc` in memory:
// its registers are for the group's own sums. One row alone would wait for its sums: it keeps several and adds them up
// at the end.
template <int ROWS>
__attribute__((noinline)) void add_group(const uint8_t* w, const int8_t* x, const float* scales, const int32_t* totals,
                                         int64_t num_groups, float (*acc)[CHANNELS]) {
  constexpr int CHAINS = ROWS == 1 ? 4 : 1;
  const int64_t stride = num_groups * GROUP;
  I32 sums[ROWS][CHAINS][VECTORS];
  unrolled<ROWS>([&](auto r) INLINE {
    const I32 offset = broadcast(-128 * totals[r * num_groups]);  // weights stand 128 too high
    unrolled<CHAINS>([&](auto c) INLINE {
      unrolled<VECTORS>([&](auto v) INLINE { sums[r][c][v] = c == 0 ? offset : zero(); });
    });
  });
  for (int64_t k = 0; k < GROUP; k += 4 * CHAINS) {
    unrolled<CHAINS>([&](auto c) INLINE {
      const uint8_t* from = w + (k + 4 * c) * CHANNELS;
      Bytes weights[VECTORS];
      unrolled<VECTORS>([&](auto v) INLINE { weights[v] = load_bytes(from + 4 * LANES * v); });
      unrolled<ROWS>([&](auto r) INLINE {
        const Bytes four = shared(x + r * stride + k + 4 * c);
        unrolled<VECTORS>([&](auto v) INLINE { sums[r][c][v] = dot(sums[r][c][v], weights[v], four); });
      });
    });
  }
  unrolled<ROWS>([&](auto r) INLINE {
    const F32 scale = fill(scales[r * num_groups]);
    unrolled<HALVES>([&](auto h) INLINE {
      constexpr int PER_HALF = VECTORS / HALVES;
      I32 whole[PER_HALF];
      unrolled<PER_HALF>([&](auto v) INLINE {
        I32 total = sums[r][0][h * PER_HALF + v];
        unrolled<CHAINS - 1>([&](auto c) INLINE { total = add(total, sums[r][c + 1][h * PER_HALF + v]); });
        whole[v] = total;
      });
      float* to = acc[r] + h * FLOATS;
      store(to, load(to) + to_floats(whole) * scale);
    });
  });
}

template <int ROWS>
void tile(const uint8_t* w, const Problem& problem, int64_t row, int64_t first) {
  const int64_t num_groups = problem.num_groups;
  alignas(64) float lanes[ROWS][CHANNELS] = {};
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t at = row * num_groups + g;
    add_group<ROWS>(w + g * GROUP * CHANNELS, problem.bytes + at * GROUP, problem.scales + at, problem.totals + at,
                    num_groups, lanes);
  }
  const int64_t count = std::min<int64_t>(CHANNELS, problem.num_channels - first);
  for (int r = 0; r < ROWS; ++r) {
    float* y = problem.y + (row + r) * problem.num_channels + first;
    for (int64_t i = 0; i < count; ++i) {
      const float scaled = lanes[r][i] * problem.w_scales[first + i];
      y[i] = problem.bias ? scaled + problem.bias[first + i] : scaled;
    }
  }
}

}  // namespace

void linear_int8(const float* x, int64_t num_rows, int64_t x_width, const uint8_t* w, int64_t num_groups,
                 const float* w_scales, const float* bias, float* y, int64_t num_channels) {
  const Activations activations = quantize_rows(x, num_rows, x_width, num_groups, GROUP);
  const Problem problem{activations.bytes.data(), activations.scales.data(), activations.totals.data(), w_scales, bias, y,
                        num_groups, num_channels};
  const int64_t num_blocks = (num_channels + CHANNELS - 1) / CHANNELS, block_bytes = num_groups * GROUP * CHANNELS;
  at::parallel_for(0, num_blocks, std::max<int64_t>(1, TASK_BYTES / block_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      tiles<MAX_ROWS>(num_rows, [&](int64_t row, auto rows) {
        tile<rows>(w + block * block_bytes, problem, row, block * CHANNELS);
      });
  });
}

}  // namespace fledge
