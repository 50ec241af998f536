// Many tokens per matrix: a tile's lines are copied together once and then added again and again, and so are whole lines of
// tokens for its salient weights.
#include "spike-tiles.h"

#include "spike-potentials.h"
#include "spike-schedule.h"

#include <algorithm>
#include <cstring>

namespace spike {
namespace {

constexpr int64_t TOKEN_BLOCK = SPIKE_TOKEN_LINE; // tokens that share a tile's lines and salient weights while they are in cache
constexpr int64_t MAX_ROWS    = SPIKE_MAX_WIDTH*SPIKE_TILE_ROWS;
constexpr int32_t LARGEST_IN_LINES = 16 << 8; // merged values beyond it are added token by token

// The tokens of a block.
struct token_block {
    int64_t                n;
    const spike_schedule * schedules[TOKEN_BLOCK];
    float *                outputs[TOKEN_BLOCK];
};

// What a thread keeps while it serves one block of tokens.
struct prompt_scratch {
    int32_t * potential; // [token][tile][row]
    int16_t * values;    // [input][token], merged
    uint8_t * lines;     // [line][tile][64], of one chunk
    size_t    size;

    // what values belong to
    int64_t job = -1, first_token = -1;
    int32_t largest = 0; // magnitude among the values

    prompt_scratch(char * memory, int64_t n_inputs) {
        scratch_arrays arrays(memory);
        arrays.take(potential, TOKEN_BLOCK*MAX_ROWS);
        arrays.take(values, n_inputs*SPIKE_TOKEN_LINE);
        arrays.take(lines, spike_schedule_lines(std::min<int64_t>(n_inputs, PROMPT_CHUNK_BLOCKS*QK_SPK))*SPIKE_MAX_WIDTH*SPIKE_LINE_BYTES);
        size = arrays.size();
    }
};

bool goes_in_lines(const spike_schedule * schedule) {
    return schedule->largest <= LARGEST_IN_LINES;
}

// The tokens' values input by input, so that a salient weight adds one line of tokens.
void transpose_values(const token_block & tokens, int64_t n_inputs, prompt_scratch & s) {
    s.largest = 1;
    for (int64_t t0 = 0; t0 < SPIKE_TOKEN_LINE; t0 += 8) {
        const int8_t * fine[8], * coarse[8];
        int shift[8];
        for (int64_t t = 0; t < 8; t++) {
            const spike_schedule * schedule = t0 + t < tokens.n ? tokens.schedules[t0 + t] : nullptr;
            const bool present = schedule && goes_in_lines(schedule);
            fine[t]   = present ? spike_schedule_values(schedule, n_inputs, 0) : nullptr;
            coarse[t] = present ? spike_schedule_values(schedule, n_inputs, 1) : nullptr;
            shift[t]  = present ? schedule->shift : 0;
            s.largest = present ? std::max(s.largest, schedule->largest) : s.largest;
        }
        spike_select_kernels()->prompt->transpose_values(fine, coarse, shift, n_inputs, s.values + t0);
    }
}

// As many blocks at a time as 16-bit sums hold.
void add_salient_by_lines(const uint8_t * salients, const spike_layout & layout, const prompt_scratch & s, int64_t stride, int32_t * potential) {
    const int64_t most = INT16_MAX/(SPIKE_SALIENT_SLOTS*s.largest);
    for (int64_t b = 0; b < layout.n_blocks; b += most) {
        spike_select_kernels()->prompt->add_salient_lines(salients + b*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS, s.values + b*QK_SPK*SPIKE_TOKEN_LINE,
                                                          std::min(most, layout.n_blocks - b), stride, potential);
    }
}

// Potentials wrap like unsigned numbers on their way to a result that fits 32 bits.
void add_wrapping(int32_t * sum, int32_t x, int shift) {
    *sum = (int32_t) ((uint32_t) *sum + ((uint32_t) x << shift));
}

// A class's share of the salient weights of a tile, times 2^shift.
void add_salient_of_class(const uint8_t * salients, const spike_layout & layout, const spike_schedule * schedule, int spike_class, int shift,
                          int32_t * potential) {
    int16_t sum[SPIKE_TILE_ROWS];
    spike_select_kernels()->add_salient(salients, spike_schedule_values(schedule, layout.n_inputs, spike_class), layout.n_blocks, sum);
    for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
        add_wrapping(&potential[r], 16*sum[r], shift);
    }
}

void add_salient_of_merged(const uint8_t * salients, const spike_layout & layout, const spike_schedule * schedule, int32_t * potential) {
    add_salient_of_class(salients, layout, schedule, 0, 0, potential);
    if (schedule->shift > 0) { // without one there are no coarse values
        add_salient_of_class(salients, layout, schedule, 1, schedule->shift, potential);
    }
}

// Neighbouring tiles of a strip, and the tokens that they serve.
struct tile_group {
    const spike_layout & layout;
    const uint8_t *      packed;
    int64_t              first;
    int64_t              width;

