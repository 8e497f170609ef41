// y = x W^T + b with int8 weights (a scale for every output channel) and int8 activations (a scale for every row).
//
// Weights stand as w + 128 in unsigned bytes, in blocks of 32 channels: within a block, four consecutive inputs of
// channel 0, the same four of channel 1, ..., then the next four inputs. A block is one stream of memory, and the
// multiply-add of four byte pairs (VNNI) has its operands side by side. Sums are exact integers; whatever the tile, the
// number of rows or the number of threads, a row's result is the same to the last bit.

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "activations.h"
#include "kernels.h"
#include "simd.h"

namespace fledge {
namespace {

constexpr int CHANNELS = INT8_CHANNELS;
constexpr int VECTORS = CHANNELS / LANES;
// As many rows at once as accumulators fit into the registers.
constexpr int MAX_ROWS = LANES == 16 ? 12 : LANES == 8 ? 2 : 1;

struct Scaled {
  const float* x_scales;
  const int32_t* x_totals;
  const float* w_scales;
  const float* bias;
  float* y;
  int64_t num_channels;
};

void finish(const int32_t* acc, const Scaled& to, int64_t row, int64_t first) {
  const int64_t count = std::min<int64_t>(CHANNELS, to.num_channels - first);
  const int32_t offset = 128 * to.x_totals[row];
  const float x_scale = to.x_scales[row];
  float* y = to.y + row * to.num_channels + first;
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = float(acc[i] - offset) * x_scale * to.w_scales[first + i];
    y[i] = to.bias ? scaled + to.bias[first + i] : scaled;
  }
}

template <int ROWS>
void tile(const uint8_t* w, const int8_t* x, int64_t width, const Scaled& to, int64_t row, int64_t first) {
  // One row alone would wait for its own sums: it keeps several and adds them up at the end.
  constexpr int CHAINS = ROWS == 1 ? 4 : 1;
  I32 acc[ROWS][CHAINS][VECTORS];
  unrolled<ROWS>([&](auto r) INLINE {
    unrolled<CHAINS>([&](auto c) INLINE { unrolled<VECTORS>([&](auto v) INLINE { acc[r][c][v] = zero(); }); });
  });
  for (int64_t k = 0; k < width; k += 4 * CHAINS) {
    unrolled<CHAINS>([&](auto c) INLINE {
      const uint8_t* from = w + (k + 4 * c) * CHANNELS;
      Bytes weights[VECTORS];
      unrolled<VECTORS>([&](auto v) INLINE { weights[v] = load_bytes(from + 4 * LANES * v); });
      unrolled<ROWS>([&](auto r) INLINE {
        const Bytes four = shared(x + r * width + k + 4 * c);
        unrolled<VECTORS>([&](auto v) INLINE { acc[r][c][v] = dot(acc[r][c][v], weights[v], four); });
      });
    });
  }
  alignas(64) int32_t sums[ROWS][CHANNELS];
  unrolled<ROWS>([&](auto r) INLINE {
    unrolled<VECTORS>([&](auto v) INLINE {
      I32 total = acc[r][0][v];
      for (int c = 1; c < CHAINS; ++c) total = add(total, acc[r][c][v]);
      store(sums[r] + LANES * v, total);
    });
  });
  for (int r = 0; r < ROWS; ++r) finish(sums[r], to, row + r, first);
}

}  // namespace

void linear_int8(const float* x, int64_t num_rows, int64_t x_width, const uint8_t* w, int64_t width,
                 const float* w_scales, const float* bias, float* y, int64_t num_channels) {
  std::vector<int8_t> bytes(num_rows * width);
  std::vector<float> scales(num_rows);
  std::vector<int32_t> totals(num_rows);
  auto quantize_rows = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      scales[row] = quantize(x + row * x_width, x_width, bytes.data() + row * width, &totals[row]);
  };
  const int64_t rows_a_task = std::max<int64_t>(1, TASK_BYTES / x_width);
  at::parallel_for(0, num_rows, rows_a_task, quantize_rows);
  const Scaled to{scales.data(), totals.data(), w_scales, bias, y, num_channels};
  const int64_t num_blocks = (num_channels + CHANNELS - 1) / CHANNELS;
  const int64_t blocks_a_task = std::max<int64_t>(1, TASK_BYTES / (CHANNELS * width));
  at::parallel_for(0, num_blocks, blocks_a_task, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      tiles<MAX_ROWS>(num_rows, [&](int64_t row, auto rows) {
        tile<rows>(w + block * CHANNELS * width, bytes.data() + row * width, width, to, row, block * CHANNELS);
      });
  });
}

}  // namespace fledge
