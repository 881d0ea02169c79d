// One forward of a Llama-shaped model: from token ids to logits, or to the most likely tokens.
//
// The residual, norms, rotation and attention are float32; products take what the kernel of the
// weights takes (products.h). Whatever a row adds up it adds in an order that depends on its own
// text alone. So its result is the same to the bit with whatever rows it is fed, in whatever pieces
// the text before it was fed, beside whatever branches, and by any number of threads.

#include <poll.h>

#include <cstdlib>
#include <memory>
#include <new>

#include "attention.h"
#include "noise.h"
#include "pool.h"
#include "products.h"

using namespace pipespec;

// What the caller fills in; library.py has the twins of these structures.
extern "C" {

struct Linear {
  const void* weight;
  const float* bias;  // [num_panels * 32], or null
  int64_t depth, num_panels;
};

// Panels of gate_up hold 16 columns of the gate, then the same 16 of the other.
struct Layer {
  const float *attention_norm, *query_norm, *key_norm, *mlp_norm;
  Linear qkv, output, gate_up, down;
  int64_t window;  // how many positions a row sees, 0: all
};

struct Shape {
  int64_t hidden, inner, num_layers, num_heads, num_kv_heads, head_dim, vocab_size;
  int64_t num_cache_rows;  // of a slot, a multiple of 32
  int64_t num_threads, is_bfloat16;
  double norm_eps;
  const void* embedding;         // [ids][hidden]
  const float *cosines, *sines;  // [positions][head_dim / 2]
  const float* norm;
  Linear head;
  const Layer* layers;
};

// `num_own` ids from position `start` on, then `num_tail` ids of branches. tail: for each of these
// its position, its cache row, how many rows of the text it sees, and where in `chain` the rows of
// branches begin that it sees; they end where the next one's begin. The last `num_outputs` ids get
// logits [num_outputs][padded vocabulary] and the ids of the `num_ranked` largest, best first; at a
// temperature above 0 of those with noise of `seed`, at most 64.
struct Feed {
  float* cache;
  const int32_t *ids, *tail, *chain;
  int64_t start, num_own, num_tail, num_outputs, num_ranked;
  float* logits;
  int32_t* ranked;
  double temperature;
  uint64_t seed;
};

// Forwards that follow one over `Feed`: each over what the one before ranked first, after the last
// of its own ids and after each of its tail. `rounds[i]` of them, in descending order, go on from
// tail i, in cache rows that follow those of the forward before; at most `num_more`, and none once
// one of the descriptors can be read. What they rank comes after what the first did; logits are
// overwritten.
struct Burst {
  const int32_t *rounds, *descriptors;
  int64_t num_more, num_descriptors;
};

}  // extern "C"

namespace {

// Zeroed memory that starts at a cache line.
class Buffer {
 public:
  void resize(size_t num_bytes) {
    memory_.reset(std::aligned_alloc(64, (num_bytes + 63) / 64 * 64));
    if (!memory_) throw std::bad_alloc();
    std::memset(memory_.get(), 0, num_bytes);
  }
  template <class Type>
  Type* as() const {
    return static_cast<Type*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
};

// Rows of what products take or give: float32, or bfloat16 if `bytes` is 2. Columns from `width` on
// are zero. A stride that is no power of two keeps the rows of a tile apart in the cache.
struct Rows {
  Rows(int64_t width, int bytes) : stride(padded(width) + PANEL), bytes(bytes) {}
  // Makes room for `count` rows, and for what tiles read beyond them.
  void resize(int64_t count) { memory.resize((count + MAX_BLOCK) * stride * bytes); }
  char* at(int64_t row) const { return memory.as<char>() + row * stride * bytes; }
  float* floats(int64_t row) const { return memory.as<float>() + row * stride; }
  // The first `count` of values.
  void put(int64_t row, int64_t column, Floats values, int64_t count = LANES) const {
    if (bytes == 2)
      put_some(at(row) + column * 2, rounded(values), count);
    else
      put_some(at(row) + column * 4, values, count);
  }

  int64_t stride;
  int bytes;
  Buffer memory;

