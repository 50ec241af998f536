// Quantizes random weights and multiplies them through ggml's public interface, in the ordinary buffer and in that
// of the spike kernels. Prints hashes of codes and outputs, which are the same on every machine.

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TYPE_SPK4 ((enum ggml_type) 90)

enum { N_INPUTS = 512, N_OUTPUTS = 192, N_TOKENS = 33 };

typedef ggml_backend_buffer_type_t * (*extra_buffer_types)(ggml_backend_dev_t device);

static uint64_t state = 1;

// The same numbers everywhere, in [-1, 1).
static float next_value(void) {
    state = state*6364136223846793005ull + 1442695040888963407ull;
    return (float) ((int64_t) (state >> 33) - (1ll << 30))/(float) (1ll << 30);
}

static uint64_t hash(const void * data, size_t size) {
    uint64_t value = 14695981039346656037ull;
    for (size_t i = 0; i < size; i++) {
        value = (value ^ ((const uint8_t *) data)[i])*1099511628211ull;
    }
    return value;
}

static ggml_backend_buffer_type_t find_buffer_type(ggml_backend_t cpu, const char * name) {
    ggml_backend_dev_t device = ggml_backend_get_device(cpu);
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(device);
    extra_buffer_types list =
        (extra_buffer_types) ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t * type = list ? list(device) : NULL; type && *type; type++) {
        if (strcmp(ggml_backend_buft_name(*type), name) == 0) {
            return *type;
        }
    }
    return strcmp(name, "CPU") == 0 ? ggml_backend_cpu_buffer_type() : NULL;
}

static int multiply(ggml_backend_t cpu, const char * buffer, const void * codes, const float * x, float * y) {
    ggml_backend_buffer_type_t type = find_buffer_type(cpu, buffer);
    if (!type) {
        return 0;
    }
    struct ggml_init_params params = { ggml_tensor_overhead()*16 + ggml_graph_overhead(), NULL, true };
    struct ggml_context * of_weights = ggml_init(params);
    struct ggml_context * of_graph = ggml_init(params);
    struct ggml_tensor * weights = ggml_new_tensor_2d(of_weights, TYPE_SPK4, N_INPUTS, N_OUTPUTS);
    ggml_backend_buffer_t memory = ggml_backend_alloc_ctx_tensors_from_buft(of_weights, type);
    ggml_backend_buffer_set_usage(memory, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_tensor_set(weights, codes, 0, ggml_nbytes(weights));
    struct ggml_tensor * input = ggml_new_tensor_2d(of_graph, GGML_TYPE_F32, N_INPUTS, N_TOKENS);
    struct ggml_tensor * output = ggml_mul_mat(of_graph, weights, input);
    struct ggml_cgraph * graph = ggml_new_graph(of_graph);
    ggml_build_forward_expand(graph, output);
    ggml_backend_buffer_t values = ggml_backend_alloc_ctx_tensors(of_graph, cpu);
    ggml_backend_tensor_set(input, x, 0, ggml_nbytes(input));
    const int done = ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS;
    ggml_backend_tensor_get(output, y, 0, ggml_nbytes(output));
    ggml_backend_buffer_free(values);
    ggml_backend_buffer_free(memory);
    ggml_free(of_graph);
    ggml_free(of_weights);
    return done;
}

int main(void) {
    static float w[N_OUTPUTS*N_INPUTS], x[N_TOKENS*N_INPUTS], y[N_TOKENS*N_OUTPUTS];
    for (int i = 0; i < N_OUTPUTS*N_INPUTS; i++) {
        w[i] = next_value()*next_value();
    }
    for (int i = 0; i < N_TOKENS*N_INPUTS; i++) {
        x[i] = 4*next_value()*next_value()*next_value();
    }
    const size_t size = ggml_row_size(TYPE_SPK4, N_INPUTS)*N_OUTPUTS;
    void * codes = malloc(size);
    ggml_quantize_chunk(TYPE_SPK4, w, codes, 0, N_OUTPUTS, N_INPUTS, NULL);
    ggml_backend_t cpu = ggml_backend_cpu_init();
    const char * buffers[] = { "CPU", "CPU_SPIKE" };
    for (int i = 0; i < 2; i++) {
        if (!multiply(cpu, buffers[i], codes, x, y)) {
            fprintf(stderr, "no product in %s\n", buffers[i]);
            return 1;
        }
        printf("%s %016llx %016llx\n", buffers[i], (unsigned long long) hash(codes, size),
            (unsigned long long) hash(y, sizeof(y)));
    }
    ggml_backend_free(cpu);
    free(codes);
    return 0;
}
