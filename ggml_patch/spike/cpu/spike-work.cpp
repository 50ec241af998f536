#include "spike-work.h"

#include "spike-prompt.h"
#include "spike-schedule.h"
#include "spike-tiles.h"

#include <algorithm>

namespace spike {

static_assert(PROMPT_CHUNK_BLOCKS <= SPIKE_SCHEDULE_CHUNK_BLOCKS, "see SPIKE_SCHEDULE_MAX_COUNTED");

int64_t most_tokens_of(const ggml_tensor * op) {
    return op->op == GGML_OP_MUL_MAT_ID ? op->src[2]->ne[1] : op->src[1]->ne[1]; // no token goes to an expert twice
}

int64_t chunks_of(const ggml_tensor * op) {
    const int64_t n_inputs = op->src[0]->ne[0];
    if (!serves_few_tokens(op)) {
        return spike_chunks(n_inputs, PROMPT_CHUNK_BLOCKS);
    }
    return spike_chunks(n_inputs, n_inputs < SHORT_INPUTS || most_tokens_of(op) > 1 ? DECODE_SHORT_CHUNK_BLOCKS : DECODE_CHUNK_BLOCKS);
}

work_layout layout_work(const ggml_tensor * op, int n_threads) {
    const int64_t n_inputs  = op->src[0]->ne[0];
    const int64_t n_columns = ggml_nrows(op->src[1]);
    const bool few   = serves_few_tokens(op);
    const bool tiles = form_of(op->src[0]) == weight_form::tiles;
    work_layout w = {};
    w.n_inputs   = n_inputs;
    w.n_tokens   = most_tokens_of(op);
    w.n_chunks   = chunks_of(op);
    w.train_size = few ? spike_train_size(n_inputs, w.n_chunks) : spike_schedule_size(n_inputs, w.n_chunks);
    w.own_encoding = op->op == GGML_OP_MUL_MAT && n_columns == 1 && tiles;
    const int64_t n_encoded = w.own_encoding ? n_threads : n_columns;
    w.cursors = aligned((size_t) n_threads*OTHERS_WORK);
    w.blocks  = w.cursors + (size_t) n_threads*sizeof(unit_cursor);
    w.trains  = w.blocks + aligned((size_t) n_encoded*(size_t) (n_inputs/QK_SPK)*sizeof(block_spka));
    w.lines   = w.trains + (size_t) n_encoded*w.train_size;
    if (!few) {
        w.tokens_per_unit = tokens_per_unit(op, n_threads);
    }
    // the tokens of a matrix follow each other, unless they are routed
    if (op->op == GGML_OP_MUL_MAT && !few && tiles && goes_by_lines(w.n_tokens)) {
        w.units_per_job  = (w.n_tokens + w.tokens_per_unit - 1)/w.tokens_per_unit;
        w.lines_per_unit = (std::min(w.tokens_per_unit, w.n_tokens) + SPIKE_TOKEN_LINE - 1)/SPIKE_TOKEN_LINE;
    }
    const int64_t n_lines = w.units_per_job*op->src[1]->ne[2]*op->src[1]->ne[3]*w.lines_per_unit;
    w.table   = w.lines + (size_t) (n_lines*n_inputs*SPIKE_TOKEN_LINE)*sizeof(int16_t);
    w.scratch = w.table + (op->op == GGML_OP_MUL_MAT_ID ? routed_product::table_size(op) : 0);
    const size_t for_encoder = 2*(size_t) n_inputs*sizeof(float);
    const size_t for_tiles   = few ? decode_scratch_size(n_inputs, w.n_chunks, w.n_tokens) : prompt_scratch_size(n_inputs);
    w.scratch_per_thread = aligned(std::max(for_encoder, for_tiles));
    w.size = w.scratch + (size_t) n_threads*w.scratch_per_thread + ALIGNMENT;
    return w;
}

int16_t * work_layout::values_in_line(char * work, int64_t job, int64_t t) const {
    const int64_t in_unit = t % tokens_per_unit;
    const int64_t line    = (job*units_per_job + t/tokens_per_unit)*lines_per_unit + in_unit/SPIKE_TOKEN_LINE;
    return (int16_t *) (work + lines) + line*n_inputs*SPIKE_TOKEN_LINE + in_unit % SPIKE_TOKEN_LINE;
}

} // namespace spike
