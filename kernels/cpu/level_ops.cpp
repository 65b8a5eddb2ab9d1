// Which level's kernels run, and the tables of those levels that add some to another's.
//
// This file is compiled for any CPU. In those compiled for one, nothing may run before that CPU is known
// to be there: no global with a constructor, no table that is not a constant.
#include <torch/library.h>

#include "ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace portable { extern const Kernels kernels; }

#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avxvnni { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }

// Functions of the types of the table's entries.
#define KERNEL(name) std::remove_pointer_t<decltype(Kernels::name)> name;
namespace avx512vbmi {
KERNEL(plane_pairs)
}
namespace avx512bf16 {
KERNEL(widen_rows) KERNEL(float_rows) KERNEL(half_tiles)
}
namespace amx {
KERNEL(widen_rows) KERNEL(float_rows) KERNEL(half_tiles) KERNEL(bf16_panels)
KERNEL(int8_tiles) KERNEL(int8_pairs) KERNEL(int4_tiles) KERNEL(int4dq_tiles)
}
#undef KERNEL
#endif

namespace {

#if defined(__x86_64__)
bool has_vbmi() {
  return __builtin_cpu_supports("avx512vbmi");
}

Kernels with_vbmi() {
  Kernels all = avx512::kernels;
  all.name = "avx512vbmi";
  all.plane_pairs = avx512vbmi::plane_pairs;
  all.lookup_bits = 6;
  return all;
}

Kernels with_bf16() {  // a CPU that has BF16 may lack VBMI
  Kernels all = has_vbmi() ? with_vbmi() : avx512::kernels;
  all.name = "avx512bf16";
  all.widen_rows = avx512bf16::widen_rows;
  all.float_rows = avx512bf16::float_rows;
  all.half_tiles = avx512bf16::half_tiles;
  return all;
}

Kernels with_amx() {
  Kernels all = with_bf16();
  all.name = "amx";
  all.widen_rows = amx::widen_rows;
  all.float_rows = amx::float_rows;
  all.half_tiles = amx::half_tiles;
  all.int8_tiles = amx::int8_tiles;
  all.int8_pairs = amx::int8_pairs;
  all.int4_tiles = amx::int4_tiles;
  all.int4dq_tiles = amx::int4dq_tiles;
  all.bf16_panels = amx::bf16_panels;
  return all;
}
#endif

// Whether this CPU has AMX with int8 and bf16 and the system lets this process use its tiles.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d = 0;
  constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

bool runs_here(const std::string& level) {
#if defined(__x86_64__)
  if (level == "amx") return runs_here("avx512bf16") && has_amx();
  if (level == "avx512vbmi") return runs_here("avx512") && has_vbmi();
  if (level == "avx512bf16") return runs_here("avx512") && __builtin_cpu_supports("avx512bf16");
  if (level == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
  unsigned a, b, c, d;
  if (level == "avxvnni")
    return runs_here("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;
  if (level == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#endif
  return level == "portable";
}

const Kernels* find_level(const std::string& level, bool emulated) {
  if (level == "best") {
    for (const char* name : {"amx", "avx512bf16", "avx512vbmi", "avx512", "avxvnni", "avx2"})
      if (runs_here(name)) return find_level(name, false);
    return &portable::kernels;
  }
  const Kernels* found = level == "portable" ? &portable::kernels : nullptr;
#if defined(__x86_64__)
  static const Kernels vbmi = with_vbmi(), bf16 = with_bf16(), amx = with_amx();
  if (level == "amx") found = &amx;
  if (level == "avx512bf16") found = &bf16;
  if (level == "avx512vbmi") found = &vbmi;
  if (level == "avx512") found = &avx512::kernels;
  if (level == "avxvnni") found = &avxvnni::kernels;
  if (level == "avx2") found = &avx2::kernels;
#endif
  TORCH_CHECK_VALUE(found && (emulated || runs_here(level)), "CPU level '", level,
                    "' is unknown or this CPU lacks it: best, amx, avx512bf16, avx512vbmi, avx512, avxvnni, "
                    "avx2 or portable");
  return found;
}

const Kernels* current = nullptr;

std::string set_cpu_level(std::string level, bool emulated) {
  current = find_level(level, emulated);
  return current->name;
}

}  // namespace

const Kernels& kernels() { return *current; }

TORCH_LIBRARY_FRAGMENT(flatllama, m) {
  m.def("set_cpu_level(str level, bool emulated=False) -> str", set_cpu_level);
}
