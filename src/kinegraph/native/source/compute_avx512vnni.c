/* The whole file for one kind of CPU, chosen at run time: the library itself is built for the oldest. */
#include "network.h"

#ifdef HAVE_X86_KERNELS
#include <immintrin.h>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")
#endif

#define KERNELS kernels_avx512vnni
#define KERNELS_NAME "avx512vnni"
#define WIDTH 16
#define TILE_ROWS 6
#define PANEL_BLOCKS 4
#define DOT_VNNI
#include "compute.h"

#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
