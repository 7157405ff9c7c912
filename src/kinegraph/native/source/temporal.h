/* Temporal convolution, tap by tap. Units are rows of the result.
 *
 * Frames are split by their remainder modulo the stride ("phases"): within a phase the rows that a tap needs lie one
 * after the other as the rows of the result do, so that all taps are segments of one matrix product. */

INLINE int64_t divide_down(int64_t a, int64_t b) { return a >= 0 ? a / b : -divide_up(-a, b); }

/* Rows [first, first + count) of one phase; bytes `fill` outside the clip, which stand for zeros */
static void gather_phase(const struct view *in, int64_t plane, int64_t joints, int64_t stride, int64_t phase,
                         int64_t first, int64_t count, int fill, float *to) {
    for (int64_t i = 0; i < count;) {
        int64_t t = divide_down(first + i, joints), v = first + i - t * joints, frame = t * stride + phase;
        int64_t length = joints - v < count - i ? joints - v : count - i;
        if (frame >= 0 && frame < in->frames)
            memcpy(to + i * LANES, in->data + plane * in->plane + (frame * joints + v) * LANES,
                   (size_t)(length * LANES) * sizeof(float));
        else
            memset(to + i * LANES, fill, (size_t)(length * LANES) * sizeof(float));
        i += length;
    }
}

static void multiply_taps(const struct task *task, const int64_t *offsets, int64_t planes) {
    const struct operation *operation = task->operation;
    const struct view *out = &task->views[task->result];
    const struct view *residual = operation->residual >= 0 ? &task->views[operation->residual] : NULL;
    const struct product product = {
        .rows = task->scratch,
        .offsets = offsets,
        .num_segments = operation->taps * planes,
        .num_rows = task->end - task->begin,
        .panels = operation->panels,
        .planes_out = operation->planes_out,
        .out = out->data + task->begin * LANES,
        .out_plane = out->plane,
        .bias = operation->bias,
        .residual = residual != NULL ? residual->data + task->begin * LANES : NULL,
        .residual_plane = residual != NULL ? residual->plane : 0,
        .relu = operation->relu,
    };
    multiply(&product);
}

static void multiply_byte_taps(const struct task *task, const int64_t *offsets, int64_t planes) {
    const struct operation *operation = task->operation;
    const struct view *out = &task->views[task->result];
    const struct view *residual = operation->residual >= 0 ? &task->views[operation->residual] : NULL;
    const struct byte_product product = {
        .rows = task->scratch,
        .offsets = offsets,
        .num_segments = operation->taps * planes,
        .num_rows = task->end - task->begin,
        .panels = operation->panels,
        .channels_out = operation->channels_out,
        .scale = operation->scale,
        .bias = operation->bias,
        .residual = residual != NULL ? (const uint8_t *)(residual->data + task->begin * LANES) : NULL,
        .residual_plane = residual != NULL ? residual->plane : 0,
        .residual_factor = operation->rescaling.residual_factor,
        .zero_point = operation->rescaling.zero_point,
        .relu = operation->relu,
        .to_bytes = operation->writes_bytes,
        .out = out->data + task->begin * LANES,
        .out_plane = out->plane,
    };
    multiply_bytes(&product);
}

static void run_temporal(const struct task *task) {
    const struct operation *operation = task->operation;
    const struct view *in = &task->views[operation->sources[0]];
    int64_t stride = operation->stride, joints = task->joints, planes = operation->planes_in;
    /* Tap i reads frame t * stride + shift = (t + divide_down(shift)) * stride + remainder */
    int64_t last_shift = (operation->taps - 1) * operation->dilation - operation->before;
    int64_t earliest = divide_down(-operation->before, stride), latest = divide_down(last_shift, stride);
    int64_t units = task->end - task->begin, rows = units + (latest - earliest) * joints, pitch = (rows | 1) * LANES;
    int64_t num_phases = 0, phases[MAX_TAPS];
    int64_t most_phases = operation->taps < stride ? operation->taps : stride;
    int64_t *offsets = (int64_t *)(task->scratch + most_phases * planes * pitch);
    for (int64_t tap = 0; tap < operation->taps; tap++) {
        int64_t shift = tap * operation->dilation - operation->before;
        int64_t frames = divide_down(shift, stride), phase = shift - frames * stride, index = 0;
        while (index < num_phases && phases[index] != phase)
            index++;
        if (index == num_phases) {
            phases[num_phases++] = phase;
            for (int64_t plane = 0; plane < planes; plane++)
                gather_phase(in, plane, joints, stride, phase, task->begin + earliest * joints, rows,
                             operation->rescaling.fill, task->scratch + (index * planes + plane) * pitch);
        }
        for (int64_t plane = 0; plane < planes; plane++)
            offsets[tap * planes + plane] = (index * planes + plane) * pitch + (frames - earliest) * joints * LANES;
    }
    if (operation->reads_bytes)
        multiply_byte_taps(task, offsets, planes);
    else
        multiply_taps(task, offsets, planes);
}
