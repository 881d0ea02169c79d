// The coupled draw of pipespec.sampling for one row of logits: the same noise, the same order.
//
// Philox-4x32-10, Salmon et al., SC 2011; Gumbel coupling: arXiv 2408.07978. A token's score is
// (logit - highest) / T + G with G = -log(-log(u)). As G <= -log(1 - u), most tokens are seen to
// score too little without a logarithm.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace pipespec {

// The generator's words for the tokens of a row, two tokens a block: 53-bit uniforms.
class Noise {
 public:
  explicit Noise(uint64_t seed) {
    for (uint32_t round = 0; round < ROUNDS; ++round) {
      keys_[round][0] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
      keys_[round][1] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
    }
  }

  // bits[v] for the tokens from `first`, which is even, to `first + 2 * BLOCKS`.
  void fill(int64_t position, int64_t first, uint64_t* bits) const {
    uint32_t a[BLOCKS], b[BLOCKS], c[BLOCKS], d[BLOCKS];
    for (int i = 0; i < BLOCKS; ++i) {
      a[i] = static_cast<uint32_t>(first / 2 + i);
      b[i] = static_cast<uint32_t>(position);
      c[i] = static_cast<uint32_t>(position >> 32);
      d[i] = 0;  // the stream that chooses tokens
    }
    for (const auto& key : keys_) {
      for (int i = 0; i < BLOCKS; ++i) {
        const uint64_t one = uint64_t{a[i]} * 0xD2511F53u, two = uint64_t{c[i]} * 0xCD9E8D57u;
        a[i] = static_cast<uint32_t>(two >> 32) ^ b[i] ^ key[0];
        c[i] = static_cast<uint32_t>(one >> 32) ^ d[i] ^ key[1];
        b[i] = static_cast<uint32_t>(two);
        d[i] = static_cast<uint32_t>(one);
      }
    }
    for (int i = 0; i < BLOCKS; ++i) {
      bits[2 * i] = uint64_t{a[i]} << 21 | b[i] >> 11;
      bits[2 * i + 1] = uint64_t{c[i]} << 21 | d[i] >> 11;
    }
  }

  static constexpr int BLOCKS = 32;

 private:
  static constexpr uint32_t ROUNDS = 10;
  uint32_t keys_[ROUNDS][2];
};

inline double gumbel(uint64_t bits) {
  const uint64_t most = (uint64_t{1} << 53) - 2;
  const double uniform = static_cast<double>(std::min(bits, most) + 1) * 0x1p-53;
  return -std::log(-std::log(uniform));
}

// No smaller than the noise: 1 - u is at least 2^-(zeros + 1) if its 53 bits begin with so many.
inline double most_noise(uint64_t bits) {
  const uint64_t rest = (uint64_t{1} << 53) - 1 - bits;
  const int zeros = rest ? __builtin_clzll(rest) - 11 : 53;
  return (zeros + 1) * 0.69314718056;
}

// The ids of the `count` best scores at `position`, the first among equals; false if some logit is
// not finite.
inline bool rank_perturbed(const float* logits, int64_t num_logits, int64_t position,
                           double temperature, const Noise& noise, int count, int32_t* best) {
  float highest = -INFINITY;
  bool all_finite = true;
  for (int64_t i = 0; i < num_logits; ++i) {
    highest = std::max(highest, logits[i]);
    all_finite &= std::isfinite(logits[i]);
  }
  if (!all_finite) return false;
  constexpr int64_t STRETCH = 2 * Noise::BLOCKS;
  uint64_t bits[STRETCH];
  double scores[64];
  count = std::min(count, 64);
  int found = 0;
  for (int64_t start = 0; start < num_logits; start += STRETCH) {
    noise.fill(position, start, bits);
    const int64_t end = std::min(start + STRETCH, num_logits);
    for (int64_t i = start; i < end; ++i) {
      const double below = double{logits[i]} - double{highest};
      const bool is_full = found == count;
      // The margin is for what rounding does to either side.
      if (is_full && below < temperature * (scores[count - 1] - most_noise(bits[i - start]) - 1e-6))
        continue;
      const double score = below / temperature + gumbel(bits[i - start]);
      if (is_full && score <= scores[count - 1]) continue;
      int at = is_full ? count - 1 : found++;
      for (; at > 0 && scores[at - 1] < score; --at) {
        scores[at] = scores[at - 1];
        best[at] = best[at - 1];
      }
      scores[at] = score;
      best[at] = static_cast<int32_t>(i);
    }
  }
  return found == count;
}

}  // namespace pipespec