 private:
  template <class Vector>
  static void put_some(char* to, const Vector& values, int64_t count) {
    if (count == LANES)
      store(to, values);
    else
      std::memcpy(to, &values, count * sizeof values[0]);
  }
};

// Finishes products of gate and up: out = silu(gate) * up.
struct Gate {
  const Rows& out;
  int first;
  const float* bias;

  void operator()(int row, int count, int panel, int panels, const float* piece) const {
    for (int r = 0; r < count; ++r) {
      for (int p = 0; p < panels; ++p) {
        for (int i = 0; i < PANEL / 2; i += LANES) {
          const float* from = piece + (r * panels + p) * PANEL + i;
          Floats gate = load(from), up = load(from + PANEL / 2);
          if (bias) gate += load(bias + (panel + p) * PANEL + i);
          if (bias) up += load(bias + (panel + p) * PANEL + PANEL / 2 + i);
          const Floats opened = gate / (exponential(-gate) + 1.0f) * up;
          out.put(first + row + r, (panel + p) * PANEL / 2 + i, opened);
        }
      }
    }
  }
};

// The ids of the `count` largest values, the first among equals; false if that cannot be said
// because some are no finite numbers.
bool rank(const float* values, int64_t num_values, int count, int32_t* best) {
  constexpr int64_t STRETCH = 64;
  float lowest = -INFINITY;
  int found = 0;
  for (int64_t start = 0; start < num_values; start += STRETCH) {
    const int64_t end = std::min(start + STRETCH, num_values);
    int num_larger = 0;  // NaN counts
    for (int64_t i = start; i < end; ++i) num_larger += !(values[i] <= lowest);
    for (int64_t i = start; num_larger > 0 && i < end; ++i) {
      const float value = values[i];
      if (!std::isfinite(value)) return false;
      if (found == count && value <= lowest) continue;
      int at = found < count ? found++ : count - 1;
      for (; at > 0 && values[best[at - 1]] < value; --at) best[at] = best[at - 1];
      best[at] = static_cast<int32_t>(i);
      if (found == count) lowest = values[best[count - 1]];
    }
  }
  return found == count;
}

}  // namespace

class Model {
 public:
  explicit Model(const Shape& shape)
      : shape_(shape),
        layers_(shape.layers, shape.layers + shape.num_layers),
        kernel_(shape.is_bfloat16 ? bfloat16_kernel() : float32_kernel()),
        attention_kernel_(float32_kernel()),
        group_(static_cast<int>(shape.num_heads / shape.num_kv_heads)),
        views_at_once_(std::max(1, MAX_ROWS / group_)),
        query_width_(shape.num_heads * shape.head_dim),
        residual_(shape.hidden, 4),
        normed_(shape.hidden, kernel_.input_bytes),
        qkv_(query_width_ + 2 * shape.num_kv_heads * shape.head_dim, 4),
        queries_(query_width_, 4),
        attended_(query_width_, kernel_.input_bytes),
        gated_(shape.inner, kernel_.input_bytes),
        scratch_(shape.num_threads),
        pool_(static_cast<int>(shape.num_threads), [this](int thread) { work(thread); }) {
    const int64_t size =
        AttentionScratch::size(views_at_once_ * group_, shape.head_dim, shape.num_cache_rows);
    for (auto& scratch : scratch_) scratch.resize(size * sizeof(float));
  }

  const char* kernel_name() const { return kernel_.name; }

  // False if some logits are not finite.
  bool forward(const Feed& feed) {
    views_.clear();
    for (int64_t at = feed.start; at < feed.start + feed.num_own; ++at)
      views_.push_back({at, at, at + 1, nullptr, nullptr});
    for (const int32_t* tail = feed.tail; tail < feed.tail + 4 * feed.num_tail; tail += 4)
      views_.push_back({tail[0], tail[1], tail[2], feed.chain + tail[3], feed.chain + tail[7]});
    return run(feed);
  }

