// Many tokens per matrix: a tile's lines are read from the cache again and again, and so are its salient weights.
#include "spike-tiles.h"

#include <algorithm>
#include <cstring>

namespace spike {
namespace {

constexpr int64_t TOKEN_BLOCK = 32; // tokens that share a tile's lines and salient weights while they are in cache
constexpr int64_t FEW_TOKENS  = 2;  // read their lines where they lie; more tokens have the tile's lines copied together

// What a thread keeps while it serves one block of tokens.
struct tile_scratch {
    int32_t *  potential; // [token][class][row]
    int8_t *   values;    // [class][input][token]
    uint8_t *  lines;     // [input][64], and a line of zeros
    uint32_t * offsets;   // [token][spike], of lines in a strip
    size_t     size;

    // what values and offsets belong to
    int64_t job = -1, first_token = -1;
    size_t  stride = 0;

    tile_scratch(char * memory, int64_t n_inputs, int64_t n_chunks) {
        scratch_arrays arrays(memory);
        arrays.take(potential, TOKEN_BLOCK*SPIKE_CLASSES*SPIKE_TILE_ROWS);
        arrays.take(values, SPIKE_CLASSES*n_inputs*TOKEN_BLOCK);
        arrays.take(lines, (n_inputs + 1)*SPIKE_LINE_BYTES);
        arrays.take(offsets, FEW_TOKENS*spike_max_spikes(n_inputs, n_chunks));
        size = arrays.size();
    }
};

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

void compute_tile(const product & product, int64_t j, int64_t tile, int64_t t0, int64_t n_tokens, const spike_layout & layout,
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
    read_out(n_tokens, tokens.trains, tokens.outputs, layout, packed, tile, s.potential);
}

} // namespace

size_t prompt_scratch_size(int64_t n_inputs, int64_t n_chunks) {
    return tile_scratch(nullptr, n_inputs, n_chunks).size;
}

void compute_prompt(const ggml_compute_params * params, const product & product, const ggml_tensor * op, char * work, const work_layout & w) {
    const spike_layout layout = spike_layout_of(op->src[0]->ne[0], op->src[0]->ne[1]);
    tile_scratch scratch(work + w.scratch + (size_t) params->ith*w.scratch_per_thread, layout.n_inputs, w.n_chunks);
    for_each_unit(params, product, TOKEN_BLOCK, layout.n_tiles, [&](int64_t j, int64_t tile, int64_t t0, int64_t n_tokens) {
        compute_tile(product, j, tile, t0, n_tokens, layout, work + w.trains, w.train_size, scratch);
    });
}

} // namespace spike
