// The table of one level's kernels.
#include "level.h"

#define STRING_(x) #x
#define STRING(x) STRING_(x)

#if defined(__AVX512BF16__)  // some products; the rest is that of the levels below
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 {
decltype(CPU_LEVEL::widen_rows) widen_rows;
decltype(CPU_LEVEL::float_rows) float_rows;
decltype(CPU_LEVEL::half_tiles) half_tiles;
}  // namespace avx512bf16

namespace CPU_LEVEL {
static Kernels with_products() {
  Kernels all = avx512::kernels;
  all.name = STRING(CPU_LEVEL);
  all.widen_rows = avx512bf16::widen_rows;
  all.float_rows = avx512bf16::float_rows;
  all.half_tiles = avx512bf16::half_tiles;
#if defined(__AMX_TILE__)
  all.widen_rows = widen_rows;
  all.float_rows = float_rows;
  all.int8_tiles = int8_tiles;
  all.int8_pairs = int8_pairs;
  all.int4_tiles = int4_tiles;
  all.int4dq_tiles = int4dq_tiles;
  all.bf16_panels = bf16_panels;
  all.half_tiles = half_tiles;
#endif
  return all;
}
extern const Kernels kernels = with_products();
}  // namespace CPU_LEVEL
#else
namespace CPU_LEVEL {
extern const Kernels kernels{
    .name = STRING(CPU_LEVEL),
    .widen_rows = widen_rows,
    .quantize_rows = quantize_rows,
    .float_rows = float_rows,
    .int8_tiles = int8_tiles,
    .int8_exact = int8_exact,
    .int8_pairs = kLanes == 16 ? int8_pairs : nullptr,
    .int4_tiles = int4_tiles,
    .int4_exact = int4_exact,
    .int4dq_tiles = int4dq_tiles,
    .panels = panels,
    .round_rows = round_rows,
    .coded_tiles = coded_tiles,
    .plane_pairs = kLanes == 16 ? plane_pairs : nullptr,
    .half_tiles = nullptr,
    .coded_widen = coded_widen,
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
#endif
