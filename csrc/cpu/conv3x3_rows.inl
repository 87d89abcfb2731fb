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
  // As few register blocks as can be, of even size: a remainder of one pixel would run at a fraction of the speed.
  const int64_t tiles = ceil_div(a.w, Isa::kPixels);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = t * a.w / tiles, end = (t + 1) * a.w / tiles;
    accumulate_some<Isa>(end - begin, a, x + begin * kLine, weight, out + begin * Isa::kGroup);
  }
}

// What of a Vec goes where: the type in memory and the precision differ where the blocked layout holds rounded bf16 or
// fp16 in fp32 or in parts.
template <DType kRoundTo, DType kStoreAs, int kPartsOf>
struct Storing {
  static constexpr DType kRound = kRoundTo, kStore = kStoreAs;
  static constexpr int kParts = kPartsOf;
  static constexpr int64_t kSize = kParts > 1 ? 2 : element_size(kStore);
};

template <class Isa, class As>
VGG_TARGET inline void store_as(char* y, int64_t part, typename Isa::Vec v) {
  if constexpr (As::kRound == DType::f16 && As::kStore != DType::f16) v = Isa::round_f16(v);
  if constexpr (As::kRound == DType::bf16 && As::kStore != DType::bf16) v = Isa::round_bf16(v);
  if constexpr (As::kParts > 1) {
    Isa::template store_parts<As::kParts>(y, part, v);
  } else if constexpr (As::kStore == DType::bf16) {
    Isa::store_bf16(y, v);
  } else if constexpr (As::kStore == DType::f16) {
    Isa::store_f16(y, v);
  } else {
    Isa::store(reinterpret_cast<float*>(y), v);
  }
}

// kParts: of the layout between the layers. What goes into a tensor is in one piece.
template <int kParts, class Write>
VGG_TARGET inline void choose_storing(const Conv3x3Args& a, const Output& out, const Write& write) {
  constexpr auto f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
  if constexpr (kParts > 1) {
    if (out.part != 0) {
      if (a.round_to == bf16) return write(Storing<bf16, f32, kParts>{});
      if (a.round_to == f16) return write(Storing<f16, f32, kParts>{});
      return write(Storing<f32, f32, kParts>{});
    }
  }
  if (out.type == bf16) return write(Storing<bf16, bf16, 1>{});
  if (out.type == f16) return write(Storing<f16, f16, 1>{});
  if (a.round_to == bf16) return write(Storing<bf16, f32, 1>{});
  if (a.round_to == f16) return write(Storing<f16, f32, 1>{});
  write(Storing<f32, f32, 1>{});
}

template <class Isa>
VGG_TARGET inline int64_t mask_offset(int64_t channel, int64_t pixel, int64_t pixels) {
  return (channel / kVector * pixels + pixel) * 2 + channel % kVector / 8;
}

template <class Isa>
using MaskBits = std::conditional_t<Isa::kLanes == kVector, uint16_t, uint8_t>;

template <class Isa>
VGG_TARGET inline void store_mask(char* to, unsigned bits) {
  // Atomic, which costs nothing: where strips overlap, two threads write the same bits.
  __atomic_store_n(reinterpret_cast<MaskBits<Isa>*>(to), MaskBits<Isa>(bits), __ATOMIC_RELAXED);
}

// Which of four values the pool chooses.
template <class Isa>
VGG_TARGET inline void chosen(const typename Isa::Vec v[4], unsigned bits[4]) {
  typename Isa::Vec best = v[0];
  bits[0] = ~0u;
  for (int k = 1; k < 4; ++k) {
    bits[k] = Isa::greater_or_nan(v[k], best);
    best = Isa::max_or_nan(best, v[k]);
    for (int before = 0; before < k; ++before) bits[before] &= ~bits[k];
  }
}

