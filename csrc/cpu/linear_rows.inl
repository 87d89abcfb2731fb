// Dot products of weight rows and images, 16 (8) inputs at a time: shared by the kernels that multiply in fp32. Include
// inside an anonymous namespace after defining VGG_TARGET. Isa: kLanes, kRows x kImages accumulators, Vec, zero, load,
// store, add, multiply_add, in_register (or gcc loads the weights anew for every image), sum (of the lanes, halves
// first), and weights<format>(const char*), kLanes of them as floats.

// Sums over parts of this many inputs are added up in a second sum: 25088 terms in one would have 5 times the error.
constexpr int64_t kPart = 1024;
// How far ahead of a row's reading to fetch it, measured: bf16 and f24 rows gain 15 %, fp32 rows nothing.
constexpr int64_t kAhead = 1024;

template <class Isa, WeightFormat kFormat>
constexpr int64_t value_bytes() {
  return kFormat == WeightFormat::f32 ? 4 : kFormat == WeightFormat::f24 ? 3 : 2;
}

// An address, not a pointer: it may lie behind the weights, where a prefetch does nothing.
inline void fetch_ahead(const char* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead));
}

// kOnce: the weights come from memory and are not read again.
// totals[image][row][lane] += weights of kRows rows times x of kImages images, `steps` vectors each.
template <class Isa, WeightFormat kFormat, bool kOnce, int kImages>
VGG_TARGET inline void add_products(const char* const* rows, const float* x, int64_t x_row, int64_t steps,
                                    float* totals) {
  constexpr int kRows = Isa::kRows;
  constexpr int64_t kStep = Isa::kLanes * value_bytes<Isa, kFormat>();
  typename Isa::Vec sums[kRows][kImages], inputs[kImages];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kImages; ++i) sums[r][i] = Isa::zero();
  }
  const char* row[kRows];
  for (int r = 0; r < kRows; ++r) row[r] = rows[r];
  for (int64_t step = 0; step < steps; ++step, x += Isa::kLanes) {
    for (int i = 0; i < kImages; ++i) inputs[i] = Isa::load(x + i * x_row);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kOnce) fetch_ahead(row[r] + step * kStep);
      typename Isa::Vec weights = Isa::template weights<kFormat>(row[r] + step * kStep);
      Isa::in_register(weights);
#pragma GCC unroll 3
      for (int i = 0; i < kImages; ++i) sums[r][i] = Isa::multiply_add(weights, inputs[i], sums[r][i]);
    }
  }
  for (int i = 0; i < kImages; ++i) {
    for (int r = 0; r < kRows; ++r) {
      float* total = totals + (i * kRows + r) * Isa::kLanes;
      Isa::store(total, Isa::add(Isa::load(total), sums[r][i]));
    }
  }
}

template <class Isa, WeightFormat kFormat, bool kOnce>
VGG_TARGET inline void add_products(int64_t images, const char* const* rows, const float* x, int64_t x_row,
                                    int64_t steps, float* totals) {
  switch (images) {
    case 1:
      return add_products<Isa, kFormat, kOnce, 1>(rows, x, x_row, steps, totals);
    case 2:
      return add_products<Isa, kFormat, kOnce, 2>(rows, x, x_row, steps, totals);
    default:
      return add_products<Isa, kFormat, kOnce, Isa::kImages>(rows, x, x_row, steps, totals);
  }
}

// One output of one image: bias, ReLU and the one rounding.
inline void store_output(const LinearArgs& a, int64_t row, int64_t image, float value) {
  if (a.bias != nullptr) value += a.bias[row];
  if (a.relu && value < 0.0f) value = 0.0f;  // NaN and -0.0 stay, as in PyTorch
  const int64_t at = image * a.out + row;
  if (a.store_as == DType::f32) {
    std::memcpy(a.y + at * 4, &value, 4);
  } else {
    const uint16_t half = a.store_as == DType::bf16 ? float_to_bf16(value) : float_to_f16(value);
    std::memcpy(a.y + at * 2, &half, 2);
  }
}

