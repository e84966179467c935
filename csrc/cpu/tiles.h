// How the tokens of one call are shared among threads.
//
// Enough tokens: every thread takes whole tiles, one after the other, and what it calls runs in that thread alone.
// Too few: one tile after the other, and the threads share the multiplies and the rows of each.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fedpft {

struct Tile {
  int64_t index, slot;  // slot: which scratch memory; tiles of one slot never run at once
  int64_t start, tokens;
};

class Tiles {
 public:
  explicit Tiles(int64_t tokens) {
    const int64_t threads = torch::stable::get_num_threads();
    slots_ = tokens >= threads * kFewestTokens ? threads : 1;
    const int64_t per_slot = std::max<int64_t>(1, divide_up(divide_up(tokens, slots_), kMostTokens));
    tokens_ = divide_up(divide_up(tokens, slots_ * per_slot), kRowsPerBlock) * kRowsPerBlock;
    for (int64_t start = 0; start < tokens; start += tokens_) {
      const int64_t index = static_cast<int64_t>(tiles_.size());
      tiles_.push_back({index, index % slots_, start, std::min(tokens_, tokens - start)});
    }
  }

  int64_t slots() const { return slots_; }
  int64_t tokens() const { return tokens_; }  // of every tile but the last
  // Rows that may be in work at once; each lane may have memory of its own.
  int64_t lanes() const { return slots_ > 1 ? slots_ : kMostTokens / kRowsPerBlock; }
  std::vector<Tile>::const_iterator begin() const { return tiles_.begin(); }
  std::vector<Tile>::const_iterator end() const { return tiles_.end(); }

  template <class Body>  // body(tile)
  void for_each(const Body& body) const {
    if (slots_ == 1) {
      for (const Tile& tile : tiles_) body(tile);
      return;
    }
    torch::stable::parallel_for(0, slots_, 1, [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) {
        for (size_t i = slot; i < tiles_.size(); i += slots_) body(tiles_[i]);
      }
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
  static constexpr int64_t kMostTokens = 512;  // smaller tiles pack the weights more often, larger ones leave the cache
  static constexpr int64_t kFewestTokens = 128;  // for a thread of its own
  static constexpr int64_t kRowsPerBlock = 32;

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

  int64_t slots_, tokens_;
  std::vector<Tile> tiles_;
};

}  // namespace fedpft
