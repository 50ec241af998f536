#include "spike-layout.h"

#include <string.h>

spike_layout spike_layout_of(int64_t n_inputs, int64_t n_rows) {
    spike_layout layout;
    layout.n_inputs = n_inputs;
    layout.n_rows   = n_rows;
    layout.n_blocks = n_inputs/QK_SPK;
    layout.n_tiles  = (n_rows + SPIKE_TILE_ROWS - 1)/SPIKE_TILE_ROWS;
    layout.salient_offset = (size_t) (layout.n_tiles*(n_inputs + 1))*SPIKE_LINE_BYTES;
    layout.header_offset  = layout.salient_offset
        + (size_t) (layout.n_tiles*layout.n_blocks)*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS;
    layout.size = layout.header_offset + (size_t) (layout.n_tiles*SPIKE_TILE_ROWS)*sizeof(uint16_t);
    return layout;
}

// Byte k of word j becomes byte j of word k, counted as on a little-endian machine, which the format is for.
static inline void transpose8(uint64_t words[8]) {
    static const uint64_t KEPT[3] = { UINT64_C(0x00FF00FF00FF00FF), UINT64_C(0x0000FFFF0000FFFF), UINT64_C(0x00000000FFFFFFFF) };
    for (int stage = 0; stage < 3; stage++) { // squares of 1, 2 and 4 bytes change places across the diagonal
        const int step = 1 << stage, bits = 8*step;
        for (int j = 0; j < 8; j++) {
            if (!(j & step)) {
                const uint64_t swapped = (words[j] >> bits ^ words[j + step]) & KEPT[stage];
                words[j + step] ^= swapped;
                words[j]        ^= swapped << bits;
            }
        }
    }
}

// The lines of a block of inputs for 128 rows: 128 times 32 bytes of codes, transposed. rows: of the tile; the others are 0.
static void pack_lines(const block_spk4 * first_row, int64_t row_stride, int64_t n_rows, uint8_t lines[QK_SPK][SPIKE_LINE_BYTES]) {
    uint8_t codes[QK_SPK/2][SPIKE_TILE_ROWS]; // [byte of a block][row]
    for (int64_t r0 = 0; r0 < SPIKE_TILE_ROWS; r0 += 8) {
        for (int j0 = 0; j0 < QK_SPK/2; j0 += 8) {
            uint64_t words[8];
            for (int64_t r = 0; r < 8; r++) {
                words[r] = 0;
                if (r0 + r < n_rows) {
                    memcpy(&words[r], first_row[(r0 + r)*row_stride].codes + j0, sizeof(words[r]));
                }
            }
            transpose8(words);
            for (int j = 0; j < 8; j++) {
                memcpy(&codes[j0 + j][r0], &words[j], sizeof(words[j]));
            }
        }
    }
    for (int j = 0; j < QK_SPK/2; j++) {
        for (int k = 0; k < SPIKE_LINE_BYTES; k++) {
            const uint8_t near = codes[j][k], far = codes[j][k + SPIKE_LINE_BYTES];
            lines[j][k]            = (uint8_t) ((near & 15) | far << 4);
            lines[j + QK_SPK/2][k] = (uint8_t) (near >> 4 | (far & 0xF0));
        }
    }
}

void spike_pack_tiles(const spike_layout * layout, const block_spk4 * blocks, uint8_t * packed, int64_t first_tile, int64_t end_tile) {
    for (int64_t tile = first_tile; tile < end_tile; tile++) {
        const spike_tile_lines lines = spike_lines_of_tile(layout, packed, tile);
        uint8_t * first = packed + (lines.first - packed);
        const int64_t row0   = tile*SPIKE_TILE_ROWS;
        const int64_t n_rows = layout->n_rows - row0 < SPIKE_TILE_ROWS ? layout->n_rows - row0 : SPIKE_TILE_ROWS;
        for (int64_t b = 0; b < layout->n_blocks; b++) {
            const block_spk4 * column = blocks + row0*layout->n_blocks + b;
            uint8_t block_lines[QK_SPK][SPIKE_LINE_BYTES];
            pack_lines(column, layout->n_blocks, n_rows, block_lines);
            for (int i = 0; i < QK_SPK; i++) {
                memcpy(first + (size_t) (b*QK_SPK + i)*lines.stride, block_lines[i], SPIKE_LINE_BYTES);
            }
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                uint8_t * salients = packed + (spike_salients_of_tile(layout, packed, tile, b, slot) - packed);
                for (int64_t r = 0; r < SPIKE_TILE_ROWS; r++) {
                    salients[r] = r < n_rows ? column[r*layout->n_blocks].salient[slot] : 0;
                }
            }
        }
        memset(first + (size_t) layout->n_inputs*lines.stride, 0, SPIKE_LINE_BYTES);
        for (int64_t r = 0; r < SPIKE_TILE_ROWS; r++) {
            const uint16_t header = r < n_rows ? blocks[(row0 + r)*layout->n_blocks].header : 0;
            memcpy(packed + layout->header_offset + (size_t) (row0 + r)*sizeof(header), &header, sizeof(header));
        }
    }
}

void spike_pack_matrix(const spike_layout * layout, const block_spk4 * blocks, uint8_t * packed) {
    spike_pack_tiles(layout, blocks, packed, 0, layout->n_tiles);
}

void spike_unpack_matrix(const spike_layout * layout, const uint8_t * packed, block_spk4 * blocks) {
    const uint16_t * headers = spike_headers(layout, packed);
    for (int64_t r = 0; r < layout->n_rows; r++) {
        const int64_t tile  = r/SPIKE_TILE_ROWS;
        const int     row   = (int) (r % SPIKE_TILE_ROWS);
        const int     shift = row < 64 ? 0 : 4;
        const spike_tile_lines lines = spike_lines_of_tile(layout, packed, tile);
        for (int64_t b = 0; b < layout->n_blocks; b++) {
            block_spk4 * y = blocks + r*layout->n_blocks + b;
            y->header = headers[r];
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                y->salient[slot] = spike_salients_of_tile(layout, packed, tile, b, slot)[row];
            }
            const uint8_t * line = lines.first + (size_t) (b*QK_SPK)*lines.stride + (row & 63);
            for (int j = 0; j < QK_SPK/2; j++) {
                const int low  = line[(size_t) j*lines.stride] >> shift & 15;
                const int high = line[(size_t) (j + QK_SPK/2)*lines.stride] >> shift & 15;
                y->codes[j] = (uint8_t) (low | high << 4);
            }
        }
    }
}
