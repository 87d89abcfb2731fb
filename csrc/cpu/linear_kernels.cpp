// Which kernel runs a fully connected layer: the rules of microkernels.cpp on a table of its own.
#include <iterator>
#include <stdexcept>

#include "microkernels.h"

namespace vgg_fast {
namespace {

constexpr LinearKernel kTable[] = {
#define LINEAR_KERNEL(name, flags, tiles, f24, error) {#name, flags, tiles, f24, Precision::error, linear_##name},
#include "linear_kernels.inc"
#undef LINEAR_KERNEL
};

// A type that the kernel would have to round is fp32 only; bf16 and fp16 weights are read as they are.
bool holds(const LinearKernel& kernel, DType dtype) {
  return dtype == DType::f32 || (!kernel.f24 && (!kernel.tiles || dtype == DType::bf16));
}

}  // namespace

const LinearKernel* linear_kernels_begin() { return std::begin(kTable); }
const LinearKernel* linear_kernels_end() { return std::end(kTable); }

const LinearKernel& find_linear_kernel(const std::string& name, DType dtype, Precision precision,
                                       const std::string& flags) {
  const Precision wanted = dtype == DType::f32 ? precision : Precision::medium;
  std::string names;
  for (const LinearKernel& kernel : kTable) {
    names += std::string(names.empty() ? "" : ", ") + kernel.name;
    const std::string lacking = missing_flags(kernel.flags, flags);
    if (name == "auto" && holds(kernel, dtype) && kernel.error <= wanted && lacking.empty()) return kernel;
    if (name != kernel.name) continue;
    if (!holds(kernel, dtype)) {
      throw std::runtime_error("linear kernel '" + name + "' cannot hold " +
                               (dtype == DType::f16 ? "float16" : "bfloat16") + " tensors; take avx512_f32 or auto");
    }
    if (lacking.empty()) return kernel;
    throw std::runtime_error("linear kernel '" + name + "' needs the CPU flags '" + lacking +
                             "', which this machine lacks or VGG_FAST_ISA forbids");
  }
  throw std::runtime_error("there is no linear kernel '" + name + "'; the kernels are auto, " + names);
}

}  // namespace vgg_fast
