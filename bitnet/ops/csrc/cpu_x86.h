// What this x86-64 processor has, and its operating system lets a process use.
#pragma once
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

#ifdef BITNET_EMULATE
static bool has_avx512() { return true; }
static bool has_amx() { return true; }
#else
static bool has_avx512() {
  __builtin_cpu_init();
  const bool foundation = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  const bool more = __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return foundation && more && __builtin_cpu_supports("avx512vnni");
}

// Linux hands out the tiles' state on request only (ARCH_REQ_XCOMP_PERM, 8 KiB a thread); CPUID 7.0 EDX has the rest.
static bool has_amx() {
#if defined(__linux__)
  unsigned eax = 7, ebx, ecx = 0, edx;
  __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool tile = edx >> 24 & 1, int8 = edx >> 25 & 1;
  return tile && int8 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif
