// Products of rows with packed weights, in one order of additions.
//
// A weight [out, in] is packed in panels of 32 outputs: [out / 32][in][32] in float32, and in
// bfloat16 pair by pair of inputs, [out / 32][in / 2][32][2]. Every output is one sum over the
// inputs, from the first to the last, whatever the number of rows or of panels computed at a time;
// so its bits depend on its row and its weights alone. The kernels differ between kinds (AMX adds
// pairs in groups of 16), and a model uses one kind for all its steps.

#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "vectors.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define PIPESPEC_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pipespec {

constexpr int PANEL = 32;
constexpr int64_t padded(int64_t count) { return (count + PANEL - 1) / PANEL * PANEL; }

constexpr int TILE_ROWS = 16;
constexpr int MAX_PIECE = 1024;  // floats that one call of a kernel writes at most

// out [rows][panels * 32] = x [rows][depth] times `panels` panels that stand `w_stride` apart.
// Strides and depth count elements.
typedef void Product(const void* x, int64_t x_stride, const void* w, int64_t w_stride,
                     int64_t depth, float* out);

constexpr int panels_at_once(int rows) {
  const int most = ACCUMULATORS * LANES / (rows * PANEL);
  return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}
constexpr int MAX_ROWS = ACCUMULATORS * LANES / PANEL;

struct Float32 {
  typedef float Weight;
  typedef float Input;
  static constexpr int STEP = 1;
  static Floats load_weights(const float* w) { return load(w); }
  static Floats add(Floats sum, Floats w, const float* x) { return multiply_add(sum, w, x[0]); }
};

// bfloat16 weights, float32 inputs.
struct Widened {
  typedef uint16_t Weight;
  typedef float Input;
  static constexpr int STEP = 2;
  static Words load_weights(const uint16_t* w) { return load<Words>(w); }
  static Floats add(Floats sum, Words w, const float* x) {
    return multiply_add(multiply_add(sum, (Floats)(w << 16), x[0]), upper(w), x[1]);
  }
};

#if defined(__AVX512BF16__)
// bfloat16 weights and inputs.
struct Dotted {
  typedef uint16_t Weight;
  typedef uint16_t Input;
  static constexpr int STEP = 2;
  static __m512i load_weights(const uint16_t* w) { return load<__m512i>(w); }
  static Floats add(Floats sum, __m512i w, const uint16_t* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
  }
};
#endif

template <class Kind, int ROWS, int PANELS>
void product(const void* inputs, int64_t x_stride, const void* weights, int64_t w_stride,
             int64_t depth, float* out) {
  constexpr int VECTORS = PANELS * PANEL / LANES;
  constexpr int EACH = PANEL / LANES;
  const auto* x = static_cast<const typename Kind::Input*>(inputs);
  const auto* w = static_cast<const typename Kind::Weight*>(weights);
  Floats sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < depth; k += Kind::STEP) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
      const auto* from = w + (v / EACH) * w_stride + k * PANEL + (v % EACH) * LANES * Kind::STEP;
      const auto loaded = Kind::load_weights(from);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r)
        sums[r][v] = Kind::add(sums[r][v], loaded, x + r * x_stride + k);
    }
  }
  // Unrolled like the sum, or the sums would live in memory.
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) store(out + (r * VECTORS + v) * LANES, sums[r][v]);
  }
}

// How weights are multiplied. block_rows: the most rows of one call. is_tiled: blocks of rows are
// full but for the last, which is padded. At [rows - 1]: how many panels are taken at once, and the
// call for so many, and for one. More than one block of rows takes single panels only.
struct Kernel {
  const char* name;
  int weight_bytes, input_bytes;
  int block_rows;
  bool is_tiled;
  std::array<int, 32> panels;
  std::array<Product*, 32> several, single;
};

template <class Kind, int... ROWS>
Kernel make_kernel(const char* name, std::integer_sequence<int, ROWS...>) {
  return {name, sizeof(typename Kind::Weight), sizeof(typename Kind::Input), sizeof...(ROWS), false,
          {panels_at_once(ROWS + 1)...},
          {product<Kind, ROWS + 1, panels_at_once(ROWS + 1)>...},
          {product<Kind, ROWS + 1, 1>...}};
}

inline Kernel float32_kernel() {
  return make_kernel<Float32>("float32", std::make_integer_sequence<int, MAX_ROWS>());
}

#if PIPESPEC_AMX
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The tile intrinsics do not tell the compiler what memory they read and write.
inline void settle_memory(const void* address) { asm volatile("" ::"r"(address) : "memory"); }

// Tiles 0 to 3 hold sums and 4, 5 inputs of up to 16 rows, 6 and 7 weights.
inline void configure_tiles(int rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = tile < 6 ? std::min(rows, TILE_ROWS) : 16;
  }
  settle_memory(&config);
  _tile_loadconfig(&config);
}