// For many images: `steps` vectors of each row as floats, side by side in L1, where rows a power of two apart would
// push each other out.
template <class Isa, WeightFormat kFormat>
VGG_TARGET inline void expand(const char** rows, int64_t steps, float* to) {
  for (int r = 0; r < Isa::kRows; ++r) {
    const char* row = rows[r];
    rows[r] = reinterpret_cast<const char*>(to);
    for (int64_t step = 0; step < steps; ++step, to += Isa::kLanes) {
      const char* from = row + step * Isa::kLanes * value_bytes<Isa, kFormat>();
      fetch_ahead(from);
      Isa::store(to, Isa::template weights<kFormat>(from));
    }
  }
}

template <class Isa, WeightFormat kFormat>
VGG_TARGET inline void linear_rows(const LinearArgs& a, int64_t begin, int64_t end, char* scratch) {
  constexpr int kRows = Isa::kRows, kImages = Isa::kImages;
  constexpr int64_t kLanes = Isa::kLanes, kBytes = value_bytes<Isa, kFormat>();
  constexpr int64_t kSums = kRows * kLanes;
  const int64_t x_row = ceil_div(a.in, kRowValues) * kRowValues;
  // f24 rows are padded; of the others the values behind the last whole vector go through a buffer.
  const int64_t whole = kFormat == WeightFormat::f24 ? x_row : a.in / kLanes * kLanes;
  const float* x = reinterpret_cast<const float*>(a.x);
  float* totals = reinterpret_cast<float*>(scratch);
  const int64_t blocks = ceil_div(end - begin, kRows);
  std::memset(totals, 0, blocks * a.images * kSums * sizeof(float));
  char tail[kRows][kLanes * 4] = {};
  alignas(64) float expanded[kRows * kPart];
  const bool many = a.images > 16;  // for fewer, waiting for memory and computing are better mixed
  for (int64_t k = 0; k < a.in; k += kPart) {
    const int64_t steps = std::max<int64_t>(0, std::min(kPart, whole - k)) / kLanes;
    const bool last = k + kPart >= a.in && whole < a.in;
    for (int64_t block = 0; block < blocks; ++block) {
      const char *rows[kRows], *tails[kRows];
      for (int r = 0; r < kRows; ++r) {
        // Rows that do not exist are the last one once more.
        const char* row = a.weight + std::min(begin + block * kRows + r, end - 1) * a.weight_row;
        rows[r] = row + k * kBytes;
        tails[r] = tail[r];
        if (last) std::memcpy(tail[r], row + whole * kBytes, (a.in - whole) * kBytes);
      }
      if (many) expand<Isa, kFormat>(rows, steps, expanded);
      for (int64_t i = 0; i < a.images; i += kImages) {
        const int64_t images = std::min<int64_t>(kImages, a.images - i);
        float* sums = totals + (block * a.images + i) * kSums;
        if (many) {
          add_products<Isa, WeightFormat::f32, false>(images, rows, x + i * x_row + k, x_row, steps, sums);
        } else {
          add_products<Isa, kFormat, true>(images, rows, x + i * x_row + k, x_row, steps, sums);
        }
        if (last) add_products<Isa, kFormat, false>(images, tails, x + i * x_row + whole, x_row, 1, sums);
      }
    }
  }
  for (int64_t i = 0; i < a.images; ++i) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t block = (row - begin) / kRows, r = (row - begin) % kRows;
      store_output(a, row, i, Isa::sum(Isa::load(totals + (block * a.images + i) * kSums + r * kLanes)));
    }
  }
}

template <class Isa>
VGG_TARGET inline void linear_any_type(const LinearArgs& a, int64_t begin, int64_t end, char* scratch) {
  switch (a.format) {
    case WeightFormat::bf16:
      return linear_rows<Isa, WeightFormat::bf16>(a, begin, end, scratch);
    case WeightFormat::f16:
      return linear_rows<Isa, WeightFormat::f16>(a, begin, end, scratch);
    default:
      return linear_rows<Isa, WeightFormat::f32>(a, begin, end, scratch);
  }
}
