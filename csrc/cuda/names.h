// What -DDK_DTYPE and -DDK_HEAD_DIM make of the names in a module.
#pragma once
#include "primitives.h"

#define DK_NAME_(pass, dtype, head_dim, suffix) disentangled_##pass##_##dtype##_d##head_dim##suffix
#define DK_NAME(pass, dtype, head_dim, suffix) DK_NAME_(pass, dtype, head_dim, suffix)

using bf16 = dk::BFloat16;
using fp16 = dk::Float16;