  // Goes on from the forward over `first`, whose own ids have one output at most. Returns how many
  // forwards followed; one with logits that are not finite is not counted, and the last.
  int64_t draw_on(const Feed& first, const Burst& burst) {
    const int64_t num_own = first.num_own > 0 ? 1 : 0, num_ranked = first.num_ranked;
    std::vector<std::vector<int32_t>> chains;
    for (const int32_t* tail = first.tail; tail < first.tail + 4 * first.num_tail; tail += 4)
      chains.emplace_back(first.chain + tail[3], first.chain + tail[7]);
    int32_t next_row = first.num_tail > 0 ? first.tail[4 * first.num_tail - 3] + 1 : 0;
    std::vector<int32_t> ids;
    std::vector<pollfd> polled;
    for (int64_t i = 0; i < burst.num_descriptors; ++i)
      polled.push_back({burst.descriptors[i], POLLIN, 0});
    Feed feed = first;
    for (int64_t done = 0; done < burst.num_more; ++done) {
      if (!polled.empty() && poll(polled.data(), polled.size(), 0) > 0) return done;
      ids.clear();
      views_.clear();
      for (int64_t i = 0; i < num_own; ++i) {
        const int64_t at = first.start + first.num_own + done;
        ids.push_back(feed.ranked[0]);
        views_.push_back({at, at, at + 1, nullptr, nullptr});
      }
      for (int64_t i = 0; i < first.num_tail && burst.rounds[i] > done; ++i) {
        const int32_t* tail = first.tail + 4 * i;
        const int32_t row = next_row++;
        ids.push_back(feed.ranked[(num_own + i) * num_ranked]);
        chains[i].push_back(row);
        const int32_t* chain = chains[i].data();
        views_.push_back({tail[0] + done + 1, row, tail[2], chain, chain + chains[i].size()});
      }
      if (ids.empty()) return done;
      feed.ids = ids.data();
      feed.ranked += feed.num_outputs * num_ranked;
      feed.num_outputs = static_cast<int64_t>(ids.size());
      if (!run(feed)) return done;
    }
    return burst.num_more;
  }

  // Copies `rows` of a cache, which ascend, to `start` and after.
  void keep(float* cache, int64_t start, const int32_t* rows, int64_t count) const {
    for (int64_t layer = 0; layer < shape_.num_layers; ++layer)
      for (int64_t head = 0; head < shape_.num_kv_heads; ++head)
        for (int64_t i = 0; i < count; ++i) head_cache(cache, layer, head).copy(rows[i], start + i);
  }

 private:
  // A forward over the views.
  bool run(const Feed& feed) {
    reserve(static_cast<int64_t>(views_.size()));
    feed_ = feed;
    all_finite_.store(true);
    pool_.run();
    return all_finite_.load();
  }

  int num_rows() const { return static_cast<int>(views_.size()); }

  HeadCache head_cache(float* cache, int64_t layer, int64_t head) const {
    const int64_t size = HeadCache::size(shape_.head_dim, shape_.num_cache_rows);
    return {cache + (layer * shape_.num_kv_heads + head) * size, shape_.head_dim,
            shape_.num_cache_rows};
  }

  // Makes room for so many rows.
  void reserve(int64_t count) {
    if (padded(count) <= capacity_) return;
    capacity_ = 0;
    for (Rows* rows : {&residual_, &normed_, &qkv_, &queries_, &attended_, &gated_})
      rows->resize(padded(count));
    capacity_ = padded(count);
  }

  // The whole forward, run by every thread on its share.
  void work(int thread) {
    const PlainArithmetic arithmetic;
    compute(thread);
  }

  __attribute__((noinline)) void compute(int thread) {
    const int rows = num_rows();
    int first = 0;  // rows before it are done
    for (int row = thread; row < rows; row += num_threads()) embed(row);
    for (int64_t index = 0; index < shape_.num_layers; ++index) {
      const Layer& layer = layers_[index];
      normalize(thread, first, layer.attention_norm);
      product(thread, layer.qkv, normed_, first, Into{qkv_.floats(0), qkv_.stride, layer.qkv.bias});
      for (int row = thread; row < rows; row += num_threads()) rotate_and_store(row, layer, index);
      if (index + 1 == shape_.num_layers) first = rows - static_cast<int>(feed_.num_outputs);
      pool_.barrier();
      attend_all(thread, first, layer, index);
      add_product(thread, layer.output, attended_, first);
      normalize(thread, first, layer.mlp_norm);
      product(thread, layer.gate_up, normed_, first, Gate{gated_, first, layer.gate_up.bias});
      add_product(thread, layer.down, gated_, first);
    }
    normalize(thread, first, shape_.norm);
    const int64_t stride = shape_.head.num_panels * PANEL;
    product(thread, shape_.head, normed_, first, Into{feed_.logits, stride});
    for (int row = thread; feed_.num_ranked > 0 && row < feed_.num_outputs; row += num_threads())
      if (!rank_row(row, feed_.logits + row * stride)) all_finite_.store(false);
    end_products(kernel_);
  }

