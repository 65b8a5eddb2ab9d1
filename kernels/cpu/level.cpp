// The table of one level's kernels.
#include "level.h"

namespace CPU_LEVEL {
#define STRING_(x) #x
#define STRING(x) STRING_(x)
extern const Kernels kernels{
    STRING(CPU_LEVEL), widen_rows, quantize_rows, float_rows, int8_tiles, int8_exact,
    int4_tiles,        int4_exact, panels,    round_rows, coded_tiles, coded_widen,
    attend,            merge,      read_sum,  rms_norm,   rotate,      silu_mul,
    add,               multiply_scale, quantize_slot,
};
}  // namespace CPU_LEVEL
