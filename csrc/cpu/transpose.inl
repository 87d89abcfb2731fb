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

// to[c * to_row + r] = from[r * from_row + c], in the type of `to`.
template <DType kType>
VGG_TARGET void transpose_as(const float* from, int64_t from_row, int64_t rows, int64_t columns, char* to,
                             int64_t to_row) {
  constexpr int64_t kSize = element_size(kType);
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = r + i < rows ? load_floats(from + (r + i) * from_row + c, columns - c) : Vec{};
      }
      exchange<8>(block);
      exchange<4>(block);
      exchange<2>(block);
      exchange<1>(block);
      for (int64_t i = 0; i < kLanes && c + i < columns; ++i) {
        store<kType>(to + ((c + i) * to_row + r) * kSize, block[i], rows - r);
      }
    }
  }
}

VGG_TARGET void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, char* to, int64_t to_row,
                          DType type) {
  type == DType::f32 ? transpose_as<DType::f32>(from, from_row, rows, columns, to, to_row)
                     : transpose_as<DType::bf16>(from, from_row, rows, columns, to, to_row);
}
