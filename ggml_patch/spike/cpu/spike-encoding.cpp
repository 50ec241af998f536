#include "spike-encoding.h"

#include "spike-counters.h"
#include "spike-cpu.h"
#include "spike-layout.h"
#include "spike-prompt.h"
#include "spike-schedule.h"
#include "spike-train.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cstring>

namespace spike {
namespace {

// ---- encoder settings

// A tensor's own salience and silence thresholds, which the model loader leaves in its op_params; 0 means the default.
spike_encoder_params encoder_params_of(const ggml_tensor * weights, bool rotated) {
    const ggml_tensor * owner = weights;
    while (owner->view_src) {
        owner = owner->view_src;
    }
    spike_encoder_params params = spike_encoder_defaults();
    if (owner->op == GGML_OP_NONE) {
        float salience, silence;
        memcpy(&salience, &owner->op_params[0], sizeof(float));
        memcpy(&silence,  &owner->op_params[1], sizeof(float));
        params.salience = salience > 0.0f ? salience : params.salience;
        params.silence  = silence  > 0.0f ? silence  : params.silence;
    }
    params.rotated = rotated;
    return params;
}

// Whether the inputs are to be rotated: as the first block of the weights says.
bool is_rotated(const ggml_tensor * weights) {
    uint16_t header;
    if (form_of(weights) == weight_form::tiles) {
        const spike_layout layout = spike_layout_of(weights->ne[0], weights->ne[1]);
        header = spike_headers(&layout, (const uint8_t *) weights->data)[0];
    } else {
        header = spike_header_of((const block_spk4 *) weights->data);
    }
    return !(header & SPK4_NOT_ROTATED);
}

// ---- sharing: products of the same input follow each other (query, key and value; gate and up)

// Where the calling thread is in the graph that it computes; graph is null outside of one.
struct graph_position {
    const ggml_cgraph * graph = nullptr;
    int                 node  = 0;
};
thread_local graph_position position;

// Whether an operation writes nothing but its output, and no more than its share of OTHERS_WORK.
bool leaves_work_alone(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_ADD:
        case GGML_OP_MUL:
            return op->src[0]->type == GGML_TYPE_F32;
        case GGML_OP_GLU:
        case GGML_OP_UNARY:
        case GGML_OP_SCALE:
        case GGML_OP_CONT:
        case GGML_OP_RMS_NORM:
            return true;
        case GGML_OP_ROPE: // a row and a cache line for each thread
            return (size_t) op->ne[0]*sizeof(float) + 64 <= OTHERS_WORK;
        default:
            return false;
    }
}

bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char * a0 = (const char *) a->data;
    const char * b0 = (const char *) b->data;
    return a0 < b0 + ggml_nbytes(b) && b0 < a0 + ggml_nbytes(a);
}

bool encodes_alike(const ggml_tensor * a, const ggml_tensor * b) {
    const spike_encoder_params p = encoder_params_of(a->src[0], is_rotated(a->src[0]));
    const spike_encoder_params q = encoder_params_of(b->src[0], is_rotated(b->src[0]));
    return a->op == b->op && a->src[1] == b->src[1] && form_of(a->src[0]) == form_of(b->src[0]) && serves_few_tokens(a) == serves_few_tokens(b)
        && p.salience == q.salience && p.silence == q.silence && p.zero_point == q.zero_point && p.rotated == q.rotated;
}

} // namespace

bool is_encoded(const ggml_tensor * op) {
    if (!position.graph || position.graph->nodes[position.node] != op) {
        return false;
    }
    for (int n = position.node - 1; n >= 0; n--) {
        const ggml_tensor * before = position.graph->nodes[n];
        if (ggml_op_is_empty(before->op)) {
            continue;
        }
        if (!(before->flags & GGML_TENSOR_FLAG_COMPUTE) || ggml_is_empty(before) || overlap(before, op->src[1])) {
            return false;
        }
        if (computes(before)) {
            return encodes_alike(before, op);
        }
        if (!leaves_work_alone(before)) {
            return false;
        }
    }
    return false;
}

