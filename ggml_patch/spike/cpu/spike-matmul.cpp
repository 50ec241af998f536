#include "spike-matmul.h"

#include "ggml-impl.h"
#include "spike-counters.h"
#include "spike-cpu.h"
#include "spike-kernels.h"
#include "spike-potentials.h"

#include <algorithm>
#include <cstring>

namespace spike {
namespace {

constexpr int64_t TOKEN_BLOCK  = 32; // tokens that share a tile's lines and salient weights while they are in cache
constexpr int64_t FEW_TOKENS   = 2;  // read their lines where they lie; more tokens have the tile's lines copied together
constexpr int64_t DECODE_CHUNK_BLOCKS = 4; // a strip's lines of two such chunks (1/2 MB) stay in the second-level cache
constexpr int64_t STORED_ROWS  = 64; // rows per unit of work on the slow path
constexpr size_t  ALIGNMENT    = 64;
constexpr size_t  OTHERS_WORK  = 2048; // bytes per thread at the start of the work buffer, for operations between sharing products

size_t aligned(size_t n) {
    return (n + ALIGNMENT - 1)/ALIGNMENT*ALIGNMENT;
}

// One matrix of the weights with all the tokens that go through it.
struct job {
    const void * matrix;
    int64_t      n_tokens;
};

struct token {
    int64_t column; // index of the encoded input
    float * output; // n_rows floats
};

// MUL_MAT: one job per slice of src1's outer dimensions.
class dense_product {
  public:
    dense_product(const ggml_tensor * dst, size_t matrix_stride) : dst(dst), src0(dst->src[0]), src1(dst->src[1]), matrix_stride(matrix_stride) {}

    int64_t n_jobs() const { return src1->ne[2]*src1->ne[3]; }

    job get_job(int64_t j) const {
        const int64_t i2 = j % src1->ne[2], i3 = j/src1->ne[2];
        const int64_t m2 = i2/(src1->ne[2]/src0->ne[2]), m3 = i3/(src1->ne[3]/src0->ne[3]);
        const size_t offset = matrix_stride ? (size_t) (m3*src0->ne[2] + m2)*matrix_stride : (size_t) (m2*src0->nb[2] + m3*src0->nb[3]);
        return { (const char *) src0->data + offset, src1->ne[1] };
    }

    token get_token(int64_t j, int64_t t) const {
        const int64_t i2 = j % src1->ne[2], i3 = j/src1->ne[2];
        return { j*src1->ne[1] + t, (float *) ((char *) dst->data + t*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3]) };
    }

  private:
    const ggml_tensor * dst;
    const ggml_tensor * src0;
    const ggml_tensor * src1;
    const size_t        matrix_stride; // 0: as the tensor says
};

// MUL_MAT_ID: one job per expert. The routing table groups (token, slot) pairs by expert.
class routed_product {
  public:
    routed_product(const ggml_tensor * dst, size_t matrix_stride, void * table) :
        dst(dst), src0(dst->src[0]), src1(dst->src[1]), ids(dst->src[2]), matrix_stride(matrix_stride ? matrix_stride : src0->nb[2]),
        first((int64_t *) table), routes((route *) (first + src0->ne[2] + 1)) {}

    static size_t table_size(const ggml_tensor * dst) {
        const ggml_tensor * ids = dst->src[2];
        return aligned((size_t) (dst->src[0]->ne[2] + 1)*sizeof(int64_t) + (size_t) (ids->ne[0]*ids->ne[1])*sizeof(route));
    }

    // a counting sort by expert; called by one thread
    void fill_table() const {
        const int64_t n_experts = src0->ne[2];
        std::fill(first, first + n_experts + 1, 0);
        for_each_route([&](int64_t expert, route) { first[expert + 1]++; });
        for (int64_t e = 0; e < n_experts; e++) {
            first[e + 1] += first[e];
        }
        // first[e] walks to the end of its own list, which is the start of the next
        for_each_route([&](int64_t expert, route r) { routes[first[expert]++] = r; });
        for (int64_t e = n_experts; e > 0; e--) {
            first[e] = first[e - 1];
        }
        first[0] = 0;
    }

    int64_t n_jobs() const { return src0->ne[2]; }

