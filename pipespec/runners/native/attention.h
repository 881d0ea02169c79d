// Attention of a few rows over the cache of one key-value head, in float32.
//
// The cache holds the keys as [rows / 32][dim][32] and the values as [dim / 32][rows][32]: packed
// weights to the products. A row's scores are put in the order of the text that it sees, and what
// it does not see has weight 0, which leaves a sum as it is; so a row's result does not depend on
// the rows in its block, and a branch gets what the same text gets in one line.

#pragma once

#include <cstdint>

#include "products.h"

namespace pipespec {

// Where a fed row stands and what it sees: rows 0 to `prefix` of the text, then a chain of rows
// that ascend, itself last. A row of the text has no chain.
struct View {
  int64_t position, cache_row, prefix;
  const int32_t *chain, *chain_end;

  int64_t length() const { return prefix + (chain_end - chain); }
  // The first that a window lets it see; 0 is no window.
  int64_t lowest(int64_t window) const {
    return window == 0 || length() < window ? 0 : length() - window;
  }
};

// A head's part of a slot's cache.
struct HeadCache {
  float *keys, *values;
  int64_t dim, num_rows;

  static int64_t size(int64_t dim, int64_t num_rows) { return num_rows * (dim + padded(dim)); }
  HeadCache(float* start, int64_t dim, int64_t num_rows)
      : keys(start), values(start + num_rows * dim), dim(dim), num_rows(num_rows) {}

  float* key(int64_t row) const { return keys + row / PANEL * PANEL * dim + row % PANEL; }
  float* value(int64_t row, int64_t at) const {
    return values + (at / PANEL * num_rows + row) * PANEL + at % PANEL;
  }
  void write(int64_t row, const float* key_values, const float* new_values) const {
    for (int64_t i = 0; i < dim; ++i) key(row)[i * PANEL] = key_values[i];
    for (int64_t i = 0; i < dim; ++i) *value(row, i) = new_values[i];
  }
  void copy(int64_t from, int64_t to) const {
    for (int64_t i = 0; i < dim; ++i) key(to)[i * PANEL] = key(from)[i * PANEL];
    for (int64_t i = 0; i < dim; ++i) *value(to, i) = *value(from, i);
  }
};

// What one thread needs for the rows of a block, times the heads that share keys and values.
// chained: scores, then weights, of rows of branches; result: what attention gives.
struct AttentionScratch {
  float *scores, *chained, *result;
  int64_t score_stride, result_stride;

  static int64_t size(int64_t num_heads, int64_t dim, int64_t num_rows) {
    return num_heads * (2 * (num_rows + 2 * PANEL) + padded(dim));
  }
  AttentionScratch(float* start, int64_t num_heads, int64_t dim, int64_t num_rows)
      : scores(start), score_stride(num_rows + 2 * PANEL), result_stride(padded(dim)) {
    chained = scores + num_heads * score_stride;
    result = chained + num_heads * score_stride;
  }
};

// Turns scores into weights that sum to `1 / result`; `width` of them, a multiple of LANES.
inline float softmax(float* scores, int64_t width) {
  Floats largest = load(scores);
  for (int64_t i = LANES; i < width; i += LANES) {
    const Floats some = load(scores + i);
    largest = some > largest ? some : largest;
  }
  const float most = largest_of(largest);
  Floats total = {};
  for (int64_t i = 0; i < width; i += LANES) {
    const Floats weights = exponential(load(scores + i) - most);
    store(scores + i, weights);
    total += weights;
  }
  return 1.0f / sum_of(total);
}

// queries: [num_views * group][dim], scaled. Returns to scratch.result [num_views * group][dim].
inline void attend(const Kernel& kernel, const View* views, int num_views, int group,
                   int64_t window, const HeadCache& cache, const float* queries,
                   const AttentionScratch& scratch) {
  const int num_heads = num_views * group;
  const int64_t dim = cache.dim;
  int64_t begin = views[0].prefix, end = 0, tail = cache.num_rows, tail_end = 0, longest = 0;
  for (const View* view = views; view < views + num_views; ++view) {
    begin = std::min({begin, view->prefix, view->lowest(window)});
    end = std::max(end, view->prefix);
    longest = std::max(longest, view->length());
    if (view->chain == view->chain_end) continue;
    tail = std::min<int64_t>(tail, view->chain[0]);
    tail_end = std::max<int64_t>(tail_end, view->chain_end[-1] + 1);
  }
  begin = begin / PANEL * PANEL;
  tail = tail / PANEL * PANEL;
  const auto score = [&](int64_t from, int64_t to, float* scores, int64_t stride) {
    const int panels = static_cast<int>((to - from + PANEL - 1) / PANEL);
    multiply(kernel, queries, dim, num_heads, cache.keys + from * dim, PANEL * dim, dim, 0, panels,
             Into{scores, stride});
  };
  score(begin, end, scratch.scores, scratch.score_stride);
  if (tail < tail_end) score(tail, tail_end, scratch.chained, scratch.score_stride);

  const int64_t width = (longest - begin + LANES - 1) / LANES * LANES;
  for (int head = 0; head < num_heads; ++head) {
    const View& view = views[head / group];
    float* scores = scratch.scores + head * scratch.score_stride;
    float* chained = scratch.chained + head * scratch.score_stride;
    float* own = scores + (view.prefix - begin);
    const int64_t num_chained = view.chain_end - view.chain;
    for (int64_t i = 0; i < num_chained; ++i) own[i] = chained[view.chain[i] - tail];
    std::fill(scores, scores + std::max<int64_t>(0, view.lowest(window) - begin), -INFINITY);
    std::fill(own + num_chained, scores + width, -INFINITY);
    chained[scratch.score_stride - 1] = softmax(scores, width);
    std::copy(own, own + num_chained, chained);
    std::fill(own, own + num_chained, 0.0f);
  }
  const int panels = static_cast<int>(padded(dim) / PANEL);
  multiply(kernel, scratch.scores, scratch.score_stride, num_heads, cache.values + begin * PANEL,
           cache.num_rows * PANEL, end - begin, 0, panels,
           Into{scratch.result, scratch.result_stride});
  for (int head = 0; head < num_heads; ++head) {
    const View& view = views[head / group];
    const float* chained = scratch.chained + head * scratch.score_stride;
    float* result = scratch.result + head * scratch.result_stride;
    for (int64_t at = 0; at < padded(dim); at += LANES) {
      Floats sum = load(result + at);
      for (int64_t i = 0; i < view.chain_end - view.chain; ++i)
        sum = multiply_add(sum, load(cache.value(view.chain[i], at)), chained[i]);
      store(result + at, sum * chained[scratch.score_stride - 1]);
    }
  }
}

}  // namespace pipespec
