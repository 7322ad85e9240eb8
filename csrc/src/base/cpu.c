/* cpu.c - CPU features: x86-64's from CPUID and XCR0 (Intel SDM vol. 1, 13.3 and vol. 2, CPUID),
 * AArch64's from what the kernel tells (Linux, arch/arm64/elf_hwcaps.rst). */
#include "pyenclave/base.h"

#include <stdatomic.h>

#define KNOWN 0x80000000u

/* The core's only mutable globals: a cache of what the CPU says, and the tests' mask. */
static _Atomic uint32_t cached;
static _Atomic uint32_t mask = 0xffffffffu;

#if defined(__x86_64__)
#include <cpuid.h>

static uint64_t read_xcr0(void)
{
    uint32_t low;
    uint32_t high;

    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return ((uint64_t)high << 32) | low;
}

/* Whose sha256rnds2 begin every cycle, where Intel's do every second: AMD's family 19h, Zen 3 and
 * Zen 4 (measured on Zen 4, bench/README.md). Later families hash in whole 512-bit vectors. */
static int is_zen4(uint32_t signature)
{
    uint32_t a = 0, b = 0, c = 0, d = 0; /* a sanitizer build takes them for unset otherwise */
    const uint32_t family = ((signature >> 8) & 0xf) + ((signature >> 20) & 0xff);

    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx &&
           d == signature_AMD_edx && family == 0x19;
}

static uint32_t detect(void)
{
    uint32_t a, b, c, d;
    uint32_t found = 0;
    uint64_t xcr0 = 0;

    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return 0;
    }
    const uint32_t signature = a;
    found |= (c & bit_SSSE3) ? PYE_CPU_SSSE3 : 0;
    found |= (c & bit_AES) ? PYE_CPU_AESNI : 0;
    found |= (c & bit_PCLMUL) ? PYE_CPU_PCLMUL : 0;
    found |= (c & bit_RDRND) ? PYE_CPU_RDRAND : 0;
    if (c & bit_OSXSAVE) {
        xcr0 = read_xcr0();
    }
    const int ymm_saved = (xcr0 & 0x6) == 0x6;
    const int zmm_saved = (xcr0 & 0xe6) == 0xe6;
    found |= ((c & bit_AVX) && ymm_saved) ? PYE_CPU_AVX : 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        return found;
    }
    found |= (b & (1u << 29)) ? PYE_CPU_SHANI : 0;
    found |= (b & (1u << 29)) && is_zen4(signature) ? PYE_CPU_SHANI_FAST : 0;
    found |= (c & (1u << 22)) ? PYE_CPU_RDPID : 0;
    found |= (c & (1u << 4)) ? PYE_CPU_PKU : 0; /* OSPKE: the kernel switched it on */
    found |= (c & (1u << 5)) ? PYE_CPU_WAITPKG : 0;
    /* BMI1 and BMI2 together: what a compiler takes for one level */
    found |= (b & (1u << 3)) && (b & (1u << 8)) ? PYE_CPU_BMI2 : 0;
    if (ymm_saved) {
        found |= (b & (1u << 5)) ? PYE_CPU_AVX2 : 0;
        found |= (c & (1u << 9)) ? PYE_CPU_VAES : 0;
        found |= (c & (1u << 10)) ? PYE_CPU_VPCLMUL : 0;
    }
    /* AVX512 here means F, DQ, BW and VL together: what the wide code uses. */
    const uint32_t wide = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
    found |= (zmm_saved && (b & wide) == wide) ? PYE_CPU_AVX512 : 0;
    found |= (zmm_saved && (b & (1u << 21))) ? PYE_CPU_IFMA : 0;
    return found;
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

/* The ID registers themselves are the kernel's; what it lists here it also lets programs use. */
#define CAP_AES (1ul << 3)
#define CAP_PMULL (1ul << 4)
#define CAP_SHA2 (1ul << 6)
#define CAP_SHA512 (1ul << 21)

static uint32_t detect(void)
{
    const unsigned long caps = getauxval(AT_HWCAP);
    uint32_t found = 0;

    found |= (caps & CAP_AES) ? PYE_CPU_ARM_AES : 0;
    found |= (caps & CAP_PMULL) ? PYE_CPU_ARM_PMULL : 0;
    found |= (caps & CAP_SHA2) ? PYE_CPU_ARM_SHA2 : 0;
    found |= (caps & CAP_SHA512) ? PYE_CPU_ARM_SHA512 : 0;
    return found;
}
#elif defined(__aarch64__) && defined(__APPLE__)
static uint32_t detect(void)
{
    /* Every processor of Apple's that runs this code has them. */
    return PYE_CPU_ARM_AES | PYE_CPU_ARM_PMULL | PYE_CPU_ARM_SHA2 | PYE_CPU_ARM_SHA512;
}
#else
static uint32_t detect(void)
{
    return 0;
}
#endif

uint32_t pye_cpu_features(void)
{
    uint32_t found = atomic_load_explicit(&cached, memory_order_relaxed);

    if (found == 0) {
        found = detect() | KNOWN;
        atomic_store_explicit(&cached, found, memory_order_relaxed);
    }
    return found & ~KNOWN & atomic_load_explicit(&mask, memory_order_relaxed);
}

void pye_cpu_set_mask(uint32_t allowed)
{
    atomic_store_explicit(&mask, allowed, memory_order_relaxed);
}

const char *pye_cpu_feature_name(uint32_t feature)
{
    switch (feature) {
    case PYE_CPU_SSSE3:
        return "ssse3";
    case PYE_CPU_AESNI:
        return "aesni";
    case PYE_CPU_PCLMUL:
        return "pclmul";
    case PYE_CPU_AVX:
        return "avx";
    case PYE_CPU_AVX2:
        return "avx2";
    case PYE_CPU_AVX512:
        return "avx512";
    case PYE_CPU_VAES:
        return "vaes";
    case PYE_CPU_VPCLMUL:
        return "vpclmul";
    case PYE_CPU_SHANI:
        return "shani";
    case PYE_CPU_RDRAND:
        return "rdrand";
    case PYE_CPU_RDPID:
        return "rdpid";
    case PYE_CPU_PKU:
        return "pku";
    case PYE_CPU_WAITPKG:
        return "waitpkg";
    case PYE_CPU_BMI2:
        return "bmi2";
    case PYE_CPU_IFMA:
        return "ifma";
    case PYE_CPU_SHANI_FAST:
        return "shani-fast";
    case PYE_CPU_ARM_AES:
        return "aes";
    case PYE_CPU_ARM_PMULL:
        return "pmull";
    case PYE_CPU_ARM_SHA2:
        return "sha2";
    case PYE_CPU_ARM_SHA512:
        return "sha512";
    default:
        return NULL;
    }
}
