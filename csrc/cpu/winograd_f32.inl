// The stages of a Winograd kernel as templates over an Isa; winograd.h has the layouts. Include after
// conv3x3_rows.inl, in the same manner.
//
// The points are 0, +-5/8, +-3/2 and infinity: with 0, +-1, +-2 the error was measured to be twice as large. All
// coefficients of B and A but the cubes are exact in fp32.

constexpr float kA = 0.625f, kA2 = kA * kA, kA3 = kA2 * kA;
constexpr float kB = 1.5f, kB2 = kB * kB, kB3 = kB2 * kB;
// 1 / product of the distances to the other points, the scale of a row of G.
constexpr double kN0 = 1.0 / (double(kA2) * kB2), kNA = 1.0 / (2.0 * kA2 * (double(kA2) - kB2)),
                 kNB = 1.0 / (2.0 * kB2 * (double(kB2) - kA2));

// v = B^T d for one column (or row) of a 6x6 patch.
template <class Isa>
VGG_TARGET inline void transform_6(const typename Isa::Vec d[6], typename Isa::Vec v[6]) {
  using Vec = typename Isa::Vec;
  const auto fma = [](float c, Vec x, Vec y) VGG_TARGET { return Isa::multiply_add(Isa::splat(c), x, y); };
  v[0] = fma(kA2 * kB2, d[0], fma(-(kA2 + kB2), d[2], d[4]));
  v[5] = fma(kA2 * kB2, d[1], fma(-(kA2 + kB2), d[3], d[5]));
  const Vec even_a = fma(-kB2, d[2], d[4]), odd_a = fma(-kB2, d[1], d[3]);
  const Vec even_b = fma(-kA2, d[2], d[4]), odd_b = fma(-kA2, d[1], d[3]);
  v[1] = fma(kA, odd_a, even_a);
  v[2] = fma(-kA, odd_a, even_a);
  v[3] = fma(kB, odd_b, even_b);
  v[4] = fma(-kB, odd_b, even_b);
}

// u = G g
template <class Isa>
VGG_TARGET inline void transform_3(const typename Isa::Vec g[3], typename Isa::Vec u[6]) {
  using Vec = typename Isa::Vec;
  const auto times = [](double c, Vec x) VGG_TARGET { return Isa::splat(float(c)) * x; };
  const auto fma = [](double c, Vec x, Vec y) VGG_TARGET { return Isa::multiply_add(Isa::splat(float(c)), x, y); };
  u[0] = times(kN0, g[0]);
  const Vec even_a = fma(kNA * kA2, g[2], times(kNA, g[0])), even_b = fma(kNB * kB2, g[2], times(kNB, g[0]));
  u[1] = fma(kNA * kA, g[1], even_a);
  u[2] = fma(-kNA * kA, g[1], even_a);
  u[3] = fma(kNB * kB, g[1], even_b);
  u[4] = fma(-kNB * kB, g[1], even_b);
  u[5] = g[2];
}

// y = A^T m
template <class Isa>
VGG_TARGET inline void transform_back(const typename Isa::Vec m[6], typename Isa::Vec y[4]) {
  using Vec = typename Isa::Vec;
  const auto fma = [](float c, Vec x, Vec y) VGG_TARGET { return Isa::multiply_add(Isa::splat(c), x, y); };
  const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + (even_a + even_b);
  y[1] = fma(kA, odd_a, Isa::splat(kB) * odd_b);
  y[2] = fma(kA2, even_a, Isa::splat(kB2) * even_b);
  y[3] = fma(kA3, odd_a, fma(kB3, odd_b, m[5]));
}

// A rectangle of tiles.
struct Chunk {
  int64_t row_begin, row_end, column_begin, column_end;
  int64_t columns() const { return column_end - column_begin; }
  int64_t tiles() const { return (row_end - row_begin) * columns(); }
};

inline Chunk chunk_of(const WinogradPlan& p, int64_t chunk) {
  chunk %= p.image_chunks();
  const int64_t r = chunk / p.chunk_columns, c = chunk % p.chunk_columns;
  return {r * p.tile_rows / p.chunk_rows, (r + 1) * p.tile_rows / p.chunk_rows, c * p.tile_columns / p.chunk_columns,
          (c + 1) * p.tile_columns / p.chunk_columns};
}