namespace {

// One row of src1, to its place among the encoded ones.
void encode_token(const ggml_tensor * op, int64_t column, int64_t place, const spike_encoder_params & encoder, char * work, const work_layout & w, float * scratch) {
    const ggml_tensor * src1 = op->src[1];
    const int64_t n_inputs = src1->ne[0];
    const int64_t i1 = column % src1->ne[1], i2 = column/src1->ne[1] % src1->ne[2], i3 = column/(src1->ne[1]*src1->ne[2]);
    const char *  row = (const char *) src1->data + i1*src1->nb[1] + i2*src1->nb[2] + i3*src1->nb[3];
    const bool tiles = form_of(op->src[0]) == weight_form::tiles, few = serves_few_tokens(op);
    const bool whole_blocks = !tiles || spike_counting(); // else only the values are of use
    block_spka * blocks = (block_spka *) (work + w.blocks) + place*(n_inputs/QK_SPK);
    void *       train  = work + w.trains + (size_t) place*w.train_size;
    int8_t *     values = nullptr;
    if (tiles && few) {
        ((spike_train *) train)->n_chunks = (int32_t) w.n_chunks;
        values = spike_train_values_to_fill((spike_train *) train, n_inputs);
    } else if (tiles) {
        ((spike_schedule *) train)->n_chunks = (int32_t) w.n_chunks;
        values = spike_schedule_values_to_fill((spike_schedule *) train, n_inputs);
    }
    if (src1->type == GGML_TYPE_SPKA) {
        memcpy(blocks, row, (size_t) (n_inputs/QK_SPK)*sizeof(block_spka));
        for (int64_t b = 0; values && b < n_inputs/QK_SPK; b++) {
            spike_activation_values(blocks + b, values + b*QK_SPK, values + n_inputs + b*QK_SPK);
        }
    } else if (whole_blocks) {
        spike_encode_token((const float *) row, blocks, n_inputs, &encoder, scratch, values);
    } else {
        spike_encode_values((const float *) row, n_inputs, &encoder, scratch, values, blocks);
    }
    if (tiles && few) {
        spike_train_build(blocks, n_inputs, (spike_train *) train);
    } else if (tiles) {
        spike_schedule_build(blocks, n_inputs, (spike_schedule *) train);
    }
}

} // namespace

const ggml_tensor * following_product(bool of_few_tokens) {
    constexpr int FAR = 48; // nodes: past the attention of a layer
    if (!position.graph) {
        return nullptr;
    }
    const int end = std::min(position.graph->n_nodes, position.node + 1 + FAR);
    for (int n = position.node + 1; n < end; n++) {
        const ggml_tensor * op = position.graph->nodes[n];
        if (computes(op)) {
            const bool fits = op->op == GGML_OP_MUL_MAT && serves_few_tokens(op) == of_few_tokens && form_of(op->src[0]) == weight_form::tiles;
            return fits ? op : nullptr;
        }
    }
    return nullptr;
}

void encode_tokens(const ggml_compute_params * params, const ggml_tensor * op, char * work, const work_layout & w) {
    constexpr int64_t MOST = 8;
    const int64_t group = w.lines_per_unit > 0 ? MOST : 1; // tokens whose values go into lines together
    const int64_t n_inputs = op->src[1]->ne[0], n_tokens = op->src[1]->ne[1];
    const int64_t groups_per_job = (n_tokens + group - 1)/group, n_groups = groups_per_job*op->src[1]->ne[2]*op->src[1]->ne[3];
    const spike_encoder_params encoder = encoder_params_of(op->src[0], is_rotated(op->src[0]));
    float * scratch = (float *) (work + w.scratch + (size_t) params->ith*w.scratch_per_thread);

    if (w.own_encoding) {
        encode_token(op, 0, params->ith, encoder, work, w, scratch);
        return;
    }
    for (int64_t g = params->ith*n_groups/params->nth; g < (params->ith + 1)*n_groups/params->nth; g++) {
        const int64_t job = g/groups_per_job, t0 = g % groups_per_job*group, n = std::min(group, n_tokens - t0);
        const spike_schedule * schedules[MOST];
        for (int64_t t = 0; t < n; t++) {
            const int64_t column = job*n_tokens + t0 + t;
            encode_token(op, column, column, encoder, work, w, scratch);
            schedules[t] = (const spike_schedule *) (work + w.trains + (size_t) column*w.train_size);
        }
        if (w.lines_per_unit > 0) {
            transpose_tokens(schedules, n, n_inputs, w.values_in_line(work, job, t0));
        }
    }
}

} // namespace spike

void spike_enter_node(const ggml_cgraph * graph, int node) {
    spike::position.graph = graph;
    spike::position.node  = node;
}