    job get_job(int64_t expert) const {
        return { (const char *) src0->data + (size_t) expert*matrix_stride, first[expert + 1] - first[expert] };
    }

    token get_token(int64_t expert, int64_t t) const {
        const route r = routes[first[expert] + t];
        return { r.row*src1->ne[1] + r.slot % src1->ne[1], (float *) ((char *) dst->data + r.slot*dst->nb[1] + r.row*dst->nb[2]) };
    }

  private:
    struct route {
        int32_t slot;
        int32_t row;
    };

    template <typename F> void for_each_route(F f) const {
        for (int64_t row = 0; row < ids->ne[1]; row++) {
            for (int64_t slot = 0; slot < ids->ne[0]; slot++) {
                const int32_t expert = *(const int32_t *) ((const char *) ids->data + row*ids->nb[1] + slot*ids->nb[0]);
                GGML_ASSERT(expert >= 0 && expert < src0->ne[2]);
                f(expert, route { (int32_t) slot, (int32_t) row });
            }
        }
    }

    const ggml_tensor * dst;
    const ggml_tensor * src0;
    const ggml_tensor * src1;
    const ggml_tensor * ids;
    const size_t        matrix_stride;
    int64_t *           first;
    route *             routes;
};

// Whether every token meets its own weights, or all of them alone: generation of text. The weights come from memory then.
bool serves_single_tokens(const ggml_tensor * op) {
    return (op->op == GGML_OP_MUL_MAT_ID ? op->src[2]->ne[1] : op->src[1]->ne[1]) == 1;
}

int64_t chunks_of(const ggml_tensor * op) {
    return spike_chunks(op->src[0]->ne[0], serves_single_tokens(op) ? DECODE_CHUNK_BLOCKS : SPIKE_CHUNK_BLOCKS);
}

// ---- working memory

struct work_layout {
    size_t blocks, trains, scratch, table; // offsets
    size_t scratch_per_thread;
    size_t size;
};

// What a thread keeps while it serves one block of tokens.
struct tile_scratch {
    int32_t *  potential; // [token][class][row]
    int8_t *   values;    // [class][input][token]
    uint8_t *  lines;     // [input][64], and a line of zeros
    uint32_t * offsets;   // [token][spike], of lines in a strip
    uint32_t * ahead;     // [place], of lines to prefetch while the programs of a chunk run

    // what values and offsets belong to
    int64_t job = -1, first_token = -1;
    size_t  stride = 0;

    tile_scratch(char * memory, int64_t n_inputs, int64_t n_chunks) {
        take(memory, potential, TOKEN_BLOCK*SPIKE_CLASSES*SPIKE_TILE_ROWS);
        take(memory, values, SPIKE_CLASSES*n_inputs*TOKEN_BLOCK);
        take(memory, lines, (n_inputs + 1)*SPIKE_LINE_BYTES);
        take(memory, offsets, FEW_TOKENS*spike_max_spikes(n_inputs, n_chunks));
        take(memory, ahead, SPIKE_STRIP_TILES*(spike_max_spikes(DECODE_CHUNK_BLOCKS*QK_SPK, 1) + 1));
        end = memory;
    }

    static size_t size(int64_t n_inputs, int64_t n_chunks) {
        return (size_t) (tile_scratch(nullptr, n_inputs, n_chunks).end - (char *) nullptr) + ALIGNMENT;
    }

  private:
    char * end;

    template <typename T> static void take(char *& memory, T *& array, int64_t n) {
        array   = (T *) memory;
        memory += aligned((size_t) n*sizeof(T));
    }
};

work_layout layout_work(const ggml_tensor * op, int n_threads) {
    const int64_t n_inputs  = op->src[0]->ne[0];
    const int64_t n_columns = ggml_nrows(op->src[1]);
    const int64_t n_chunks  = chunks_of(op);
    work_layout w;
    w.blocks  = aligned((size_t) n_threads*OTHERS_WORK);
    w.trains  = w.blocks + aligned((size_t) n_columns*(size_t) (n_inputs/QK_SPK)*sizeof(block_spka));
    w.table   = w.trains + (size_t) n_columns*spike_train_size(n_inputs, n_chunks);
    w.scratch = w.table + (op->op == GGML_OP_MUL_MAT_ID ? routed_product::table_size(op) : 0);
    w.scratch_per_thread = std::max(aligned(2*(size_t) n_inputs*sizeof(float)), aligned(tile_scratch::size(n_inputs, n_chunks)));
    w.size = w.scratch + (size_t) n_threads*w.scratch_per_thread + ALIGNMENT;
    return w;
}

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
        header = ((const block_spk4 *) weights->data)->header;
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
    return a->op == b->op && a->src[1] == b->src[1] && form_of(a->src[0]) == form_of(b->src[0]) && chunks_of(a) == chunks_of(b)
        && p.salience == q.salience && p.silence == q.silence && p.zero_point == q.zero_point && p.rotated == q.rotated;
}