// V of one channel block of a chunk. Returns whether an input is over kLargest, infinite or NaN.
template <class Isa>
VGG_TARGET inline bool transform_inputs(const Conv3x3Args& a, const WinogradPlan& p, const Chunk& chunk, int64_t block,
                                        float* v) {
  using Vec = typename Isa::Vec;
  const int64_t pitch = (a.w + 2) * kWords, plane = p.v_plane(p.cin_blocks);
  const float* map = reinterpret_cast<const float*>(a.x + block * a.x_plane);
  float* out = v + block * chunk.tiles() * kWords;
  const int64_t bottom = std::min(chunk.row_end * kTile, a.h) + 2, right = std::min(chunk.column_end * kTile, a.w) + 2;
  Vec largest = Isa::zero();
  for (int64_t row = chunk.row_begin * kTile; row < bottom; ++row) {
    const float* line = map + row * pitch + chunk.column_begin * kTile * kWords;
    const float* end = map + row * pitch + right * kWords;
    for (; line < end; line += Isa::kLanes) largest = Isa::larger_magnitude(largest, Isa::load(line));
  }
  alignas(64) float patch[kPlanes * kWords], half[kPlanes * kWords];
  for (int64_t row = chunk.row_begin; row < chunk.row_end; ++row) {
    for (int64_t column = chunk.column_begin; column < chunk.column_end; ++column, out += kWords) {
      const float* from = map + row * kTile * pitch + column * kTile * kWords;
      int64_t step = pitch;
      const int64_t rows = std::min(kPatch, a.h + 2 - row * kTile),
                    columns = std::min(kPatch, a.w + 2 - column * kTile);
      if (rows < kPatch || columns < kPatch) {  // what lies past the map counts as zeros
        for (int64_t i = 0; i < kPatch; ++i) {
          for (int64_t j = 0; j < kPatch; ++j) {
            for (int64_t c = 0; c < kWords; c += Isa::kLanes) {
              const bool there = i < rows && j < columns;
              Isa::store(patch + (i * kPatch + j) * kWords + c,
                         there ? Isa::load(from + i * pitch + j * kWords + c) : Isa::zero());
            }
          }
        }
        from = patch;
        step = kPatch * kWords;
      }
      for (int64_t c = 0; c < kWords; c += Isa::kLanes) {
        Vec in[6], result[6];
        for (int64_t j = 0; j < kPatch; ++j) {
          for (int64_t i = 0; i < kPatch; ++i) in[i] = Isa::load(from + i * step + j * kWords + c);
          transform_6<Isa>(in, result);
          for (int64_t i = 0; i < kPatch; ++i) Isa::store(half + (i * kPatch + j) * kWords, result[i]);
        }
        for (int64_t i = 0; i < kPatch; ++i) {
          for (int64_t j = 0; j < kPatch; ++j) in[j] = Isa::load(half + (i * kPatch + j) * kWords);
          transform_6<Isa>(in, result);
          for (int64_t j = 0; j < kPatch; ++j) Isa::store(out + (i * kPatch + j) * plane + c, result[j]);
        }
      }
    }
  }
  return Isa::exceeds(largest, kLargest);
}

// Rows of U for one channel block of a group; u is where those of the block begin. Returns whether a weight is over
// kLargest, infinite or NaN.
template <class Isa>
VGG_TARGET inline bool transform_weights(const Conv3x3Args& a, const WinogradPlan& p, int64_t group, int64_t block,
                                         float* u, int64_t plane) {
  using Vec = typename Isa::Vec;
  constexpr int64_t kTap = kWords * Isa::kGroup;
  const uint32_t* plain = a.weight + (group * p.cin_blocks + block) * kTaps * kTap;
  Vec largest = Isa::zero();
  for (int64_t lane = 0; lane < kTap; lane += Isa::kLanes) {
    Vec g[3], half[3][6], result[6];
    for (int64_t j = 0; j < 3; ++j) {
      for (int64_t i = 0; i < 3; ++i) {
        g[i] = Isa::load(reinterpret_cast<const float*>(plain) + (i * 3 + j) * kTap + lane);
        largest = Isa::larger_magnitude(largest, g[i]);
      }
      transform_3<Isa>(g, half[j]);
    }
    for (int64_t i = 0; i < kPatch; ++i) {
      for (int64_t j = 0; j < 3; ++j) g[j] = half[j][i];
      transform_3<Isa>(g, result);
      for (int64_t j = 0; j < kPatch; ++j) Isa::store(u + (i * kPatch + j) * plane + lane, result[j]);
    }
  }
  return Isa::exceeds(largest, kLargest);
}

