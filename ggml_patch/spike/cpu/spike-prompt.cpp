// Many tokens per matrix: a tile's lines are copied together once and then added again and again, and so are whole lines of
// tokens for its salient weights.
#include "spike-prompt.h"

#include "spike-tiles.h"

#include "spike-encoding.h"
#include "spike-potentials.h"
#include "spike-schedule.h"

#include <algorithm>
#include <cstring>

namespace spike {
namespace {

constexpr int64_t MOST_TOKENS = 128; // that share a copy of a tile's lines
constexpr int64_t FEWEST_TOKENS = 16; // below, copies cost more than threads gain that keep to the tokens that they encoded
constexpr int64_t FEW_TOKENS = 24; // each has many lines to request, which in one burst would wait for each other
constexpr int64_t GROUP = 16; // spikes, see spike_line_requests
constexpr int64_t TOKENS_TO_FINISH = 32; // whose potentials are still near when outputs are made of them
constexpr int64_t FEW_TILES = 4; // per thread: with fewer, their shares of rows differ so much that half as many tokens still pay
constexpr int64_t TOKEN_STRIDE = SPIKE_TILE_ROWS + 16; // of potentials: no power of two, lest a row of all tokens fight for a few cache sets
constexpr int32_t LARGEST_IN_LINES = 16 << 8; // merged values beyond it are added token by token

// The tokens that a unit of work serves.
struct token_block {
    int64_t                n;
    const spike_schedule * schedules[MOST_TOKENS];
    float *                outputs[MOST_TOKENS];
};

// What a thread keeps while it serves a block of tokens.
struct prompt_scratch {
    int32_t * potential; // [token][row], of one tile
    int16_t * values;    // [input][token], merged, of routed tokens
    uint8_t * lines;     // [line][64], of one chunk
    size_t    size;

    // what values belong to
    int64_t job = -1, first_token = -1;

    prompt_scratch(char * memory, int64_t n_inputs) {
        scratch_arrays arrays(memory);
        arrays.take(potential, MOST_TOKENS*TOKEN_STRIDE);
        arrays.take(values, goes_by_lines(SPIKE_TOKEN_LINE) ? n_inputs*SPIKE_TOKEN_LINE : 0);
        arrays.take(lines, spike_schedule_lines(std::min<int64_t>(n_inputs, PROMPT_CHUNK_BLOCKS*QK_SPK))*SPIKE_LINE_BYTES);
        size = arrays.size();
    }
};

bool goes_in_lines(const spike_schedule * schedule) {
    return schedule->largest <= LARGEST_IN_LINES;
}

// Potentials wrap like unsigned numbers on their way to a result that fits 32 bits.
void add_wrapping(int32_t * sum, int32_t x, int shift) {
    *sum = (int32_t) ((uint32_t) *sum + ((uint32_t) x << shift));
}

// A tile of a matrix.
struct matrix_tile {
    const spike_layout & layout;
    const uint8_t *      packed;
    int64_t              index;

    int64_t first_row() const { return index*SPIKE_TILE_ROWS; }
    int64_t n_rows() const { return std::min<int64_t>(SPIKE_TILE_ROWS, layout.n_rows - first_row()); }
    int64_t n_neurons() const { return is_half() ? SPIKE_HALF_TILE : SPIKE_TILE_ROWS; } // rows and what fills the last tile up
    bool    is_half() const { return spike_is_half_tile(&layout, index); }
    int64_t n_chunks() const { return spike_chunks(layout.n_inputs, PROMPT_CHUNK_BLOCKS); }
    int64_t first_input(int64_t chunk) const { return spike_chunk_start(layout.n_inputs, n_chunks(), chunk); }

