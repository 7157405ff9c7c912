/* Layers on bytes. Units are those of the same layers on floats. */

/* QUANTIZE: floats -> bytes */
static void run_quantize(const struct task *task) {
    const struct operation *operation = task->operation;
    const struct view *in = &task->views[operation->sources[0]], *out = &task->views[task->result];
    int64_t planes = count_planes(operation->channels_in);
    for (int64_t block = 0; block < operation->planes_out * (BYTE_LANES / LANES); block++)
        for (int64_t row = task->begin * task->joints; row < task->end * task->joints; row++) {
            uint8_t *to = (uint8_t *)(out->data + block / 4 * out->plane + row * LANES) + block % 4 * LANES;
            for (int lane = 0; lane < LANES; lane += WIDTH) {
                vector x = {0};
                if (block < planes)
                    x = *(const vector *)(in->data + block * in->plane + row * LANES + lane);
                x = x * operation->rescaling.residual_factor + operation->rescaling.zero_point;
                byte_vector bytes = round_to_bytes(x);
                memcpy(to + lane, &bytes, sizeof bytes);
            }
        }
}

/* DEQUANTIZE: bytes -> floats; the channels that fill the last plane up are zero */
static void run_dequantize(const struct task *task) {
    const struct operation *operation = task->operation;
    const struct view *in = &task->views[operation->sources[0]], *out = &task->views[task->result];
    for (int64_t block = 0; block < operation->planes_out; block++)
        for (int64_t row = task->begin * task->joints; row < task->end * task->joints; row++) {
            const uint8_t *from = (const uint8_t *)(in->data + block / 4 * in->plane + row * LANES) + block % 4 * LANES;
            float *to = out->data + block * out->plane + row * LANES;
            for (int lane = 0; lane < LANES; lane++) {
                float x = ((float)from[lane] - operation->rescaling.zero_point) * operation->rescaling.residual_factor;
                to[lane] = block * LANES + lane < operation->channels_out ? x : 0.0f;
            }
        }
}

/* Rows of all parts' products (planes' of 16, rows, 16) -> joints, see combine_rows */
static void combine_byte_rows(const struct task *task, const float *products, int64_t pitch) {
    const struct operation *operation = task->operation;
    const struct links *links = &operation->combination;
    const struct view *out = &task->views[task->result];
    const struct view *residual = operation->residual >= 0 ? &task->views[operation->residual] : NULL;
    int64_t frames = task->end - task->begin;
    for (int64_t block = 0; block < count_planes(operation->channels_out); block++)
        for (int64_t t = 0; t < frames; t++)
            for (int64_t w = 0; w < task->joints; w++) {
                int64_t to = (task->begin + t) * task->joints + w, from = links->start[w], end = links->start[w + 1];
                for (int lane = 0; lane < LANES; lane += WIDTH) {
                    vector total = *(const vector *)(operation->bias + (block * task->joints + w) * LANES + lane);
                    for (int64_t e = from; e < end; e++) {
                        int64_t first = operation->link_first[e], rows = operation->link_rows[e];
                        int64_t row = frames * first + t * rows + links->source[e] - first;
                        total += *(const vector *)(products + block * pitch + row * LANES + lane) * links->weight[e];
                    }
                    if (residual != NULL) {
                        const float *line = residual->data + block / 4 * residual->plane + to * LANES;
                        vector bytes = load_bytes((const uint8_t *)line + block % 4 * LANES + lane);
                        total += operation->rescaling.residual_factor * bytes;
                    }
                    if (operation->relu)
                        total = clip_negative_vector(total);
                    if (operation->writes_bytes) {
                        byte_vector bytes = round_to_bytes(total + operation->rescaling.zero_point);
                        memcpy((uint8_t *)(out->data + block / 4 * out->plane + to * LANES) + block % 4 * LANES + lane,
                               &bytes, sizeof bytes);
                    } else
                        *(vector *)(out->data + block * out->plane + to * LANES + lane) = total;
                }
            }
}

/* Products of single joints; neighbours are summed after them, in float, so that no sum must be rounded to a byte */
static void run_byte_graph(const struct task *task) {
    const struct operation *operation = task->operation;
    const struct view *in = &task->views[operation->sources[0]];
    int64_t frames = task->end - task->begin, total_rows = 0, longest = 0, first = 0, planes = operation->planes_in;
    for (int64_t i = 0; i < operation->num_parts; i++) {
        int64_t cells = planes * (frames * operation->parts[i].rows | 1);
        total_rows += operation->parts[i].rows;
        longest = cells > longest ? cells : longest;
    }
    int64_t out_pitch = (frames * total_rows | 1) * LANES;
    float *products = task->scratch + longest * LANES;
    int64_t blocks = divide_up(operation->channels_out, BYTE_LANES) * (BYTE_LANES / LANES);
    int64_t *offsets = (int64_t *)(products + blocks * out_pitch);
    for (int64_t i = 0; i < operation->num_parts; i++) {
        const struct part *part = &operation->parts[i];
        int64_t pitch = (frames * part->rows | 1) * LANES;
        for (int64_t plane = 0; plane < planes; plane++) {
            offsets[plane] = plane * pitch;
            for (int64_t t = 0; t < frames; t++)
                for (int64_t row = 0; row < part->rows; row++) {
                    int64_t from = (task->begin + t) * task->joints + part->mixing.source[row];
                    memcpy(task->scratch + plane * pitch + (t * part->rows + row) * LANES,
                           in->data + plane * in->plane + from * LANES, BYTE_LANES);
                }
        }
        const struct byte_product product = {
            .rows = task->scratch,
            .offsets = offsets,
            .num_segments = planes,
            .num_rows = frames * part->rows,
            .panels = part->panels,
            .channels_out = operation->channels_out,
            .scale = part->scale,
            .out = products + frames * first * LANES,
            .out_plane = out_pitch,
        };
        multiply_bytes(&product);
        first += part->rows;
    }
    combine_byte_rows(task, products, out_pitch);
}