// m (+)= v u over k channels for P tiles x kGroup channels; `first` starts from zero.
template <class Isa, int P>
VGG_TARGET inline void multiply_tiles(const float* v, int64_t block_step, const float* u, int64_t k, bool first,
                                      float* m) {
  constexpr int kVecs = Isa::kGroup / Isa::kLanes;
  for (; k > 0; first = false) {
    typename Isa::Vec acc[P][kVecs];
    for (int t = 0; t < P; ++t)
      for (int i = 0; i < kVecs; ++i) acc[t][i] = Isa::zero();
    for (int64_t b = 0; b < kSumBlocks && k > 0; ++b, k -= kWords, v += block_step) {
      for (int64_t word = 0; word < std::min(k, kWords); ++word, u += Isa::kGroup) {
        typename Isa::Vec w[kVecs];
        for (int i = 0; i < kVecs; ++i) w[i] = Isa::load(u + i * Isa::kLanes);
        for (int t = 0; t < P; ++t) {
          const typename Isa::Vec value = Isa::splat(v[t * kWords + word]);
          for (int i = 0; i < kVecs; ++i) acc[t][i] = Isa::multiply_add(value, w[i], acc[t][i]);
        }
      }
    }
    for (int t = 0; t < P; ++t) {
      for (int i = 0; i < kVecs; ++i) {
        float* sum = m + t * Isa::kGroup + i * Isa::kLanes;
        Isa::store(sum, first ? acc[t][i] : Isa::load(sum) + acc[t][i]);
      }
    }
  }
}

template <class Isa, int P = Isa::kPixels>
VGG_TARGET inline void multiply_some(int64_t tiles, const float* v, int64_t block_step, const float* u, int64_t k,
                                     bool first, float* m) {
  if (tiles == P) {
    multiply_tiles<Isa, P>(v, block_step, u, k, first, m);
  } else if constexpr (P > 1) {
    multiply_some<Isa, P - 1>(tiles, v, block_step, u, k, first, m);
  }
}

// M of a chunk and a group: what the channel blocks from `begin` to `end` add to it. A plane's weights stay in L1 while
// the tiles pass by.
template <class Isa>
VGG_TARGET inline void multiply(const Conv3x3Args& a, const WinogradPlan& p, int64_t tiles, int64_t begin, int64_t end,
                                const float* v, const float* u, int64_t u_plane, float* m) {
  const int64_t channels = (a.cin_blocks - 1) * kWords + a.last_words, step = tiles * kWords;
  const int64_t k = std::min(end * kWords, channels) - begin * kWords;
  const int64_t strips = ceil_div(tiles, Isa::kPixels);
  for (int64_t plane = 0; plane < kPlanes; ++plane) {
    const float* inputs = v + plane * p.v_plane(p.cin_blocks) + begin * step;
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t from = s * tiles / strips, to = (s + 1) * tiles / strips;
      multiply_some<Isa>(to - from, inputs + from * kWords, step, u + plane * u_plane, k, begin == 0,
                         m + plane * p.m_plane() + from * Isa::kGroup);
    }
  }
}

// From M (or, where `direct`, from the inputs) to a row of tiles of the result. rows: [4][columns][kGroup] floats.
template <class Isa>
VGG_TARGET inline void finish_tile_row(const Conv3x3Args& a, const WinogradPlan& p, const Chunk& chunk, int64_t group,
                                       int64_t tile_row, bool direct, const float* m, float* rows) {
  using Vec = typename Isa::Vec;
  const int64_t left = chunk.column_begin * kTile, pitch = chunk.columns() * kTile * Isa::kGroup;
  const int64_t top = tile_row * kTile, bottom = std::min(top + kTile, a.h);
  const int64_t width = std::min(chunk.column_end * kTile, a.w) - left;
  if (direct) {
    const uint32_t* weight = a.weight + group * a.cin_blocks * kTaps * kWords * Isa::kGroup;
    for (int64_t row = top; row < bottom; ++row) {
      const char* x = a.x + (row * (a.w + 2) + left) * kLine;
      for (int64_t column = 0; column < width; column += Isa::kPixels) {
        accumulate_some<Isa>(std::min<int64_t>(Isa::kPixels, width - column), a, x + column * kLine, weight,
                             rows + (row - top) * pitch + column * Isa::kGroup);
      }
    }
  } else {
    m += (tile_row - chunk.row_begin) * chunk.columns() * Isa::kGroup;
    alignas(64) float half[kTile * kPatch * Isa::kLanes];
    for (int64_t tile = 0; tile < chunk.columns(); ++tile, m += Isa::kGroup) {
      for (int64_t c = 0; c < Isa::kGroup; c += Isa::kLanes) {
        Vec in[6], result[4];
        for (int64_t j = 0; j < kPatch; ++j) {
          for (int64_t i = 0; i < kPatch; ++i) in[i] = Isa::load(m + (i * kPatch + j) * p.m_plane() + c);
          transform_back<Isa>(in, result);
          for (int64_t i = 0; i < kTile; ++i) Isa::store(half + (i * kPatch + j) * Isa::kLanes, result[i]);
        }
        for (int64_t i = 0; i < kTile; ++i) {
          for (int64_t j = 0; j < kPatch; ++j) in[j] = Isa::load(half + (i * kPatch + j) * Isa::kLanes);
          transform_back<Isa>(in, result);
          for (int64_t j = 0; j < kTile; ++j) {
            Isa::store(rows + i * pitch + (tile * kTile + j) * Isa::kGroup + c, result[j]);
          }
        }
      }
    }
  }
  for (int64_t row = top; row < bottom; row += 2, rows += 2 * pitch) {
    epilogue<Isa>(a, group, row, left, width, row + 1 < bottom, rows, pitch);
  }
}

