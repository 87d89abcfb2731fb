// The transforms of F(3x3, 4x4) over channels_last maps, as templates over an Isa; include after winograd_f32.inl,
// whose points and matrices they use, in the same manner.

// m = A y
template <class Isa>
VGG_TARGET inline void transform_4(const typename Isa::Vec y[4], typename Isa::Vec m[6]) {
  using Vec = typename Isa::Vec;
  const auto fma = [](float c, Vec x, Vec y) VGG_TARGET { return Isa::multiply_add(Isa::splat(c), x, y); };
  const Vec even_a = fma(kA2, y[2], y[0]), odd_a = fma(kA2, y[3], y[1]);
  const Vec even_b = fma(kB2, y[2], y[0]), odd_b = fma(kB2, y[3], y[1]);
  m[0] = y[0];
  m[1] = fma(kA, odd_a, even_a);
  m[2] = fma(-kA, odd_a, even_a);
  m[3] = fma(kB, odd_b, even_b);
  m[4] = fma(-kB, odd_b, even_b);
  m[5] = y[3];
}

// d = G^T m
template <class Isa>
VGG_TARGET inline void transform_weight_back(const typename Isa::Vec m[6], typename Isa::Vec d[3]) {
  using Vec = typename Isa::Vec;
  const auto times = [](double c, Vec x) VGG_TARGET { return Isa::splat(float(c)) * x; };
  const auto fma = [](double c, Vec x, Vec y) VGG_TARGET { return Isa::multiply_add(Isa::splat(float(c)), x, y); };
  const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  d[0] = fma(kN0, m[0], fma(kNA, even_a, times(kNB, even_b)));
  d[1] = fma(kNA * kA, odd_a, times(kNB * kB, odd_b));
  d[2] = fma(kNA * kA2, even_a, fma(kNB * kB2, even_b, m[5]));
}

// Reads kSide x kSide pixels from (top, left) on, zeros where there are none, and writes the 6x6 of a tile.
template <class Isa, int kSide>
VGG_TARGET inline void transform_tile(const float* map, int64_t h, int64_t w, int64_t channels, int64_t top,
                                      int64_t left, float* out, int64_t plane) {
  using Vec = typename Isa::Vec;
  const bool inside = top >= 0 && left >= 0 && top + kSide <= h && left + kSide <= w;
  const auto transform = [](const Vec* in, Vec* result) VGG_TARGET {
    if constexpr (kSide == kPatch) {
      transform_6<Isa>(in, result);
    } else {
      transform_4<Isa>(in, result);
    }
  };
  alignas(64) float half[kPatch * kSide * Isa::kLanes];
  for (int64_t c = 0; c < kVector; c += Isa::kLanes) {
    Vec in[kSide], result[6];
    for (int64_t j = 0; j < kSide; ++j) {
      const float* from = map + (top * w + left + j) * channels + c;
      for (int64_t i = 0; i < kSide; ++i) {
        const bool there = inside || (top + i >= 0 && top + i < h && left + j >= 0 && left + j < w);
        in[i] = there ? Isa::load(from + i * w * channels) : Isa::zero();
      }
      transform(in, result);
      for (int64_t i = 0; i < kPatch; ++i) Isa::store(half + (i * kSide + j) * Isa::kLanes, result[i]);
    }
    for (int64_t i = 0; i < kPatch; ++i) {
      for (int64_t j = 0; j < kSide; ++j) in[j] = Isa::load(half + (i * kSide + j) * Isa::kLanes);
      transform(in, result);
      for (int64_t j = 0; j < kPatch; ++j) Isa::store(out + (i * kPatch + j) * plane + c, result[j]);
    }
  }
}

template <class Isa, int kSide>
VGG_TARGET inline void transform_maps(const WeightGradArgs& a, const char* maps, int64_t channels, int64_t channel,
                                      int64_t begin, int64_t end, float* out, int64_t plane) {
  const int64_t columns = ceil_div(a.w, kTile), tiles = ceil_div(a.h, kTile) * columns, before = (kSide - kTile) / 2;
  for (int64_t t = begin; t < end; ++t, out += kVector) {
    const float* map = reinterpret_cast<const float*>(maps) + t / tiles * a.h * a.w * channels + channel;
    const int64_t row = t % tiles / columns * kTile - before, column = t % tiles % columns * kTile - before;
    transform_tile<Isa, kSide>(map, a.h, a.w, channels, row, column, out, plane);
  }
}

template <class Isa>
VGG_TARGET void weight_grad_transform_x(const WeightGradArgs& a, int64_t channel, int64_t begin, int64_t end, float* v,
                                        int64_t plane) {
  transform_maps<Isa, kPatch>(a, a.x, a.cin, channel, begin, end, v, plane);
}

template <class Isa>
VGG_TARGET void weight_grad_transform_dy(const WeightGradArgs& a, int64_t channel, int64_t begin, int64_t end, float* w,
                                         int64_t plane) {
  transform_maps<Isa, kTile>(a, a.dy, a.cout, channel, begin, end, w, plane);
}

template <class Isa>
VGG_TARGET void weight_grad_transform_back(const float* m, int64_t plane, int64_t vectors, bool first, float* out,
                                           int64_t tap) {
  using Vec = typename Isa::Vec;
  for (int64_t l = 0; l < vectors * kVector; l += Isa::kLanes) {
    Vec in[6], half[6][3], result[3];
    for (int64_t i = 0; i < kPatch; ++i) {
      for (int64_t j = 0; j < kPatch; ++j) in[j] = Isa::load(m + (i * kPatch + j) * plane + l);
      transform_weight_back<Isa>(in, half[i]);
    }
    for (int64_t j = 0; j < 3; ++j) {
      for (int64_t i = 0; i < kPatch; ++i) in[i] = half[i][j];
      transform_weight_back<Isa>(in, result);
      for (int64_t i = 0; i < 3; ++i) {
        float* to = out + (i * 3 + j) * tap + l;
        Isa::store(to, first ? result[i] : Isa::load(to) + result[i]);
      }
    }
  }
}
