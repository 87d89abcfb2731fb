// The matrix product of weight_grad.h as a template over an Isa; include after conv3x3_rows.inl, in the same manner.
//   Isa::kOuterRows  rows of x whose sums, by kOuterBlocks blocks of 16 channels of dy, fit into the registers

template <class Isa, int kRows, int kBlocks>
VGG_TARGET inline void outer_products(const float* v, const float* w, int64_t w_block, int64_t count, bool first,
                                      float* m, int64_t m_row, const float* ahead) {
  constexpr int kVecs = kVector / Isa::kLanes * kBlocks;
  const auto offset = [&](int i) VGG_TARGET { return i * Isa::kLanes / kVector * w_block + i * Isa::kLanes % kVector; };
  typename Isa::Vec sum[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVecs; ++i) sum[r][i] = first ? Isa::zero() : Isa::load(m + r * m_row + i * Isa::kLanes);
  for (int64_t k = 0; k < count; ++k, v += kVector, w += kVector) {
    __builtin_prefetch(ahead + k * kAheadFloats, 0, 2);
    typename Isa::Vec lanes[kVecs];
    for (int i = 0; i < kVecs; ++i) lanes[i] = Isa::load(w + offset(i));
    for (int r = 0; r < kRows; ++r) {
      const typename Isa::Vec value = Isa::splat(v[r]);
      for (int i = 0; i < kVecs; ++i) sum[r][i] = Isa::multiply_add(value, lanes[i], sum[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kVecs; ++i) Isa::store(m + r * m_row + i * Isa::kLanes, sum[r][i]);
}

// Rows past the last one are computed too, in a block of channels that has them as zeros.
template <class Isa>
VGG_TARGET void outer(const float* v, int64_t rows, const float* w, int64_t w_block, int64_t blocks, int64_t count,
                      bool first, float* m, int64_t m_row, const float* ahead) {
  constexpr int kRows = Isa::kOuterRows, kFew = kRows < 4 ? kRows : 4;
  if (blocks > 1) {
    rows > kFew ? outer_products<Isa, kRows, 2>(v, w, w_block, count, first, m, m_row, ahead)
                : outer_products<Isa, kFew, 2>(v, w, w_block, count, first, m, m_row, ahead);
  } else {
    rows > kFew ? outer_products<Isa, kRows, 1>(v, w, w_block, count, first, m, m_row, ahead)
                : outer_products<Isa, kFew, 1>(v, w, w_block, count, first, m, m_row, ahead);
  }
}
