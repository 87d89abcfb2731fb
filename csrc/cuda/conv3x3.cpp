// One convolution: checks, choice of the kernel, launch.
#include "maxpool2x2_cuda.h"
#include "torch_layer.h"
#include "torch_ops.h"

namespace vgg_fast::cuda {

Family family_named(const std::string& name) {
  if (name == "cuda_tf32") return Family::kCudaTf32;
  if (name == "cuda_wgmma") return Family::kCudaWgmma;
  if (name == "cuda_wgmma_tf32") return Family::kCudaWgmmaTf32;
  STD_TORCH_CHECK(name == "cuda", "there is no kernel '", name,
                  "'; choose one of cuda, cuda_tf32, cuda_wgmma, cuda_wgmma_tf32");
  return Family::kCuda;
}

Layer plan_layer(const Tensor& x, bool aligned, int64_t cin, int64_t h, int64_t w, const Tensor& weight,
                 const Tensor& affine, int64_t step, Family family, DeviceLimits limits) {
  const char* op = "conv3x3 (cuda): ";
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 3 && weight.size(2) == 3 && weight.size(3) == cin &&
                      weight.is_contiguous(),
                  op, "weight has sizes ", describe_sizes(weight), "; expected contiguous [Cout, 3, 3, ", cin,
                  "] as pack() lays it out");
  const int64_t cout = weight.size(0);
  STD_TORCH_CHECK(affine.dim() == 2 && affine.size(0) == 2 && affine.size(1) == cout && affine.is_contiguous() &&
                      affine.scalar_type() == torch::headeronly::ScalarType::Float,
                  op, "affine is ", torch::headeronly::toString(affine.scalar_type()), " of sizes ",
                  describe_sizes(affine), "; expected contiguous Float [2, ", cout, "] as pack() makes it");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, "weight is ",
                  torch::headeronly::toString(weight.scalar_type()), " and x is ",
                  torch::headeronly::toString(x.scalar_type()), "; they must be the same");
  STD_TORCH_CHECK(weight.device() == x.device() && affine.device() == x.device(), op,
                  "x, weight and affine must be on one device");
  STD_TORCH_CHECK(cin > 0 && cout > 0, op, cin, " input and ", cout, " output channels; both must be at least 1");
  STD_TORCH_CHECK(step >= 0 && step <= (kRelu | kPool | kTap), op, "step ", step, " of the program; known bits are ",
                  kRelu, " (ReLU), ", kPool, " (pool) and ", kTap, " (tap)");
  const int64_t smallest = step & kPool ? 2 : 1;
  STD_TORCH_CHECK(h >= smallest && w >= smallest, op, "a ", h, "x", w, " map is smaller than ", smallest, "x",
                  smallest);
  Layer layer{};
  layer.step = step;
  Conv3x3Args& a = layer.args;
  a.weight = weight.const_data_ptr();
  a.affine = static_cast<const float*>(affine.const_data_ptr());
  a.n = x.size(0);
  a.h = h;
  a.w = w;
  a.cin = cin;
  a.cout = cout;
  a.dtype = kernel_dtype("conv3x3", x);
  a.relu = step & kRelu;
  layer.aligned = aligned && reinterpret_cast<uintptr_t>(a.weight) % 16 == 0;
  choose_kernel(layer, family, limits);
  return layer;
}

void launch_layer(const Layer& layer, const void* x, void* full, void* pooled, void* partial, void* arrived,
                  DeviceLimits limits, Queue queue) {
  Conv3x3Args a = layer.args;
  if (layer.kernel == Kernel::kHopper) {
    Sm90Args args{};
    args.x = x;
    args.weight = a.weight;
    args.affine = a.affine;
    args.out = full;
    args.pooled = pooled;
    args.partial = static_cast<float*>(partial);
    args.arrived = static_cast<unsigned*>(arrived);
    args.relu = a.relu;
    const Sm90Problem problem{a.n, a.h, a.w, a.cin, a.cout, a.dtype};
    check_launch("conv3x3", launch_conv3x3_sm90(args, problem, limits.multiprocessors, queue));
    return;
  }
  if (layer.kernel == Kernel::kTensorCores) {
    MmaArgs args = mma_args({a.n, a.h, a.w, a.cin, a.cout, a.dtype}, layer.plan);
    args.x = x;
    args.weight = a.weight;
    args.affine = a.affine;
    args.out = full;
    args.pooled = pooled;
    args.partial = static_cast<float*>(partial);
    args.arrived = static_cast<unsigned*>(arrived);
    args.relu = a.relu;
    check_launch("conv3x3", launch_conv3x3_mma(args, a.dtype, layer.plan, queue));
    return;
  }
  a.x = x;
  a.pool = pooled && !full;
  a.out = full ? full : pooled;
  check_launch("conv3x3", launch_conv3x3(a, queue));
  if (pooled && full) {
    const Maxpool2x2Args pool{full, pooled, a.n, a.h, a.w, a.cout, a.dtype};
    check_launch("maxpool2x2", launch_maxpool2x2(pool, queue));
  }
}

}  // namespace vgg_fast::cuda