// Whether the work buffer already holds the encoded input: the last product before this one in the same run of the graph
// had the same input tensor and settings, and since then nothing wrote to that input or to the encoding. Every
// thread finds the same, for it depends on the graph alone.
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

// ---- tiles

// The tokens of a block.
struct token_block {
    int64_t             n;
    const spike_train * trains[TOKEN_BLOCK];
    float *             outputs[TOKEN_BLOCK];
};

// The tokens' values input by input, so that a salient weight adds one line of tokens.
void transpose_values(const token_block & tokens, int64_t n_inputs, int8_t * values) {
    memset(values, 0, (size_t) (SPIKE_CLASSES*n_inputs*TOKEN_BLOCK));
    for (int k = 0; k < SPIKE_CLASSES; k++) {
        for (int64_t t = 0; t < tokens.n; t++) {
            if (!tokens.trains[t]->fires[k]) {
                continue;
            }
            const int8_t * value = spike_train_values(tokens.trains[t], n_inputs, k);
            for (int64_t i = 0; i < n_inputs; i++) {
                values[(k*n_inputs + i)*TOKEN_BLOCK + t] = value[i];
            }
        }
    }
}

void add_line_of_tokens(int16_t * sum, const int8_t * values, bool subtract) {
    for (int64_t t = 0; t < TOKEN_BLOCK; t++) {
        sum[t] = (int16_t) (subtract ? sum[t] - values[t] : sum[t] + values[t]);
    }
}

// Salient weights reach 16 codes further, up or down: their inputs enter the potential 16 times more.
void add_salient_by_lines(const uint8_t * salients, const spike_layout & layout, int spike_class, int64_t n_tokens, tile_scratch & s) {
    const int8_t * values = s.values + spike_class*layout.n_inputs*TOKEN_BLOCK;
    for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
        int16_t sum[TOKEN_BLOCK] = { 0 };
        for (int64_t b = 0; b < layout.n_blocks; b++) {
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                const uint8_t salient = salients[(b*SPIKE_SALIENT_SLOTS + slot)*SPIKE_TILE_ROWS + r];
                const int     sign    = salient >> 6;
                if (sign == 1 || sign == 2) {
                    add_line_of_tokens(sum, values + (b*QK_SPK + (salient & 63))*TOKEN_BLOCK, sign == 2);
                }
            }
        }
        for (int64_t t = 0; t < n_tokens; t++) {
            s.potential[(t*SPIKE_CLASSES + spike_class)*SPIKE_TILE_ROWS + r] += 16*sum[t];
        }
    }
}

void add_salient_of_token(const uint8_t * salients, const spike_layout & layout, int spike_class, const spike_train * train, int32_t * potential) {
    if (!train->fires[spike_class]) {
        return;
    }
    int16_t sum[SPIKE_TILE_ROWS];
    spike_select_kernels()->add_salient(salients, spike_train_values(train, layout.n_inputs, spike_class), layout.n_blocks, sum);
    for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
        potential[r] += 16*sum[r];
    }
}

// Offsets of the lines that fire where the lines of several tiles are interleaved.
void scale_offsets(const spike_train * train, size_t stride, uint32_t * scaled) {
    const uint32_t   width   = (uint32_t) (stride/SPIKE_LINE_BYTES);
    const uint32_t * offsets = spike_train_offsets(train);
    for (uint32_t e = 0; e < train->n_spikes; e++) {
        scaled[e] = offsets[e]*width;
    }
}

