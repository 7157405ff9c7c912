/* The whole file for one kind of CPU, chosen at run time: the library itself is built for the oldest. */
#include "network.h"

#ifdef HAVE_X86_KERNELS
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define KERNELS kernels_avx2
#define KERNELS_NAME "avx2"
#define WIDTH 8
#define TILE_ROWS 6
#define PANEL_BLOCKS 1
#define DOT_MADD(x, y) ((vector_bits)_mm256_madd_epi16((__m256i)(x), (__m256i)(y)))
#include "compute.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
