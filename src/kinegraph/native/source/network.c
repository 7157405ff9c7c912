/* Building and freeing networks. Every number of a caller is checked here or in layers.c, and never again. */
#include "network.h"

#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* Winograd's method goes along fifty streams of memory at once, as many as there are entries for small pages */
#define LARGE_PAGE ((size_t)2 << 20)

void *allocate(int64_t count, int64_t size) {
    if (count < 0 || size <= 0 || count > (INT64_MAX - ALIGNMENT) / size || count * size > MAX_SCRATCH_BYTES)
        return NULL;
    size_t bytes = (size_t)(divide_up(count * size, ALIGNMENT) * ALIGNMENT);
    if (bytes == 0)
        bytes = ALIGNMENT;
    size_t alignment = ALIGNMENT;
    if (bytes >= LARGE_PAGE) {
        alignment = LARGE_PAGE;
        bytes = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    }
    void *memory = aligned_alloc(alignment, bytes);
    if (memory == NULL)
        return NULL;
#ifdef MADV_HUGEPAGE
    if (alignment == LARGE_PAGE)
        madvise(memory, bytes, MADV_HUGEPAGE); /* a wish: small pages are right too */
#endif
    memset(memory, 0, bytes);
    return memory;
}

static void free_links(struct links *links) {
    free(links->start);
    free(links->source);
    free(links->weight);
}

static void free_operation(struct operation *operation) {
    for (int64_t i = 0; operation->parts != NULL && i < operation->num_parts; i++) {
        free_links(&operation->parts[i].mixing);
        free(operation->parts[i].panels);
        free(operation->parts[i].scale);
    }
    free_links(&operation->combination);
    free(operation->parts);
    free(operation->link_first);
    free(operation->link_rows);
    free(operation->sources);
    free(operation->source_channels);
    free(operation->scale);
    free(operation->bias);
    free(operation->panels);
    memset(operation, 0, sizeof *operation);
}

struct network *create_network(const struct kernels *kernels, int64_t channels, int64_t joints) {
    struct network *network = calloc(1, sizeof *network);
    if (network == NULL)
        return NULL;
    network->kernels = kernels;
    network->num_channels = channels;
    network->num_joints = joints;
    network->operations = calloc(MAX_OPERATIONS + 1, sizeof *network->operations);
    network->result_channels = calloc(MAX_OPERATIONS + 1, sizeof *network->result_channels);
    network->result_strides = calloc(MAX_OPERATIONS + 1, sizeof *network->result_strides);
    network->result_is_bytes = calloc(MAX_OPERATIONS + 1, sizeof *network->result_is_bytes);
    if (!network->operations || !network->result_channels || !network->result_strides || !network->result_is_bytes) {
        free_network(network);
        return NULL;
    }
    network->result_channels[0] = channels;
    network->result_strides[0] = 1;
    return network;
}

void free_network(struct network *network) {
    if (network == NULL)
        return;
    for (int i = 0; network->operations != NULL && i <= network->num_operations; i++)
        free_operation(&network->operations[i]);
    free(network->operations);
    free(network->result_channels);
    free(network->result_strides);
    free(network->result_is_bytes);
    free(network->head_weight);
    free(network->head_bias);
    free(network->kept_scratch);
    free(network);
}

struct operation *opened_operation(struct network *network) { return &network->operations[network->num_operations]; }

void discard_operation(struct network *network) {
    free_operation(opened_operation(network));
}

