// The two halves of every micro-kernel, as templates over an Isa. An ISA file defines VGG_TARGET (the
// function attribute of its instruction set), then its Isa inside an anonymous namespace, then includes this
// file there.
//
//   Isa::kLanes   fp32 lanes of a Vec              Isa::kGroup    output channels per call
//   Isa::kPixels  most pixels of a register block  Isa::Words     kLanes words of x or weights
//
// accumulate_row: raw accumulators of one convolution row, [w][kGroup] floats
// epilogue:       output pixels from two rows of accumulators

// P pixels x kGroup channels stay in registers over the whole sum.
template <class Isa, int P>
VGG_TARGET inline void accumulate_pixels(const Conv3x3Args& a, const char* x, const uint32_t* weight, float* out) {
  constexpr int kVecs = Isa::kGroup / Isa::kLanes;
  const int64_t row = (a.w + 2) * kLine;
  typename Isa::Vec acc[P][kVecs];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < kVecs; ++v) acc[p][v] = Isa::zero();
  for (int64_t b = 0; b < a.cin_blocks; ++b) {
    const int64_t words = b + 1 == a.cin_blocks ? a.last_words : kWords;
    for (int64_t tap = 0; tap < kTaps; ++tap) {
      const char* pixels = x + b * a.x_plane + (tap / 3) * row + (tap % 3) * kLine;
      const uint32_t* lanes = weight + (b * kTaps + tap) * kWords * Isa::kGroup;
      for (int64_t k = 0; k < words; ++k) {
        typename Isa::Words w[kVecs];
        for (int v = 0; v < kVecs; ++v) w[v] = Isa::load_words(lanes + k * Isa::kGroup + v * Isa::kLanes);
        for (int p = 0; p < P; ++p) {
          const typename Isa::Words value = Isa::broadcast_word(pixels + p * kLine + k * 4);
          for (int v = 0; v < kVecs; ++v) acc[p][v] = Isa::dot(value, w[v], acc[p][v]);
        }
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < kVecs; ++v) Isa::store(out + p * Isa::kGroup + v * Isa::kLanes, acc[p][v]);
}

template <class Isa, int P = Isa::kPixels>
VGG_TARGET inline void accumulate_some(int64_t pixels, const Conv3x3Args& a, const char* x, const uint32_t* weight,
                                       float* out) {
  if (pixels == P) {
    accumulate_pixels<Isa, P>(a, x, weight, out);
  } else if constexpr (P > 1) {
    accumulate_some<Isa, P - 1>(pixels, a, x, weight, out);
  }
}

template <class Isa>
VGG_TARGET inline void accumulate_row(const Conv3x3Args& a, int64_t group, int64_t row, float* out) {
  const uint32_t* weight = a.weight + group * a.cin_blocks * kTaps * kWords * Isa::kGroup;
  const char* x = a.x + row * (a.w + 2) * kLine;
  // As few register blocks as can be, of even size: a remainder of one pixel would run at a fraction of the
  // speed.
  const int64_t tiles = ceil_div(a.w, Isa::kPixels);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = t * a.w / tiles, end = (t + 1) * a.w / tiles;
    accumulate_some<Isa>(end - begin, a, x + begin * kLine, weight, out + begin * Isa::kGroup);
  }
}