    spike_tile_lines lines() const { return spike_lines_of_tile(&layout, packed, index); }
    const uint8_t *  salients() const { return spike_salients_of_tile(&layout, packed, index, 0, 0); }
};

// As many blocks at a time as 16-bit sums hold.
void add_salient_by_lines(const matrix_tile & tile, const int16_t * values, int64_t n_tokens, int32_t largest, int32_t * potential) {
    const int64_t filled = (n_tokens + SPIKE_TOKENS_AT_ONCE - 1)/SPIKE_TOKENS_AT_ONCE*SPIKE_TOKENS_AT_ONCE; // the rest of it is never read
    const int64_t most = INT16_MAX/(SPIKE_SALIENT_SLOTS*largest);
    for (int64_t b = 0; b < tile.layout.n_blocks; b += most) {
        spike_select_kernels()->prompt->add_salient_lines(tile.salients() + b*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS,
                                                          tile.n_neurons(), values + b*QK_SPK*SPIKE_TOKEN_LINE,
                                                          std::min(most, tile.layout.n_blocks - b), filled, TOKEN_STRIDE, potential);
    }
}

// Some tokens one by one, each with its values of both classes.
void add_salient_by_tokens(const matrix_tile & tile, const spike_schedule * const * schedules, int64_t n_tokens, int32_t * potential) {
    spike_salient_token tokens[SPIKE_TOKEN_LINE];
    int64_t n = 0;
    for (int64_t t = 0; t < n_tokens; t++) {
        const spike_schedule * schedule = schedules[t];
        if (schedule->merged) {
            tokens[n++] = { spike_schedule_values(schedule, tile.layout.n_inputs, 0),
                            schedule->shift > 0 ? spike_schedule_values(schedule, tile.layout.n_inputs, 1) : nullptr,
                            schedule->coarse_blocks, schedule->shift, potential + t*TOKEN_STRIDE };
        }
    }
    spike_select_kernels()->prompt->add_salient_tokens(tile.salients(), tile.n_neurons(), tile.layout.n_blocks, tokens, n);
}

// Thresholds and zero-points of a tile. Kernels count every code from 8; the row's own zero-point makes up for the difference.
struct row_settings {
    int64_t n_rows;
    float   threshold[SPIKE_TILE_ROWS];
    int32_t offset[SPIKE_TILE_ROWS];