  // The tokens that come first after an output row; false if that cannot be said.
  bool rank_row(int row, const float* logits) const {
    const int count = static_cast<int>(feed_.num_ranked);
    int32_t* best = feed_.ranked + row * count;
    if (feed_.temperature == 0.0) return rank(logits, shape_.vocab_size, count, best);
    const int64_t position = views_[num_rows() - feed_.num_outputs + row].position + 1;
    return rank_perturbed(logits, shape_.vocab_size, position, feed_.temperature,
                          Noise(feed_.seed), count, best);
  }

  int num_threads() const { return static_cast<int>(shape_.num_threads); }

  void embed(int row) const {
    const int64_t hidden = shape_.hidden, id = feed_.ids[row];
    float* x = residual_.floats(row);
    std::fill(x + hidden, x + residual_.stride, 0.0f);
    if (shape_.is_bfloat16) {
      const auto* from = static_cast<const uint16_t*>(shape_.embedding) + id * hidden;
      for (int64_t i = 0; i < hidden; ++i) {
        const uint32_t word = static_cast<uint32_t>(from[i]) << 16;
        std::memcpy(x + i, &word, sizeof word);
      }
    } else {
      std::memcpy(x, static_cast<const float*>(shape_.embedding) + id * hidden, hidden * 4);
    }
  }

  // RMSNorm of the residual of all rows from `first` on.
  void normalize(int thread, int first, const float* weight) {
    const int64_t width = padded(shape_.hidden);
    for (int row = first + thread; row < num_rows(); row += num_threads()) {
      const float* x = residual_.floats(row);
      const float scale = root_mean_square(x, width, shape_.hidden);
      for (int64_t i = 0; i < width; i += LANES)
        normed_.put(row, i, load(x + i) * scale * load(weight + i));
    }
    pool_.barrier();
  }

  // 1 / sqrt(mean(x^2) + eps); x has `width` values, zero from `count` on.
  float root_mean_square(const float* x, int64_t width, int64_t count) const {
    Floats squares = {};
    for (int64_t i = 0; i < width; i += LANES) squares += load(x + i) * load(x + i);
    const float mean = sum_of(squares) / static_cast<float>(count);
    return 1.0f / std::sqrt(mean + static_cast<float>(shape_.norm_eps));
  }

  // Multiplies the rows of x from `first` on with the thread's panels; `finish` counts from there.
  template <class Finish>
  void product(int thread, const Linear& linear, const Rows& x, int first, Finish finish) {
    const int begin = static_cast<int>(linear.num_panels * thread / num_threads());
    const int end = static_cast<int>(linear.num_panels * (thread + 1) / num_threads());
    if (first < num_rows())
      multiply(kernel_, x.at(first), x.stride, num_rows() - first, linear.weight,
               linear.depth * PANEL, linear.depth, begin, end, finish);
    pool_.barrier();
  }

  void add_product(int thread, const Linear& linear, const Rows& x, int first) {
    product(thread, linear, x, first,
            Into{residual_.floats(first), residual_.stride, linear.bias, true});
  }

  // Norms and rotates a row's queries and keys; keys and values go to the cache.
  void rotate_and_store(int row, const Layer& layer, int64_t index) {
    const int64_t dim = shape_.head_dim;
    const View& view = views_[row];
    const float* from = qkv_.floats(row);
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t head = 0; head < shape_.num_heads; ++head, from += dim)
      rotate(from, view.position, layer.query_norm, scale, query(row, head));
    for (int64_t head = 0; head < shape_.num_kv_heads; ++head, from += dim) {
      float key[MAX_HEAD_DIM];
      rotate(from, view.position, layer.key_norm, 1.0f, key);
      const float* value = from + shape_.num_kv_heads * dim;
      head_cache(feed_.cache, index, head).write(view.cache_row, key, value);
    }
  }

