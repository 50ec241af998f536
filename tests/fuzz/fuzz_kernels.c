// Any bytes as repacked weights and as a token, unvalidated: every kernel that this CPU runs stays inside its memory and
// gives the integers of plain C; where rows and token are consistent, those of the dot product, too.
#include "every_kernel.h"
#include "fuzz.h"

#include "spike/cpu/spike-potentials.h"

enum { MAX_BLOCKS = 5 };

// Potentials of a tile, [class][row], with codes counted from 8.
static void tile_potentials(const spike_kernels * kernel, const spike_layout * layout, const uint8_t * packed, int64_t tile,
                            const spike_train * train, const uint32_t * scaled, int32_t * potential) {
    const spike_tile_lines lines = spike_lines_of_tile(layout, packed, tile);
    memset(potential, 0, SPIKE_CLASSES*SPIKE_TILE_ROWS*sizeof(int32_t));
    for (int k = 0; k < SPIKE_CLASSES; k++) {
        int32_t * own = potential + k*SPIKE_TILE_ROWS;
        for (int64_t c = 0; c < train->n_chunks; c++) {
            const spike_program * program = spike_train_program(train, k, c);
            if (spike_is_half_tile(layout, tile)) {
                kernel->integrate_half(lines.first, program, scaled, own, NULL);
            } else if (kernel->integrate_ahead && (c & 1)) {
                const uint8_t * runs[SPIKE_AHEAD_FIRST + 1]; // always the same one
                for (int i = 0; i <= SPIKE_AHEAD_FIRST; i++) {
                    runs[i] = lines.first;
                }
                spike_ahead ahead = { runs, 2*SPIKE_LINE_BYTES, tile % 2 ? 4*SPIKE_LINE_BYTES : 0, SPIKE_AHEAD_FIRST << SPIKE_AHEAD_SHIFT, 0 };
                kernel->integrate_ahead(lines.first, 1, program, scaled, own, 0, &ahead);
            } else {
                kernel->integrate(lines.first, program, scaled, own);
            }
        }
        int16_t sum[SPIKE_TILE_ROWS];
        kernel->add_salient(spike_salients_of_tile(layout, packed, tile, 0, 0), spike_train_values(train, layout->n_inputs, k),
                            layout->n_blocks, sum, NULL);
        for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
            own[r] += 16*sum[r];
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const spike_kernels * kernels[MAX_KERNELS];
    const int n_kernels = every_kernel(kernels);
    fuzz_input input = fuzz_open(data, size);
    const int64_t n_blocks = 1 + fuzz_byte(&input) % MAX_BLOCKS, n_inputs = n_blocks*QK_SPK;
    const int64_t n_rows   = 1 + (fuzz_byte(&input) % 8 == 0 ? fuzz_below(&input, 3*SPIKE_TILE_ROWS) : fuzz_byte(&input) % 4);
    const int64_t chunk    = 1 + fuzz_byte(&input) % MAX_BLOCKS;
    const bool    uniform  = fuzz_byte(&input) & 1;
    block_spka * token   = allocate_unset((size_t) n_blocks*sizeof(block_spka));
    block_spk4 * weights = allocate_unset((size_t) (n_rows*n_blocks)*sizeof(block_spk4));
    fuzz_fill(&input, token, (size_t) n_blocks*sizeof(block_spka));
    fuzz_fill(&input, weights, (size_t) (n_rows*n_blocks)*sizeof(block_spk4));
    for (int64_t b = 1; uniform && b < n_blocks; b++) {
        memcpy(token + b, token, 8);
    }

    const spike_layout layout = spike_layout_of(n_inputs, n_rows);
    uint8_t     * packed = allocate_unset(layout.size);
    spike_train * train  = make_train(token, n_inputs, chunk);
    spike_pack_matrix(&layout, weights, packed);
    fuzz_require((int64_t) train->n_spikes <= spike_max_spikes(n_inputs, train->n_chunks), "a train has room for its spikes");
    for (int64_t tile = 0; tile < layout.n_tiles; tile++) {
        const spike_tile_lines lines = spike_lines_of_tile(&layout, packed, tile);
        uint32_t * scaled = scaled_offsets(train, lines.stride);
        int32_t expected[SPIKE_CLASSES*SPIKE_TILE_ROWS], found[SPIKE_CLASSES*SPIKE_TILE_ROWS];
        tile_potentials(kernels[0], &layout, packed, tile, train, scaled, expected);
        for (int k = 1; k < n_kernels; k++) {
            tile_potentials(kernels[k], &layout, packed, tile, train, scaled, found);
            fuzz_require(memcmp(found, expected, sizeof(found)) == 0, "every kernel gives the integers of plain C");
        }
        for (int64_t r = 0; r < SPIKE_TILE_ROWS && tile*SPIKE_TILE_ROWS + r < n_rows; r++) {
            const block_spk4 * row = weights + (tile*SPIKE_TILE_ROWS + r)*n_blocks;
            const int32_t offset = (spike_header_of(row) & SPK4_ZERO_POINT) - 8;
            int32_t fine, coarse;
            spike_potentials_of_row(row, token, n_blocks, &fine, &coarse);
            fuzz_require(fine == expected[r] - offset*train->sum[0] && coarse == expected[SPIKE_TILE_ROWS + r] - offset*train->sum[1],
                         "kernels give the integers of the dot product");
        }
        free(scaled);
    }
    free(train);
    free(packed);
    free(weights);
    free(token);
    return 0;
}
