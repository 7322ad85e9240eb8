/* sha512_bmi2.c - the block function with rotations that leave their source alone (RORX). */
#if defined(__x86_64__)
#pragma GCC target("bmi,bmi2")
#define BLOCKS_FUNCTION pye_sha512_blocks_bmi2
#include "crypto/sha512_block_impl.h"
#else
typedef int pye_sha512_bmi2_is_for_x86; /* ISO C wants a declaration */
#endif