    explicit row_settings(const matrix_tile & tile) : n_rows(tile.n_rows()) {
        const uint16_t * headers = spike_headers(&tile.layout, tile.packed) + tile.first_row();
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

// Brings the first steps and spikes of a program near; what follows them, the processor foresees.
void prefetch_program(const spike_schedule * schedule, int64_t chunk) {
    const spike_schedule_program * program = spike_schedule_program_of(schedule, 0, chunk);
    const uint16_t * spikes = spike_schedule_spikes(schedule) + program->first;
    bring_near(program, 128);
    bring_near(spikes, 512);
}

// What will be copied together next, brought near bit by bit meanwhile: lines of a strip, from afar and in no order that a
// prefetcher would see.
class next_lines {
  public:
    // The lines of a chunk of a tile; none if the tile is beyond the matrix.
    next_lines(const matrix_tile & tile, int64_t chunk) {
        if (tile.index < tile.layout.n_tiles) {
            const int64_t begin = tile.first_input(chunk);
            const spike_tile_lines lines = tile.lines();
            n     = tile.first_input(chunk + 1) - begin;
            first = lines.first + (size_t) begin*lines.stride;
            due   = { first, first, lines.stride, 0 };
        }
    }

    // As many as are due when such a share of the tokens is done.
    void set_due(int64_t done, int64_t of) { due.end = first + (size_t) (n*done/of)*due.stride; }

    // Requests for what is due, by the kernel with every so many groups of spikes.
    spike_line_requests * spread(int64_t n_groups) {
        const int64_t n_due = n > 0 ? (due.end - due.next)/(int64_t) due.stride : 0;
        due.at_once = (int) ((n_due + n_groups - 1)/n_groups);
        return &due;
    }

    // The rest of it.
    void bring() {
        for (; due.next != due.end; due.next += due.stride) {
#if defined(__GNUC__)
            __builtin_prefetch(due.next, 0, 2);
#endif
        }
    }

  private:
    const uint8_t *     first = nullptr;
    int64_t             n = 0;
    spike_line_requests due = { nullptr, nullptr, 0, 0 };
};

// The lines of a chunk, copied together: so they do not fight for the same cache sets.
void copy_chunk(const matrix_tile & tile, int64_t chunk, uint8_t * to) {
    const spike_prompt_kernels * kernels = spike_select_kernels()->prompt;
    const spike_tile_lines lines = tile.lines();
    const int64_t first = tile.first_input(chunk);
    const int64_t n     = tile.first_input(chunk + 1) - first;
    const auto    copy  = tile.is_half() ? kernels->copy_half : kernels->copy_lines;
    copy(lines.first + (size_t) first*lines.stride, lines.stride, n, to);
}

// Runs a program over them. requests: nullptr, or what to request meanwhile, if the kernel does such things.
void integrate(const matrix_tile & tile, const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes, int32_t * potential,
               spike_line_requests * requests) {
    const spike_prompt_kernels * kernels = spike_select_kernels()->prompt;
    if (tile.is_half()) {
        kernels->integrate_half_schedule(lines, program, spikes, potential, requests);
    } else if (requests) {
        kernels->integrate_schedule_ahead(lines, program, spikes, potential, requests);
    } else {
        kernels->integrate_schedule(lines, program, spikes, potential);
    }
}

// A chunk of a tile whose lines are copied together, while tokens run over it.
class tile_chunk {
  public:
    // after: the tile that this thread will probably come to next, or one beyond its matrix.
    tile_chunk(const matrix_tile & tile, const matrix_tile & after, const token_block & tokens, int64_t chunk, prompt_scratch & s)
        : tile(tile), tokens(tokens), chunk(chunk), lines(s.lines),
          requests(tokens.n <= FEW_TOKENS && spike_select_kernels()->prompt->integrate_schedule_ahead),
          coming(is_last() ? next_lines(after, 0) : next_lines(tile, chunk + 1)) {
        copy_chunk(tile, chunk, s.lines);
    }

    // Some tokens, the first of which has its potentials there. All tokens come one after the other.
    void run(int64_t first_token, int64_t n_tokens, int32_t * potential) {
        for (int64_t t = first_token; t < first_token + n_tokens; t++) {
            const spike_schedule * schedule = tokens.schedules[t];
            const spike_schedule_program * program = spike_schedule_program_of(schedule, 0, chunk);
            coming.set_due(t + 1, tokens.n);
            if (!requests) {
                coming.bring();
            }
            prefetch_program(tokens.schedules[std::min(t + 1, tokens.n - 1)], chunk);
            if (is_last()) { // outputs are made soon; sooner asked for, they come while spikes are added
                bring_near<near_for::writing>(tokens.outputs[t] + tile.first_row(), (size_t) tile.n_rows()*sizeof(float));
            }
            if (chunk == 0) {
                memset(potential, 0, SPIKE_TILE_ROWS*sizeof(int32_t));
            }
            integrate(tile, lines, program, spike_schedule_spikes(schedule), potential, requests ? coming.spread(groups_of(program)) : nullptr);
            coming.bring();
            potential += TOKEN_STRIDE;
        }
    }

  private:
    bool is_last() const { return chunk + 1 == tile.n_chunks(); }

    // How many groups of spikes a program has, or 1.
    static int64_t groups_of(const spike_schedule_program * program) {
        int64_t n = 0;
        for (uint32_t s = 0; s < program->n_steps; s++) {
            n += (program->steps[s].n_spikes + GROUP - 1)/GROUP;
        }
        return std::max<int64_t>(n, 1);
    }

    const matrix_tile & tile;
    const token_block & tokens;
    const int64_t       chunk;
    const uint8_t *     lines;
    const bool          requests; // with the spikes
    next_lines          coming;
};

// A token whose classes do not fit one integer together. Its values are so extreme that speed hardly matters.
void compute_unmerged(const matrix_tile & tile, const spike_schedule * schedule, float * output, prompt_scratch & s) {
    int32_t potential[SPIKE_SCHEDULE_CLASSES][SPIKE_TILE_ROWS] = { { 0 } };
    for (int64_t c = 0; c < schedule->n_chunks; c++) {
        copy_chunk(tile, c, s.lines);
        for (int k = 0; k < SPIKE_SCHEDULE_CLASSES; k++) {
            integrate(tile, s.lines, spike_schedule_program_of(schedule, k, c), spike_schedule_spikes(schedule), potential[k], nullptr);
        }
    }
    for (int k = 0; k < SPIKE_SCHEDULE_CLASSES; k++) {
        const spike_salient_token token = { spike_schedule_values(schedule, tile.layout.n_inputs, k), nullptr, nullptr, 0, potential[k] };
        spike_select_kernels()->prompt->add_salient_tokens(tile.salients(), tile.n_neurons(), tile.layout.n_blocks, &token, 1);
    }
    const row_settings rows(tile);
    for (int64_t r = 0; r < rows.n_rows; r++) {
        output[tile.first_row() + r] = spike_readout(rows.threshold[r], schedule->threshold, potential[0][r] - rows.offset[r]*schedule->sum[0],
                                                     potential[1][r] - rows.offset[r]*schedule->sum[1], schedule->coarse_unit);
    }
}

// A tile's share of the salient weights for up to a line of tokens, and their outputs. values: the line, or NULL if the
// tokens are so few that each goes alone.
void finish_tokens(const matrix_tile & tile, const row_settings & rows, const spike_schedule * const * schedules, float * const * outputs,
                   int64_t n_tokens, const int16_t * values, int32_t * potential) {
    if (values) {
        int32_t largest = 1;
        for (int64_t t = 0; t < n_tokens; t++) {
            largest = goes_in_lines(schedules[t]) ? std::max(largest, schedules[t]->largest) : largest;
        }
        add_salient_by_lines(tile, values, n_tokens, largest, potential);
        for (int64_t t = 0; t < n_tokens; t++) {
            if (!goes_in_lines(schedules[t])) {
                add_salient_by_tokens(tile, schedules + t, 1, potential + t*TOKEN_STRIDE);
            }
        }
    } else {
        add_salient_by_tokens(tile, schedules, n_tokens, potential);
    }
    for (int64_t t = 0; t < n_tokens; t++) {
        int32_t * own = potential + t*TOKEN_STRIDE;
        if (schedules[t]->merged) {
            read_out_merged(rows, schedules[t], own, outputs[t] + tile.first_row());
        }
    }
}

// values: lines of the tokens, or NULL.
void compute_tile(const matrix_tile & tile, const matrix_tile & after, const token_block & tokens, const int16_t * values, prompt_scratch & s) {
    const int64_t last_chunk = tile.n_chunks() - 1;
    for (int64_t c = 0; c < last_chunk; c++) {
        tile_chunk(tile, after, tokens, c, s).run(0, tokens.n, s.potential);
    }
    const row_settings rows(tile);
    const int64_t at_once = values ? SPIKE_TOKEN_LINE : TOKENS_TO_FINISH;
    tile_chunk chunk(tile, after, tokens, last_chunk, s);
    for (int64_t t = 0; t < tokens.n; t += at_once) {
        const int64_t n = std::min(at_once, tokens.n - t);
        int32_t * potential = s.potential + (last_chunk > 0 ? t*TOKEN_STRIDE : 0); // the same memory again and again where nothing is in it yet
        chunk.run(t, n, potential);
        finish_tokens(tile, rows, tokens.schedules + t, tokens.outputs + t, n, values ? values + t*tile.layout.n_inputs : nullptr, potential); // a line of tokens per input
    }
    for (int64_t t = 0; t < tokens.n; t++) {
        if (!tokens.schedules[t]->merged) {
            compute_unmerged(tile, tokens.schedules[t], tokens.outputs[t], s);
        }
    }
}

// Where a thread will begin in another product, or nowhere: lines that it will copy without having had the time to request them. Those
// of a prompt's many tokens would not stay in the cache until then, and matter less.
class first_tile {
  public:
    first_tile(const ggml_tensor * op, const ggml_compute_params * params) {
        if (op && most_tokens_of(op) <= FEW_TOKENS) {
            layout = spike_layout_of(op->src[0]->ne[0], op->src[0]->ne[1]);
            packed = (const uint8_t *) op->src[0]->data;
            const int64_t blocks = (op->src[1]->ne[1] + tokens_per_unit(op, params->nth) - 1)/tokens_per_unit(op, params->nth);
            index = params->ith*(blocks*op->src[1]->ne[2]*op->src[1]->ne[3]*layout.n_tiles)/params->nth % layout.n_tiles;
        }
    }

    matrix_tile tile() const { return { layout, packed, index }; }

  private:
    spike_layout    layout = {};
    const uint8_t * packed = nullptr;
    int64_t         index  = 0; // beyond a layout without tiles
};

} // namespace

void transpose_tokens(const spike_schedule * const * schedules, int64_t n_tokens, int64_t n_inputs, int16_t * lines) {
    for (int64_t t0 = 0; t0 < n_tokens; t0 += 8) {
        const int8_t * fine[8], * coarse[8];
        int shift[8];
        for (int64_t t = 0; t < 8; t++) {
            const spike_schedule * schedule = t0 + t < n_tokens ? schedules[t0 + t] : nullptr;
            const bool present = schedule && goes_in_lines(schedule);
            fine[t]   = present ? spike_schedule_values(schedule, n_inputs, 0) : nullptr;
            coarse[t] = present ? spike_schedule_values(schedule, n_inputs, 1) : nullptr;
            shift[t]  = present ? schedule->shift : 0;
        }
        spike_select_kernels()->prompt->transpose_values(fine, coarse, shift, n_inputs, lines + t0);
    }
}

int64_t tokens_per_unit(const ggml_tensor * op, int n_threads) {
    if (op->op == GGML_OP_MUL_MAT_ID) {
        return SPIKE_TOKEN_LINE;
    }
    const ggml_tensor * inputs = op->src[1];
    const auto count_blocks = [&](int64_t n_tokens) { return (inputs->ne[1] + n_tokens - 1)/n_tokens*inputs->ne[2]*inputs->ne[3]; };
    const int64_t n_tiles = (op->src[0]->ne[1] + SPIKE_TILE_ROWS - 1)/SPIKE_TILE_ROWS;
    const int64_t fewest  = n_tiles < FEW_TILES*n_threads ? FEWEST_TOKENS/2 : FEWEST_TOKENS;
    int64_t n_tokens = MOST_TOKENS;
    while (n_tokens > fewest && count_blocks(n_tokens) < n_threads) {
        n_tokens /= 2;
    }
    return n_tokens;
}

size_t prompt_scratch_size(int64_t n_inputs) {
    return prompt_scratch(nullptr, n_inputs).size;
}

void compute_prompt(const ggml_compute_params * params, const product & product, const ggml_tensor * op, char * work, const work_layout & w) {
    const spike_layout layout = spike_layout_of(op->src[0]->ne[0], op->src[0]->ne[1]);
    const bool routed = op->op == GGML_OP_MUL_MAT_ID;
    prompt_scratch scratch(work + w.scratch + (size_t) params->ith*w.scratch_per_thread, layout.n_inputs);
    unit_cursor * cursors = (unit_cursor *) (work + w.cursors);
    const first_tile first_of_next(following_product(false), params);
    for_each_unit(params, cursors, product, w.tokens_per_unit, layout.n_tiles, [&](int64_t j, int64_t i, int64_t t0, int64_t n_tokens, bool goes_on) {
        token_block tokens;
        tokens.n = n_tokens;
        for (int64_t t = 0; t < n_tokens; t++) {
            const token tok     = product.get_token(j, t0 + t);
            tokens.schedules[t] = (const spike_schedule *) (work + w.trains + (size_t) tok.column*w.train_size);
            tokens.outputs[t]   = tok.output;
        }
        const int16_t * values = nullptr;
        if (w.lines_per_unit > 0) {
            values = w.values_in_line(work, j, t0);
        } else if (routed && goes_by_lines(n_tokens)) {
            if (scratch.job != j || scratch.first_token != t0) {
                transpose_tokens(tokens.schedules, n_tokens, layout.n_inputs, scratch.values);
                scratch.job         = j;
                scratch.first_token = t0;
            }
            values = scratch.values;
        }
        const uint8_t * packed = (const uint8_t *) product.get_job(j).matrix;
        compute_tile({ layout, packed, i }, goes_on ? matrix_tile { layout, packed, i + 1 } : first_of_next.tile(), tokens, values, scratch);
    });
}

} // namespace spike
