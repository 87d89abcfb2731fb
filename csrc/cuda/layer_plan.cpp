// Which kernel runs a layer. Host only.
#include "block1_cuda.h"
#include "layer_cuda.h"

namespace vgg_fast::cuda {

void choose_kernel(Layer& layer, Family family, DeviceLimits limits) {
  const Conv3x3Args& a = layer.args;
  layer.kernel = Kernel::kPlain;
  const bool tf32 = family == Family::kCudaTf32 || family == Family::kCudaWgmmaTf32;
  const bool wgmma = family == Family::kCudaWgmma || family == Family::kCudaWgmmaTf32;
  if (a.n == 0 || !layer.aligned || limits.sm < 80 || (a.dtype == DType::kFloat32 && !tf32)) return;
  const MmaProblem problem{a.n, a.h, a.w, a.cin, a.cout, a.dtype};
  const Sm90Problem on_hopper{a.n, a.h, a.w, a.cin, a.cout, a.dtype};
  if (wgmma && !sm90_unsupported(on_hopper, limits.sm)) {
    layer.hopper = plan_sm90(on_hopper, limits.multiprocessors);
    layer.kernel = Kernel::kHopper;
  } else if (!mma_unsupported(problem)) {
    layer.plan = plan_mma(problem, limits.multiprocessors);
    if (layer.plan.clocks >= 0) layer.kernel = Kernel::kTensorCores;
  }
}

void fuse_first_block(std::vector<Layer>& layers) {
  if (layers.size() < 2) return;
  Layer &first = layers[0], &second = layers[1];
  const bool hidden = !first.pool() && !first.tap();
  if (!hidden || !first.aligned || second.kernel == Kernel::kPlain ||
      !is_block1(first.args.dtype, first.args.cin, first.args.cout, second.args.cout))
    return;
  second.kernel = Kernel::kTensorCores;
  second.plan = plan_block1(first.args.n, first.args.h, first.args.w);
  second.with_previous = first.in_next = true;
}

}  // namespace vgg_fast::cuda
