// Rows and columns change places, 16 by 16; include after batch_norm.inl, in the same manner.

// One of four steps: bit `kBit` of the row and of the column change places.
template <int kBit>
VGG_INLINE void exchange(Vec r[kLanes]) {
  const Mask lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Mask upper = (lane & kBit) != 0;
  const Mask low = upper ? lane + 16 - kBit : lane, high = upper ? lane + 16 : lane + kBit;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kBit) continue;
    const Vec a = r[i], b = r[i + kBit];
    r[i] = __builtin_shuffle(a, b, low);
    r[i + kBit] = __builtin_shuffle(a, b, high);
  }
}

VGG_INLINE void transpose_block(Vec r[kLanes]) {
  exchange<8>(r);
  exchange<4>(r);
  exchange<2>(r);
  exchange<1>(r);
}

// to[c * to_row + r] = from[r * from_row + c], in the type of `to`.
template <DType kType>
VGG_TARGET bool transpose_as(const float* from, int64_t from_row, int64_t rows, int64_t columns, char* to,
                             int64_t to_row) {
  constexpr int64_t kSize = element_size(kType);
  Mask finite = Mask{} - 1;
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = r + i < rows ? load_floats(from + (r + i) * from_row + c, columns - c) : Vec{};
        finite &= block[i] - block[i] == Vec{};
      }
      transpose_block(block);
      for (int64_t i = 0; i < kLanes && c + i < columns; ++i) {
        store<kType>(to + ((c + i) * to_row + r) * kSize, block[i], rows - r);
      }
    }
  }
  bool all = true;
  for (int64_t i = 0; i < kLanes; ++i) all &= finite[i] != 0;
  return all;
}

VGG_TARGET bool transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, char* to, int64_t to_row,
                          DType type) {
  return type == DType::f32 ? transpose_as<DType::f32>(from, from_row, rows, columns, to, to_row)
                            : transpose_as<DType::bf16>(from, from_row, rows, columns, to, to_row);
}

// The nine taps of 16 lanes of one channel, times their signs.
template <DType kType>
VGG_INLINE void load_taps(const PackArgs& a, int64_t lane, int64_t channel, Vec sign, Vec taps[kLanes]) {
  constexpr int64_t kSize = element_size(kType);
  for (int64_t i = 0; i < kLanes; ++i) {
    taps[i] = Vec{};
    if (lane + i >= a.lanes || channel >= a.channels) continue;
    const char* from = a.from + ((lane + i) * a.lane + channel * a.channel) * kSize;
    // Whole vectors wherever there is memory behind the taps: short copies take several times as long.
    taps[i] = from + kLanes * kSize <= a.end ? load<kType>(from, kLanes) : load<kType>(from, kTaps);
  }
  transpose_block(taps);
  for (int64_t tap = 0; tap < kTaps; ++tap) taps[tap] *= sign;
}

template <DType kType>
VGG_TARGET void pack_taps_as(const PackArgs& a) {
  constexpr int64_t kPerWord = 4 / element_size(kType);
  for (int64_t lane = 0; lane < a.group; lane += kLanes) {
    const Vec sign = load_floats(a.sign + lane, a.lanes > lane ? a.lanes - lane : 0);
    for (int64_t word = 0; word < kWords; ++word) {
      Vec first[kLanes], second[kLanes];
      load_taps<kType>(a, lane, word * kPerWord, sign, first);
      if (kPerWord == 2) load_taps<kType>(a, lane, word * kPerWord + 1, sign, second);
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        Vec v = first[tap];
        if (kPerWord == 2) {
          const Bits low = reinterpret_cast<Bits>(v) >> 16, high = reinterpret_cast<Bits>(second[tap]);
          v = reinterpret_cast<Vec>(low | (high & 0xffff0000u));
        }
        const int64_t row = (a.reversed ? kTaps - 1 - tap : tap) * kWords + word;
        *reinterpret_cast<Vec*>(a.to + (row * a.group + lane) * 4) = v;
      }
    }
  }
}

VGG_TARGET void pack_taps(const PackArgs& a) {
  a.type == DType::f32 ? pack_taps_as<DType::f32>(a) : pack_taps_as<DType::bf16>(a);
}
