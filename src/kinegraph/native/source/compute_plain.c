/* For any CPU: vectors of 4 floats are what SSE2 and NEON have. */
#ifdef __SSE2__
#include <emmintrin.h>
#define DOT_MADD(x, y) ((vector_bits)_mm_madd_epi16((__m128i)(x), (__m128i)(y)))
#endif
#define KERNELS kernels_plain
#define KERNELS_NAME "plain"
#define WIDTH 4
#ifdef __aarch64__
#define TILE_ROWS 6 /* 32 registers */
#else
#define TILE_ROWS 3
#endif
#define PANEL_BLOCKS 1
#include "compute.h"
