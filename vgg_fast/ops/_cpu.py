"""Questions to the compiled CPU library: its table of micro-kernels and what this CPU can run."""

from torch.library import define

define("vgg_fast::cpu_kernels", "() -> str")
define("vgg_fast::cpu_flags", "() -> str")
define("vgg_fast::cpu_select", "(str dtype, str precision, str kernel, str flags) -> str")
define("vgg_fast::cpu_linear_kernels", "() -> str")
define("vgg_fast::cpu_linear_select", "(str dtype, str precision, str kernel, str flags) -> str")
define("vgg_fast::cpu_packed_words", "(int cout, int cin, str kernel) -> int")
define("vgg_fast::cpu_passes", "() -> str")
define("vgg_fast::cpu_weight_grad", "(str kernel, str dtype, int n, int cin, int cout, int h, int w) -> str")