// Up to 16 rows. PANELS: 1 or 2.
template <int PANELS>
__attribute__((noinline)) void one_tile(const void* inputs, int64_t x_stride, const void* weights,
                                        int64_t w_stride, int64_t depth, float* out) {
  const auto* x = static_cast<const uint16_t*>(inputs);
  const auto* w = static_cast<const uint16_t*>(weights);
  settle_memory(x);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += 32) {
    const uint16_t* from = w + k * PANEL;
    _tile_loadd(4, x + k, x_stride * 2);
    _tile_loadd(6, from, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, from + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    if (PANELS == 2) {
      _tile_loadd(6, from + w_stride, 128);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, from + w_stride + 32, 128);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, out, PANELS * 128);
  _tile_stored(1, out + 16, PANELS * 128);
  if (PANELS == 2) {
    _tile_stored(2, out + 32, PANELS * 128);
    _tile_stored(3, out + 48, PANELS * 128);
  }
  settle_memory(out);
}

// 32 rows, of which the last may be padding, and one panel.
__attribute__((noinline)) inline void two_tiles(const void* inputs, int64_t x_stride,
                                                const void* weights, int64_t, int64_t depth,
                                                float* out) {
  const auto* x = static_cast<const uint16_t*>(inputs);
  const auto* w = static_cast<const uint16_t*>(weights);
  settle_memory(x);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < depth; k += 32) {
    _tile_loadd(4, x + k, x_stride * 2);
    _tile_loadd(6, w + k * PANEL, 128);
    _tile_loadd(5, x + 16 * x_stride + k, x_stride * 2);
    _tile_loadd(7, w + k * PANEL + 32, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  _tile_stored(2, out + 16 * PANEL, 128);
  _tile_stored(3, out + 16 * PANEL + 16, 128);
  settle_memory(out);
}

inline Kernel amx_kernel() {
  Kernel kernel = {"amx", 2, 2, 2 * TILE_ROWS, true, {}, {}, {}};
  for (int index = 0; index < 2 * TILE_ROWS; ++index) {
    const bool fits = index < TILE_ROWS;
    kernel.panels[index] = fits ? 2 : 1;
    kernel.several[index] = fits ? one_tile<2> : two_tiles;
    kernel.single[index] = fits ? one_tile<1> : two_tiles;
  }
  return kernel;
}

// A process must ask the system for the tiles once (arch_prctl, ARCH_REQ_XCOMP_PERM).
inline bool may_use_amx() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#endif

inline Kernel bfloat16_kernel() {
#if PIPESPEC_AMX
  if (may_use_amx()) return amx_kernel();
#endif
  const auto rows = std::make_integer_sequence<int, MAX_ROWS>();
#if defined(__AVX512BF16__)
  return make_kernel<Dotted>("avx512-bf16", rows);
#else
  return make_kernel<Widened>("widened", rows);
#endif
}

// A `finish` of `multiply`: out [rows][stride] = product + bias, or += if it adds.
struct Into {
  float* out;
  int64_t stride;
  const float* bias = nullptr;
  bool adds = false;

  void operator()(int row, int count, int panel, int panels, const float* piece) const {
    for (int r = 0; r < count; ++r) {
      float* to = out + (row + r) * stride + panel * PANEL;
      for (int i = 0; i < panels * PANEL; i += LANES) {
        Floats sum = load(piece + r * panels * PANEL + i);
        if (bias) sum += load(bias + panel * PANEL + i);
        if (adds) sum += load(to + i);
        store(to + i, sum);
      }
    }
  }
};

// What a thread calls after its last product.
inline void end_products(const Kernel& kernel) {
#if PIPESPEC_AMX
  if (kernel.is_tiled) _tile_release();
#else
  static_cast<void>(kernel);
#endif
}

// Multiplies `rows` rows of x with the panels from `first` to `last`, and hands every piece to
// finish(row, number of rows, panel, number of panels, piece [rows][panels * 32]).
// w: panel 0, whose like stand `w_stride` elements apart.
template <class Finish>
void multiply(const Kernel& kernel, const void* x, int64_t x_stride, int rows, const void* w,
              int64_t w_stride, int64_t depth, int first, int last, Finish finish) {
  alignas(64) float piece[MAX_PIECE];
  const int blocks = (rows + kernel.block_rows - 1) / kernel.block_rows;
  const int block = kernel.is_tiled ? kernel.block_rows : (rows + blocks - 1) / blocks;
  const int at_once = blocks == 1 ? kernel.panels[rows - 1] : 1;
#if PIPESPEC_AMX
  if (kernel.is_tiled) configure_tiles(rows);
#endif
  for (int panel = first; panel < last;) {
    const int panels = last - panel >= at_once ? at_once : 1;
    const auto* from = static_cast<const char*>(w) + panel * w_stride * kernel.weight_bytes;
    for (int row = 0; row < rows; row += block) {
      const int count = std::min(block, rows - row);
      const auto* inputs = static_cast<const char*>(x) + row * x_stride * kernel.input_bytes;
      const auto& products = panels > 1 ? kernel.several : kernel.single;
      products[count - 1](inputs, x_stride, from, w_stride, depth, piece);
      finish(row, count, panel, panels, piece);
    }
    panel += panels;
  }
}

}  // namespace pipespec