// Where the type in memory and the precision differ, the blocked layout holds rounded bf16 or fp16 in fp32 or in parts.
template <class Isa, bool kPool, DType kRound, DType kStore, int kParts>
VGG_TARGET inline void write_pixels_as(const Conv3x3Args& a, const Output& out, int64_t group, int64_t row,
                                       int64_t column, int64_t pixels, const float* top, const float* bottom) {
  const typename Isa::Vec floor = Isa::splat(a.relu ? 0.0f : -__builtin_inff());
  for (int64_t c = 0; c < Isa::kGroup; c += Isa::kLanes) {
    const int64_t channel = group * Isa::kGroup + c;
    if (channel >= out.stored) break;
    const typename Isa::Vec scale = Isa::load(a.scale + channel), shift = Isa::load(a.shift + channel);
    const typename Isa::Mask exist = Isa::first_lanes(a.cout - channel);
    char* y = out.data + group * out.group + row * out.row + column * out.pixel + (c / kVector) * out.vector +
              (c % kVector) * (kParts > 1 ? 2 : element_size(kStore));
    for (int64_t p = 0; p < pixels; ++p, y += out.pixel) {
      typename Isa::Vec v;
      if constexpr (kPool) {
        const int64_t left = 2 * p * Isa::kGroup + c, right = left + Isa::kGroup;
        v = Isa::max_or_nan(Isa::max_or_nan(Isa::load(top + left), Isa::load(top + right)),
                            Isa::max_or_nan(Isa::load(bottom + left), Isa::load(bottom + right)));
      } else {
        v = Isa::load(top + p * Isa::kGroup + c);
      }
      v = Isa::clamp_below(Isa::multiply_add(v, scale, shift), floor);
      v = Isa::keep(v, exist);
      if constexpr (kRound == DType::f16 && kStore != DType::f16) v = Isa::round_f16(v);
      if constexpr (kRound == DType::bf16 && kStore != DType::bf16) v = Isa::round_bf16(v);
      if constexpr (kParts > 1) {
        Isa::template store_parts<kParts>(y, out.part, v);
      } else if constexpr (kStore == DType::bf16) {
        Isa::store_bf16(y, v);
      } else if constexpr (kStore == DType::f16) {
        Isa::store_f16(y, v);
      } else {
        Isa::store(reinterpret_cast<float*>(y), v);
      }
    }
  }
}

// kParts: of the layout between the layers. What goes into a tensor is in one piece.
template <class Isa, bool kPool, int kParts>
VGG_TARGET inline void write_pixels(const Conv3x3Args& a, const Output& out, int64_t group, int64_t row, int64_t column,
                                    int64_t pixels, const float* top, const float* bottom) {
  constexpr auto f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
  const auto as = [&](auto write) VGG_TARGET { write(a, out, group, row, column, pixels, top, bottom); };
  if constexpr (kParts > 1) {
    if (out.part != 0) {
      if (a.round_to == bf16) return as(write_pixels_as<Isa, kPool, bf16, f32, kParts>);
      if (a.round_to == f16) return as(write_pixels_as<Isa, kPool, f16, f32, kParts>);
      return as(write_pixels_as<Isa, kPool, f32, f32, kParts>);
    }
  }
  if (out.type == bf16) return as(write_pixels_as<Isa, kPool, bf16, bf16, 1>);
  if (out.type == f16) return as(write_pixels_as<Isa, kPool, f16, f16, 1>);
  if (a.round_to == bf16) return as(write_pixels_as<Isa, kPool, bf16, f32, 1>);
  if (a.round_to == f16) return as(write_pixels_as<Isa, kPool, f16, f32, 1>);
  as(write_pixels_as<Isa, kPool, f32, f32, 1>);
}

// The epilogue: writes `width` pixels from `column` on of convolution row `row`, and of the next one where `two`, from
// raw accumulators [row][pixel][kGroup], `pitch` floats to a row. Pooling, row and column are even, and an odd last row
// or column goes into the tap only.
template <class Isa, int kParts = 1>
VGG_TARGET inline void epilogue(const Conv3x3Args& a, int64_t group, int64_t row, int64_t column, int64_t width,
                                bool two, const float* sums, int64_t pitch) {
  const auto unpooled = [&](const Output& out) VGG_TARGET {
    write_pixels<Isa, false, kParts>(a, out, group, row, column, width, sums, nullptr);
    if (two) write_pixels<Isa, false, kParts>(a, out, group, row + 1, column, width, sums + pitch, nullptr);
  };
  if (a.tap.data != nullptr) unpooled(a.tap);
  if (!a.pool) {
    unpooled(a.y);
  } else if (two) {
    write_pixels<Isa, true, kParts>(a, a.y, group, row / 2, column / 2, width / 2, sums, sums + pitch);
  }
}

// The micro-kernel for ISAs that work a row off by itself.
template <class Isa>
VGG_TARGET inline void conv3x3_rows(const Conv3x3Args& a, int64_t group, int64_t row_begin, int64_t row_end,
                                    float* scratch) {
  const int64_t pitch = a.w * Isa::kGroup;
  for (int64_t row = row_begin; row < row_end; row += 2) {
    const bool two = row + 1 < row_end;
    accumulate_row<Isa>(a, group, row, scratch);
    if (two) accumulate_row<Isa>(a, group, row + 1, scratch + pitch);
    epilogue<Isa>(a, group, row, 0, a.w, two, scratch, pitch);
  }
}
