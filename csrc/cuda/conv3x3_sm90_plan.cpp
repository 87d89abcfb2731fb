// How a convolution is cut for Hopper. Host only.
#include <algorithm>

#include "conv3x3_sm90_cuda.h"

namespace vgg_fast::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Clocks for each row of a block: a chunk of a half tile is 9 taps x 4 k-steps x 2 consumers, 4 clocks each; a part of
// a shared sum is 4 KB, written by all and read by the last to come, at 39 bytes a clock (the L2's share of a
// multiprocessor that counters.py assumes).
constexpr int64_t kChunkClocks = 9 * 4 * 2 * 4, kPartClocks = 4096 / 39;

int64_t split_clocks(int64_t chunks, int64_t split) {
  return ceil_div(chunks, split) * kChunkClocks + (split > 1 ? split * kPartClocks : 0);
}

// The CTAs that share the chunks of a half tile: whoever is not the last has as many chunks as any.
int64_t best_split(int64_t chunks, int64_t most) {
  int64_t best = 1;
  for (int64_t split = 2; split <= std::min(most, chunks); ++split)
    if (ceil_div(chunks, ceil_div(chunks, split)) == split && split_clocks(chunks, split) < split_clocks(chunks, best))
      best = split;
  return best;
}

// The plan with blocks of so many rows, and the clocks of the busiest multiprocessor.
struct Candidate {
  Sm90Plan plan;
  int64_t clocks;
};

Candidate cut(const Sm90Problem& p, int rows_of_block, int multiprocessors) {
  Sm90Plan plan{};
  plan.rows = rows_of_block;
  plan.down = static_cast<int>(ceil_div(p.h, plan.rows));
  plan.across = static_cast<int>(ceil_div(p.w, kSm90Width));
  const int64_t blocks = p.n * plan.down * plan.across, columns = p.cout / kSm90Columns;

  // Whole tiles move the fewest bytes. But where the last round of them would leave half of the multiprocessors or more
  // without work, it is one of half tiles, and takes half the time.
  int64_t tiles = ceil_div(blocks, kSm90Whole), halves = 0;
  const int64_t kept = tiles * columns / multiprocessors * multiprocessors / columns;
  const int64_t rest = ceil_div(std::max<int64_t>(0, blocks - kept * kSm90Whole), kSm90Half) * columns;
  if (rest <= multiprocessors) {
    tiles = kept;
    halves = rest;
  }
  plan.whole = static_cast<int>(tiles * columns);

  // A grid smaller than half of the GPU shares the chunks of each tile among several CTAs.
  plan.split = 1;
  const int64_t chunks = p.cin * element_size(p.dtype) / kSm90Chunk;
  if (tiles == 0 && halves > 0) plan.split = static_cast<int>(best_split(chunks, multiprocessors / halves));
  plan.items = static_cast<int>(plan.whole + halves * plan.split);
  if (plan.split > 1) {
    const int64_t sums = int64_t{kSm90Half} * plan.rows * kSm90Width * kSm90Columns;
    plan.partial_bytes = halves * plan.split * sums * static_cast<int64_t>(sizeof(float));
    plan.counter_bytes = halves * static_cast<int64_t>(sizeof(unsigned));
  }
  const int64_t rounds = ceil_div(plan.whole, multiprocessors) * 2 * chunks * kChunkClocks;
  const int64_t last = halves > 0 ? split_clocks(chunks, plan.split) : 0;
  return {plan, (rounds + last) * plan.rows};
}

}  // namespace

const char* sm90_unsupported(const Sm90Problem& p, int sm) {
  if (sm != 90) return "its machine code is for compute capability 9.0 alone";
  if (p.cin * element_size(p.dtype) % kSm90Chunk || p.cout % kSm90Columns)
    return "cout must be a multiple of 64, and cin as well, of 32 with fp32";
  if (p.cin > 1 << 20 || p.cout > 1 << 20) return "more than 2^20 channels";
  if (p.n * (p.h + kSm90Rows[1]) * (p.w + kSm90Width) >= int64_t{1} << 31) return "x has 2^31 pixels; split the batch";
  if (p.h * p.w * p.cin * element_size(p.dtype) >= int64_t{1} << 40)
    return "an image has 2^40 bytes, more than a tensor map can stride over";
  return nullptr;
}

Sm90Plan plan_sm90(const Sm90Problem& p, int multiprocessors) {
  const Candidate low = cut(p, kSm90Rows[0], multiprocessors), high = cut(p, kSm90Rows[1], multiprocessors);
  // Higher blocks have fewer halos.
  return low.clocks < high.clocks ? low.plan : high.plan;
}

}  // namespace vgg_fast::cuda