void integrate_token(const uint8_t * lines, const spike_train * train, const uint32_t * offsets, int32_t * potential) {
    memset(potential, 0, SPIKE_CLASSES*SPIKE_TILE_ROWS*sizeof(int32_t));
    for (int64_t c = 0; c < train->n_chunks; c++) {
        for (int k = 0; k < SPIKE_CLASSES; k++) {
            spike_select_kernels()->integrate(lines, spike_train_program(train, k, c), offsets, potential + k*SPIKE_TILE_ROWS);
        }
    }
}

void integrate_tokens(const spike_layout & layout, const spike_tile_lines & lines, const token_block & tokens, tile_scratch & s) {
    const int64_t n_inputs   = layout.n_inputs;
    const int64_t max_spikes = spike_max_spikes(n_inputs, tokens.trains[0]->n_chunks);
    const bool few = tokens.n <= FEW_TOKENS;
    if (!few) {
        // side by side, the lines of a tile do not fight for the same cache sets
        for (int64_t i = 0; i <= n_inputs; i++) {
            memcpy(s.lines + i*SPIKE_LINE_BYTES, lines.first + (size_t) i*lines.stride, SPIKE_LINE_BYTES);
        }
    } else if (s.stride != lines.stride) {
        for (int64_t t = 0; t < tokens.n; t++) {
            scale_offsets(tokens.trains[t], lines.stride, s.offsets + t*max_spikes);
        }
        s.stride = lines.stride;
    }
    for (int64_t t = 0; t < tokens.n; t++) {
        const uint32_t * offsets = few ? s.offsets + t*max_spikes : spike_train_offsets(tokens.trains[t]);
        integrate_token(few ? lines.first : s.lines, tokens.trains[t], offsets, s.potential + t*SPIKE_CLASSES*SPIKE_TILE_ROWS);
    }
}

// Potentials to outputs. Kernels count every code from 8; the row's own zero-point makes up for the difference.
void read_out(const token_block & tokens, const uint16_t * headers, int64_t row0, int64_t n_rows, const int32_t * potential) {
    float   threshold[SPIKE_TILE_ROWS];
    int32_t offset[SPIKE_TILE_ROWS];
    for (int64_t r = 0; r < n_rows; r++) {
        threshold[r] = spike_threshold_from_header(headers[r]);
        offset[r]    = (headers[r] & SPK4_ZERO_POINT) - 8;
    }
    for (int64_t t = 0; t < tokens.n; t++) {
        const spike_train * train  = tokens.trains[t];
        const int32_t *     fine   = potential + t*SPIKE_CLASSES*SPIKE_TILE_ROWS;
        const int32_t *     coarse = fine + SPIKE_TILE_ROWS;
        float *             output = tokens.outputs[t] + row0;
        for (int64_t r = 0; r < n_rows; r++) {
            output[r] = spike_readout(threshold[r], train->threshold, fine[r] - offset[r]*train->sum[0],
                                      coarse[r] - offset[r]*train->sum[1], train->coarse_unit);
        }
    }
}

template <typename P>
void compute_tile(const P & product, int64_t j, int64_t tile, int64_t t0, int64_t n_tokens, const spike_layout & layout,
                  const char * trains, size_t train_size, tile_scratch & s) {
    const uint8_t * packed = (const uint8_t *) product.get_job(j).matrix;
    token_block tokens;
    tokens.n = n_tokens;
    const bool by_lines = n_tokens >= spike_select_kernels()->tokens_for_lines;
    bool fires[SPIKE_CLASSES] = { false, false };
    for (int64_t t = 0; t < n_tokens; t++) {
        const token tok   = product.get_token(j, t0 + t);
        tokens.trains[t]  = (const spike_train *) (trains + (size_t) tok.column*train_size);
        tokens.outputs[t] = tok.output;
        for (int k = 0; k < SPIKE_CLASSES; k++) {
            fires[k] = fires[k] || tokens.trains[t]->fires[k];
        }
    }
    if (s.job != j || s.first_token != t0) {
        if (by_lines) {
            transpose_values(tokens, layout.n_inputs, s.values);
        }
        s.job         = j;
        s.first_token = t0;
        s.stride      = 0;
    }

    integrate_tokens(layout, spike_lines_of_tile(&layout, packed, tile), tokens, s);
    const uint8_t * salients = spike_salients_of_tile(&layout, packed, tile, 0, 0);
    for (int k = 0; k < SPIKE_CLASSES; k++) {
        if (fires[k] && by_lines) {
            add_salient_by_lines(salients, layout, k, n_tokens, s);
        } else if (fires[k]) {
            for (int64_t t = 0; t < n_tokens; t++) {
                add_salient_of_token(salients, layout, k, tokens.trains[t], s.potential + (t*SPIKE_CLASSES + k)*SPIKE_TILE_ROWS);
            }
        }
    }
    const int64_t row0   = tile*SPIKE_TILE_ROWS;
    const int64_t n_rows = std::min<int64_t>(SPIKE_TILE_ROWS, layout.n_rows - row0);
    read_out(tokens, spike_headers(&layout, packed) + row0, row0, n_rows, s.potential);
}

