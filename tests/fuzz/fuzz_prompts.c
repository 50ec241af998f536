// Any bytes as repacked weights and as tokens of a prompt, unvalidated: the schedules of every kernel that this CPU runs stay
// inside their memory and give the integers of plain C; where rows and token are consistent, those of the dot product, too.
#include "every_kernel.h"
#include "fuzz.h"

#include "spike/cpu/spike-potentials.h"

enum { MAX_BLOCKS = 5, TOKENS = 8, SIZE = SPIKE_SCHEDULE_CLASSES*SPIKE_TILE_ROWS };

static bool is_plain(const block_spk4 * row, int64_t n_blocks) {
    for (int64_t b = 0; b < n_blocks; b++) {
        for (int slot = spike_first_slot(b); slot < SPIKE_SALIENT_SLOTS; slot++) {
            if (row[b].salient[slot] & 0xC0) {
                return false;
            }
        }
    }
    return true;
}

static void check_products(fuzz_input * input, const spike_kernels ** kernels, int n_kernels) {
    const int64_t n_blocks = 1 + fuzz_byte(input) % MAX_BLOCKS, n_inputs = n_blocks*QK_SPK;
    const int64_t n_rows   = 1 + (fuzz_byte(input) % 8 == 0 ? fuzz_below(input, 3*SPIKE_TILE_ROWS) : fuzz_byte(input) % 4);
    const int64_t chunk    = 1 + fuzz_byte(input) % MAX_BLOCKS;
    const bool    uniform  = fuzz_byte(input) & 1;
    block_spka * token   = allocate_unset((size_t) n_blocks*sizeof(block_spka));
    block_spk4 * weights = allocate_unset((size_t) (n_rows*n_blocks)*sizeof(block_spk4));
    fuzz_fill(input, token, (size_t) n_blocks*sizeof(block_spka));
    fuzz_fill(input, weights, (size_t) (n_rows*n_blocks)*sizeof(block_spk4));
    for (int64_t i = 0; uniform && i < n_rows*n_blocks; i++) {
        const int first_slot = spike_first_slot(i % n_blocks);
        memset(weights[i].salient + first_slot, 0, (size_t) (SPIKE_SALIENT_SLOTS - first_slot));
    }
    for (int64_t b = 1; uniform && b < n_blocks; b++) {
        memcpy(token + b, token, 8);
    }
    const spike_layout layout = spike_layout_of(n_inputs, n_rows);
    uint8_t        * packed   = allocate_unset(layout.size);
    spike_schedule * schedule = make_schedule(token, n_inputs, chunk);
    spike_pack_matrix(&layout, weights, packed);
    for (int64_t tile = 0; tile < layout.n_tiles; tile++) {
        int32_t expected[SIZE], found[SIZE];
        schedule_potentials(kernels[0]->prompt, &layout, packed, tile, schedule, expected);
        for (int k = 1; k < n_kernels; k++) {
            schedule_potentials(kernels[k]->prompt, &layout, packed, tile, schedule, found);
            fuzz_require(memcmp(found, expected, sizeof(found)) == 0, "every kernel gives the integers of plain C");
        }
        for (int64_t i = 0; i < SPIKE_TILE_ROWS && tile*SPIKE_TILE_ROWS + i < n_rows; i++) {
            const block_spk4 * row = weights + (tile*SPIKE_TILE_ROWS + i)*n_blocks;
            if (!is_plain(row, n_blocks)) {
                continue;
            }
            int32_t fine, coarse;
            spike_potentials_of_row(row, token, n_blocks, &fine, &coarse);
            const int64_t offset = (spike_header_of(row) & SPK4_ZERO_POINT) - 8, unit = (int64_t) 1 << schedule->shift;
            const int64_t fine_sum = offset*schedule->sum[0], coarse_sum = offset*schedule->sum[1];
            if (schedule->merged) {
                const int32_t true_sum = (int32_t) ((uint32_t) expected[i] - (uint32_t) (fine_sum + unit*coarse_sum));
                fuzz_require(fine + unit*coarse == true_sum, "merged potentials are those of the dot product");
            } else {
                fuzz_require(fine == expected[i] - fine_sum && coarse == expected[SPIKE_TILE_ROWS + i] - coarse_sum,
                             "potentials are those of the dot product");
            }
        }
    }
    free(schedule);
    free(packed);
    free(weights);
    free(token);
}

