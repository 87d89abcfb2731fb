#include "torch_device.h"

#include <dlfcn.h>

namespace vgg_fast::cuda {
namespace {

using GetStream = AOTITorchError (*)(int32_t device, void** stream);

// aoti_torch_get_current_cuda_stream lives in libtorch_cuda. Looking it up, instead of linking it, is what
// lets this library be built, loaded and tested beside a CPU build of PyTorch.
GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  return library ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
}

}  // namespace

DeviceScope::DeviceScope(const torch::stable::Tensor& x) {
  static const GetStream get_stream = find_get_stream();
  STD_TORCH_CHECK(get_stream,
                  "vgg_fast: this PyTorch has no libtorch_cuda.so with aoti_torch_get_current_cuda_stream; ",
                  "install a CUDA build of PyTorch 2.10 or later");
  queue_.device = x.get_device_index();
  guard_.emplace(queue_.device);
  STD_TORCH_CHECK(get_stream(queue_.device, &queue_.stream) == AOTI_TORCH_SUCCESS,
                  "vgg_fast: PyTorch has no current stream on CUDA device ", queue_.device);
}

}  // namespace vgg_fast::cuda
