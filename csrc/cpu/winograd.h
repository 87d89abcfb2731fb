// How a layer is cut up for the Winograd kernels: F(4x4, 3x3) of Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks" (arXiv 1509.09308). 36 products make a tile of 4x4 outputs instead of 144:
//
//   Y = A^T [ sum over cin of (G g G^T) . (B^T d B) ] A      d: 6x6 inputs, g: 3x3 weights, '.': element by element
//
// The sum over cin is 36 matrix products M[xi] = V[xi] U[xi], xi = 0 .. 35:
//
//   V  inputs   [xi][block][tile][16]   of a chunk, a rectangle of tiles
//   U  weights  [xi][cin][g]            of a group of output channels
//   M  sums     [xi][tile][g]
//
// U is made anew in every call: kept in the pack it would be four times the plain weights, and from memory the plain
// weights arrive faster than U would.
#pragma once
#include <algorithm>

#include "../conv3x3.h"

namespace vgg_fast {

constexpr int64_t kTile = 4, kPatch = kTile + 2, kPlanes = kPatch * kPatch;
// Channel blocks of one partial sum; partial sums are added up in a second step. A single sum over 512 channels was
// measured to double the error.
constexpr int64_t kSumBlocks = 2;
// Where the inputs are shared, a unit works on 64 of the input channels at a time, at most 128 output channels and 56
// tiles: V (0.5 MB), M (1 MB) and U of one group (0.3 MB) then stay in L2. A multiple of kSumBlocks.
constexpr int64_t kUnitBlocks = 4, kUnitChannels = 128, kUnitTiles = 56;
// Floats between the 36 planes that keep them out of one another's cache sets.
constexpr int64_t kSkew = 16;
// Larger inputs or weights (and inf, NaN) are left to the direct kernel: below it no intermediate value can overflow,
// the transforms magnifying by less than 2^12 and 2^80 * 2^12 leaving room for 2^35 channels.
constexpr float kLargest = 0x1p40f;

// Either the weights of all groups are transformed first and shared, and a unit of work transforms the inputs of one
// chunk (large maps); or the inputs are, and a unit transforms the weights of some groups (many channels). The shared
// inputs are those of a band of chunks; the bands of a large map take turns.
struct WinogradPlan {
  int64_t group, cin_blocks, groups;
  int64_t tile_rows, tile_columns;    // of the map
  int64_t chunk_rows, chunk_columns;  // into how many chunks the map is cut, down and across
  int64_t images;                     // whose chunks follow one another; more than one only where the inputs are shared
  int64_t chunk_tiles;                // most tiles of a chunk
  bool share_weights;
  int64_t unit_chunks, unit_groups;  // chunks and groups of a unit where the inputs are shared
  int64_t band_chunks, band = 0;     // chunks that share their inputs, and which of the bands it is the turn of

  int64_t image_chunks() const { return chunk_rows * chunk_columns; }
  int64_t chunks() const { return images * image_chunks(); }
  int64_t v_plane(int64_t blocks) const { return blocks * chunk_tiles * kWords + kSkew; }
  int64_t u_plane(int64_t blocks) const { return blocks * kWords * group + kSkew; }
  int64_t m_plane() const { return chunk_tiles * group + kSkew; }
  int64_t unit_blocks() const { return std::min(kUnitBlocks, cin_blocks); }

  // Floats of the shared operand, of one of its parts (a group's or a chunk's), and of its flags (whether a part's
  // block holds a value over kLargest).
  int64_t parts() const { return share_weights ? groups : band_chunks; }
  int64_t bands() const { return share_weights ? 1 : ceil_div(chunks(), band_chunks); }
  int64_t band_begin() const { return band * band_chunks; }
  int64_t band_size() const { return std::min(band_chunks, chunks() - band_begin()); }
  int64_t part_floats() const { return kPlanes * (share_weights ? u_plane(cin_blocks) : v_plane(cin_blocks)); }
  int64_t shared_floats() const { return parts() * (part_floats() + ceil_div(cin_blocks, kSkew) * kSkew); }

  int64_t prepare_units() const { return (share_weights ? groups : band_size()) * cin_blocks; }
  int64_t run_units() const {
    return share_weights ? chunks() : ceil_div(groups, unit_groups) * ceil_div(band_size(), unit_chunks);
  }
  int64_t m_parts() const { return share_weights || cin_blocks <= kUnitBlocks ? 1 : unit_groups * unit_chunks; }
  int64_t local_floats() const { return kPlanes * (share_weights ? v_plane(cin_blocks) : u_plane(unit_blocks())); }
  int64_t scratch_floats() const {
    const int64_t row_pixels = kTile * ceil_div(tile_columns, chunk_columns);
    return local_floats() + m_parts() * kPlanes * m_plane() + kTile * row_pixels * group;
  }
};

// Chunks depend on nothing but the layer, and not on the number of images, so that those with values over kLargest are
// the same in every run; the number of threads only says how many of the groups a unit gets.
inline WinogradPlan winograd_plan(int64_t h, int64_t w, int64_t cin_blocks, int64_t groups, int64_t group,
                                  int64_t threads, int64_t images) {
  constexpr int64_t kMostTiles = 56;
  constexpr int64_t kHalfL2 = 1 << 18;                                        // floats
  const int64_t band = std::clamp<int64_t>(threads << 19, 1 << 20, 1 << 22);  // enough for every thread to have units
  WinogradPlan p{};
  p.group = group;
  p.groups = groups;
  p.cin_blocks = cin_blocks;
  p.images = 1;
  p.tile_rows = ceil_div(h, kTile);
  p.tile_columns = ceil_div(w, kTile);
  auto cut = [&p](int64_t most) {
    p.chunk_columns = ceil_div(p.tile_columns, most);
    const int64_t across = ceil_div(p.tile_columns, p.chunk_columns);
    p.chunk_rows = ceil_div(p.tile_rows, std::max<int64_t>(1, most / across));
    p.chunk_tiles = across * ceil_div(p.tile_rows, p.chunk_rows);
  };
  cut(std::clamp<int64_t>(kHalfL2 / (kPlanes * cin_blocks * kWords), 14, kMostTiles));
  p.share_weights = groups * kPlanes * p.u_plane(cin_blocks) <= 5 * kHalfL2 / 2 && p.chunks() >= groups;
  if (!p.share_weights) cut(kMostTiles);
  p.images = images;
  p.unit_chunks = std::min(p.chunks(), std::max<int64_t>(1, kUnitTiles / p.chunk_tiles));
  p.band_chunks = std::max<int64_t>(1, band / (p.part_floats() * p.unit_chunks)) * p.unit_chunks;
  p.band_chunks = std::min(p.band_chunks, p.chunks());
  p.unit_groups = std::clamp<int64_t>(groups / threads, 1, kUnitChannels / group);
  return p;
}

// With fewer input channels PyTorch's own sums are so short that F(4x4) has more than twice their error.
constexpr int64_t kLeastChannels = 48;

// Whether F(4x4) is accurate enough and takes less time than the direct kernel. Per pair of channels it computes 36
// products a tile and transforms the weights, at the price of some 250 products (measured: 7x7 maps break even with
// AVX-512, 6x6 with AVX2); the direct kernel computes 9 products a pixel. vgg_fast.testing.is_direct says the same.
inline bool winograd_pays(int64_t h, int64_t w, int64_t cin) {
  const int64_t tiles = ceil_div(h, kTile) * ceil_div(w, kTile);
  return cin >= kLeastChannels && kPlanes * tiles + 250 < kTaps * h * w;
}

}  // namespace vgg_fast
