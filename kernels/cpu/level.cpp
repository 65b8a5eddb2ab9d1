// The table of a level that has all kernels itself. Those of others: level_ops.cpp.
#include "level.h"

#define STRING_(x) #x
#define STRING(x) STRING_(x)

namespace CPU_LEVEL {
extern const Kernels kernels{
    .name = STRING(CPU_LEVEL),
    .lanes = kLanes,
    .widen_rows = widen_rows,
    .quantize_rows = quantize_rows,
    .float_rows = float_rows,
    .int8_tiles = int8_tiles,
    .int8_exact = int8_exact,
    .int8_pairs = kLanes > 4 ? int8_pairs : nullptr,
    .int4_tiles = int4_tiles,
    .int4_exact = int4_exact,
    .int4dq_tiles = int4dq_tiles,
    .panels = panels,
    .round_rows = round_rows,
    .coded_tiles = coded_tiles,
    .plane_pairs = kLanes > 4 ? plane_pairs : nullptr,
    .sparse_pairs = kLanes == 16 ? sparse_pairs : nullptr,
    .lookup_bits = kLookupBits,
    .half_tiles = nullptr,
    .attend = attend,
    .merge = merge,
    .read_sum = read_sum,
    .rms_norm = rms_norm,
    .rotate = rotate,
    .silu_mul = silu_mul,
    .add = add,
    .multiply_scale = multiply_scale,
    .quantize_slot = quantize_slot,
};
}  // namespace CPU_LEVEL
