// One module: the backward for one dtype, -DDK_DTYPE=bf16 or fp16, and one head size, -DDK_HEAD_DIM=64.
#include "backward.h"
#include "names.h"

extern "C" {

__constant__ dk::BackwardInfo disentangled_backward_info = {
    dk::kBackwardAbiVersion,
    DK_HEAD_DIM,
    dk::BackwardLayout<DK_HEAD_DIM>::kRows,
    dk::kTile,
    dk::BackwardLayout<DK_HEAD_DIM>::kThreads,
    dk::BackwardLayout<DK_HEAD_DIM>::kSharedBytes,
    dk::BackwardLayout<DK_HEAD_DIM>::kTableMargin,
};

#define DK_KERNEL(suffix, pair, dropout)                                                                         \
  __global__ void __launch_bounds__(dk::BackwardLayout<DK_HEAD_DIM>::kThreads, 1)                                \
      DK_NAME(backward, DK_DTYPE, DK_HEAD_DIM, suffix)(const __grid_constant__ dk::BackwardParams p) { \
    dk::backward<DK_DTYPE, DK_HEAD_DIM, pair, dropout>(p);                                                       \
  }

DK_KERNEL(, false, false)
DK_KERNEL(_pair, true, false)
DK_KERNEL(_dropout, false, true)
DK_KERNEL(_pair_dropout, true, true)

__global__ void __launch_bounds__(dk::kWarpgroup)
    DK_NAME(backward_dq, DK_DTYPE, DK_HEAD_DIM, )(const __grid_constant__ dk::BackwardParams p) {
  dk::convert_queries<DK_DTYPE, DK_HEAD_DIM>(p);
}

}