// ---- one token: tiles side by side, chunk by chunk, the next chunk's lines on their way from memory

void prefetch(const uint8_t * line) {
#if defined(__GNUC__)
    __builtin_prefetch(line, 0, 2);
#else
    (void) line;
#endif
}

// Offsets of the active lines of a chunk in the order of their addresses, which memory serves fastest.
// Returns how many; up to 16 more places are overwritten.
uint32_t list_active_lines(const spike_train * train, int64_t n_inputs, int64_t chunk, size_t stride, int64_t n_tiles, uint32_t * list) {
    const int8_t * fine   = spike_train_values(train, n_inputs, 0);
    const int8_t * coarse = spike_train_values(train, n_inputs, 1);
    uint32_t active[DECODE_CHUNK_BLOCKS*QK_SPK], n_active = 0;
    for (int64_t i = spike_chunk_start(n_inputs, train->n_chunks, chunk); i < spike_chunk_start(n_inputs, train->n_chunks, chunk + 1); i++) {
        active[n_active] = (uint32_t) i;
        n_active += (fine[i] | coarse[i]) != 0;
    }
    for (uint32_t e = 0; e < n_active; e++) {
        for (uint32_t t = 0; t < SPIKE_STRIP_TILES; t++) {
            list[t] = active[e]*(uint32_t) stride + t*SPIKE_LINE_BYTES;
        }
        list += n_tiles;
    }
    return n_active*(uint32_t) n_tiles;
}

void integrate_single_token(const spike_layout & layout, const spike_tile_lines & lines, int64_t n_tiles, const spike_train * train, tile_scratch & s) {
    const spike_kernels * kernels = spike_select_kernels();
    if (s.stride != lines.stride) {
        scale_offsets(train, lines.stride, s.offsets);
        s.stride = lines.stride;
    }
    memset(s.potential, 0, (size_t) n_tiles*SPIKE_CLASSES*SPIKE_TILE_ROWS*sizeof(int32_t));
    uint32_t n_ahead = kernels->integrate_ahead ? list_active_lines(train, layout.n_inputs, 0, lines.stride, n_tiles, s.ahead) : 0;
    for (uint32_t e = 0; e < n_ahead; e++) {
        prefetch(lines.first + s.ahead[e]);
    }
    for (int64_t c = 0; c < train->n_chunks; c++) {
        const bool last = c + 1 == train->n_chunks;
        n_ahead = last || !kernels->integrate_ahead ? 0 : list_active_lines(train, layout.n_inputs, c + 1, lines.stride, n_tiles, s.ahead);
        uint32_t n_places = 0;
        for (int k = 0; k < SPIKE_CLASSES; k++) {
            n_places += spike_program_places(train, k, c);
        }
        n_places *= (uint32_t) n_tiles;
        for (uint32_t e = n_ahead; n_ahead > 0 && e < n_places; e++) {
            s.ahead[e] = s.ahead[n_ahead - 1];
        }
        const uint32_t * ahead = s.ahead;
        for (int64_t t = 0; t < n_tiles; t++) {
            for (int k = 0; k < SPIKE_CLASSES; k++) {
                const uint8_t *       first     = lines.first + t*SPIKE_LINE_BYTES;
                const spike_program * program   = spike_train_program(train, k, c);
                int32_t *             potential = s.potential + (t*SPIKE_CLASSES + k)*SPIKE_TILE_ROWS;
                if (n_ahead > 0) {
                    kernels->integrate_ahead(first, program, s.offsets, potential, lines.first, ahead);
                    ahead += spike_program_places(train, k, c);
                } else {
                    kernels->integrate(first, program, s.offsets, potential);
                }
            }
        }
        for (uint32_t e = n_places; e < n_ahead; e++) {
            prefetch(lines.first + s.ahead[e]);
        }
    }
}

