#include "microkernels.h"

#include <array>
#include <cstdlib>
#include <iterator>
#include <sstream>
#include <stdexcept>

#include "batch_norm.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vgg_fast {
namespace {

constexpr MicroKernel kTable[] = {
#define MICROKERNEL(name, flags, compute, parts, error, group, rows, im2col) \
  {#name, flags, DType::compute, parts, Precision::error, group, rows, im2col, conv3x3_##name, nullptr, nullptr},
#define MICROKERNEL_WINOGRAD(name, flags, group) \
  {#name,                                        \
   flags,                                        \
   DType::f32,                                   \
   1,                                            \
   Precision::highest,                           \
   group,                                        \
   2,                                            \
   false,                                        \
   conv3x3_##name,                               \
   winograd_prepare_##name,                      \
   winograd_run_##name},
#include "microkernels.inc"
#undef MICROKERNEL_WINOGRAD
#undef MICROKERNEL
};

constexpr std::array<const char*, 4> kCaps = {"portable", "avx2", "avx512", "amx"};

size_t cap_level(const std::string& cap) {
  for (size_t i = 0; i < kCaps.size(); ++i) {
    if (cap == kCaps[i]) return i;
  }
  throw std::runtime_error("VGG_FAST_ISA is '" + cap + "'; it must be one of portable, avx2, avx512, amx (or unset)");
}

bool contains(const std::string& flags, const std::string& flag) {
  return (" " + flags + " ").find(" " + flag + " ") != std::string::npos;
}

// Winograd's error, though far below a rounding of bf16 or fp16, tips some of those roundings the other way: results in
// half precision would be no closer to PyTorch's than the direct kernel's, but no longer the best there are.
bool good_enough(const MicroKernel& kernel, DType dtype, Precision precision) {
  if (kernel.winograd_run != nullptr && dtype != DType::f32) return false;
  const Precision wanted = dtype == DType::bf16 ? Precision::medium : dtype == DType::f16 ? Precision::high : precision;
  return kernel.error <= wanted;
}

#if defined(__x86_64__)
// Tile state is 8 KB that the kernel saves only for processes that asked for it.
bool request_amx() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

std::string detect() {
  std::string flags;
  auto add = [&flags](bool present, const char* name) {
    if (present) flags += (flags.empty() ? "" : " ") + std::string(name);
  };
  __builtin_cpu_init();
  add(__builtin_cpu_supports("avx2"), "avx2");
  add(__builtin_cpu_supports("fma"), "fma");
  add(__builtin_cpu_supports("f16c"), "f16c");
  add(__builtin_cpu_supports("avx512f"), "avx512f");
  add(__builtin_cpu_supports("avx512bw"), "avx512bw");
  add(__builtin_cpu_supports("avx512vl"), "avx512vl");
  add(__builtin_cpu_supports("avx512dq"), "avx512dq");
  add(__builtin_cpu_supports("avx512bf16"), "avx512_bf16");
  if (__builtin_cpu_supports("amx-tile") && request_amx()) {
    add(true, "amx_tile");
    add(__builtin_cpu_supports("amx-bf16"), "amx_bf16");
  }
  return flags;
}
#else
std::string detect() { return ""; }
#endif

}  // namespace

std::string missing_flags(const std::string& wanted, const std::string& flags) {
  std::istringstream stream(wanted);
  std::string result;
  for (std::string flag; stream >> flag;) {
    if (!contains(flags, flag)) result += (result.empty() ? "" : " ") + flag;
  }
  return result;
}

const MicroKernel* microkernels_begin() { return std::begin(kTable); }
const MicroKernel* microkernels_end() { return std::end(kTable); }

std::string cpu_flags() {
  static const std::string detected = detect();
  const char* cap = std::getenv("VGG_FAST_ISA");
  if (cap == nullptr || *cap == '\0') return detected;
  const size_t level = cap_level(cap);
  std::istringstream stream(detected);
  std::string result;
  for (std::string flag; stream >> flag;) {
    const size_t flag_level = flag.rfind("amx", 0) == 0 ? 3 : flag.rfind("avx512", 0) == 0 ? 2 : 1;
    if (flag_level <= level) result += (result.empty() ? "" : " ") + flag;
  }
  return result;
}

const MicroKernel& select_microkernel(DType dtype, Precision precision, const std::string& flags) {
  for (const MicroKernel& kernel : kTable) {
    if (good_enough(kernel, dtype, precision) && missing_flags(kernel.flags, flags).empty()) return kernel;
  }
  throw std::logic_error("the portable micro-kernel takes everything");
}

const MicroKernel& find_microkernel(const std::string& name, DType dtype, Precision precision,
                                    const std::string& flags) {
  if (name == "auto") return select_microkernel(dtype, precision, flags);
  std::string names;
  for (const MicroKernel& kernel : kTable) {
    names += std::string(names.empty() ? "" : ", ") + kernel.name;
    if (name != kernel.name) continue;
    if (kernel.winograd_run != nullptr && dtype != DType::f32) {
      throw std::runtime_error("kernel '" + name + "' takes fp32 tensors only");
    }
    // An fp32 tensor may be run at less precision by who names the kernel; fp16 has values that bf16 cannot hold.
    if (dtype == DType::f16 && !good_enough(kernel, dtype, precision)) {
      throw std::runtime_error("kernel '" + name + "' multiplies single bf16 values, which cannot hold fp16 tensors; " +
                               "convert them to bf16, or take kernel amx_bf16x3, avx512_f32 or auto");
    }
    const std::string lacking = missing_flags(kernel.flags, flags);
    if (lacking.empty()) return kernel;
    throw std::runtime_error("kernel '" + name + "' needs the CPU flags '" + lacking +
                             "', which this machine lacks or VGG_FAST_ISA forbids");
  }
  throw std::runtime_error("there is no CPU kernel '" + name + "'; the kernels are auto, " + names);
}

const Passes& select_passes(const std::string& flags) {
#if defined(__x86_64__)
  for (const Passes* passes : {&kPassesAvx512, &kPassesAvx2}) {
    if (missing_flags(passes->flags, flags).empty()) return *passes;
  }
#endif
  return kPassesPortable;
}

}  // namespace vgg_fast
