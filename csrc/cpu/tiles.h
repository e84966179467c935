// How the tokens of one call are shared among threads.
//
// Enough tokens: every thread takes a tile of a wave, and what it calls runs in that thread alone.
// Too few: one tile is a wave, and the threads share the multiplies and the rows of it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fedpft {

struct Tile {
  int64_t slot;  // its place in the wave: which scratch memory is its own
  int64_t start, tokens;
};

struct Wave {
  int64_t start, tokens;
};

class Tiles {
 public:
  explicit Tiles(int64_t tokens) : all_(tokens) {
    const int64_t threads = torch::stable::get_num_threads();
    slots_ = tokens >= threads * kFewestTokens ? threads : 1;
    const int64_t waves = std::max<int64_t>(1, divide_up(divide_up(tokens, slots_), kMostTokens));
    tokens_ = divide_up(divide_up(tokens, slots_ * waves), kRowsPerBlock) * kRowsPerBlock;
  }

  int64_t slots() const { return slots_; }
  int64_t tokens() const { return tokens_; }                // of every tile but the last
  int64_t wave_tokens() const { return slots_ * tokens_; }  // of every wave but the last
  // Rows that may be in work at once; each lane may have memory of its own.
  int64_t lanes() const { return slots_ > 1 ? slots_ : divide_up(tokens_, kRowsPerBlock); }

  std::vector<Wave> waves() const {
    std::vector<Wave> waves;
    for (int64_t start = 0; start < all_; start += wave_tokens()) {
      waves.push_back({start, std::min(wave_tokens(), all_ - start)});
    }
    return waves;
  }

  template <class Body>  // body(tile)
  void for_each(const Wave& wave, const Body& body) const {
    const int64_t tiles = divide_up(wave.tokens, tokens_);
    const auto run = [&](int64_t slot) {
      const int64_t first = slot * tokens_;
      body(Tile{slot, wave.start + first, std::min(tokens_, wave.tokens - first)});
    };
    if (slots_ == 1) return run(0);
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) run(slot);
    });
  }

  template <class Body>  // body(share, shares), each in a thread of its own where the tiles are
  void for_each_share(const Body& body) const {
    if (slots_ == 1) return body(0, 1);
    torch::stable::parallel_for(0, slots_, 1, [&](int64_t first, int64_t last) {
      for (int64_t share = first; share < last; ++share) body(share, slots_);
    });
  }

  template <class Body>  // body(lane, row of the tile)
  void for_each_row(const Tile& tile, const Body& body) const {
    if (slots_ > 1) {
      for (int64_t row = 0; row < tile.tokens; ++row) body(tile.slot, row);
      return;
    }
    torch::stable::parallel_for(0, divide_up(tile.tokens, kRowsPerBlock), 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t stop = std::min(tile.tokens, (block + 1) * kRowsPerBlock);
        for (int64_t row = block * kRowsPerBlock; row < stop; ++row) body(block, row);
      }
    });
  }

 private:
  static constexpr int64_t kMostTokens = 512;    // of a tile: fewer pack the weights more often, more leave the cache
  static constexpr int64_t kFewestTokens = 128;  // for a thread of its own
  static constexpr int64_t kRowsPerBlock = 32;

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  int64_t all_, slots_, tokens_;
};

}  // namespace fedpft
