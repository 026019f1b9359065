// The forward with a branch scale, fast tier.
#pragma once

#include "kernels.h"

namespace autofocus::cuda {

void fast_branches(const Inputs& in, const TensorView& output, const Context& context);

}  // namespace autofocus::cuda
