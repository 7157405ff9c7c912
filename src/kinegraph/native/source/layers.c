/* Filling operations: weights are checked, padded to whole planes and packed as the matrix products read them. */
#include "network.h"

#include <stdlib.h>
#include <string.h>

static int holds(struct span span, int64_t count, int64_t size) { return count >= 0 && span.size == count * size; }

static float float_at(struct span span, int64_t index) {
    float value;
    memcpy(&value, (const char *)span.bytes + index * (int64_t)sizeof value, sizeof value);
    return value;
}

/* (V, C) -> (planes, V, 16), as many planes as fill lines of bytes */
static float *spread_cells(struct span values, int64_t joints, int64_t channels) {
    float *cells = allocate(divide_up(channels, BYTE_LANES) * BYTE_LANES * joints, sizeof(float));
    for (int64_t v = 0; cells != NULL && v < joints; v++)
        for (int64_t c = 0; c < channels; c++)
            cells[(c / LANES * joints + v) * LANES + c % LANES] = float_at(values, v * channels + c);
    return cells;
}

/* One matrix (groups, C, C') as panels: of each panel's columns, row after row, C padded to whole planes */
static void pack_floats(float *panels, struct span weight, int64_t first, int64_t groups,
                        const struct operation *operation, int64_t panel_blocks) {
    int64_t depth = groups * operation->planes_in * LANES, columns = count_planes(operation->channels_out) * LANES;
    int64_t width = panel_blocks * LANES;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t c = 0; c < operation->channels_in; c++)
            for (int64_t d = 0; d < operation->channels_out; d++) {
                int64_t start = d / width * width, own = columns - start < width ? columns - start : width;
                int64_t row = g * operation->planes_in * LANES + c;
                panels[start * depth + row * own + d - start] =
                    float_at(weight, first + (g * operation->channels_in + c) * operation->channels_out + d);
            }
}

/* The same for bytes: 4 of the depth side by side, as the dot products of 4 bytes read them; C' padded to 64 */
static void pack_bytes(int8_t *panels, struct span weight, int64_t groups, const struct operation *operation,
                       int64_t panel_blocks) {
    int64_t depth = groups * operation->planes_in * BYTE_LANES, width = panel_blocks * LANES;
    for (int64_t g = 0; g < groups; g++)
        for (int64_t c = 0; c < operation->channels_in; c++)
            for (int64_t d = 0; d < operation->channels_out; d++) {
                int64_t row = g * operation->planes_in * BYTE_LANES + c;
                panels[d / width * width * depth + (row / 4 * width + d % width) * 4 + row % 4] =
                    ((const int8_t *)weight.bytes)[(g * operation->channels_in + c) * operation->channels_out + d];
            }
}

static void *build_panels(const struct network *network, const struct operation *operation, struct span weight,
                          int64_t matrices, int64_t groups) {
    int64_t columns = divide_up(operation->channels_out, BYTE_LANES) * BYTE_LANES;
    if (operation->reads_bytes) {
        int8_t *panels = allocate(groups * operation->planes_in * BYTE_LANES * columns, 1);
        if (panels != NULL)
            pack_bytes(panels, weight, groups, operation, network->kernels->panel_blocks);
        return panels;
    }
    int64_t size = groups * operation->planes_in * LANES * count_planes(operation->channels_out) * LANES;
    float *panels = allocate(matrices * size, sizeof(float));
    for (int64_t i = 0; panels != NULL && i < matrices; i++)
        pack_floats(panels + i * size, weight, i * groups * operation->channels_in * operation->channels_out, groups,
                    operation, network->kernels->panel_blocks);
    return panels;
}

/* (C',) padded to whole lines of bytes, which are whole blocks of floats too */
static float *pad_channels(struct span values, int64_t channels) {
    float *padded = allocate(divide_up(channels, BYTE_LANES) * BYTE_LANES, sizeof(float));
    for (int64_t c = 0; padded != NULL && c < channels; c++)
        padded[c] = float_at(values, c);
    return padded;
}