template <typename P>
void compute_single_token(const P & product, int64_t j, int64_t tile0, int64_t n_tiles, const spike_layout & layout, const char * trains,
                          size_t train_size, tile_scratch & s) {
    const uint8_t * packed = (const uint8_t *) product.get_job(j).matrix;
    const token     tok    = product.get_token(j, 0);
    token_block tokens;
    tokens.n          = 1;
    tokens.trains[0]  = (const spike_train *) (trains + (size_t) tok.column*train_size);
    tokens.outputs[0] = tok.output;
    if (s.job != j) {
        s.job    = j;
        s.stride = 0;
    }
    integrate_single_token(layout, spike_lines_of_tile(&layout, packed, tile0), n_tiles, tokens.trains[0], s);
    for (int64_t t = 0; t < n_tiles; t++) {
        int32_t *       potential = s.potential + t*SPIKE_CLASSES*SPIKE_TILE_ROWS;
        const uint8_t * salients  = spike_salients_of_tile(&layout, packed, tile0 + t, 0, 0);
        for (int k = 0; k < SPIKE_CLASSES; k++) {
            add_salient_of_token(salients, layout, k, tokens.trains[0], potential + k*SPIKE_TILE_ROWS);
        }
        const int64_t row0 = (tile0 + t)*SPIKE_TILE_ROWS;
        read_out(tokens, spike_headers(&layout, packed) + row0, row0, std::min<int64_t>(SPIKE_TILE_ROWS, layout.n_rows - row0), potential);
    }
}

// Tiles that one thread takes at a time: a whole strip, or less where threads would go without. A group lies in one strip.
int64_t tiles_per_group(int64_t n_tiles, int n_threads) {
    if (n_tiles <= SPIKE_STRIP_TILES) {
        return (n_tiles + n_threads - 1)/n_threads;
    }
    int64_t group = SPIKE_STRIP_TILES;
    while (n_threads > 1 && group > 4 && n_tiles < 4*n_threads*group) {
        group /= 2;
    }
    return group;
}

// Units of work in an order that keeps a thread on the same tokens: job, block of tokens, block of rows.
template <typename P, typename F>
void for_each_unit(const ggml_compute_params * params, const P & product, int64_t n_row_blocks, F compute_unit) {
    int64_t unit = params->ith; // the first nth units are taken without asking
    int64_t before = 0;
    for (int64_t j = 0; j < product.n_jobs(); j++) {
        const int64_t n_tokens = product.get_job(j).n_tokens;
        const int64_t n_units  = (n_tokens + TOKEN_BLOCK - 1)/TOKEN_BLOCK*n_row_blocks;
        while (unit < before + n_units) {
            const int64_t t0 = (unit - before)/n_row_blocks*TOKEN_BLOCK;
            compute_unit(j, (unit - before) % n_row_blocks, t0, std::min(TOKEN_BLOCK, n_tokens - t0));
            unit = ggml_threadpool_chunk_add(params->threadpool, 1);
        }
        before += n_units;
    }
}

template <typename P>
void integrate_tiles(const ggml_compute_params * params, const P & product, const ggml_tensor * op, char * work, const work_layout & w) {
    const ggml_tensor * src0 = op->src[0];
    const spike_layout layout = spike_layout_of(src0->ne[0], src0->ne[1]);
    const int64_t n_chunks   = chunks_of(op);
    const size_t  train_size = spike_train_size(layout.n_inputs, n_chunks);
    tile_scratch scratch(work + w.scratch + (size_t) params->ith*w.scratch_per_thread, layout.n_inputs, n_chunks);
    if (serves_single_tokens(op)) {
        const int64_t group = tiles_per_group(layout.n_tiles, params->nth);
        for_each_unit(params, product, (layout.n_tiles + group - 1)/group, [&](int64_t j, int64_t g, int64_t, int64_t) {
            compute_single_token(product, j, g*group, std::min(group, layout.n_tiles - g*group), layout, work + w.trains, train_size, scratch);
        });
        return;
    }
    for_each_unit(params, product, layout.n_tiles, [&](int64_t j, int64_t tile, int64_t t0, int64_t n_tokens) {
        compute_tile(product, j, tile, t0, n_tokens, layout, work + w.trains, train_size, scratch);
    });
}

