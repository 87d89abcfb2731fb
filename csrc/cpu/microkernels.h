// Which micro-kernels there are, which of them a CPU can run, and which one is chosen. Plain C++.
#pragma once
#include <string>

#include "../linear.h"

namespace vgg_fast {

// Flags of this CPU that any row of the table asks for, separated by blanks, less those that VGG_FAST_ISA
// forbids. Raises std::runtime_error if VGG_FAST_ISA is none of portable, avx2, avx512, amx.
std::string cpu_flags();

// The first row of the table that `flags` can run and whose error is good enough for tensors of this type, fp32 ones
// being content with `precision`: a pure function.
const MicroKernel& select_microkernel(DType dtype, Precision precision, const std::string& flags);

// The row with this name, which must be able to hold `dtype` and run under `flags`; "auto" selects.
// Raises std::runtime_error naming the reasons otherwise.
const MicroKernel& find_microkernel(const std::string& name, DType dtype, Precision precision,
                                    const std::string& flags);

// The same for the kernels of fully connected layers.
const LinearKernel& find_linear_kernel(const std::string& name, DType dtype, Precision precision,
                                       const std::string& flags);

// Blank-separated flags of `wanted` that `flags` lacks.
std::string missing_flags(const std::string& wanted, const std::string& flags);

}  // namespace vgg_fast
