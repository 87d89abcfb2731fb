// How a convolution is cut for the tensor cores: strips, tile and split, chosen by an estimate of its time. Host only.
#include <algorithm>
#include <iterator>

#include "block1_cuda.h"
#include "conv3x3_mma_cuda.h"

namespace vgg_fast::cuda {
namespace {

constexpr int kSharedLimit = 98 << 10;  // sm_86, sm_89 and sm_120 give a CTA 99 KiB, 1 KiB of it is the system's
constexpr int kWidestStrip = 64;        // a tile of a wider one would read more above and below than it computes
constexpr int kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};

// The estimate, in clocks of an A100: what GPU matters little, the choice is among similar kernels.
constexpr double kMacsPerClock = 1024;  // of a multiprocessor, 16-bit; tf32 has half of the channels in 32 bytes
constexpr double kL2BytesPerClock = 47;
constexpr double kMemoryWeight = 0.25;  // assumed: products hide most of what the memories do, not all
constexpr double kStart = 2500;  // assumed: from a CTA's first instruction to its first product, and its epilogue
constexpr double kAlone = 1.4;   // assumed: one warp per scheduler waits for its own operands

int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

int channels_of_chunk(DType dtype) { return dtype == DType::kFloat32 ? 8 : 16; }

// Pixels of the largest halo of a tile of `positions`; also the places that a plane of it takes.
int halo_pixels(int positions, int strip, int pairs, int pitch, int pad) {
  const bool whole_pairs = positions % strip == 0;
  const int touched = whole_pairs ? positions / strip : (positions - 2) / strip + 2;
  const bool whole_strips = whole_pairs && (touched % pairs == 0 || pairs % touched == 0);
  const int crossed = whole_strips ? (touched - 1) / pairs : (touched + pairs - 2) / pairs;
  const int count = 2 * pitch * (touched + 1) + pad * crossed;
  return (count + 3) / 8 * 8 + 4;  // 4 modulo 8, at least count
}

double chunk_clocks(const MmaTile& tile, int halo) {
  const double bytes = 9.0 * 32 * tile.bn + 32.0 * halo;
  const double wavefronts = tile.warps() * 3 * (8 * tile.units + 6 * tile.columns) + bytes / 128;
  return tile.bm * tile.bn * 9.0 * 16 / kMacsPerClock + kMemoryWeight * (wavefronts + bytes / kL2BytesPerClock);
}

double estimate(const MmaTile& tile, int64_t tiles, int chunks, int split, int halo, int multiprocessors) {
  const int each = ceil_div(tiles * split, multiprocessors);
  double clocks = chunk_clocks(tile, halo) * ceil_div(chunks, split);
  if (each == 1 && tile.warps() == 4) clocks *= kAlone;
  if (split > 1) clocks += 2.0 * tile.bm * tile.bn * 4 / kL2BytesPerClock;
  return each * clocks + ceil_div(each, tile.resident) * kStart;
}

}  // namespace

const char* mma_unsupported(const MmaProblem& p) {
  if (p.cin % (channels_of_chunk(p.dtype) / 2)) return "the pixels of x are not whole vectors of 16 bytes";
  if (p.n * ((p.h + 1) / 2 * 2) * (p.w + kWidestStrip) >= int64_t{1} << 31) return "x has 2^31 pixels; split the batch";
  if (p.cin > 1 << 20 || p.cout > 1 << 20) return "more than 2^20 channels";
  return nullptr;
}

