// Drives csrc/cpu under ThreadSanitizer, without Python and without libgomp: every micro-kernel this CPU can run,
// chains of layers shared out over threads (few images) and images shared out over threads (many), called from two
// threads at once. The results must also be those of one thread, bit for bit. `main race` shows that a race would be
// seen.
#include <cstdio>
#include <cstring>
#include <random>

#include "../../csrc/cpu/convert.h"
#include "../../csrc/cpu/torch_cpu.h"

using namespace vgg_fast;

namespace {

constexpr int64_t kRelu = 1, kPool = 2;

struct Chain {
  int64_t n, h, w;
  std::vector<int64_t> channels;
  bool channels_last;
  const char* why;
};

// Small: under ThreadSanitizer each access costs some ten times what it does otherwise.
const std::vector<Chain> kChains = {
    {1, 21, 19, {3, 40, 33, 64}, false, "one image: each layer is shared out; first-layer form, odd sizes, unpacked"},
    {1, 18, 16, {16, 32, 32, 48}, true, "the last layer writes the result itself"},
    {5, 9, 12, {37, 53, 20, 32}, false, "two images per thread and one left over"},
    {3, 8, 7, {20, 3, 2, 17}, false, "few channels inside the chain, which some kernels lay out as neighbourhoods"},
};

void fill(const Tensor& tensor, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> values(-1, 1);
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    const float value = values(random);
    if (tensor.scalar_type() == ScalarType::Float) {
      static_cast<float*>(tensor.mutable_data_ptr())[i] = value;
    } else {
      static_cast<uint16_t*>(tensor.mutable_data_ptr())[i] = float_to_bf16(value);
    }
  }
}

Tensor run(const Chain& chain, const MicroKernel& kernel, int64_t threads) {
  torch::stable::num_threads = threads;
  const bool single_bf16 = kernel.compute == DType::bf16 && kernel.parts == 1;
  const ScalarType type = single_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor x({chain.n, chain.channels[0], chain.h, chain.w}, type, chain.channels_last);
  fill(x, 1);
  std::vector<Tensor> weights, affines;
  for (size_t i = 0; i + 1 < chain.channels.size(); ++i) {
    Tensor weight({chain.channels[i + 1], chain.channels[i], 3, 3}, type, false);
    fill(weight, unsigned(i) + 2);
    const auto [packed, affine] =
        pack_cpu(weight, std::nullopt, std::nullopt, std::nullopt, std::nullopt, std::nullopt, 0.0, kernel.name);
    weights.push_back(packed);
    affines.push_back(affine);
  }
  const Tensor y = conv_stack_cpu(x, weights, affines, {kRelu, kRelu | kPool, 0}, kernel.name, chain.channels_last);
  return maxpool2x2_cpu(y);
}

// Several units of rows, two passes over the weights, tails everywhere.
Tensor run_linear(const LinearKernel& kernel, int64_t threads) {
  torch::stable::num_threads = threads;
  const ScalarType type = kernel.tiles ? ScalarType::BFloat16 : ScalarType::Float;
  const Tensor x({133, 45}, type, false), weight({140, 45}, type, false), bias({140}, type, false);
  fill(x, 1);
  fill(weight, 2);
  fill(bias, 3);
  return linear_cpu(x, kernel.f24 ? linear_pack_cpu(weight, kernel.name) : weight, bias, true, kernel.name);
}

bool equal(const Tensor& a, const Tensor& b) {
  const int64_t size = a.scalar_type() == ScalarType::Float ? 4 : 2;
  return a.sizes() == b.sizes() && std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.numel() * size) == 0;
}

// Two threads write one tensor.
void race() {
  const Tensor shared({1}, ScalarType::Float, false);
  torch::stable::num_threads = 2;
  torch::stable::parallel_for(
      0, 2, 1, [&](int64_t begin, int64_t) { *static_cast<float*>(shared.mutable_data_ptr()) += float(begin); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "race") == 0) {
    race();
    return 0;
  }
  int failures = 0;
  for (const MicroKernel* kernel = microkernels_begin(); kernel != microkernels_end(); ++kernel) {
    try {
      find_microkernel(kernel->name, kernel->compute, Precision::highest, cpu_flags());
    } catch (const std::exception& error) {
      std::printf("%-14s skipped: %s\n", kernel->name, error.what());
      continue;
    }
    for (const Chain& chain : kChains) {
      const Tensor alone = run(chain, *kernel, 1);
      // Two callers at once, each with threads of its own: what the calls share must be shared safely.
      std::vector<Tensor> results(2, alone);
      std::thread first([&] { results[0] = run(chain, *kernel, 2); }),
          second([&] { results[1] = run(chain, *kernel, 3); });
      first.join();
      second.join();
      const bool same = equal(results[0], alone) && equal(results[1], alone);
      failures += !same;
      std::printf("%-14s %s: %s\n", kernel->name, same ? "same bits" : "DIFFERENT BITS", chain.why);
    }
  }
  for (const LinearKernel* kernel = linear_kernels_begin(); kernel != linear_kernels_end(); ++kernel) {
    if (!missing_flags(kernel->flags, cpu_flags()).empty()) continue;
    const Tensor alone = run_linear(*kernel, 1);
    std::vector<Tensor> results(2, alone);
    std::thread first([&] { results[0] = run_linear(*kernel, 2); }),
        second([&] { results[1] = run_linear(*kernel, 3); });
    first.join();
    second.join();
    const bool same = equal(results[0], alone) && equal(results[1], alone);
    failures += !same;
    std::printf("linear %-14s %s\n", kernel->name, same ? "same bits" : "DIFFERENT BITS");
  }
  return failures != 0;
}
