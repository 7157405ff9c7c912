/* Layers that mix no channels. Units are frames of the result. */

static void run_affine(const struct task *task) {
    const struct operation *operation = task->operation;
    const struct view *in = &task->views[operation->sources[0]];
    for (int64_t plane = 0; plane < operation->planes_in; plane++)
        for (int64_t t = task->begin; t < task->end; t++)
            for (int64_t v = 0; v < task->joints; v++) {
                int64_t row = t * task->joints + v, weights = (plane * task->joints + v) * LANES;
                cell x = load_cell(in->data + plane * in->plane + row * LANES);
                x = x * load_cell(operation->scale + weights) + load_cell(operation->bias + weights);
                finish_cell(task, x, plane, row);
            }
}

static void run_sum(const struct task *task) {
    const struct operation *operation = task->operation;
    for (int64_t plane = 0; plane < operation->planes_out; plane++)
        for (int64_t row = task->begin * task->joints; row < task->end * task->joints; row++) {
            cell total = {0};
            for (int i = 0; i < operation->num_sources; i++) {
                const struct view *in = &task->views[operation->sources[i]];
                total += load_cell(in->data + plane * in->plane + row * LANES);
            }
            finish_cell(task, total, plane, row);
        }
}

static void run_maximum(const struct task *task) {
    const struct operation *operation = task->operation;
    const struct view *in = &task->views[operation->sources[0]];
    for (int64_t plane = 0; plane < operation->planes_out; plane++)
        for (int64_t t = task->begin; t < task->end; t++) {
            int64_t first = t * operation->stride - operation->before, last = first + operation->taps;
            first = first < 0 ? 0 : first;
            last = last > in->frames ? in->frames : last;
            for (int64_t v = 0; v < task->joints; v++) {
                const float *x = in->data + plane * in->plane + v * LANES;
                cell most = load_cell(x + first * task->joints * LANES);
                for (int64_t i = first + 1; i < last; i++) {
                    cell other = load_cell(x + i * task->joints * LANES);
                    most = choose_larger(most, other);
                }
                finish_cell(task, most, plane, t * task->joints + v);
            }
        }
}

/* Channels of the inputs one after the other. Where an input does not begin at a plane, they move one by one. */
static void run_concatenation(const struct task *task) {
    const struct operation *operation = task->operation;
    const struct view *out = &task->views[task->result];
    for (int64_t row = task->begin * task->joints; row < task->end * task->joints; row++) {
        int64_t channel = 0;
        for (int i = 0; i < operation->num_sources; i++) {
            const struct view *in = &task->views[operation->sources[i]];
            for (int64_t c = 0; c < operation->source_channels[i]; c += LANES) {
                int64_t left = operation->source_channels[i] - c, count = left < LANES ? left : LANES;
                const float *from = in->data + c / LANES * in->plane + row * LANES;
                for (int64_t lane = 0; lane < count; lane++, channel++)
                    out->data[channel / LANES * out->plane + row * LANES + channel % LANES] = from[lane];
            }
        }
        for (; channel < operation->planes_out * LANES; channel++)
            out->data[channel / LANES * out->plane + row * LANES + channel % LANES] = 0;
        for (int64_t plane = 0; plane < operation->planes_out; plane++)
            finish_cell(task, load_cell(out->data + plane * out->plane + row * LANES), plane, row);
    }
}
