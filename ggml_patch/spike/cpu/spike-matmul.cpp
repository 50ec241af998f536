#include "spike-matmul.h"

#include "spike-counters.h"
#include "spike-cpu.h"
#include "spike-encoding.h"
#include "spike-tiles.h"

#include "ggml-impl.h"

#include <algorithm>

namespace spike {
namespace {

constexpr int64_t STORED_ROWS = 64, STORED_TOKENS = 32; // per unit of work on the slow path

// Weights as stored: row by row, through the dot product.
void dot_stored_rows(const ggml_compute_params * params, const product & product, const ggml_tensor * src0, char * work, const work_layout & w) {
    const int64_t n_inputs = src0->ne[0], n_rows = src0->ne[1];
    const block_spka * blocks = (const block_spka *) (work + w.blocks);
    unit_cursor * cursors = (unit_cursor *) (work + w.cursors);
    const int64_t row_blocks = (n_rows + STORED_ROWS - 1)/STORED_ROWS;
    for_each_unit(params, cursors, product, STORED_TOKENS, row_blocks, [&](int64_t j, int64_t row_block, int64_t t0, int64_t n_tokens, bool) {
        const char * matrix = (const char *) product.get_job(j).matrix;
        const int64_t r1 = std::min(n_rows, (row_block + 1)*STORED_ROWS);
        for (int64_t t = t0; t < t0 + n_tokens; t++) {
            const token tok = product.get_token(j, t);
            for (int64_t r = row_block*STORED_ROWS; r < r1; r++) {
                ggml_vec_dot_spk4_spka((int) n_inputs, tok.output + r, 0, matrix + (size_t) r*src0->nb[1], 0,
                                       blocks + tok.column*(n_inputs/QK_SPK), 0, 1);
            }
        }
    });
}

void count_product(const product & product, const ggml_tensor * weights, const block_spka * blocks) {
    for (int64_t j = 0; j < product.n_jobs(); j++) {
        const int64_t n_tokens = product.get_job(j).n_tokens;
        spike_counter * counter = spike_count_product(weights->name, weights->ne[0], weights->ne[1], n_tokens);
        for (int64_t t = 0; t < n_tokens; t++) {
            const int64_t column = product.get_token(j, t).column;
            spike_count_token(counter, column, blocks + column*(weights->ne[0]/QK_SPK), n_tokens == 1);
        }
    }
}

void run_product(const ggml_compute_params * params, const product & product, const ggml_tensor * op, char * work, const work_layout & w) {
    if (params->ith == 0 && spike_counting()) {
        count_product(product, op->src[0], (const block_spka *) (work + w.blocks));
    }
    if (form_of(op->src[0]) == weight_form::tiles) {
        (serves_few_tokens(op) ? compute_few_tokens : compute_prompt)(params, product, op, work, w);
    } else {
        dot_stored_rows(params, product, op->src[0], work, w);
    }
}

} // namespace

bool computes(const ggml_tensor * op) {
    if (op->op != GGML_OP_MUL_MAT && op->op != GGML_OP_MUL_MAT_ID) {
        return false;
    }
    return op->src[0]->type == GGML_TYPE_SPK4 && (op->src[1]->type == GGML_TYPE_F32 || op->src[1]->type == GGML_TYPE_SPKA);
}

size_t work_size(const ggml_tensor * op, int n_threads) {
    return layout_work(op, n_threads).size;
}

void compute(const ggml_compute_params * params, ggml_tensor * op) {
    const ggml_tensor * src0 = op->src[0];
    const ggml_tensor * src1 = op->src[1];
    GGML_ASSERT(src1->nb[0] == ggml_type_size(src1->type) && op->nb[0] == sizeof(float));
    GGML_ASSERT(src0->ne[0] == src1->ne[0] && src0->ne[0] % QK_SPK == 0);
    const bool tiles = form_of(src0) == weight_form::tiles;

    const work_layout w = layout_work(op, params->nth);
    char * work = (char *) aligned((size_t) params->wdata);
    GGML_ASSERT(params->wsize >= w.size);

    const size_t matrix_stride = tiles ? spike_layout_of(src0->ne[0], src0->ne[1]).size : 0;
    const bool   routed        = op->op == GGML_OP_MUL_MAT_ID;

    if (!is_encoded(op)) {
        encode_tokens(params, op, work, w);
    }
    if (params->ith == 0) {
        if (routed) {
            routed_product(op, matrix_stride, work + w.table).fill_table();
        }
        reset_cursors((unit_cursor *) (work + w.cursors), params->nth);
    }
    if (!w.own_encoding) {
        ggml_barrier(params->threadpool);
    }

    if (routed) {
        run_product(params, routed_product(op, matrix_stride, work + w.table), op, work, w);
    } else {
        run_product(params, dense_product(op, matrix_stride), op, work, w);
    }
}

} // namespace spike
