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

template <typename T>
constexpr CUtensorMapDataType kType = std::is_same_v<T, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                      : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// A tensor, and the box of it that is copied at once, innermost dimension first; strides in elements.
template <typename T, int kRank>
const char* encode(CUtensorMap& map, const void* data, const cuuint64_t (&sizes)[kRank],
                   cuuint64_t (&&strides)[kRank - 1], const cuuint32_t (&box)[kRank]) {
  static const Encode function = find_encode();
  if (!function) return "this driver has no cuTensorMapEncodeTiled; that of CUDA 12.0 has, and later ones";
  for (cuuint64_t& stride : strides) stride *= sizeof(T);
  constexpr cuuint32_t kEach[] = {1, 1, 1, 1, 1};
  const CUresult result = function(&map, kType<T>, kRank, const_cast<void*>(data), sizes, strides, box, kEach,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor; please report its sizes";
}

template <typename T>
const char* encode_pixels(CUtensorMap& map, const Sm90Args& args, const Sm90Problem& p, int rows) {
  const cuuint64_t n = p.n, h = p.h, w = p.w, cin = p.cin;
  return encode<T, 4>(map, args.x, {cin, w, h, n}, {cin, w * cin, h * w * cin},
                      {kChunk<T>, kHalo, static_cast<cuuint32_t>(rows + 2), 1});
}

// The weights as [cout / 16][2 s][4 r][2 e][tap, ci], row 8 s + 2 r + e of a warp: the dimensions of a tensor map may
// be any, so the channels that are these rows may be those that the stores want (store_columns).
template <typename T>
const char* encode_weights(CUtensorMap& map, const Sm90Args& args, const Sm90Problem& p) {
  const cuuint64_t row = 9 * p.cin, groups = p.cout / 16, r = kTurned<T> ? 4 : 2, s = kTurned<T> ? 2 : 8;
  return encode<T, 5>(map, args.weight, {row, 2, 4, 2, groups}, {row, r * row, s * row, 16 * row},
                      {kChunk<T>, 2, 4, 2, kColumns / 16});
}

template <typename T, int kRows>
const char* launch_rows(const Sm90Args& args, const Sm90Problem& p, const Sm90Plan& plan, int multiprocessors,
                        Queue queue) {
  const auto kernel = conv3x3_sm90_kernel<T, kRows>;
  constexpr int kSharedBytes = Layout<kRows>::kBytes;
  if (const char* error = text_of(cudaSetDevice(queue.device))) return error;
  if (const char* error =
          text_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)))
    return error;
  CUtensorMap x, weight;
  if (const char* error = encode_pixels<T>(x, args, p, kRows)) return error;
  if (const char* error = encode_weights<T>(weight, args, p)) return error;
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

template <typename T>
const char* launch_typed(const Sm90Args& args, const Sm90Problem& p, const Sm90Plan& plan, int multiprocessors,
                         Queue queue) {
  const auto launch = plan.rows == 14 ? launch_rows<T, 14> : launch_rows<T, 16>;
  return launch(args, p, plan, multiprocessors, queue);
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
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_typed<float>(args, p, plan, multiprocessors, queue);
    case DType::kFloat16:
      return launch_typed<__half>(args, p, plan, multiprocessors, queue);
    case DType::kBFloat16:
      return launch_typed<__nv_bfloat16>(args, p, plan, multiprocessors, queue);
  }
  return "an unknown dtype";
}

}  // namespace vgg_fast::cuda
