/* The kernels, compiled once for each instruction set by compute_*.c, which define KERNELS (the name of the table),
 * WIDTH (floats of a vector), TILE_ROWS and PANEL_BLOCKS. Vectors are those of GCC and Clang, so that no instruction
 * is named here. */
#include "network.h"

#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define VECTORS (LANES / WIDTH)

typedef float vector __attribute__((vector_size(WIDTH * 4)));
/* The 16 channels of one row. The compiler makes as many instructions of it as the registers are narrow. */
typedef float cell __attribute__((vector_size(LANES * 4)));
typedef int32_t vector_bits __attribute__((vector_size(WIDTH * 4)));
typedef int32_t cell_bits __attribute__((vector_size(LANES * 4)));

INLINE cell load_cell(const float *p) { return *(const cell *)p; }
INLINE void store_cell(float *p, cell value) { *(cell *)p = value; }
INLINE vector larger_of(vector x, vector y) {
    vector_bits first = x > y;
    return (vector)(((vector_bits)x & first) | ((vector_bits)y & ~first));
}
INLINE vector smaller_of(vector x, vector y) {
    vector_bits first = x < y;
    return (vector)(((vector_bits)x & first) | ((vector_bits)y & ~first));
}
/* NaN stays NaN, as in PyTorch */
INLINE cell clip_negative(cell x) { return (cell)((cell_bits)x & ~(x < 0)); }
INLINE vector clip_negative_vector(vector x) { return (vector)((vector_bits)x & ~(x < 0)); }
INLINE cell choose_larger(cell x, cell y) {
    cell_bits first = ~(x < y);
    return (cell)(((cell_bits)x & first) | ((cell_bits)y & ~first));
}

/* Adds the residual of a row, applies relu, stores */
INLINE void finish_cell(const struct task *task, cell value, int64_t plane, int64_t row) {
    const struct operation *operation = task->operation;
    if (operation->residual >= 0) {
        const struct view *residual = &task->views[operation->residual];
        value += load_cell(residual->data + plane * residual->plane + row * LANES);
    }
    if (operation->relu)
        value = clip_negative(value);
    const struct view *out = &task->views[task->result];
    store_cell(out->data + plane * out->plane + row * LANES, value);
}

#include "multiply.h"
#include "multiply_bytes.h"

#include "elementwise.h"
#include "graph.h"
#include "temporal.h"
#include "winograd.h"

#include "quantized.h"

static void run_task(const struct task *task) {
    switch (task->operation->kind) {
    case AFFINE:
        run_affine(task);
        break;
    case GRAPH:
        if (task->operation->reads_bytes)
            run_byte_graph(task);
        else
            run_graph(task);
        break;
    case TEMPORAL:
        run_temporal(task);
        break;
    case WINOGRAD:
        run_winograd(task);
        break;
    case MAXIMUM:
        run_maximum(task);
        break;
    case SUM:
        run_sum(task);
        break;
    case CONCATENATION:
        run_concatenation(task);
        break;
    case QUANTIZE:
        run_quantize(task);
        break;
    case DEQUANTIZE:
        run_dequantize(task);
        break;
    }
}

const struct kernels KERNELS = {KERNELS_NAME, PANEL_BLOCKS, run_task};
