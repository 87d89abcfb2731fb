// How a convolution is cut for Hopper. Host only.
#include <algorithm>

#include "conv3x3_sm90_cuda.h"

namespace vgg_fast::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

const char* sm90_unsupported(const Sm90Problem& p, int sm) {
  if (sm != 90) return "its machine code is for compute capability 9.0 alone";
  if (p.dtype == DType::kFloat32) return "it multiplies fp16 and bf16 alone";
  if (p.cin % kSm90Channels || p.cout % kSm90Columns) return "cin must be a multiple of 64, and cout one of 128";
  if (p.cin > 1 << 20 || p.cout > 1 << 20) return "more than 2^20 channels";
  if (p.n * (p.h + kSm90Block) * (p.w + kSm90Block) >= int64_t{1} << 31) return "x has 2^31 pixels; split the batch";
  if (p.h * p.w * p.cin >= int64_t{1} << 39) return "an image has 2^40 bytes, more than a tensor map can stride over";
  return nullptr;
}

Sm90Plan plan_sm90(const Sm90Problem& p, int multiprocessors) {
  Sm90Plan plan{};
  plan.down = static_cast<int>(ceil_div(p.h, kSm90Block));
  plan.across = static_cast<int>(ceil_div(p.w, kSm90Block));
  const int64_t blocks = p.n * plan.down * plan.across, columns = p.cout / kSm90Columns;

  // Whole tiles move the fewest bytes. But where the last round of them would leave half of the multiprocessors or more
  // without work, it is one of half tiles, and takes half the time.
  int64_t rows = ceil_div(blocks, kSm90Whole), halves = 0;
  const int64_t kept = rows * columns / multiprocessors * multiprocessors / columns;
  const int64_t rest = ceil_div(std::max<int64_t>(0, blocks - kept * kSm90Whole), kSm90Half) * columns;
  if (rest <= multiprocessors) {
    rows = kept;
    halves = rest;
  }
  plan.whole = static_cast<int>(rows * columns);

  // A grid smaller than half of the GPU shares the chunks of each tile among several CTAs.
  plan.split = 1;
  if (rows == 0 && halves > 0) {
    const int64_t chunks = p.cin / kSm90Channels, most = std::clamp<int64_t>(multiprocessors / halves, 1, chunks);
    plan.split = static_cast<int>(ceil_div(chunks, ceil_div(chunks, most)));
  }
  plan.items = static_cast<int>(plan.whole + halves * plan.split);
  if (plan.split > 1) {
    constexpr int64_t kTileBytes = kSm90Half * kSm90Block * kSm90Block * kSm90Columns * sizeof(float);
    plan.partial_bytes = halves * plan.split * kTileBytes;
    plan.counter_bytes = halves * sizeof(unsigned);
  }
  return plan;
}

}  // namespace vgg_fast::cuda
