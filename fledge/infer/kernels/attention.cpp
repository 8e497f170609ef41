// Decoding attention over pages: every query sees the positions of its own sequence, which stand in blocks of the cache
// (Kwon et al. 2023, PagedAttention). Long sequences are cut at fixed positions and the parts joined by the usual
// rescaling (Milakov & Gimelshein 2018), so threads share one sequence and the result does not depend on their number.

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace fledge {
namespace {

constexpr int64_t PART = 256;        // positions a part, cut at multiples of it
constexpr int SHARED = 4;            // query heads of one key head worked on together
constexpr int64_t CACHE_LINE = 64;   // bytes
constexpr int64_t TASK_WORK = 16384;  // multiply-adds that are worth waking a thread for

struct Part {
  int64_t query, begin, end;  // positions begin to end - 1
};

template <class Number>
F32 load_some(const Number* from, int64_t count) {
  if (count >= FLOATS) return load(from);
  Number lane[FLOATS] = {};
  std::memcpy(lane, from, sizeof(Number) * count);
  return load(lane);
}

void store_some(float* to, F32 x, int64_t count) {
  if (count >= FLOATS) return store(to, x);
  float lane[FLOATS];
  store(lane, x);
  std::memcpy(to, lane, 4 * count);
}

// Where the keys and values of one part stand: rows of `width` numbers, (slot * num_groups + group) of them before.
struct Rows {
  int64_t at[PART];
};

template <class Number>
void find_rows(const Pages<Number>& pages, const int64_t* table, int64_t group, const Part& part, Rows& rows) {
  int64_t offset = part.begin % pages.block_size, block = part.begin / pages.block_size;
  for (int64_t i = 0; i < part.end - part.begin; ++i) {
    rows.at[i] = (table[block] * pages.block_size + offset) * pages.num_groups + group;
    if (++offset == pages.block_size) offset = 0, ++block;
  }
}

// A head's keys lie far apart, where no hardware looks ahead: the row `ahead` of `i` is asked for in time.
template <class Number>
INLINE inline void prefetch(const Number* base, const Rows& rows, int64_t i, int64_t ahead, int64_t count, int64_t width) {
  if (i + ahead >= count) return;
  const Number* row = base + rows.at[i + ahead] * width;
  for (int64_t k = 0; k < width; k += CACHE_LINE / sizeof(Number)) __builtin_prefetch(row + k);
}

// scores[r][i] = scale * q_r . k of position begin + i.
template <class Number>
void score(const float* q, int64_t num_shared, const Pages<Number>& pages, const Rows& rows, int64_t count, float scale,
           float (*scores)[PART]) {
  const int64_t width = pages.key_width;
  for (int64_t first = 0; first < count; first += FLOATS) {
    const Number* keys[FLOATS];
    for (int64_t i = 0; i < FLOATS; ++i) prefetch(pages.keys, rows, first + i, FLOATS, count, width);
    for (int64_t i = 0; i < FLOATS; ++i) keys[i] = pages.keys + rows.at[std::min(first + i, count - 1)] * width;
    for (int64_t r = 0; r < num_shared; ++r) {
      F32 products[FLOATS] = {};
      for (int64_t k = 0; k < width; k += FLOATS) {
        const F32 some = load_some(q + r * width + k, width - k);
        unrolled<FLOATS>([&](auto i) INLINE { products[i] = fma(some, load_some(keys[i] + k, width - k), products[i]); });
      }
      store(scores[r] + first, sums(products) * fill(scale));
    }
  }
}

// Turns scores into exp(score - their maximum); returns (maximum, sum).
std::pair<float, float> soften(float* scores, int64_t count) {
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < count; ++i) top = scores[i] > top ? scores[i] : top;
  for (int64_t i = count; i % FLOATS; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  F32 total = {};
  for (int64_t i = 0; i < count; i += FLOATS) {
    const F32 weight = exp(load(scores + i) - fill(top));
    store(scores + i, weight);
    total += weight;
  }
  return {top, sum(total)};
}

// out[r] = sum of the values of the part, weighted by weights[r].
template <int ROWS, class Number>
void mix(const float (*weights)[PART], const Pages<Number>& pages, const Rows& rows, int64_t count, float* out) {
  constexpr int STRIPE = 4;  // vectors of one value at once
  const int64_t width = pages.value_width;
  int64_t column = 0;
  for (; column + STRIPE * FLOATS <= width; column += STRIPE * FLOATS) {
    F32 acc[ROWS][STRIPE];
    unrolled<ROWS>([&](auto r) INLINE { unrolled<STRIPE>([&](auto s) INLINE { acc[r][s] = F32{}; }); });
    for (int64_t i = 0; i < count; ++i) {
      const Number* value = pages.values + rows.at[i] * width + column;
      if (column == 0) prefetch(pages.values, rows, i, FLOATS, count, width);
      unrolled<STRIPE>([&](auto s) INLINE {
        const F32 some = load(value + s * FLOATS);
        unrolled<ROWS>([&](auto r) INLINE { acc[r][s] = fma(fill(weights[r][i]), some, acc[r][s]); });
      });
    }
    unrolled<ROWS>([&](auto r) INLINE {
      unrolled<STRIPE>([&](auto s) INLINE { store(out + r * width + column + s * FLOATS, acc[r][s]); });
    });
  }
  for (; column < width; column += FLOATS)  // what is left of a width that is no multiple of 64
    for (int r = 0; r < ROWS; ++r) {
      F32 acc = {};
      for (int64_t i = 0; i < count; ++i)
        acc = fma(fill(weights[r][i]), load_some(pages.values + rows.at[i] * width + column, width - column), acc);
      store_some(out + r * width + column, acc, width - column);
    }
}

// What one part gives for one key head and all the query heads that share it; `tops` and `totals` likewise a head.
template <class Number>
void attend_part(const float* q, int64_t num_shared, const Pages<Number>& pages, const int64_t* table, int64_t group,
                 const Part& part, float scale, float* out, float* tops, float* totals) {
  alignas(64) float scores[SHARED][PART];
  Rows rows;
  find_rows(pages, table, group, part, rows);
  const int64_t length = part.end - part.begin;
  for (int64_t first = 0; first < num_shared; first += SHARED) {
    const int64_t count = std::min<int64_t>(SHARED, num_shared - first);
    score(q + first * pages.key_width, count, pages, rows, length, scale, scores);
    for (int64_t r = 0; r < count; ++r) std::tie(tops[first + r], totals[first + r]) = soften(scores[r], length);
    float* to = out + first * pages.value_width;
    as_constant<SHARED>(count, [&](auto number) { mix<number>(scores, pages, rows, length, to); });
  }
}

// Joins the parts of one head of one query: parts stand `stride` heads apart.
void join(int64_t num_parts, int64_t stride, int64_t width, const float* outs, const float* tops, const float* totals,
          float* y) {
  float top = tops[0];
  for (int64_t part = 1; part < num_parts; ++part) top = tops[part * stride] > top ? tops[part * stride] : top;
  float total = 0;
  std::fill(y, y + width, 0.0f);
  for (int64_t part = 0; part < num_parts; ++part) {
    const float share = exp(fill(tops[part * stride] - top))[0];
    total += share * totals[part * stride];
    for (int64_t i = 0; i < width; ++i) y[i] += share * outs[part * stride * width + i];
  }
  for (int64_t i = 0; i < width; ++i) y[i] /= total;
}

}  // namespace

template <class Number>
void paged_attention(const float* q, const Queries& queries, const Pages<Number>& pages, float scale, int64_t window,
                     float* y) {
  std::vector<Part> parts;
  std::vector<int64_t> first_part(queries.count + 1, 0);
  int64_t num_positions = 0;
  for (int64_t n = 0; n < queries.count; ++n) {
    const int64_t end = queries.lengths[n], begin = window > 0 ? std::max<int64_t>(0, end - window) : 0;
    for (int64_t at = begin; at < end; at = (at / PART + 1) * PART)
      parts.push_back({n, at, std::min(end, (at / PART + 1) * PART)});
    first_part[n + 1] = int64_t(parts.size());
    num_positions += end - begin;
  }
  const int64_t num_groups = pages.num_groups, num_heads = queries.num_heads, num_shared = num_heads / num_groups;
  const int64_t num_tasks = int64_t(parts.size()) * num_groups;
  std::vector<float> outs(parts.size() * num_heads * pages.value_width), tops(parts.size() * num_heads);
  std::vector<float> totals(tops.size());
  const int64_t work = num_positions * num_heads * (pages.key_width + pages.value_width);
  const int64_t tasks_a_thread = std::max<int64_t>(1, num_tasks * TASK_WORK / std::max<int64_t>(1, work));
  at::parallel_for(0, num_tasks, tasks_a_thread, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task % num_groups, head = task / num_groups * num_heads + group * num_shared;
      const Part& part = parts[task / num_groups];
      const float* own = q + (part.query * num_heads + group * num_shared) * pages.key_width;
      attend_part(own, num_shared, pages, queries.tables + part.query * queries.table_width, group, part, scale,
                  outs.data() + head * pages.value_width, &tops[head], &totals[head]);
    }
  });
  for (int64_t n = 0; n < queries.count; ++n)
    for (int64_t h = 0; h < num_heads; ++h) {
      const int64_t head = first_part[n] * num_heads + h, width = pages.value_width;
      join(first_part[n + 1] - first_part[n], num_heads, width, &outs[head * width], &tops[head], &totals[head],
           y + (n * num_heads + h) * width);
    }
}

template void paged_attention(const float*, const Queries&, const Pages<float>&, float, int64_t, float*);
template void paged_attention(const float*, const Queries&, const Pages<Half>&, float, int64_t, float*);

}  // namespace fledge
