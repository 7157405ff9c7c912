/* Graph convolution. Units are frames.
 *
 * Each part is one matrix product: rows are sums of joints (or single joints), and each joint of the result is a sum
 * of rows of the products. Which sums are taken before the product and which after is chosen in Python (graph.py). */

/* (slots * planes, frames * rows, 16): the left side of a part's product */
static void mix_joints(const struct task *task, const struct part *part, int64_t pitch, float *mixed) {
    const struct operation *operation = task->operation;
    const struct view *in = &task->views[operation->sources[0]];
    for (int64_t slot = 0; slot < part->slots; slot++)
        for (int64_t plane = 0; plane < operation->planes_in; plane++)
            for (int64_t t = task->begin; t < task->end; t++) {
                const float *x = in->data + plane * in->plane + t * task->joints * LANES;
                float *y = mixed + (slot * operation->planes_in + plane) * pitch;
                y += (t - task->begin) * part->rows * LANES;
                for (int64_t row = 0; row < part->rows; row++) {
                    int64_t from = part->mixing.start[slot * part->rows + row];
                    int64_t to = part->mixing.start[slot * part->rows + row + 1];
                    cell total = {0};
                    for (int64_t e = from; e < to; e++)
                        total += load_cell(x + (int64_t)part->mixing.source[e] * LANES) * part->mixing.weight[e];
                    store_cell(y + row * LANES, total);
                }
            }
}

/* Rows of the products (planes', frames * rows of all parts, 16), part after part -> joints */
static void combine_rows(const struct task *task, const float *products, int64_t pitch) {
    const struct operation *operation = task->operation;
    const struct links *links = &operation->combination;
    int64_t frames = task->end - task->begin;
    for (int64_t plane = 0; plane < operation->planes_out; plane++)
        for (int64_t t = 0; t < frames; t++)
            for (int64_t w = 0; w < task->joints; w++) {
                cell total = load_cell(operation->bias + (plane * task->joints + w) * LANES);
                for (int64_t e = links->start[w]; e < links->start[w + 1]; e++) {
                    int64_t first = operation->link_first[e], rows = operation->link_rows[e];
                    int64_t row = frames * first + t * rows + links->source[e] - first;
                    total += load_cell(products + plane * pitch + row * LANES) * links->weight[e];
                }
                finish_cell(task, total, plane, (task->begin + t) * task->joints + w);
            }
}

static void run_graph(const struct task *task) {
    const struct operation *operation = task->operation;
    const struct view *in = &task->views[operation->sources[0]];
    /* Planes are short pieces from far apart: the CPU's own prefetcher would start anew in each */
    for (int64_t plane = 0; plane < operation->planes_in; plane++)
        for (int64_t row = task->begin * task->joints; row < task->end * task->joints; row++)
            __builtin_prefetch(in->data + plane * in->plane + row * LANES);
    int64_t frames = task->end - task->begin, total_rows = 0, longest = 0;
    for (int64_t i = 0; i < operation->num_parts; i++) {
        const struct part *part = &operation->parts[i];
        int64_t planes = part->slots * operation->planes_in, cells = planes * (frames * part->rows | 1);
        total_rows += part->rows;
        longest = cells > longest ? cells : longest;
    }
    int64_t out_pitch = (frames * total_rows | 1) * LANES;
    float *products = task->scratch + longest * LANES;
    int64_t *offsets = (int64_t *)(products + operation->planes_out * out_pitch), first = 0;
    for (int64_t i = 0; i < operation->num_parts; i++) {
        const struct part *part = &operation->parts[i];
        int64_t pitch = (frames * part->rows | 1) * LANES;
        mix_joints(task, part, pitch, task->scratch);
        for (int64_t j = 0; j < part->slots * operation->planes_in; j++)
            offsets[j] = j * pitch;
        const struct product product = {
            .rows = task->scratch,
            .offsets = offsets,
            .num_segments = part->slots * operation->planes_in,
            .num_rows = frames * part->rows,
            .panels = part->panels,
            .planes_out = operation->planes_out,
            .out = products + frames * first * LANES,
            .out_plane = out_pitch,
        };
        multiply(&product);
        first += part->rows;
    }
    combine_rows(task, products, out_pitch);
}