  // Queries that share keys stand together: [kv_heads][rows][group][dim].
  float* query(int row, int64_t head) const {
    const int64_t block = head / group_ * capacity_ + row;
    return queries_.floats(0) + (block * group_ + head % group_) * shape_.head_dim;
  }

  void rotate(const float* from, int64_t position, const float* norm, float scale,
              float* to) const {
    const int64_t half = shape_.head_dim / 2;
    const float* cosines = shape_.cosines + position * half;
    const float* sines = shape_.sines + position * half;
    float head[MAX_HEAD_DIM];
    std::copy(from, from + 2 * half, head);
    if (norm) {
      std::fill(head + 2 * half, head + padded(2 * half), 0.0f);
      const float inverse = root_mean_square(head, padded(2 * half), 2 * half);
      for (int64_t i = 0; i < 2 * half; ++i) head[i] = head[i] * inverse * norm[i];
    }
    for (int64_t i = 0; i < half; ++i) {
      to[i] = (head[i] * cosines[i] - head[half + i] * sines[i]) * scale;
      to[half + i] = (head[half + i] * cosines[i] + head[i] * sines[i]) * scale;
    }
  }

  // Attention of the rows from `first` on, block by block for each key-value head.
  void attend_all(int thread, int first, const Layer& layer, int64_t index) {
    const int64_t dim = shape_.head_dim;
    const AttentionScratch scratch(scratch_[thread].as<float>(), views_at_once_ * group_, dim,
                                   shape_.num_cache_rows);
    const int blocks = (num_rows() - first + views_at_once_ - 1) / views_at_once_;
    for (int64_t item = thread; item < blocks * shape_.num_kv_heads; item += num_threads()) {
      const int64_t head = item / blocks;
      const int row = first + static_cast<int>(item % blocks) * views_at_once_;
      const int count = std::min(views_at_once_, num_rows() - row);
      attend(attention_kernel_, &views_[row], count, group_, layer.window,
             head_cache(feed_.cache, index, head), query(row, head * group_), scratch);
      for (int i = 0; i < count * group_; ++i)
        for (int64_t at = 0; at < dim; at += LANES)
          attended_.put(row + i / group_, (head * group_ + i % group_) * dim + at,
                        load(scratch.result + i * scratch.result_stride + at),
                        std::min<int64_t>(LANES, dim - at));
    }
    pool_.barrier();
  }

  static constexpr int64_t MAX_HEAD_DIM = 512;

  Shape shape_;
  std::vector<Layer> layers_;
  Kernel kernel_, attention_kernel_;
  int group_, views_at_once_;  // query heads a key-value head; rows a block of attention
  int64_t query_width_;
  Rows residual_, normed_, qkv_, queries_, attended_, gated_;
  int64_t capacity_ = 0;  // rows
  std::vector<Buffer> scratch_;
  std::vector<View> views_;
  Feed feed_ = {};
  std::atomic<bool> all_finite_{true};
  Pool pool_;
};

extern "C" {

// Null if there is no memory or no thread left.
Model* pipespec_create(const Shape* shape) {
  try {
    return new Model(*shape);
  } catch (const std::exception&) {
    return nullptr;
  }
}

void pipespec_destroy(Model* model) { delete model; }

const char* pipespec_kernel(const Model* model) { return model->kernel_name(); }

// 0, or 1 if some logits are not finite, or 2 if there is no memory left.
int pipespec_forward(Model* model, const Feed* feed) {
  try {
    return model->forward(*feed) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 2;
  }
}

// How many forwards followed, or -1 if there is no memory left.
int64_t pipespec_draw_on(Model* model, const Feed* first, const Burst* burst) {
  try {
    return model->draw_on(*first, *burst);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}

void pipespec_keep(const Model* model, float* cache, int64_t start, const int32_t* rows,
                   int64_t count) {
  model->keep(cache, start, rows, count);
}

}  // extern "C"
