// vdpbf16ps on 512-bit registers, carried out in a handler of SIGILL: with it the kernels for
// AVX-512 BF16 run, slowly, on any CPU with AVX-512 under Linux.
//
// The instruction (Intel's manual, volume 2): each fp32 lane of the destination gains the product
// of the odd, then that of the even bf16 numbers of its lane; to nearest even, denormals as zeros.
#include <cpuid.h>
#include <math.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <initializer_list>

namespace {

// Of the interrupted thread's state, saved in XSAVE's layout: where the upper halves of ymm (2),
// those of zmm0-15 (6) and all of zmm16-31 (7) lie.
uint32_t offset_of[8];
struct sigaction before;

// 16 bytes, number `part`, of zmm `r`.
char* lane(char* state, int r, int part) {
  if (r >= 16) return state + offset_of[7] + (r - 16) * 64 + part * 16;
  if (part == 0) return state + 160 + r * 16;
  if (part == 1) return state + offset_of[2] + r * 16;
  return state + offset_of[6] + r * 32 + (part - 2) * 16;
}

void read(char* state, int r, void* value) {
  for (int part = 0; part < 4; part++) memcpy((char*)value + part * 16, lane(state, r, part), 16);
}

void write(char* state, int r, const void* value) {
  for (int part = 0; part < 4; part++)
    memcpy(lane(state, r, part), (const char*)value + part * 16, 16);
  uint64_t present;  // states that are not marked would be restored as zeros
  memcpy(&present, state + 512, 8);
  present |= r < 16 ? 0x46 : 0x80;
  memcpy(state + 512, &present, 8);
}

float widen(uint16_t half) {
  uint32_t bits = uint32_t(half & 0x7f80 ? half : half & 0x8000) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

float flush(float x) { return fpclassify(x) == FP_SUBNORMAL ? copysignf(0, x) : x; }

int64_t general(const ucontext_t* c, int r) {
  static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};
  return c->uc_mcontext.gregs[order[r]];
}

// The address that the operand behind `modrm` names; p moves past its bytes.
int64_t address(const ucontext_t* c, int modrm, bool b3, bool x3, const uint8_t*& p) {
  const int mod = modrm >> 6;
  int base = modrm & 7;
  int64_t at = 0;
  bool has_base = mod != 0 || base != 5;
  const bool to_next = !has_base;  // relative to the next instruction
  if (base == 4) {  // scale, index and base
    const int sib = *p++, index = (sib >> 3 & 7) | x3 << 3;
    if (index != 4) at = general(c, index) << (sib >> 6);
    base = sib & 7;
    has_base = mod != 0 || base != 5;
  }
  if (has_base) at += general(c, base | b3 << 3);
  if (mod == 1) {
    at += int64_t(int8_t(*p++)) * 64;
  } else if (mod == 2 || !has_base) {
    int32_t wide;
    memcpy(&wide, p, 4);
    p += 4;
    at += wide;
  }
  return to_next ? at + (int64_t)p : at;
}

void carry_out(int, siginfo_t*, void* context) {
  auto* c = static_cast<ucontext_t*>(context);
  auto* state = reinterpret_cast<char*>(c->uc_mcontext.fpregs);
  auto* p = reinterpret_cast<const uint8_t*>(c->uc_mcontext.gregs[REG_RIP]);
  // EVEX, map 0F38, W0, prefix F3, 512 bits, no mask, no broadcast; opcode 52. Register numbers are
  // stored inverted.
  if (p[0] != 0x62 || (p[1] & 15) != 2 || (p[2] & 0x87) != 6 || (p[3] & 0xf7) != 0x40 ||
      p[4] != 0x52) {
    sigaction(SIGILL, &before, nullptr);  // not ours: it traps again
    return;
  }
  const bool r3 = !(p[1] & 0x80), x3 = !(p[1] & 0x40), b3 = !(p[1] & 0x20), r4 = !(p[1] & 0x10);
  const int modrm = p[5], to = (modrm >> 3 & 7) | r3 << 3 | r4 << 4;
  const int first = (~p[2] >> 3 & 15) | !(p[3] & 8) << 4;
  p += 6;
  uint32_t a[16], b[16];
  float sums[16];
  read(state, first, a);
  if (modrm >> 6 == 3) read(state, (modrm & 7) | b3 << 3 | x3 << 4, b);
  else memcpy(b, reinterpret_cast<const void*>(address(c, modrm, b3, x3, p)), 64);
  read(state, to, sums);
  for (int i = 0; i < 16; i++)
    for (int shift : {16, 0})
      sums[i] = flush(fmaf(widen(a[i] >> shift), widen(b[i] >> shift), flush(sums[i])));
  write(state, to, sums);
  c->uc_mcontext.gregs[REG_RIP] = (int64_t)p;
}

}  // namespace

extern "C" {
bool install() {
  for (int part : {2, 6, 7}) {
    uint32_t size, ecx, edx;
    __cpuid_count(0xd, part, size, offset_of[part], ecx, edx);
    if (!size) return false;  // no AVX-512
  }
  struct sigaction ours = {};
  ours.sa_sigaction = carry_out;
  ours.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &ours, &before) == 0;
}

void uninstall() { sigaction(SIGILL, &before, nullptr); }
}