    const uint8_t * salients(int64_t tile) const { return spike_salients_of_tile(&layout, packed, first + tile, 0, 0); }
};

// Thresholds and zero-points of a tile. Kernels count every code from 8; the row's own zero-point makes up for the difference.
struct row_settings {
    int64_t n_rows;
    float   threshold[SPIKE_TILE_ROWS];
    int32_t offset[SPIKE_TILE_ROWS];

    row_settings(const tile_group & group, int64_t tile) {
        const int64_t    row0    = (group.first + tile)*SPIKE_TILE_ROWS;
        const uint16_t * headers = spike_headers(&group.layout, group.packed) + row0;
        n_rows = std::min<int64_t>(SPIKE_TILE_ROWS, group.layout.n_rows - row0);
        for (int64_t r = 0; r < n_rows; r++) {
            threshold[r] = spike_threshold_from_header(headers[r]);
            offset[r]    = (headers[r] & SPK4_ZERO_POINT) - 8;
        }
    }
};

// float(N + S*2^k) is float(N) + float(S)*2^k here, see spike-schedule.h.
void read_out_merged(const row_settings & rows, const spike_schedule * schedule, const int32_t * potential, float * output) {
    int32_t sum = schedule->sum[0];
    add_wrapping(&sum, schedule->sum[1], schedule->shift);
    for (int64_t r = 0; r < rows.n_rows; r++) {
        const int32_t own = (int32_t) ((uint32_t) potential[r] - (uint32_t) rows.offset[r]*(uint32_t) sum);
        output[r] = spike_readout(rows.threshold[r], schedule->threshold, own, 0, schedule->coarse_unit);
    }
}

void integrate_chunk(const tile_group & group, const token_block & tokens, int64_t chunk, prompt_scratch & s) {
    const spike_prompt_kernels * kernels = spike_select_kernels()->prompt;
    const spike_tile_lines lines = spike_lines_of_tile(&group.layout, group.packed, group.first);
    const int64_t n_chunks = tokens.schedules[0]->n_chunks;
    const int64_t first = spike_chunk_start(group.layout.n_inputs, n_chunks, chunk);
    const int64_t n     = spike_chunk_start(group.layout.n_inputs, n_chunks, chunk + 1) - first;
    // side by side, the lines of a tile do not fight for the same cache sets
    kernels->copy_lines(lines.first + (size_t) first*lines.stride, lines.stride, group.width, n, s.lines);
    for (int64_t t = 0; t < tokens.n; t++) {
        const spike_schedule * schedule = tokens.schedules[t];
        kernels->integrate_schedule(s.lines, group.width, spike_schedule_program_of(schedule, 0, chunk), spike_schedule_spikes(schedule),
                                    s.potential + t*MAX_ROWS);
    }
}

// A token whose classes do not fit one integer together. Its values are so extreme that speed hardly matters.
void compute_unmerged(const tile_group & group, const spike_schedule * schedule, float * output, prompt_scratch & s) {
    const spike_prompt_kernels * kernels = spike_select_kernels()->prompt;
    const spike_tile_lines lines = spike_lines_of_tile(&group.layout, group.packed, group.first);
    const int64_t n_chunks = schedule->n_chunks;
    int32_t potential[SPIKE_SCHEDULE_CLASSES][MAX_ROWS] = { { 0 } };
    for (int64_t c = 0; c < n_chunks; c++) {
        const int64_t first = spike_chunk_start(group.layout.n_inputs, n_chunks, c);
        const int64_t n     = spike_chunk_start(group.layout.n_inputs, n_chunks, c + 1) - first;
        kernels->copy_lines(lines.first + (size_t) first*lines.stride, lines.stride, group.width, n, s.lines);
        for (int k = 0; k < SPIKE_SCHEDULE_CLASSES; k++) {
            kernels->integrate_schedule(s.lines, group.width, spike_schedule_program_of(schedule, k, c), spike_schedule_spikes(schedule), potential[k]);
        }
    }
    for (int64_t tile = 0; tile < group.width; tile++) {
        int32_t * fine = potential[0] + tile*SPIKE_TILE_ROWS, * coarse = potential[1] + tile*SPIKE_TILE_ROWS;
        add_salient_of_class(group.salients(tile), group.layout, schedule, 0, 0, fine);
        add_salient_of_class(group.salients(tile), group.layout, schedule, 1, 0, coarse);
        const row_settings rows(group, tile);
        for (int64_t r = 0; r < rows.n_rows; r++) {
            output[(group.first + tile)*SPIKE_TILE_ROWS + r] =
                spike_readout(rows.threshold[r], schedule->threshold, fine[r] - rows.offset[r]*schedule->sum[0],
                              coarse[r] - rows.offset[r]*schedule->sum[1], schedule->coarse_unit);
        }
    }
}

void compute_tiles(const tile_group & group, const token_block & tokens, bool by_lines, prompt_scratch & s) {
    memset(s.potential, 0, (size_t) (tokens.n*MAX_ROWS)*sizeof(int32_t));
    for (int64_t c = 0; c < tokens.schedules[0]->n_chunks; c++) {
        integrate_chunk(group, tokens, c, s);
    }
    for (int64_t tile = 0; tile < group.width; tile++) {
        int32_t * potential = s.potential + tile*SPIKE_TILE_ROWS;
        if (by_lines) {
            add_salient_by_lines(group.salients(tile), group.layout, s, MAX_ROWS, potential);
        }
        const row_settings rows(group, tile);
        for (int64_t t = 0; t < tokens.n; t++) {
            const spike_schedule * schedule = tokens.schedules[t];
            if (schedule->merged) {
                if (!by_lines || !goes_in_lines(schedule)) {
                    add_salient_of_merged(group.salients(tile), group.layout, schedule, potential + t*MAX_ROWS);
                }
                read_out_merged(rows, schedule, potential + t*MAX_ROWS, tokens.outputs[t] + (group.first + tile)*SPIKE_TILE_ROWS);
            }
        }
    }
    for (int64_t t = 0; t < tokens.n; t++) {
        if (!tokens.schedules[t]->merged) {
            compute_unmerged(group, tokens.schedules[t], tokens.outputs[t], s);
        }
    }
}

// Tiles are served in groups of the width that the kernels like, unless threads would go without.
int64_t group_width(const product & product, int64_t n_tiles, int n_threads) {
    int64_t n_blocks = 0;
    for (int64_t j = 0; j < product.n_jobs(); j++) {
        n_blocks += (product.get_job(j).n_tokens + TOKEN_BLOCK - 1)/TOKEN_BLOCK;
    }
    const int64_t width = spike_select_kernels()->prompt->width;
    const int64_t wide = (n_tiles + width - 1)/width*n_blocks;
    return wide >= n_threads ? width : 1;
}

} // namespace