/* spans: start (rows + 1) int32, source int32, weight float32 */
static const char *copy_links(struct links *links, int64_t rows, int64_t num_sources, const struct span spans[3]) {
    int64_t count = spans[1].size / (int64_t)sizeof(int32_t);
    if (!holds(spans[0], rows + 1, sizeof(int32_t)) || !holds(spans[1], count, sizeof(int32_t)) ||
        !holds(spans[2], count, sizeof(float)))
        return "links of another size than their shape";
    links->rows = rows;
    links->start = allocate(rows + 1, sizeof(int32_t));
    links->source = allocate(count, sizeof(int32_t));
    links->weight = allocate(count, sizeof(float));
    if (!links->start || !links->source || !links->weight)
        return OUT_OF_MEMORY;
    memcpy(links->start, spans[0].bytes, (size_t)spans[0].size);
    memcpy(links->source, spans[1].bytes, (size_t)spans[1].size);
    memcpy(links->weight, spans[2].bytes, (size_t)spans[2].size);
    if (links->start[0] != 0 || links->start[rows] != count)
        return "links that do not begin or end where they should";
    for (int64_t i = 0; i < rows; i++)
        if (links->start[i] > links->start[i + 1])
            return "links whose rows overlap";
    for (int64_t e = 0; e < count; e++)
        if (links->source[e] < 0 || links->source[e] >= num_sources)
            return "a link to a row that does not exist";
    return NULL;
}

const char *set_affine(struct network *network, struct span scale, struct span shift) {
    struct operation *operation = opened_operation(network);
    int64_t joints = network->num_joints, channels = operation->channels_in;
    if (!holds(scale, joints * channels, sizeof(float)) || !holds(shift, joints * channels, sizeof(float)))
        return "weights of another size than their shape";
    operation->scale = spread_cells(scale, joints, channels);
    operation->bias = spread_cells(shift, joints, channels);
    return operation->scale == NULL || operation->bias == NULL ? OUT_OF_MEMORY : NULL;
}

static const char *set_channels_out(struct operation *operation, int64_t channels_out) {
    if (channels_out < 1 || channels_out > MAX_CHANNELS)
        return "too few or too many channels";
    operation->channels_out = channels_out;
    operation->planes_out = count_result_planes(channels_out, operation->writes_bytes);
    return NULL;
}

const char *set_graph(struct network *network, int64_t channels_out, int64_t num_parts, struct span bias) {
    struct operation *operation = opened_operation(network);
    const char *problem = set_channels_out(operation, channels_out);
    if (problem != NULL)
        return problem;
    if (!holds(bias, network->num_joints * channels_out, sizeof(float)))
        return "a bias of another size than its shape";
    if (num_parts < 0 || num_parts > MAX_JOINTS)
        return "too many parts";
    operation->bias = spread_cells(bias, network->num_joints, channels_out);
    operation->parts = calloc((size_t)num_parts + 1, sizeof *operation->parts);
    operation->num_parts = num_parts;
    return operation->bias == NULL || operation->parts == NULL ? OUT_OF_MEMORY : NULL;
}

const char *set_part(struct network *network, int64_t index, int64_t rows, int64_t slots, const struct span links[3],
                     struct span weight, struct span scale) {
    struct operation *operation = opened_operation(network);
    if (index < 0 || index >= operation->num_parts || rows < 1 || rows > network->num_joints || slots < 1 ||
        slots > MAX_TAPS)
        return "a part with too many rows or slots";
    int64_t size = operation->reads_bytes ? 1 : (int64_t)sizeof(float);
    if (!holds(weight, slots * operation->channels_in * operation->channels_out, size) ||
        (operation->reads_bytes && !holds(scale, operation->channels_out, sizeof(float))))
        return "weights of another size than their shape";
    if (operation->reads_bytes && slots != 1)
        return "sums of bytes";
    struct part *part = &operation->parts[index];
    part->rows = rows;
    part->slots = slots;
    part->panels = build_panels(network, operation, weight, 1, slots);
    if (operation->reads_bytes)
        part->scale = pad_channels(scale, operation->channels_out);
    if (part->panels == NULL || (operation->reads_bytes && part->scale == NULL))
        return OUT_OF_MEMORY;
    const char *problem = copy_links(&part->mixing, rows * slots, network->num_joints, links);
    for (int64_t i = 0; problem == NULL && operation->reads_bytes && i <= rows; i++)
        if (part->mixing.start[i] != i)
            problem = "sums of bytes";
    return problem;
}

