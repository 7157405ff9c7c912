/* Temporal convolution of up to 9 taps with fewer multiplications. Units are rows (tile, joint).
 *
 * Winograd's minimal filtering (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016): a tile
 * of outputs is a linear transform of products of transformed inputs and transformed weights, one product a point.
 *
 * Stride 1 (nested after Agarwal and Cooley, New Algorithms for Digital Convolution, 1977): 9 taps are 3 pieces of 3,
 * and 12 outputs 4 blocks of 3. In each block F(3, 3) at 0, 1, -1, 2, infinity; in its 5 points, pieces and blocks are
 * again a convolution of 3 taps, done by F(4, 3) at 0, 1, -1, 1/2, -2, infinity. 30 multiplications instead of 108,
 * with numbers so small that float32 loses no more than two bits.
 * Stride 2: even and odd frames are convolved with even and odd taps, at most 5, by F(4, 5) at 0, 1, -1, 2, -2, 1/2,
 * -1/2, infinity, and added before the way back: 16 multiplications instead of 36.
 * The transformed weights are made in Python (winograd.py), in float64. */

/* 5 frames of a block -> its 5 points */
INLINE void transform_block(const cell x[5], cell y[5]) {
    cell near = x[3] - x[1];
    y[0] = 2.0f * (x[0] - x[2]) + near;
    y[1] = x[3] - x[2] - 2.0f * x[1];
    y[2] = x[3] - 3.0f * x[2] + 2.0f * x[1];
    y[3] = near;
    y[4] = x[4] - x[2] - 2.0f * near;
}

/* 5 points -> 3 outputs */
INLINE void restore_block(const cell x[5], cell y[3]) {
    cell sum = x[1] + x[2], difference = x[1] - x[2];
    y[0] = x[0] + sum + x[3];
    y[1] = difference + 2.0f * x[3];
    y[2] = sum + 4.0f * x[3] + x[4];
}

/* One point of 6 blocks -> 6 points */
INLINE void transform_blocks(const cell x[6], cell y[6]) {
    cell near = x[3] - x[1], far = x[4] - x[2];
    y[0] = x[0] - x[2] + far + 1.5f * near;
    y[1] = far + near + 1.5f * (x[2] + x[3]);
    y[2] = far - near + 1.5f * (x[3] - x[2]);
    y[3] = far + 2.0f * near;
    y[4] = far - 0.5f * near;
    y[5] = x[5] - x[3] - near + 1.5f * far;
}

/* 6 points -> the same point of 4 blocks */
INLINE void restore_blocks(const cell x[6], cell y[4]) {
    cell sum = x[1] + x[2], difference = x[1] - x[2];
    y[0] = x[0] + sum + x[3] + x[4];
    y[1] = difference + 0.5f * x[3] - 2.0f * x[4];
    y[2] = sum + 0.25f * x[3] + 4.0f * x[4];
    y[3] = difference + 0.125f * x[3] - 8.0f * x[4] + x[5];
}

/* 8 frames of one parity -> 8 points */
INLINE void transform_halved(const cell x[8], cell y[8]) {
    cell even = x[2] - 4.25f * x[4] + x[6], odd = x[1] - 4.25f * x[3] + x[5];
    y[0] = x[6] - x[0] + 5.25f * (x[2] - x[4]);
    y[1] = even + odd;
    y[2] = even - odd;
    even = 0.25f * x[2] - 1.25f * x[4] + x[6], odd = 0.5f * x[1] - 2.5f * x[3] + 2.0f * x[5];
    y[3] = even + odd;
    y[4] = even - odd;
    even = 4.0f * x[2] - 5.0f * x[4] + x[6], odd = 2.0f * x[1] - 2.5f * x[3] + 0.5f * x[5];
    y[5] = even + odd;
    y[6] = even - odd;
    y[7] = x[7] - x[1] + 5.25f * (x[3] - x[5]);
}

INLINE void restore_halved(const cell x[8], cell y[4]) {
    cell sum = x[1] + x[2], difference = x[1] - x[2], sum_2 = x[3] + x[4], difference_2 = x[3] - x[4];
    cell sum_half = x[5] + x[6], difference_half = x[5] - x[6];
    y[0] = x[0] + sum + sum_2 + sum_half;
    y[1] = difference + 2.0f * difference_2 + 0.5f * difference_half;
    y[2] = sum + 4.0f * sum_2 + 0.25f * sum_half;
    y[3] = difference + 8.0f * difference_2 + 0.125f * difference_half + x[7];
}

/* Joints between those that are loaded and those that are fetched into the cache. A window goes along twenty streams of
 * memory, more than the CPU's own prefetcher follows. */
#define AHEAD 8

/* `count` frames from `first` on, `step` apart, of one joint; zeros outside the clip */
INLINE void load_window(const struct task *task, int64_t plane, int64_t joint, int64_t first, int64_t step,
                        const int count, cell *x) {
    const struct view *in = &task->views[task->operation->sources[0]];
    const float *data = in->data + plane * in->plane + joint * LANES;
    for (int i = 0; i < count; i++) {
        int64_t frame = first + i * step;
        x[i] = (cell){0};
        if (frame >= 0 && frame < in->frames) {
            x[i] = load_cell(data + frame * task->joints * LANES);
            __builtin_prefetch(data + (frame * task->joints + AHEAD) * LANES);
        }
    }
}

