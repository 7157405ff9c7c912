/* The Python side: arguments are parsed here and checked in network.c and layers.c. */
#define Py_LIMITED_API 0x030B0000 /* also the oldest Python that has buffers in it */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "job.h"

#include <string.h>

typedef struct {
    PyObject_HEAD
    struct network *network;
} NetworkObject;

static PyObject *raise_problem(const char *problem) {
    if (strcmp(problem, OUT_OF_MEMORY) == 0)
        return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError, problem);
    return NULL;
}

static struct span get_span(const Py_buffer *buffer) { return (struct span){buffer->buf, buffer->len}; }

static const struct kernels *find_kernels(const char *name) {
#ifdef HAVE_X86_KERNELS
    if (strcmp(name, "avx512vnni") == 0 && find_kernels("avx512") != NULL && __builtin_cpu_supports("avx512vnni"))
        return &kernels_avx512vnni;
    if (strcmp(name, "avx512") == 0 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &kernels_avx512;
    if (strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &kernels_avx2;
#endif
    return strcmp(name, "plain") == 0 ? &kernels_plain : NULL;
}

static PyObject *list_instruction_sets(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    const char *names[] = {"avx512vnni", "avx512", "avx2", "plain"};
    PyObject *list = PyList_New(0);
    for (int i = 0; list != NULL && i < 4; i++) {
        if (find_kernels(names[i]) == NULL)
            continue;
        PyObject *name = PyUnicode_FromString(names[i]);
        if (name == NULL || PyList_Append(list, name) < 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    return list;
}

static PyObject *new_network(PyTypeObject *type, PyObject *arguments, PyObject *keywords) {
    long long channels, joints;
    const char *name;
    (void)keywords;
    if (!PyArg_ParseTuple(arguments, "LLs", &channels, &joints, &name))
        return NULL;
    const struct kernels *kernels = find_kernels(name);
    if (kernels == NULL)
        return raise_problem("an instruction set that is unknown or not to be had here");
    if (channels < 1 || channels > MAX_CHANNELS || joints < 1 || joints > MAX_JOINTS)
        return raise_problem("too few or too many channels or joints");
    allocfunc create = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    NetworkObject *self = (NetworkObject *)create(type, 0);
    if (self != NULL && (self->network = create_network(kernels, channels, joints)) == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void free_object(PyObject *self) {
    PyTypeObject *type = Py_TYPE(self);
    free_network(((NetworkObject *)self)->network);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* The number of the new result, or the error; what was filled in until then is dropped */
static PyObject *end(struct network *network, const char *problem) {
    if (problem == NULL && !PyErr_Occurred())
        problem = end_operation(network);
    if (problem == NULL && !PyErr_Occurred())
        return PyLong_FromLong(network->num_operations);
    discard_operation(network);
    return PyErr_Occurred() ? NULL : raise_problem(problem);
}

static PyObject *add_affine(PyObject *self, PyObject *arguments) {
    struct network *network = ((NetworkObject *)self)->network;
    int source, relu;
    Py_buffer scale, shift;
    if (!PyArg_ParseTuple(arguments, "ipy*y*", &source, &relu, &scale, &shift))
        return NULL;
    const char *problem = begin_operation(network, AFFINE, &source, 1, -1, relu);
    if (problem == NULL)
        problem = set_affine(network, get_span(&scale), get_span(&shift));
    PyBuffer_Release(&scale);
    PyBuffer_Release(&shift);
    return end(network, problem);
}

static void release(Py_buffer *buffers, int count) {
    for (int i = 0; i < count; i++)
        PyBuffer_Release(&buffers[i]);
}

/* (rows, slots, start, source, factor, weight, scale) */
static const char *add_part(struct network *network, Py_ssize_t index, PyObject *part) {
    long long rows, slots;
    Py_buffer b[5];
    if (!PyTuple_Check(part)) {
        PyErr_SetString(PyExc_TypeError, "parts must be tuples");
        return NULL;
    }
    if (!PyArg_ParseTuple(part, "LLy*y*y*y*y*", &rows, &slots, &b[0], &b[1], &b[2], &b[3], &b[4]))
        return NULL;
    struct span links[3] = {get_span(&b[0]), get_span(&b[1]), get_span(&b[2])};
    const char *problem = set_part(network, index, rows, slots, links, get_span(&b[3]), get_span(&b[4]));
    release(b, 5);
    return problem;
}

/* The last argument of layers that may read bytes: None, or (to_bytes, residual_factor, zero_point, fill) */
static const char *parse_bytes(struct network *network, PyObject *argument) {
    int to_bytes;
    struct rescaling rescaling;
    if (argument == Py_None)
        return NULL;
    if (!PyTuple_Check(argument)) {
        PyErr_SetString(PyExc_TypeError, "expected None or a tuple");
        return NULL;
    }
    if (!PyArg_ParseTuple(argument, "pffi", &to_bytes, &rescaling.residual_factor, &rescaling.zero_point,
                          &rescaling.fill))
        return NULL;
    return use_bytes(network, 1, to_bytes, rescaling);
}

static PyObject *add_graph(PyObject *self, PyObject *arguments) {
    struct network *network = ((NetworkObject *)self)->network;
    int source, residual, relu;
    long long channels;
    PyObject *parts, *bytes;
    Py_buffer b[4];
    if (!PyArg_ParseTuple(arguments, "iipLy*O!y*y*y*O", &source, &residual, &relu, &channels, &b[0], &PyTuple_Type,
                          &parts, &b[1], &b[2], &b[3], &bytes))
        return NULL;
    const char *problem = begin_operation(network, GRAPH, &source, 1, residual, relu);
    if (problem == NULL)
        problem = parse_bytes(network, bytes);
    if (problem == NULL && !PyErr_Occurred())
        problem = set_graph(network, channels, PyTuple_Size(parts), get_span(&b[0]));
    for (Py_ssize_t i = 0; problem == NULL && !PyErr_Occurred() && i < PyTuple_Size(parts); i++)
        problem = add_part(network, i, PyTuple_GetItem(parts, i));
    struct span links[3] = {get_span(&b[1]), get_span(&b[2]), get_span(&b[3])};
    if (problem == NULL && !PyErr_Occurred())
        problem = set_combination(network, links);
    release(b, 4);
    return end(network, problem);
}

static PyObject *add_temporal(PyObject *self, PyObject *arguments) {
    struct network *network = ((NetworkObject *)self)->network;
    int source, residual, relu, is_winograd;
    long long channels, taps, stride, dilation, before;
    Py_buffer b[3];
    PyObject *bytes;
    if (!PyArg_ParseTuple(arguments, "iippL(LLLL)y*y*y*O", &source, &residual, &relu, &is_winograd, &channels, &taps,
                          &stride, &dilation, &before, &b[0], &b[1], &b[2], &bytes))
        return NULL;
    const int64_t geometry[4] = {taps, stride, dilation, before};
    const char *problem = begin_operation(network, is_winograd ? WINOGRAD : TEMPORAL, &source, 1, residual, relu);
    if (problem == NULL)
        problem = parse_bytes(network, bytes);
    if (problem == NULL && !PyErr_Occurred())
        problem = set_temporal(network, channels, geometry, get_span(&b[0]), get_span(&b[1]), get_span(&b[2]));
    release(b, 3);
    return end(network, problem);
}

/* Floats to bytes, x * factor + zero_point, or back, (q - zero_point) * factor */
static PyObject *add_conversion(PyObject *self, PyObject *arguments) {
    struct network *network = ((NetworkObject *)self)->network;
    int source, to_bytes;
    struct rescaling rescaling = {0};
    if (!PyArg_ParseTuple(arguments, "ipff", &source, &to_bytes, &rescaling.residual_factor, &rescaling.zero_point))
        return NULL;
    const char *problem = begin_operation(network, to_bytes ? QUANTIZE : DEQUANTIZE, &source, 1, -1, 0);
    return end(network, problem != NULL ? problem : use_bytes(network, !to_bytes, to_bytes, rescaling));
}

static PyObject *add_maximum(PyObject *self, PyObject *arguments) {
    struct network *network = ((NetworkObject *)self)->network;
    int source, relu;
    long long size, stride, before;
    if (!PyArg_ParseTuple(arguments, "ipLLL", &source, &relu, &size, &stride, &before))
        return NULL;
    const char *problem = begin_operation(network, MAXIMUM, &source, 1, -1, relu);
    return end(network, problem != NULL ? problem : set_maximum(network, size, stride, before));
}

/* sum or concatenation of several results */
static PyObject *add_joined(PyObject *self, PyObject *arguments) {
    struct network *network = ((NetworkObject *)self)->network;
    int relu, is_sum, sources[MAX_SOURCES];
    PyObject *tuple;
    if (!PyArg_ParseTuple(arguments, "O!pp", &PyTuple_Type, &tuple, &relu, &is_sum))
        return NULL;
    Py_ssize_t count = PyTuple_Size(tuple);
    if (count < 1 || count > MAX_SOURCES)
        return raise_problem("a layer without inputs or with too many");
    for (Py_ssize_t i = 0; i < count; i++) {
        long source = PyLong_AsLong(PyTuple_GetItem(tuple, i));
        if (source == -1 && PyErr_Occurred())
            return NULL;
        sources[i] = source < 0 || source > MAX_OPERATIONS ? -1 : (int)source;
    }
    return end(network, begin_operation(network, is_sum ? SUM : CONCATENATION, sources, (int)count, -1, relu));
}

static PyObject *add_head(PyObject *self, PyObject *arguments) {
    long long classes;
    int only_real_frames;
    Py_buffer weight, bias;
    if (!PyArg_ParseTuple(arguments, "Lpy*y*", &classes, &only_real_frames, &weight, &bias))
        return NULL;
    const char *problem = set_head(((NetworkObject *)self)->network, classes, only_real_frames, get_span(&weight),
                                   get_span(&bias));
    PyBuffer_Release(&weight);
    PyBuffer_Release(&bias);
    if (problem != NULL)
        return raise_problem(problem);
    Py_RETURN_NONE;
}

static const char *check_call(const struct network *network, const int64_t shape[5], long long threads, int64_t x_bytes,
                              int64_t logits_bytes, int64_t features_bytes) {
    if (network->head_weight == NULL)
        return "a network without a head";
    if (shape[1] != network->num_channels || shape[3] != network->num_joints)
        return "clips with other channels or joints than the network's";
    if (shape[0] < 1 || shape[0] > MAX_FRAMES || shape[2] < 1 || shape[2] > MAX_FRAMES || shape[4] < 1 ||
        shape[4] > MAX_JOINTS || threads < 1 || threads > MAX_THREADS)
        return "too few or too many clips, frames, people or threads";
    int64_t cells = shape[1] * shape[2] * shape[3]; /* below 2^48 */
    if (cells > INT64_MAX / 4 / (shape[0] * shape[4]) || x_bytes != cells * shape[0] * shape[4] * 4)
        return "clips of another size than their shape";
    if (logits_bytes != shape[0] * network->num_classes * 4)
        return "logits of another size than their shape";
    int64_t channels = network->result_channels[network->num_operations];
    int64_t rows = divide_up(shape[2], network->result_strides[network->num_operations]) * shape[3] * channels;
    if (features_bytes >= 0 &&
        (rows > INT64_MAX / 4 / (shape[0] * shape[4]) || features_bytes != rows * shape[0] * shape[4] * 4))
        return "features of another size than their shape";
    return NULL;
}

static int is_aligned(const void *pointer) { return (uintptr_t)pointer % sizeof(float) == 0; }

/* compute(x, (N, C, T, V, M), threads, logits, features or an empty buffer) */
static PyObject *compute(PyObject *self, PyObject *arguments) {
    struct network *network = ((NetworkObject *)self)->network;
    long long n, c, t, v, m, threads;
    Py_buffer x, logits, features;
    if (!PyArg_ParseTuple(arguments, "y*(LLLLL)Lw*w*", &x, &n, &c, &t, &v, &m, &threads, &logits, &features))
        return NULL;
    const int64_t shape[5] = {n, c, t, v, m};
    const char *problem =
        check_call(network, shape, threads, x.len, logits.len, features.len > 0 ? (int64_t)features.len : -1);
    /* Where an empty buffer points to is anybody's guess */
    if (problem == NULL &&
        !(is_aligned(x.buf) && is_aligned(logits.buf) && (features.len == 0 || is_aligned(features.buf))))
        problem = "buffers that are not aligned to floats";
    if (problem == NULL) {
        struct job job;
        problem = prepare_job(&job, network, shape, (int)threads);
        job.x = x.buf;
        job.features = features.len > 0 ? features.buf : NULL;
        if (problem == NULL) {
            Py_BEGIN_ALLOW_THREADS;
            problem = run_job(&job, logits.buf);
            Py_END_ALLOW_THREADS;
        }
        finish_job(&job);
    }
    PyBuffer_Release(&x);
    PyBuffer_Release(&logits);
    PyBuffer_Release(&features);
    if (problem != NULL)
        return raise_problem(problem);
    Py_RETURN_NONE;
}

static PyMethodDef network_methods[] = {
    {"add_affine", add_affine, METH_VARARGS, "source, relu, scale (V, C), shift (V, C) -> result"},
    {"add_graph", add_graph, METH_VARARGS, 
     "source, residual, relu, channels, bias (V, C'), parts, start, source, factor, bytes -> result"},
    {"add_temporal", add_temporal, METH_VARARGS,
     "source, residual, relu, is_winograd, channels, (taps, stride, dilation, before), weight, scale, bias, bytes"},
    {"add_conversion", add_conversion, METH_VARARGS, "source, to_bytes, factor, zero_point -> result"},
    {"add_maximum", add_maximum, METH_VARARGS, "source, relu, size, stride, before -> result"},
    {"add_joined", add_joined, METH_VARARGS, "sources, relu, is_sum -> result"},
    {"add_head", add_head, METH_VARARGS, "classes, only_real_frames, weight (C', classes), bias (classes,)"},
    {"compute", compute, METH_VARARGS, "x, (N, C, T, V, M), threads, logits (N, classes), features or b''"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot network_slots[] = {
    {Py_tp_new, new_network},
    {Py_tp_dealloc, free_object},
    {Py_tp_methods, network_methods},
    {Py_tp_doc, "Network(channels, joints, instruction_set)"},
    {0, NULL},
};

static PyType_Spec network_spec = {"kinegraph.native._kernels.Network", sizeof(NetworkObject), 0, Py_TPFLAGS_DEFAULT,
                                   network_slots};

static PyMethodDef module_methods[] = {
    {"list_instruction_sets", list_instruction_sets, METH_NOARGS, "Names of those that this CPU has, fastest first"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernels", NULL, -1, module_methods, NULL, NULL, NULL,
                                        NULL};

PyMODINIT_FUNC PyInit__kernels(void) {
    PyObject *module = PyModule_Create(&definition);
    PyObject *type = module == NULL ? NULL : PyType_FromSpec(&network_spec);
    if (type == NULL || PyModule_AddObject(module, "Network", type) < 0) {
        Py_XDECREF(type);
        Py_CLEAR(module);
    }
    return module;
}
