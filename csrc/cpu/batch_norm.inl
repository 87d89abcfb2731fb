// The passes of batch_norm.h in gcc's vector extension: VGG_TARGET, defined before this is included inside an anonymous
// namespace, decides what the compiler makes of a vector of 16 floats. No product is contracted with a sum, hence the
// same bits for every target.

typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Mask __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));

#define VGG_INLINE VGG_TARGET inline __attribute__((always_inline))

constexpr int64_t kLanes = 16;

VGG_INLINE Vec splat(float value) { return Vec{} + value; }

// The first `lanes` of 16 floats, zeros behind them.
VGG_INLINE Vec load_floats(const float* p, int64_t lanes) {
  if (lanes >= kLanes) return *reinterpret_cast<const Vec*>(p);
  Vec v{};
  __builtin_memcpy(&v, p, lanes * sizeof(float));
  return v;
}

template <DType kType>
VGG_INLINE Vec load(const char* p, int64_t lanes) {
  if constexpr (kType == DType::f32) {
    return load_floats(reinterpret_cast<const float*>(p), lanes);
  } else {
    Halves half{};
    if (lanes >= kLanes) {
      half = *reinterpret_cast<const Halves*>(p);
    } else {
      __builtin_memcpy(&half, p, lanes * 2);
    }
    return reinterpret_cast<Vec>(__builtin_convertvector(half, Bits) << 16);
  }
}

// Rounded to bf16, the bits in the upper halves; a NaN stays one.
VGG_INLINE Bits bf16_bits(Vec v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Mask nan = v != v;
  return (nan ? bits | 0x400000u : rounded) & 0xffff0000u;
}

template <DType kType>
VGG_INLINE Vec rounded(Vec v) {
  if constexpr (kType == DType::f32) return v;
  return reinterpret_cast<Vec>(bf16_bits(v));
}

template <DType kType>
VGG_INLINE void store(char* p, Vec v, int64_t lanes) {
  if constexpr (kType == DType::f32) {
    if (lanes >= kLanes) {
      *reinterpret_cast<Vec*>(p) = v;
    } else {
      __builtin_memcpy(p, &v, lanes * sizeof(float));
    }
  } else {
    const Halves half = __builtin_convertvector(bf16_bits(v) >> 16, Halves);
    if (lanes >= kLanes) {
      *reinterpret_cast<Halves*>(p) = half;
    } else {
      __builtin_memcpy(p, &half, lanes * 2);
    }
  }
}

// What of the 2x2 window (or the one pixel) a value comes from.
template <DType kType, bool kPool>
struct Window {
  static constexpr int kSize = kPool ? 4 : 1;
  Vec z[kSize];  // as stored
  Vec best;      // the value
  Mask index;    // of the pixel that it comes from

  VGG_INLINE void read(const char* first, int64_t row, int64_t pixel, int64_t lanes, Vec scale, Vec shift, Vec floor) {
    const int64_t offset[4] = {0, pixel, row, row + pixel};
    for (int k = 0; k < kSize; ++k) {
      z[k] = load<kType>(first + offset[k], lanes);
      Vec v = rounded<kType>(z[k] * scale + shift);
      const Mask below = v < floor;
      v = below ? floor : v;
      if (k == 0) {
        best = v;
        index = Mask{};
        continue;
      }
      const Mask take = (v > best) | (v != v);
      best = take ? v : best;
      index = take ? Mask{} + k : index;
    }
  }
};

struct UnitRows {
  int64_t image, begin, end;
};

VGG_INLINE UnitRows rows_of(const PassArgs& a, int64_t unit, int64_t rows) {
  const int64_t begin = unit % a.image_units() * a.unit_rows();
  return {unit / a.image_units(), begin, begin + a.unit_rows() < rows ? begin + a.unit_rows() : rows};
}

template <DType kType, bool kPool>
VGG_TARGET void value_unit(const PassArgs& a, int64_t unit) {
  constexpr int64_t kSize = element_size(kType), kStep = kPool ? 2 : 1;
  const UnitRows rows = rows_of(a, unit, a.out_h());
  const int64_t pixel = a.c * kSize, row = a.w * pixel;
  const Vec floor = splat(a.relu ? 0.0f : -__builtin_inff());
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    const char* z = a.z + (rows.image * a.h + r * kStep) * row;
    char* y = a.out + (rows.image * a.out_h() + r) * a.out_w() * pixel;
    for (int64_t p = 0; p < a.out_w(); ++p, z += kStep * pixel, y += pixel) {
      for (int64_t c = 0; c < a.c; c += kLanes) {
        Window<kType, kPool> window;
        window.read(z + c * kSize, row, pixel, a.c - c, load_floats(a.scale + c, a.c - c),
                    load_floats(a.shift + c, a.c - c), floor);
        store<kType>(y + c * kSize, window.best, a.c - c);
      }
    }
  }
}

