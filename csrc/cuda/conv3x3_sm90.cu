#include <algorithm>
#include <cmath>

#include "conv3x3_sm90.cuh"
#include "conv3x3_sm90_cuda.h"

namespace vgg_fast::cuda {
namespace {

using namespace sm90;

const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// The driver's function, looked up at run time: nothing here links libcuda.
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

// A tensor of five dimensions and the box of it that is copied at once, innermost first; strides in bytes.
const char* encode(CUtensorMap& map, DType dtype, const void* data, const cuuint64_t (&sizes)[5],
                   const cuuint64_t (&strides)[4], const cuuint32_t (&box)[5], CUtensorMapSwizzle swizzle) {
  static const Encode function = find_encode();
  if (!function) return "this driver has no cuTensorMapEncodeTiled; that of CUDA 12.0 has, and later ones";
  constexpr cuuint32_t kEach[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      function(&map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5,
               const_cast<void*>(data), sizes, strides, box, kEach, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor; please report its sizes";
}

// x as [n][cin / 8][h][w][8]: a box is a halo as the kernel wants it.
const char* encode_pixels(CUtensorMap& map, const Sm90Args& args, const Sm90Problem& p) {
  const cuuint64_t n = p.n, h = p.h, w = p.w, pixel = 2 * p.cin;
  return encode(map, p.dtype, args.x, {8, w, h, pixel / kCell, n}, {pixel, w * pixel, kCell, h * w * pixel},
                {8, kHalo, kHalo, kChunk / 8, 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
}

// The weights as [cout / 32][4 b][4 t][2 e][tap, ci], of channels 32 a + 8 t + 2 b + e.
const char* encode_weights(CUtensorMap& map, const Sm90Args& args, const Sm90Problem& p) {
  const cuuint64_t row = 9 * 2 * p.cin, groups = p.cout / 32;
  return encode(map, p.dtype, args.weight, {row / 2, 2, 4, 4, groups}, {row, 8 * row, 2 * row, 32 * row},
                {kChunk, 2, 4, 4, kColumns / 32}, CU_TENSOR_MAP_SWIZZLE_128B);
}

template <typename T>
const char* launch_typed(const Sm90Args& args, const Sm90Problem& p, const Sm90Plan& plan, int multiprocessors,
                         Queue queue) {
  const auto kernel = conv3x3_sm90_kernel<T>;
  if (const char* error = text_of(cudaSetDevice(queue.device))) return error;
  if (const char* error =
          text_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)))
    return error;
  CUtensorMap x, weight;
  if (const char* error = encode_pixels(x, args, p)) return error;
  if (const char* error = encode_weights(weight, args, p)) return error;
  Task t{};
  t.affine = args.affine;
  t.out = args.out;
  t.pooled = args.pooled;
  t.partial = args.partial;
  t.arrived = args.arrived;
  t.n = static_cast<int>(p.n);
  t.h = static_cast<int>(p.h);
  t.w = static_cast<int>(p.w);
  t.cin = static_cast<int>(p.cin);
  t.cout = static_cast<int>(p.cout);
  t.down = plan.down;
  t.across = plan.across;
  t.whole = plan.whole;
  t.items = plan.items;
  t.split = plan.split;
  t.floor = args.relu ? 0.0f : -INFINITY;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(std::min(plan.items, multiprocessors)));
  config.blockDim = dim3(sm90::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, x, weight, t);
  return text_of(error == cudaSuccess ? cudaGetLastError() : error);
}

}  // namespace

const char* launch_conv3x3_sm90(const Sm90Args& args, const Sm90Problem& p, int multiprocessors, Queue queue) {
  if (const char* reason = sm90_unsupported(p, 90)) return reason;
  for (const void* data : {args.x, args.weight, static_cast<const void*>(args.affine),
                           static_cast<const void*>(args.out), static_cast<const void*>(args.pooled)})
    if (reinterpret_cast<uintptr_t>(data) % 16) return "a tensor does not begin at a multiple of 16 bytes; copy it";
  if (p.n == 0) return nullptr;
  const Sm90Plan plan = plan_sm90(p, multiprocessors);
  if (plan.split > 1 && !(args.partial && args.arrived)) return "no workspace for the partial sums of the plan";
  return p.dtype == DType::kFloat16 ? launch_typed<__half>(args, p, plan, multiprocessors, queue)
                                    : launch_typed<__nv_bfloat16>(args, p, plan, multiprocessors, queue);
}

}  // namespace vgg_fast::cuda
