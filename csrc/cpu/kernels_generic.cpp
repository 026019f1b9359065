// The kernels for no particular instruction set: vectors of 16 bytes, which every 64-bit CPU has.
#include "shared.h"

#define AUTOFOCUS_ISA generic
#define AUTOFOCUS_VECTOR_BYTES 16
#include "kernels_isa.h"
namespace autofocus {
constexpr Kernels generic_kernels = generic::entries("generic");
}