// relu' of a value, where PyTorch lets a NaN pass: threshold is 0, or NaN without a ReLU.
VGG_INLINE Vec masked(Vec g, Vec value, Vec threshold) {
  const Mask stopped = value <= threshold;
  return stopped ? Vec{} : g;
}

template <DType kType, bool kPool, bool kCentred>
VGG_TARGET void gradient_unit(const PassArgs& a, int64_t unit) {
  constexpr int64_t kSize = element_size(kType), kStep = kPool ? 2 : 1;
  const UnitRows rows = rows_of(a, unit, (a.h + kStep - 1) / kStep);
  const int64_t pixel = a.c * kSize, row = a.w * pixel;
  const Vec floor = splat(a.relu ? 0.0f : -__builtin_inff()), threshold = splat(a.relu ? 0.0f : __builtin_nanf(""));
  // Where nothing was pooled: the last row or column of an odd map.
  const auto rest = [&](int64_t y, int64_t x) VGG_TARGET {
    const int64_t at = ((rows.image * a.h + y) * a.w + x) * pixel;
    for (int64_t c = 0; c < a.c; c += kLanes) {
      Vec dz{};
      if constexpr (kCentred) {
        const Vec z = load<kType>(a.z + at + c * kSize, a.c - c);
        dz = (z - load_floats(a.mean + c, a.c - c)) * load_floats(a.slope + c, a.c - c) +
             load_floats(a.offset + c, a.c - c);
      }
      store<kType>(a.out + at + c * kSize, dz, a.c - c);
    }
  };
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    if (r >= a.out_h()) {
      for (int64_t x = 0; x < a.w; ++x) rest(r * kStep, x);
      continue;
    }
    const int64_t at = (rows.image * a.h + r * kStep) * row;
    const char* z = a.z + at;
    char* dz = a.out + at;
    const char* dy = a.dy + (rows.image * a.out_h() + r) * a.out_w() * pixel;
    for (int64_t p = 0; p < a.out_w(); ++p, z += kStep * pixel, dz += kStep * pixel, dy += pixel) {
      for (int64_t c = 0; c < a.c; c += kLanes) {
        const int64_t lanes = a.c - c;
        Window<kType, kPool> window;
        window.read(z + c * kSize, row, pixel, lanes, load_floats(a.scale + c, lanes), load_floats(a.shift + c, lanes),
                    floor);
        const Vec g =
            masked(load<kType>(dy + c * kSize, lanes), window.best, threshold) * load_floats(a.factor + c, lanes);
        const int64_t offset[4] = {0, pixel, row, row + pixel};
        for (int k = 0; k < window.kSize; ++k) {
          const Mask here = window.index == k;
          Vec v = kPool ? (here ? g : Vec{}) : g;
          if constexpr (kCentred) {
            v += (window.z[k] - load_floats(a.mean + c, lanes)) * load_floats(a.slope + c, lanes) +
                 load_floats(a.offset + c, lanes);
          }
          store<kType>(dz + offset[k] + c * kSize, v, lanes);
        }
      }
    }
    if (kPool && a.w % 2) {
      rest(r * 2, a.w - 1);
      rest(r * 2 + 1, a.w - 1);
    }
  }
}