const char *set_combination(struct network *network, const struct span links[3]) {
    struct operation *operation = opened_operation(network);
    int64_t rows = 0;
    for (int64_t i = 0; i < operation->num_parts; i++)
        rows += operation->parts[i].rows;
    struct links *combination = &operation->combination;
    const char *problem = copy_links(combination, network->num_joints, rows, links);
    if (problem != NULL)
        return problem;
    int64_t count = combination->start[network->num_joints];
    operation->link_first = allocate(count, sizeof(int32_t));
    operation->link_rows = allocate(count, sizeof(int32_t));
    if (operation->link_first == NULL || operation->link_rows == NULL)
        return OUT_OF_MEMORY;
    for (int64_t e = 0; e < count; e++) {
        int64_t first = 0, part = 0;
        while (combination->source[e] >= first + operation->parts[part].rows)
            first += operation->parts[part++].rows;
        operation->link_first[e] = (int32_t)first;
        operation->link_rows[e] = (int32_t)operation->parts[part].rows;
    }
    return NULL;
}

const char *set_temporal(struct network *network, int64_t channels_out, const int64_t geometry[4], struct span weight,
                         struct span scale, struct span bias) {
    struct operation *operation = opened_operation(network);
    const char *problem = set_channels_out(operation, channels_out);
    if (problem != NULL)
        return problem;
    int64_t taps = geometry[0], stride = geometry[1], dilation = geometry[2], before = geometry[3];
    if (taps < 1 || taps > MAX_TAPS || stride < 1 || stride > MAX_REACH || dilation < 1 || dilation > MAX_REACH ||
        (taps - 1) * dilation > MAX_REACH || before < 0 || before > (taps - 1) * dilation)
        return "taps, stride, dilation or padding out of range";
    int64_t matrices = 1, groups = taps;
    if (operation->kind == WINOGRAD) {
        if (operation->reads_bytes || taps > 9 || stride > 2 || (stride == 2 && dilation != 1))
            return "a convolution that has no Winograd form here";
        matrices = stride == 1 ? NESTED_POINTS : HALVED_POINTS;
        groups = stride;
    }
    int64_t size = operation->reads_bytes ? 1 : (int64_t)sizeof(float);
    if (!holds(weight, matrices * groups * operation->channels_in * channels_out, size) ||
        !holds(bias, channels_out, sizeof(float)) ||
        (operation->reads_bytes && !holds(scale, channels_out, sizeof(float))))
        return "weights of another size than their shape";
    operation->taps = taps;
    operation->stride = stride;
    operation->dilation = dilation;
    operation->before = before;
    operation->panels = build_panels(network, operation, weight, matrices, groups);
    operation->bias = pad_channels(bias, channels_out);
    if (operation->reads_bytes && (operation->scale = pad_channels(scale, channels_out)) == NULL)
        return OUT_OF_MEMORY;
    return operation->panels == NULL || operation->bias == NULL ? OUT_OF_MEMORY : NULL;
}

const char *set_maximum(struct network *network, int64_t size, int64_t stride, int64_t before) {
    struct operation *operation = opened_operation(network);
    if (size < 1 || size > MAX_REACH || stride < 1 || stride > MAX_REACH || before < 0 || before >= size)
        return "size, stride or padding out of range";
    operation->taps = size;
    operation->stride = stride;
    operation->dilation = 1;
    operation->before = before;
    return NULL;
}