// Weights as stored: row by row, through the dot product.
template <typename P>
void dot_stored_rows(const ggml_compute_params * params, const P & product, const ggml_tensor * src0, char * work, const work_layout & w) {
    const int64_t n_inputs = src0->ne[0], n_rows = src0->ne[1];
    const block_spka * blocks = (const block_spka *) (work + w.blocks);
    for_each_unit(params, product, (n_rows + STORED_ROWS - 1)/STORED_ROWS, [&](int64_t j, int64_t row_block, int64_t t0, int64_t n_tokens) {
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

// Each thread encodes a contiguous range of src1's rows.
void encode_tokens(const ggml_compute_params * params, const ggml_tensor * op, char * work, const work_layout & w) {
    const ggml_tensor * src1 = op->src[1];
    const int64_t n_inputs = src1->ne[0], n_columns = ggml_nrows(src1);
    const spike_encoder_params encoder = encoder_params_of(op->src[0], is_rotated(op->src[0]));
    const bool    tiles      = form_of(op->src[0]) == weight_form::tiles;
    const int64_t n_chunks   = chunks_of(op);
    const size_t  train_size = spike_train_size(n_inputs, n_chunks);
    float * scratch = (float *) (work + w.scratch + (size_t) params->ith*w.scratch_per_thread);

    for (int64_t c = params->ith*n_columns/params->nth; c < (params->ith + 1)*n_columns/params->nth; c++) {
        const int64_t i1 = c % src1->ne[1], i2 = c/src1->ne[1] % src1->ne[2], i3 = c/(src1->ne[1]*src1->ne[2]);
        const char *  row = (const char *) src1->data + i1*src1->nb[1] + i2*src1->nb[2] + i3*src1->nb[3];
        block_spka *  blocks = (block_spka *) (work + w.blocks) + c*(n_inputs/QK_SPK);
        spike_train * train  = (spike_train *) (work + w.trains + (size_t) c*train_size);
        int8_t *      values = nullptr;
        if (tiles) {
            train->n_chunks = (int32_t) n_chunks;
            values = spike_train_values_to_fill(train, n_inputs);
        }
        if (src1->type == GGML_TYPE_SPKA) {
            memcpy(blocks, row, (size_t) (n_inputs/QK_SPK)*sizeof(block_spka));
            for (int64_t b = 0; values && b < n_inputs/QK_SPK; b++) {
                spike_activation_values(blocks + b, values + b*QK_SPK, values + n_inputs + b*QK_SPK);
            }
        } else {
            spike_encode_token((const float *) row, blocks, n_inputs, &encoder, scratch, values);
        }
        if (tiles) {
            spike_train_build(blocks, n_inputs, train);
        }
    }
}

template <typename P>
void count_product(const P & product, const ggml_tensor * weights, const block_spka * blocks) {
    for (int64_t j = 0; j < product.n_jobs(); j++) {
        const int64_t n_tokens = product.get_job(j).n_tokens;
        spike_counter * counter = spike_count_product(weights->name, weights->ne[0], weights->ne[1], n_tokens);
        for (int64_t t = 0; t < n_tokens; t++) {
            const int64_t column = product.get_token(j, t).column;
            spike_count_token(counter, column, blocks + column*(weights->ne[0]/QK_SPK), n_tokens == 1);
        }
    }
}

template <typename P>
void run_product(const ggml_compute_params * params, const P & product, const ggml_tensor * op, char * work, const work_layout & w) {
    if (params->ith == 0 && spike_counting()) {
        count_product(product, op->src[0], (const block_spka *) (work + w.blocks));
    }
    if (form_of(op->src[0]) == weight_form::tiles) {
        integrate_tiles(params, product, op, work, w);
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
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    if (routed) {
        run_product(params, routed_product(op, matrix_stride, work + w.table), op, work, w);
    } else {
        run_product(params, dense_product(op, matrix_stride), op, work, w);
    }
}

} // namespace spike

void spike_enter_node(const ggml_cgraph * graph, int node) {
    spike::position.graph = graph;
    spike::position.node  = node;
}