template <DType kType, bool kPool>
VGG_TARGET void gated_unit(const PassArgs& a, int64_t unit) {
  constexpr int64_t kSize = element_size(kType), kStep = kPool ? 2 : 1;
  const Mask bit = Mask{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const UnitRows rows = rows_of(a, unit, (a.h + kStep - 1) / kStep);
  const int64_t pixel = a.c * kSize;
  for (int64_t y = rows.begin * kStep; y < rows.end * kStep && y < a.h; ++y) {
    char* out = a.out + (rows.image * a.h + y) * a.w * pixel;
    const char* dy = a.dy + (rows.image * a.out_h() + y / kStep) * a.out_w() * pixel;
    for (int64_t c = 0; c < a.c; c += kLanes) {
      const int64_t lanes = a.c - c;
      const Vec factor = load_floats(a.factor + c, lanes);
      const int64_t plane = rows.image * ceil_div(a.c, kLanes) + c / kLanes;
      const char* masks = a.mask == nullptr ? nullptr : a.mask + (plane * a.h + y) * a.w * 2;
      for (int64_t x = 0; x < a.w; ++x) {
        Vec v{};
        if (y / kStep < a.out_h() && x / kStep < a.out_w()) {
          v = load<kType>(dy + x / kStep * pixel + c * kSize, lanes) * factor;
          uint16_t bits = 0xffff;
          if (masks != nullptr) __builtin_memcpy(&bits, masks + 2 * x, 2);
          const Mask pass = (bit & int32_t{bits}) != 0;
          v = pass ? v : Vec{};
        }
        store<kType>(out + x * pixel + c * kSize, v, lanes);
      }
    }
  }
}

constexpr int kColumns = 4;  // vectors that are summed up side by side: four lines in a row from each pixel

template <int kVecs>
VGG_INLINE void store_sums(double* to, const Vec (&sum)[kVecs], int64_t channels) {
  for (int i = 0; i < kVecs; ++i)
    for (int64_t l = 0; l < kLanes && i * kLanes + l < channels; ++l) to[i * kLanes + l] = double{sum[i][l]};
}

template <DType kType, bool kPool>
VGG_TARGET void gradient_sums_unit(const PassArgs& a, int64_t unit) {
  constexpr int64_t kSize = element_size(kType), kStep = kPool ? 2 : 1;
  const UnitRows rows = rows_of(a, unit, a.out_h());
  const int64_t pixel = a.c * kSize, row = a.w * pixel;
  const Vec floor = splat(a.relu ? 0.0f : -__builtin_inff()), threshold = splat(a.relu ? 0.0f : __builtin_nanf(""));
  double* sums = a.sums + unit * 2 * a.c;
  for (int64_t c = 0; c < a.c; c += kLanes) {
    const int64_t lanes = a.c - c;
    const Vec scale = load_floats(a.scale + c, lanes), shift = load_floats(a.shift + c, lanes);
    const Vec mean = a.mean != nullptr ? load_floats(a.mean + c, lanes) : Vec{};
    Vec total[2] = {};
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const char* z = a.z + (rows.image * a.h + r * kStep) * row + c * kSize;
      const char* dy = a.dy + (rows.image * a.out_h() + r) * a.out_w() * pixel + c * kSize;
      for (int64_t p = 0; p < a.out_w(); ++p, z += kStep * pixel, dy += pixel) {
        Window<kType, kPool> window;
        window.read(z, row, pixel, lanes, scale, shift, floor);
        const Vec g = masked(load<kType>(dy, lanes), window.best, threshold);
        Vec from = window.z[0];
        for (int k = 1; k < window.kSize; ++k) {
          const Mask here = window.index == k;
          from = here ? window.z[k] : from;
        }
        total[0] += g;
        total[1] += g * (from - mean);
      }
    }
    store_sums<1>(sums + c, {total[0]}, lanes);
    store_sums<1>(sums + a.c + c, {total[1]}, lanes);
  }
}

template <DType kType, bool kPool>
VGG_TARGET void moments_unit(const PassArgs& a, int64_t unit) {
  constexpr int64_t kSize = element_size(kType);
  const UnitRows rows = rows_of(a, unit, a.h);
  const int64_t pixel = a.c * kSize, pixels = (rows.end - rows.begin) * a.w;
  const char* first = a.z + (rows.image * a.h + rows.begin) * a.w * pixel;
  double* sums = a.sums + unit * 2 * a.c;
  for (int64_t c = 0; c < a.c; c += kColumns * kLanes) {
    Vec sum[kColumns] = {}, pivot[kColumns], rest[kColumns] = {}, squares[kColumns] = {};
    const char* z = first + c * kSize;
    for (int64_t p = 0; p < pixels; ++p, z += pixel)
      for (int i = 0; i < kColumns && c + i * kLanes < a.c; ++i)
        sum[i] += load<kType>(z + i * kLanes * kSize, a.c - c - i * kLanes);
    for (int i = 0; i < kColumns; ++i) pivot[i] = sum[i] / float(pixels);
    z = first + c * kSize;
    for (int64_t p = 0; p < pixels; ++p, z += pixel) {
      for (int i = 0; i < kColumns && c + i * kLanes < a.c; ++i) {
        const Vec distance = load<kType>(z + i * kLanes * kSize, a.c - c - i * kLanes) - pivot[i];
        rest[i] += distance;
        squares[i] += distance * distance;
      }
    }
    // The pivot is the mean but for its rounding, which the sum of what is left makes good.
    for (int64_t l = 0; l < kColumns * kLanes && c + l < a.c; ++l) {
      const double left = double{rest[l / kLanes][l % kLanes]};
      sums[c + l] = double{pivot[l / kLanes][l % kLanes]} + left / double(pixels);
      sums[a.c + c + l] = double{squares[l / kLanes][l % kLanes]} - left * left / double(pixels);
    }
  }
}

template <DType kType, bool kPool>
VGG_TARGET void gradient_either(const PassArgs& a, int64_t unit) {
  a.mean != nullptr ? gradient_unit<kType, kPool, true>(a, unit) : gradient_unit<kType, kPool, false>(a, unit);
}

// Chooses by type and pool.
#define VGG_PASS(name)                                                               \
  VGG_TARGET void pass_##name(const PassArgs& a, int64_t unit) {                     \
    if (a.type == DType::f32) {                                                      \
      a.pool ? name<DType::f32, true>(a, unit) : name<DType::f32, false>(a, unit);   \
    } else {                                                                         \
      a.pool ? name<DType::bf16, true>(a, unit) : name<DType::bf16, false>(a, unit); \
    }                                                                                \
  }
VGG_PASS(value_unit)
VGG_PASS(moments_unit)
VGG_PASS(gradient_either)
VGG_PASS(gated_unit)
VGG_PASS(gradient_sums_unit)
#undef VGG_PASS
