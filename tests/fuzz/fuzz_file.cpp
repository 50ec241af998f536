// Any bytes as a GGUF file, as llama.cpp reads it: header, encoder settings, and of every SPK4 tensor within the file the
// data, repacked and not, given back and multiplied on one and two threads. Unvalidated, although the loader validates.
#include "fuzz.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "gguf.h"

#include "spike/cpu/spike-cpu.h"
#include "spike/spike.h"

#include <cmath>
#include <memory>
#include <vector>

namespace {

constexpr int64_t MAX_WEIGHTS = 1 << 15; // larger tensors are read like small ones, only slower
constexpr int64_t MAX_TENSORS = 4;

struct context_deleter {
    void operator()(ggml_context * context) const { ggml_free(context); }
    void operator()(gguf_context * context) const { gguf_free(context); }
    void operator()(ggml_backend_buffer * buffer) const { ggml_backend_buffer_free(buffer); }
};
using context_ptr = std::unique_ptr<ggml_context, context_deleter>;
using gguf_ptr    = std::unique_ptr<gguf_context, context_deleter>;
using buffer_ptr  = std::unique_ptr<ggml_backend_buffer, context_deleter>;

ggml_backend_t backend() {
    static ggml_backend_t cpu = [] {
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        return ggml_backend_cpu_init();
    }();
    return cpu;
}

context_ptr new_context() {
    return context_ptr(ggml_init({ 32*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }));
}

// Outputs of a product with weights of these bytes in a buffer of this type.
std::vector<float> product(const gguf_context * file, const ggml_tensor * meta, const void * bytes, ggml_backend_buffer_type_t buffer_type,
                           const std::vector<float> & inputs, int n_threads) {
    context_ptr weights_context = new_context();
    ggml_tensor * weights = ggml_dup_tensor(weights_context.get(), meta);
    ggml_set_name(weights, meta->name);
    (void) spike_version_is_known(file); // of any kind of value
    spike_apply_encoder_settings(file, weights);
    buffer_ptr buffer(ggml_backend_alloc_ctx_tensors_from_buft(weights_context.get(), buffer_type));
    ggml_backend_tensor_set(weights, bytes, 0, ggml_nbytes(weights));

    std::vector<uint8_t> back(ggml_nbytes(weights));
    ggml_backend_tensor_get(weights, back.data(), 0, back.size());
    fuzz_require(memcmp(back.data(), bytes, back.size()) == 0, "stored weights come back");

    context_ptr graph_context = new_context();
    const int64_t n_tokens = (int64_t) inputs.size()/(meta->ne[0]*meta->ne[2]*meta->ne[3]);
    ggml_tensor * tokens = ggml_new_tensor_4d(graph_context.get(), GGML_TYPE_F32, meta->ne[0], n_tokens, meta->ne[2], meta->ne[3]);
    ggml_tensor * result = ggml_mul_mat(graph_context.get(), weights, tokens);
    ggml_cgraph * graph  = ggml_new_graph(graph_context.get());
    ggml_build_forward_expand(graph, result);
    buffer_ptr graph_buffer(ggml_backend_alloc_ctx_tensors(graph_context.get(), backend()));
    ggml_backend_tensor_set(tokens, inputs.data(), 0, ggml_nbytes(tokens));
    ggml_backend_cpu_set_n_threads(backend(), n_threads);
    fuzz_require(ggml_backend_graph_compute(backend(), graph) == GGML_STATUS_SUCCESS, "products are computed");
    std::vector<float> outputs((size_t) ggml_nelements(result));
    ggml_backend_tensor_get(result, outputs.data(), 0, ggml_nbytes(result));
    return outputs;
}

bool same(const std::vector<float> & a, const std::vector<float> & b) {
    for (size_t i = 0; i < a.size(); i++) {
        if (!(std::isnan(a[i]) && std::isnan(b[i])) && memcmp(&a[i], &b[i], sizeof(float)) != 0) {
            return false;
        }
    }
    return a.size() == b.size();
}

void read_tensor(const gguf_context * file, const ggml_tensor * meta, const uint8_t * bytes, fuzz_input * input) {
    const size_t n_bytes = ggml_nbytes(meta);
    std::unique_ptr<uint8_t, decltype(&free)> exact((uint8_t *) allocate_unset(n_bytes), &free);
    memcpy(exact.get(), bytes, n_bytes);
    spike_validate_tensor(meta->name, exact.get(), meta->ne[0], ggml_nrows(meta));
    ggml_validate_row_data(meta->type, exact.get(), n_bytes);

    for (int64_t n_tokens : { 1, 3 }) {
        std::vector<float> inputs((size_t) (meta->ne[0]*n_tokens*meta->ne[2]*meta->ne[3]));
        for (float & x : inputs) {
            const int8_t any = (int8_t) fuzz_byte(input);
            x = any == -128 ? INFINITY : (float) any*0.01f;
        }
        const auto stored   = product(file, meta, exact.get(), ggml_backend_cpu_buffer_type(), inputs, 1);
        const auto repacked = product(file, meta, exact.get(), ggml_backend_cpu_spike_buffer_type(), inputs, 1 + (fuzz_byte(input) & 1));
        fuzz_require(same(stored, repacked), "repacked weights give the outputs of stored ones");
    }
}

} // namespace

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    backend();
    ggml_context * meta = nullptr;
    gguf_ptr file(gguf_init_from_buffer(data, size, { true, &meta }));
    if (!file) {
        return 0;
    }
    context_ptr meta_owner(meta);
    fuzz_input input = fuzz_open(data, size);
    input.left = 0; // pseudo-random from here on
    int64_t n_read = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(file.get()) && n_read < MAX_TENSORS; i++) {
        const ggml_tensor * tensor = ggml_get_tensor(meta, gguf_get_tensor_name(file.get(), i));
        if (tensor == nullptr || tensor->type != GGML_TYPE_SPK4 || ggml_nelements(tensor) > MAX_WEIGHTS || ggml_nelements(tensor) < 1) {
            continue;
        }
        const size_t offset = gguf_get_data_offset(file.get()) + gguf_get_tensor_offset(file.get(), i);
        if (offset > size || ggml_nbytes(tensor) > size - offset) {
            continue;
        }
        read_tensor(file.get(), tensor, data + offset, &input);
        n_read++;
    }
    return 0;
}