INLINE void store_outputs(const struct task *task, int64_t plane, int64_t joint, int64_t first, int64_t step,
                          const int count, const cell *y) {
    int64_t frames = task->views[task->result].frames;
    cell bias = load_cell(task->operation->bias + plane * LANES);
    for (int i = 0; i < count && first + i * step < frames; i++)
        finish_cell(task, y[i] + bias, plane, (first + i * step) * task->joints + joint);
}

/* Points lie `pitch` floats apart */
static void transform_nested(const struct task *task, int64_t plane, int64_t joint, int64_t first, float *to,
                             int64_t pitch) {
    cell x[NESTED_WINDOW], blocks[5][6];
    load_window(task, plane, joint, first - task->operation->before, task->operation->dilation, NESTED_WINDOW, x);
    for (int b = 0; b < 6; b++) {
        cell y[5];
        transform_block(x + 3 * b, y);
        for (int i = 0; i < 5; i++)
            blocks[i][b] = y[i];
    }
    for (int i = 0; i < 5; i++) {
        cell y[6];
        transform_blocks(blocks[i], y);
        for (int j = 0; j < 6; j++)
            store_cell(to + (i * 6 + j) * pitch, y[j]);
    }
}

static void restore_nested(const struct task *task, int64_t plane, int64_t joint, int64_t first, const float *from,
                           int64_t pitch) {
    cell blocks[4][5], outputs[NESTED_OUTPUTS];
    for (int i = 0; i < 5; i++) {
        cell x[6], y[4];
        for (int j = 0; j < 6; j++)
            x[j] = load_cell(from + (i * 6 + j) * pitch);
        restore_blocks(x, y);
        for (int b = 0; b < 4; b++)
            blocks[b][i] = y[b];
    }
    for (int b = 0; b < 4; b++)
        restore_block(blocks[b], outputs + 3 * b);
    store_outputs(task, plane, joint, first, task->operation->dilation, NESTED_OUTPUTS, outputs);
}

/* The first frame of the result in a tile: with dilation d, tiles go through every d-th frame, d of them interleaved */
INLINE int64_t find_first(const struct operation *operation, int64_t tile) {
    if (operation->stride == 2)
        return tile * HALVED_OUTPUTS;
    return tile % operation->dilation + tile / operation->dilation * operation->dilation * NESTED_OUTPUTS;
}

static void transform_rows(const struct task *task, float *transformed, int64_t pitch) {
    const struct operation *operation = task->operation;
    int64_t planes = operation->planes_in;
    for (int64_t plane = 0; plane < planes; plane++)
        for (int64_t unit = task->begin; unit < task->end; unit++) {
            int64_t first = find_first(operation, unit / task->joints), joint = unit % task->joints;
            float *to = transformed + plane * pitch + (unit - task->begin) * LANES;
            if (operation->stride == 1) {
                transform_nested(task, plane, joint, first, to, planes * pitch);
                continue;
            }
            for (int parity = 0; parity < 2; parity++) {
                cell x[HALVED_WINDOW], y[HALVED_POINTS];
                load_window(task, plane, joint, 2 * first + parity - operation->before, 2, HALVED_WINDOW, x);
                transform_halved(x, y);
                for (int i = 0; i < HALVED_POINTS; i++)
                    store_cell(to + (i * 2 + parity) * planes * pitch, y[i]);
            }
        }
}

static void restore_rows(const struct task *task, const float *products, int64_t pitch) {
    const struct operation *operation = task->operation;
    int64_t planes = operation->planes_out;
    for (int64_t plane = 0; plane < planes; plane++)
        for (int64_t unit = task->begin; unit < task->end; unit++) {
            int64_t first = find_first(operation, unit / task->joints), joint = unit % task->joints;
            const float *from = products + plane * pitch + (unit - task->begin) * LANES;
            if (operation->stride == 1) {
                restore_nested(task, plane, joint, first, from, planes * pitch);
                continue;
            }
            cell x[HALVED_POINTS], y[HALVED_OUTPUTS];
            for (int i = 0; i < HALVED_POINTS; i++)
                x[i] = load_cell(from + i * planes * pitch);
            restore_halved(x, y);
            store_outputs(task, plane, joint, first, 1, HALVED_OUTPUTS, y);
        }
}

static void run_winograd(const struct task *task) {
    const struct operation *operation = task->operation;
    int64_t points = operation->stride == 1 ? NESTED_POINTS : HALVED_POINTS;
    int64_t planes = operation->stride * operation->planes_in, rows = task->end - task->begin;
    int64_t pitch = (rows | 1) * LANES;
    float *products = task->scratch + points * planes * pitch;
    int64_t *offsets = (int64_t *)(products + points * operation->planes_out * pitch);
    for (int64_t j = 0; j < planes; j++)
        offsets[j] = j * pitch;
    transform_rows(task, task->scratch, pitch);
    for (int64_t point = 0; point < points; point++) {
        const struct product product = {
            .rows = task->scratch + point * planes * pitch,
            .offsets = offsets,
            .num_segments = planes,
            .num_rows = rows,
            .panels = (const float *)operation->panels + point * planes * operation->planes_out * LANES * LANES,
            .planes_out = operation->planes_out,
            .out = products + point * operation->planes_out * pitch,
            .out_plane = pitch,
        };
        multiply(&product);
    }
    restore_rows(task, products, pitch);
}
