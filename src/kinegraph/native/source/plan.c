/* How operations are cut into tasks: pieces whose scratch memory stays in the second-level cache, as many for each
 * worker as for the others. */
#include "network.h"

#define SCRATCH_GOAL (640 * 1024 / (int64_t)sizeof(float))
/* Weights are read once for each task, which pays only from some rows on */
#define WINOGRAD_ROWS 96
#define GRAPH_FRAMES 4

int64_t count_units(const struct operation *operation, int64_t frames_out, int64_t joints) {
    switch (operation->kind) {
    case TEMPORAL:
        return frames_out * joints;
    case WINOGRAD:
        if (operation->stride == 2)
            return divide_up(frames_out, HALVED_OUTPUTS) * joints;
        return operation->dilation * divide_up(divide_up(frames_out, operation->dilation), NESTED_OUTPUTS) * joints;
    default:
        return frames_out;
    }
}

int64_t count_scratch(const struct operation *operation, int64_t units, int64_t joints) {
    if (operation->kind == GRAPH) {
        int64_t mixed = 0, results = 0, offsets = 0;
        for (int64_t i = 0; i < operation->num_parts; i++) {
            const struct part *part = &operation->parts[i];
            int64_t planes = part->slots * operation->planes_in, rows = part->rows * units | 1;
            mixed = planes * rows > mixed ? planes * rows : mixed;
            offsets = planes > offsets ? planes : offsets;
            results += part->rows;
        }
        /* Products of bytes come in whole lines of 64 channels */
        results = divide_up(operation->channels_out, BYTE_LANES) * (BYTE_LANES / LANES) * (results * units | 1);
        return (mixed + results + offsets + 1) * LANES;
    }
    if (operation->kind == TEMPORAL) {
        int64_t phases = operation->taps < operation->stride ? operation->taps : operation->stride;
        int64_t reach = divide_up((operation->taps - 1) * operation->dilation, operation->stride) + 1;
        int64_t rows = (units + reach * joints) | 1;
        return (phases * operation->planes_in * rows + operation->taps * operation->planes_in + 1) * LANES;
    }
    if (operation->kind == WINOGRAD) {
        int64_t points = operation->stride == 1 ? NESTED_POINTS : HALVED_POINTS;
        int64_t planes = operation->stride * operation->planes_in;
        return (points * (planes + operation->planes_out) * (units | 1) + planes + 1) * LANES;
    }
    return LANES;
}

int64_t choose_units(const struct operation *operation, int64_t units, int64_t joints, int64_t workers) {
    int64_t base = count_scratch(operation, 1, joints);
    int64_t each = count_scratch(operation, 3, joints) - base; /* of two units */
    int64_t most = each > 0 ? 2 * SCRATCH_GOAL / each : 64;
    if (operation->kind == WINOGRAD && most < WINOGRAD_ROWS)
        most = WINOGRAD_ROWS;
    if (operation->kind == GRAPH && most < GRAPH_FRAMES)
        most = GRAPH_FRAMES;
    if (most < 1)
        most = 1;
    int64_t tasks = divide_up(divide_up(units, most), workers) * workers;
    return divide_up(units, tasks < units ? tasks : units);
}
