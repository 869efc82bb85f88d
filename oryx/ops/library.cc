// The operator library "oryx". Each operator adds its schemas and kernels with TORCH_LIBRARY_FRAGMENT in its own
// folder; this is the one definition that the dispatcher asks for.
#include <torch/library.h>

TORCH_LIBRARY(oryx, m) { (void)m; }