size_t prompt_scratch_size(int64_t n_inputs) {
    return prompt_scratch(nullptr, n_inputs).size;
}

void compute_prompt(const ggml_compute_params * params, const product & product, const ggml_tensor * op, char * work, const work_layout & w) {
    const spike_layout layout = spike_layout_of(op->src[0]->ne[0], op->src[0]->ne[1]);
    const int64_t width = group_width(product, layout.n_tiles, params->nth);
    prompt_scratch scratch(work + w.scratch + (size_t) params->ith*w.scratch_per_thread, layout.n_inputs);
    for_each_unit(params, product, TOKEN_BLOCK, (layout.n_tiles + width - 1)/width, [&](int64_t j, int64_t g, int64_t t0, int64_t n_tokens) {
        token_block tokens;
        tokens.n = n_tokens;
        for (int64_t t = 0; t < n_tokens; t++) {
            const token tok     = product.get_token(j, t0 + t);
            tokens.schedules[t] = (const spike_schedule *) (work + w.trains + (size_t) tok.column*w.train_size);
            tokens.outputs[t]   = tok.output;
        }
        const bool by_lines = n_tokens >= spike_select_kernels()->prompt->tokens_for_lines;
        if (by_lines && (scratch.job != j || scratch.first_token != t0)) {
            transpose_values(tokens, layout.n_inputs, scratch);
            scratch.job         = j;
            scratch.first_token = t0;
        }
        const tile_group group = { layout, (const uint8_t *) product.get_job(j).matrix, g*width, std::min(width, layout.n_tiles - g*width) };
        compute_tiles(group, tokens, by_lines, scratch);
    });
}

} // namespace spike