// Lines of tokens: any bytes as salient weights, any values that the schedules of valid tokens can hold.
static void check_lines(fuzz_input * input, const spike_kernels ** kernels, int n_kernels) {
    const int64_t n_blocks = 1 + fuzz_byte(input) % 3, n = n_blocks*QK_SPK;
    const size_t  n_values = (size_t) n*SPIKE_TOKEN_LINE, n_potentials = SPIKE_TOKEN_LINE*SPIKE_TILE_ROWS;
    const size_t  n_salients = (size_t) n_blocks*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS;
    uint8_t * salients  = allocate_unset(n_salients);
    int8_t  * values    = allocate_unset(2*TOKENS*(size_t) n);
    int16_t * lines     = allocate_unset(n_values*sizeof(int16_t)), * expected_lines = allocate_unset(n_values*sizeof(int16_t));
    int32_t * potential = allocate_unset(n_potentials*sizeof(int32_t)), * expected = allocate_unset(n_potentials*sizeof(int32_t));
    fuzz_fill(input, salients, n_salients);
    fuzz_fill(input, values, 2*TOKENS*(size_t) n);
    const int8_t * fine[TOKENS], * coarse[TOKENS];
    int shift[TOKENS];
    for (int64_t i = 0; i < TOKENS*n; i++) {
        int8_t * fine_value = values + i/n*2*n + i % n, * coarse_value = fine_value + n;
        *fine_value = (int8_t) (*fine_value % 16);
        *coarse_value = (int8_t) (*fine_value ? 0 : *coarse_value % 16);
    }
    for (int t = 0; t < TOKENS; t++) {
        const bool absent = fuzz_byte(input) % 8 == 0;
        fine[t]   = absent ? NULL : values + 2*t*n;
        coarse[t] = absent ? NULL : values + (2*t + 1)*n;
        shift[t]  = fuzz_byte(input) % 8;
    }
    for (int k = 0; k < n_kernels; k++) {
        const spike_prompt_kernels * kernel = kernels[k]->prompt;
        if (kernel->tokens_for_lines == INT64_MAX) {
            continue;
        }
        memset(lines, 0, n_values*sizeof(int16_t));
        memset(potential, 0, n_potentials*sizeof(int32_t));
        for (int64_t t0 = 0; t0 < SPIKE_TOKEN_LINE; t0 += TOKENS) {
            kernel->transpose_values(fine, coarse, shift, n, lines + t0);
        }
        kernel->add_salient_lines(salients, SPIKE_TILE_ROWS, lines, n_blocks, SPIKE_TOKEN_LINE, SPIKE_TILE_ROWS, potential);
        if (k == 0) {
            memcpy(expected_lines, lines, n_values*sizeof(int16_t));
            memcpy(expected, potential, n_potentials*sizeof(int32_t));
        }
        fuzz_require(memcmp(lines, expected_lines, n_values*sizeof(int16_t)) == 0, "every kernel transposes alike");
        fuzz_require(memcmp(potential, expected, n_potentials*sizeof(int32_t)) == 0, "every kernel adds salient weights alike");
    }
    for (int k = 0; k < n_kernels; k++) {
        spike_salient_token tokens[TOKENS];
        uint64_t coarse_blocks[TOKENS] = { 0 };
        memset(potential, 0, n_potentials*sizeof(int32_t));
        int64_t n_tokens = 0;
        for (int t = 0; t < TOKENS; t++) {
            for (int64_t i = 0; fine[t] && i < n; i++) {
                coarse_blocks[t] |= (uint64_t) (coarse[t][i] != 0) << i/QK_SPK;
            }
            if (fine[t]) {
                tokens[n_tokens++] = (spike_salient_token) { fine[t], coarse[t], &coarse_blocks[t], shift[t], potential + t*SPIKE_TILE_ROWS };
            }
        }
        kernels[k]->prompt->add_salient_tokens(salients, SPIKE_TILE_ROWS, n_blocks, tokens, n_tokens);
        fuzz_require(memcmp(potential, expected, TOKENS*SPIKE_TILE_ROWS*sizeof(int32_t)) == 0, "looks at values add what lines do");
    }
    free(expected);
    free(potential);
    free(expected_lines);
    free(lines);
    free(values);
    free(salients);
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const spike_kernels * kernels[MAX_KERNELS];
    const int n_kernels = every_kernel(kernels);
    fuzz_input input = fuzz_open(data, size);
    if (fuzz_byte(&input) % 8) {
        check_products(&input, kernels, n_kernels);
    } else {
        check_lines(&input, kernels, n_kernels);
    }
    return 0;
}