template <class Isa>
VGG_TARGET inline void finish(const Conv3x3Args& a, const WinogradPlan& p, const Chunk& chunk, int64_t group,
                              bool direct, const float* m, float* rows) {
  for (int64_t row = chunk.row_begin; row < chunk.row_end; ++row) {
    finish_tile_row<Isa>(a, p, chunk, group, row, direct, m, rows);
  }
}

// Stage one: one channel block of one part of the shared operand.
template <class Isa>
VGG_TARGET inline void winograd_prepare_unit(const Conv3x3Args* images, const WinogradPlan& p, int64_t unit,
                                             float* shared) {
  const int64_t part = unit / p.cin_blocks, block = unit % p.cin_blocks;
  float* operand = shared + part * p.part_floats();
  bool large;
  if (p.share_weights) {
    const int64_t rows = block * kWords * Isa::kGroup;
    large = transform_weights<Isa>(*images, p, part, block, operand + rows, p.u_plane(p.cin_blocks));
  } else {
    const int64_t chunk = p.band_begin() + part;
    large = transform_inputs<Isa>(images[chunk / p.image_chunks()], p, chunk_of(p, chunk), block, operand);
  }
  shared[p.parts() * p.part_floats() + unit] = large;
}

inline bool any_large(const WinogradPlan& p, const float* shared, int64_t part) {
  const float* flags = shared + p.parts() * p.part_floats() + part * p.cin_blocks;
  return std::find(flags, flags + p.cin_blocks, 1.0f) != flags + p.cin_blocks;
}

// Stage two: a chunk and all groups, or some groups and some chunks.
template <class Isa>
VGG_TARGET inline void winograd_run_unit(const Conv3x3Args* images, const WinogradPlan& p, int64_t unit,
                                         const float* shared, float* scratch) {
  float* m = scratch + p.local_floats();
  float* rows = m + p.m_parts() * kPlanes * p.m_plane();
  if (p.share_weights) {
    const Conv3x3Args& a = images[unit / p.image_chunks()];
    bool large = false;
    const Chunk chunk = chunk_of(p, unit);
    for (int64_t block = 0; block < p.cin_blocks; ++block) {
      large |= transform_inputs<Isa>(a, p, chunk, block, scratch);
    }
    for (int64_t group = 0; group < p.groups; ++group) {
      const float* u = shared + group * p.part_floats();
      multiply<Isa>(a, p, chunk.tiles(), 0, p.cin_blocks, scratch, u, p.u_plane(p.cin_blocks), m);
      finish<Isa>(a, p, chunk, group, large || any_large(p, shared, group), m, rows);
    }
    return;
  }
  const int64_t units = ceil_div(p.band_size(), p.unit_chunks);
  const int64_t first = unit / units * p.unit_groups, last = std::min(first + p.unit_groups, p.groups);
  const int64_t begin = unit % units * p.unit_chunks, end = std::min(begin + p.unit_chunks, p.band_size());
  const int64_t plane = p.u_plane(p.unit_blocks());
  bool large_weights[kUnitChannels / Isa::kGroup] = {};
  for (int64_t block = 0; block < p.cin_blocks; block += kUnitBlocks) {
    const int64_t stop = std::min(block + kUnitBlocks, p.cin_blocks);
    float* sums = m;
    for (int64_t group = first; group < last; ++group) {
      bool& large = large_weights[group - first];
      for (int64_t b = block; b < stop; ++b) {
        large |= transform_weights<Isa>(*images, p, group, b, scratch + (b - block) * kWords * Isa::kGroup, plane);
      }
      for (int64_t c = begin; c < end; ++c, sums += p.m_parts() == 1 ? 0 : kPlanes * p.m_plane()) {
        const Conv3x3Args& a = images[(p.band_begin() + c) / p.image_chunks()];
        const Chunk chunk = chunk_of(p, p.band_begin() + c);
        multiply<Isa>(a, p, chunk.tiles(), block, stop, shared + c * p.part_floats(), scratch, plane, sums);
        if (stop == p.cin_blocks) finish<Isa>(a, p, chunk, group, large || any_large(p, shared, c), sums, rows);
      }
    }
  }
}