const char *begin_operation(struct network *network, enum kind kind, const int *sources, int num_sources, int residual,
                            int relu) {
    if (network->head_weight != NULL)
        return "the network has its head already";
    if (network->num_operations >= MAX_OPERATIONS)
        return "too many layers";
    if (num_sources < 1 || num_sources > MAX_SOURCES)
        return "a layer without inputs or with too many";
    for (int i = 0; i < num_sources; i++)
        if (sources[i] < 0 || sources[i] > network->num_operations)
            return "an input that is no earlier result";
    for (int i = 0; i < num_sources; i++)
        if (network->result_is_bytes[sources[i]] != network->result_is_bytes[sources[0]])
            return "inputs of which some are bytes";
    if (residual < -1 || residual > network->num_operations)
        return "a residual that is no earlier result";
    struct operation *operation = opened_operation(network);
    memset(operation, 0, sizeof *operation);
    operation->kind = kind;
    operation->relu = relu != 0;
    operation->residual = residual;
    operation->num_sources = num_sources;
    operation->sources = calloc((size_t)num_sources, sizeof *operation->sources);
    operation->source_channels = calloc((size_t)num_sources, sizeof *operation->source_channels);
    if (operation->sources == NULL || operation->source_channels == NULL)
        return OUT_OF_MEMORY;
    memcpy(operation->sources, sources, (size_t)num_sources * sizeof *sources);
    int64_t total = 0;
    for (int i = 0; i < num_sources; i++) {
        operation->source_channels[i] = network->result_channels[sources[i]];
        total += operation->source_channels[i];
        if (network->result_strides[sources[i]] != network->result_strides[sources[0]])
            return "inputs with different numbers of frames";
        if (kind == SUM && operation->source_channels[i] != operation->source_channels[0])
            return "inputs with different numbers of channels";
    }
    operation->channels_in = operation->source_channels[0];
    operation->channels_out = kind == CONCATENATION ? total : operation->channels_in;
    if (operation->channels_out > MAX_CHANNELS)
        return "too many channels";
    operation->stride = 1;
    operation->planes_in = count_planes(operation->channels_in);
    operation->planes_out = count_planes(operation->channels_out);
    return NULL;
}

const char *use_bytes(struct network *network, int reads, int writes, struct rescaling rescaling) {
    struct operation *operation = opened_operation(network);
    operation->reads_bytes = reads;
    operation->writes_bytes = writes;
    operation->rescaling = rescaling;
    operation->planes_in = count_result_planes(operation->channels_in, reads);
    operation->planes_out = count_result_planes(operation->channels_out, writes);
    if (rescaling.fill < 0 || rescaling.fill > 255)
        return "a zero point that is no byte";
    return NULL;
}

const char *end_operation(struct network *network) {
    struct operation *operation = opened_operation(network);
    if (operation->sources == NULL) /* arguments whose conversion to numbers added a layer of its own */
        return "a layer that was never begun";
    int64_t stride = network->result_strides[operation->sources[0]] * operation->stride;
    if (stride > MAX_FRAMES)
        return "strides whose product is too large";
    if (operation->residual >= 0 && (network->result_channels[operation->residual] != operation->channels_out ||
                                     network->result_strides[operation->residual] != stride))
        return "a residual of another shape than the result";
    if (network->result_is_bytes[operation->sources[0]] != operation->reads_bytes ||
        (operation->residual >= 0 && network->result_is_bytes[operation->residual] != operation->reads_bytes))
        return "bytes where floats belong, or floats where bytes do";
    network->num_operations++;
    network->result_is_bytes[network->num_operations] = operation->writes_bytes;
    network->result_channels[network->num_operations] = operation->channels_out;
    network->result_strides[network->num_operations] = stride;
    return NULL;
}

const char *set_head(struct network *network, int64_t classes, int only_real_frames, struct span weight,
                     struct span bias) {
    int64_t channels = network->result_channels[network->num_operations];
    if (network->head_weight != NULL || network->num_operations == 0 ||
        network->result_is_bytes[network->num_operations])
        return "a head where none belongs";
    if (classes < 1 || classes > MAX_CHANNELS * (int64_t)16)
        return "too few or too many classes";
    if (weight.size != channels * classes * (int64_t)sizeof(float) || bias.size != classes * (int64_t)sizeof(float))
        return "a head of another size than its shape";
    float *head_bias = allocate(classes, sizeof(float));
    network->head_weight = allocate(channels * classes, sizeof(float));
    if (head_bias == NULL || network->head_weight == NULL) {
        free(head_bias);
        free(network->head_weight);
        network->head_weight = NULL;
        return OUT_OF_MEMORY;
    }
    memcpy(network->head_weight, weight.bytes, (size_t)weight.size);
    memcpy(head_bias, bias.bytes, (size_t)bias.size);
    network->head_bias = head_bias;
    network->num_classes = classes;
    network->only_real_frames = only_real_frames;
    return NULL;
}
