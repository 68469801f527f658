// One module: the forward for one dtype, -DDK_DTYPE=bf16 or fp16, and one head size, -DDK_HEAD_DIM=64 or 128.
#include "forward.h"
#include "names.h"

extern "C" {

__constant__ dk::ForwardInfo disentangled_forward_info = {
    dk::kForwardAbiVersion,
    DK_HEAD_DIM,
    dk::Layout<DK_HEAD_DIM>::kRows,
    dk::kTile,
    dk::Layout<DK_HEAD_DIM>::kThreads,
    dk::Layout<DK_HEAD_DIM>::kSharedBytes,
    dk::Layout<DK_HEAD_DIM>::kTableMargin,
};

#define DK_KERNEL(suffix, pair, dropout)                                                                 \
  __global__ void __launch_bounds__(dk::Layout<DK_HEAD_DIM>::kThreads, 1)                                \
      DK_NAME(forward, DK_DTYPE, DK_HEAD_DIM, suffix)(const __grid_constant__ dk::ForwardParams p) {              \
    dk::forward<DK_DTYPE, DK_HEAD_DIM, pair, dropout>(p);                                                \
  }

DK_KERNEL(, false, false)
DK_KERNEL(_pair, true, false)
DK_KERNEL(_dropout, false, true)
DK_KERNEL(_pair_dropout, true, true)

}
