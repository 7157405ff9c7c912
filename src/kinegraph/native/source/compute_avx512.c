/* The whole file for one kind of CPU, chosen at run time: the library itself is built for the oldest. */
#include "network.h"

#ifdef HAVE_X86_KERNELS
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif

#define KERNELS kernels_avx512
#define KERNELS_NAME "avx512"
#define WIDTH 16
#define TILE_ROWS 6
#define PANEL_BLOCKS 4
#define DOT_MADD(x, y) ((vector_bits)_mm512_madd_epi16((__m512i)(x), (__m512i)(y)))
#include "compute.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