template <class Isa, bool kPool, class As>
VGG_TARGET inline void write_pixels_as(const Conv3x3Args& a, const Output& out, int64_t group, int64_t row,
                                       int64_t column, int64_t pixels, const float* top, const float* bottom) {
  constexpr int64_t kStep = kPool ? 2 : 1;
  const typename Isa::Vec floor = Isa::splat(a.relu ? 0.0f : -__builtin_inff());
  for (int64_t c = 0; c < Isa::kGroup; c += Isa::kLanes) {
    const int64_t channel = group * Isa::kGroup + c;
    if (channel >= out.stored) break;
    const typename Isa::Vec scale = Isa::load(a.scale + channel), shift = Isa::load(a.shift + channel);
    const typename Isa::Mask exist = Isa::first_lanes(a.cout - channel);
    char* y = out.data + group * out.group + row * out.row + column * out.pixel + (c / kVector) * out.vector +
              (c % kVector) * As::kSize;
    char* mask = nullptr;
    if (a.mask != nullptr && channel / kVector * kVector < a.cout) {
      mask = a.mask + mask_offset<Isa>(channel, (row * a.w + column) * kStep, a.h * a.w);
    }
    for (int64_t p = 0; p < pixels; ++p, y += out.pixel) {
      typename Isa::Vec v, window[4];
      if constexpr (kPool) {
        const int64_t left = 2 * p * Isa::kGroup + c, right = left + Isa::kGroup;
        window[0] = Isa::load(top + left);
        window[1] = Isa::load(top + right);
        window[2] = Isa::load(bottom + left);
        window[3] = Isa::load(bottom + right);
        v = Isa::max_or_nan(Isa::max_or_nan(window[0], window[1]), Isa::max_or_nan(window[2], window[3]));
      } else {
        v = Isa::load(top + p * Isa::kGroup + c);
      }
      v = Isa::clamp_below(Isa::multiply_add(v, scale, shift), floor);
      v = Isa::keep(v, exist);
      if (mask != nullptr) {
        const unsigned pass = a.relu ? Isa::not_below_or_zero(v) : ~0u;
        if constexpr (kPool) {
          unsigned bits[4];
          chosen<Isa>(window, bits);
          for (int k = 0; k < 4; ++k) store_mask<Isa>(mask + (k / 2 * a.w + 2 * p + k % 2) * 2, bits[k] & pass);
        } else {
          store_mask<Isa>(mask + 2 * p, pass);
        }
      }
      store_as<Isa, As>(y, out.part, v);
    }
  }
}

template <class Isa, bool kPool, int kParts>
VGG_TARGET inline void write_pixels(const Conv3x3Args& a, const Output& out, int64_t group, int64_t row, int64_t column,
                                    int64_t pixels, const float* top, const float* bottom) {
  choose_storing<kParts>(a, out, [&](auto as) VGG_TARGET {
    write_pixels_as<Isa, kPool, decltype(as)>(a, out, group, row, column, pixels, top, bottom);
  });
}

// A row of a gradient on its way through a gate; without a ReLU of its own and unpooled.
template <class Isa, int kWindow, class As>
VGG_TARGET inline void write_gradient_as(const Conv3x3Args& a, int64_t group, int64_t row, int64_t column,
                                         int64_t pixels, const float* sums) {
  const Output& out = a.y;
  for (int64_t c = 0; c < Isa::kGroup; c += Isa::kLanes) {
    const int64_t channel = group * Isa::kGroup + c;
    if (channel >= out.stored) break;
    const bool any = channel / kVector * kVector < a.cout;
    const typename Isa::Vec scale = Isa::load(a.scale + channel);
    const typename Isa::Mask exist = Isa::first_lanes(a.cout - channel);
    for (int64_t y = 0; y < kWindow; ++y) {
      const int64_t at = row * kWindow + y, first = column * kWindow;
      const char* mask = a.gate.mask + mask_offset<Isa>(any ? channel : 0, at * a.gate.w + first, a.gate.h * a.gate.w);
      char* to = out.data + group * out.group + at * out.row + first * out.pixel + (c / kVector) * out.vector +
                 (c % kVector) * As::kSize;
      for (int64_t p = 0; p < pixels; ++p) {
        const typename Isa::Vec v = Isa::keep(Isa::load(sums + p * Isa::kGroup + c) * scale, exist);
        for (int64_t x = 0; x < kWindow; ++x, mask += 2, to += out.pixel) {
          const unsigned bits = *reinterpret_cast<const MaskBits<Isa>*>(mask);
          store_as<Isa, As>(to, out.part, Isa::keep_bits(v, bits));
        }
      }
    }
  }
}

template <class Isa, int kParts>
VGG_TARGET inline void write_gradient(const Conv3x3Args& a, int64_t group, int64_t row, int64_t column, int64_t pixels,
                                      const float* sums) {
  choose_storing<kParts>(a, a.y, [&](auto as) VGG_TARGET {
    a.gate.pooled ? write_gradient_as<Isa, 2, decltype(as)>(a, group, row, column, pixels, sums)
                  : write_gradient_as<Isa, 1, decltype(as)>(a, group, row, column, pixels, sums);
  });
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
  if (a.gate.mask != nullptr) {
    write_gradient<Isa, kParts>(a, group, row, column, width, sums);
    if (two) write_gradient<Isa, kParts>(a, group, row + 1, column, width, sums + pitch);
    return;
  }
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
