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

// One tile at a time, block by block: 128 blocks of 32 codes become 64 lines, which stay in L1.
void spike_pack_matrix(const spike_layout * layout, const block_spk4 * blocks, uint8_t * packed) {
    memset(packed, 0, layout->size);
    for (int64_t tile = 0; tile < layout->n_tiles; tile++) {
        const spike_tile_lines lines = spike_lines_of_tile(layout, packed, tile);
        uint8_t * first = packed + (lines.first - packed);
        const int64_t row0   = tile*SPIKE_TILE_ROWS;
        const int64_t n_rows = layout->n_rows - row0 < SPIKE_TILE_ROWS ? layout->n_rows - row0 : SPIKE_TILE_ROWS;
        for (int64_t b = 0; b < layout->n_blocks; b++) {
            uint8_t block_lines[QK_SPK][SPIKE_LINE_BYTES] = { { 0 } };
            for (int64_t r = 0; r < n_rows; r++) {
                const block_spk4 * x = blocks + (row0 + r)*layout->n_blocks + b;
                const int byte  = (int) r & 63;
                const int shift = r < 64 ? 0 : 4;
                for (int j = 0; j < QK_SPK/2; j++) {
                    block_lines[j][byte]            |= (uint8_t) ((x->codes[j] & 15) << shift);
                    block_lines[j + QK_SPK/2][byte] |= (uint8_t) ((x->codes[j] >> 4) << shift);
                }
                for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                    uint8_t * salients = packed + (spike_salients_of_tile(layout, packed, tile, b, slot) - packed);
                    salients[r] = x->salient[slot];
                }
            }
            for (int i = 0; i < QK_SPK; i++) {
                memcpy(first + (size_t) (b*QK_SPK + i)*lines.stride, block_lines[i], SPIKE_LINE_BYTES);
            }
        }
        for (int64_t r = 0; r < n_rows; r++) {
            const uint16_t header = blocks[(row0 + r)*layout->n_blocks].header;
            memcpy(packed + layout->header_offset + (size_t) (row0 + r)*sizeof(header), &header, sizeof(header));
        }
    }
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