MmaPlan plan_mma(const MmaProblem& p, int multiprocessors, int forced_tile, int forced_split) {
  MmaPlan best{};
  best.clocks = -1;
  const int chunks = ceil_div(p.cin, channels_of_chunk(p.dtype)), pairs = ceil_div(p.h, 2);
  for (int t = 0; t < static_cast<int>(std::size(kMmaTiles)); ++t) {
    if (forced_tile >= 0 && t != forced_tile) continue;
    const MmaTile& tile = kMmaTiles[t];
    MmaPlan cut{};
    double cut_clocks = -1;
    for (int strips = ceil_div(p.w, kWidestStrip); strips <= std::max<int64_t>(1, p.w / 8); ++strips) {
      const int strip = ceil_div(ceil_div(p.w, strips), 2) * 2;
      int pitch = strip + 2;
      while ((2 * pitch - strip) % 8) ++pitch;
      const int pad = ceil_div(2 * pitch, 8) * 8, halo = halo_pixels(tile.bm / 2, strip, pairs, pitch, pad);
      const int shared =
          kMmaWeightStages * 3 * 32 * (tile.bn + 4) + kMmaHaloStages * 32 * halo + 8 * tile.bn + 4 * halo;
      if (shared > kSharedLimit) continue;
      const int rows = ceil_div(p.n * strips * pairs * strip, tile.bm / 2);
      const double clocks = rows * chunk_clocks(tile, halo);
      if (cut_clocks >= 0 && clocks >= cut_clocks) continue;
      cut_clocks = clocks;
      cut = {t, strip, strips, pairs, pitch, pad, halo, rows, ceil_div(p.cout, tile.bn), 1, shared, 0, 0, 0};
    }
    if (cut_clocks < 0) continue;
    const int64_t tiles = static_cast<int64_t>(cut.rows) * cut.columns;
    for (int split : kSplits) {
      const bool wanted = forced_split ? split == forced_split : split == 1 || tiles <= 2 * multiprocessors;
      if (!wanted || split > chunks) continue;
      const double clocks = estimate(tile, tiles, chunks, split, cut.halo, multiprocessors);
      if (best.clocks >= 0 && clocks >= best.clocks) continue;
      best = cut;
      best.split = split;
      best.clocks = clocks;
      best.partial_bytes = split > 1 ? tiles * split * tile.bm * tile.bn * 4 : 0;
      best.counter_bytes = split > 1 ? tiles * 4 : 0;
    }
  }
  return best;
}

bool is_block1(DType dtype, int64_t cin, int64_t middle, int64_t cout) {
  return dtype != DType::kFloat32 && cin <= 4 && middle == kBlock1Channels && cout <= kBlock1Channels;
}

MmaPlan plan_block1(int64_t n, int64_t h, int64_t w) {
  constexpr int kTile = 2, kEdge = 16;
  constexpr MmaTile tile = kMmaTiles[kTile];
  static_assert(tile.bm == kEdge * kEdge && tile.bn == kBlock1Channels);
  MmaPlan plan{};
  plan.tile = kTile;
  plan.strip = kEdge;
  plan.strips = ceil_div(w, kEdge);
  plan.pairs = ceil_div(h, kEdge) * kEdge / 2;
  plan.pitch = kEdge + 2;
  plan.pad = 2 * plan.pitch;  // no tile crosses it
  plan.halo = 325;
  plan.rows = static_cast<int>(n) * plan.strips * ceil_div(h, kEdge);
  plan.columns = plan.split = 1;
  // Weights, the middle map, affines, the image, the first weights.
  plan.shared_bytes = kMmaWeightStages * 6 * (tile.bn + 4) * 16 + kBlock1Channels / 8 * plan.halo * 16 +
                      2 * 2 * kBlock1Channels * 4 + 20 * 224 + kBlock1Channels * 9 * 4 * 2;
  return plan;
}

MmaArgs mma_args(const MmaProblem& p, const MmaPlan& plan) {
  MmaArgs args{};
  args.n = static_cast<int>(p.n);
  args.h = static_cast<int>(p.h);
  args.w = static_cast<int>(p.w);
  args.cin = static_cast<int>(p.cin);
  args.cout = static_cast<int>(p.cout);
  args.strip = plan.strip;
  args.strips = plan.strips;
  args.pairs = plan.pairs;
  args.pitch = plan.pitch;
  args.pad = plan.pad;
  args.halo = plan.halo;
  args.columns = plan.columns;
  args.split = plan.split;
  return args;
}

}  // namespace vgg_fast::cuda
