#include "spike-layout.h"

#include <string.h>

spike_layout spike_layout_of(int64_t n_inputs, int64_t n_rows) {
    spike_layout layout;
    layout.n_inputs = n_inputs;
    layout.n_rows   = n_rows;
    layout.n_blocks = n_inputs/QK_SPK;
    layout.n_tiles  = (n_rows + SPIKE_TILE_ROWS - 1)/SPIKE_TILE_ROWS;
    const int64_t in_last = n_rows - (layout.n_tiles - 1)*SPIKE_TILE_ROWS;
    layout.n_whole_tiles = layout.n_tiles - (in_last <= SPIKE_HALF_TILE);
    layout.salient_offset = (size_t) (layout.n_whole_tiles*(n_inputs + 1))*SPIKE_LINE_BYTES
        + (size_t) ((layout.n_tiles - layout.n_whole_tiles)*(n_inputs + 2))*SPIKE_HALF_LINE; // with an unused line, to a multiple of 64
    layout.header_offset  = layout.salient_offset
        + (size_t) (layout.n_tiles*layout.n_blocks)*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS;
    layout.size = layout.header_offset + (size_t) (layout.n_tiles*SPIKE_TILE_ROWS)*sizeof(uint16_t);
    return layout;
}

enum { SQUARE = 16 }; // rows and bytes that are transposed together

#if defined(__GNUC__)

typedef uint8_t bytes16 __attribute__((vector_size(SQUARE)));

#    if defined(__clang__)
#        define INTERLEAVE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#    else
#        define INTERLEAVE(a, b, ...) __builtin_shuffle(a, b, (bytes16) { __VA_ARGS__ })
#    endif

// Byte k of row j becomes byte j of row k: four times, each row of the upper half is interleaved with its partner of the lower.
static inline void transpose(uint8_t square[SQUARE][SQUARE]) {
    bytes16 rows[SQUARE], next[SQUARE];
    memcpy(rows, square, sizeof(rows));
    for (int stage = 0; stage < 4; stage++) {
        for (int j = 0; j < SQUARE/2; j++) {
            next[2*j]     = INTERLEAVE(rows[j], rows[j + SQUARE/2], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            next[2*j + 1] = INTERLEAVE(rows[j], rows[j + SQUARE/2], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(rows, next, sizeof(rows));
    }
    memcpy(square, rows, sizeof(rows));
}

#else

static inline void transpose(uint8_t square[SQUARE][SQUARE]) {
    for (int j = 0; j < SQUARE; j++) {
        for (int k = 0; k < j; k++) {
            const uint8_t x = square[j][k];
            square[j][k] = square[k][j];
            square[k][j] = x;
        }
    }
}

#endif

// The lines of a block of inputs for a tile's rows, of 32 bytes of codes each, transposed. n_rows: of the tile; the others are 0.
static void pack_lines(const block_spk4 * first_row, int64_t row_stride, int64_t n_rows, size_t line_bytes, uint8_t * lines, size_t stride) {
    uint8_t codes[QK_SPK/2][SPIKE_TILE_ROWS]; // [byte of a block][row]
    for (int64_t r0 = 0; r0 < (int64_t) (2*line_bytes); r0 += SQUARE) {
        for (int j0 = 0; j0 < QK_SPK/2; j0 += SQUARE) {
            uint8_t square[SQUARE][SQUARE];
            for (int64_t r = 0; r < SQUARE; r++) {
                if (r0 + r < n_rows) {
                    memcpy(square[r], first_row[(r0 + r)*row_stride].codes + j0, SQUARE);
                } else {
                    memset(square[r], 0, SQUARE);
                }
            }
            transpose(square);
            for (int j = 0; j < SQUARE; j++) {
                memcpy(&codes[j0 + j][r0], square[j], SQUARE);
            }
        }
    }
    for (int j = 0; j < QK_SPK/2; j++) {
        uint8_t near_line[SPIKE_LINE_BYTES], far_line[SPIKE_LINE_BYTES];
        for (size_t k = 0; k < line_bytes; k++) {
            const uint8_t near = codes[j][k], far = codes[j][k + line_bytes];
            near_line[k] = (uint8_t) ((near & 15) | far << 4);
            far_line[k]  = (uint8_t) (near >> 4 | (far & 0xF0));
        }
        memcpy(lines + (size_t) j*stride, near_line, line_bytes);
        memcpy(lines + (size_t) (j + QK_SPK/2)*stride, far_line, line_bytes);
    }
}

static size_t line_bytes_of(const spike_layout * layout, int64_t tile) {
    return spike_is_half_tile(layout, tile) ? SPIKE_HALF_LINE : SPIKE_LINE_BYTES;
}

bool spike_pack_tiles(const spike_layout * layout, const block_spk4 * blocks, uint8_t * packed, int64_t first_tile, int64_t end_tile) {
    const uint16_t rotation = layout->n_rows > 0 ? spike_header_of(blocks) & SPK4_NOT_ROTATED : 0;
    bool sound = true;
    for (int64_t tile = first_tile; tile < end_tile; tile++) {
        const spike_tile_lines lines = spike_lines_of_tile(layout, packed, tile);
        uint8_t * first = packed + (lines.first - packed);
        const size_t  line_bytes = line_bytes_of(layout, tile);
        const int64_t row0   = tile*SPIKE_TILE_ROWS;
        const int64_t n_rows = layout->n_rows - row0 < SPIKE_TILE_ROWS ? layout->n_rows - row0 : SPIKE_TILE_ROWS;
        for (int64_t b = 0; b < layout->n_blocks; b++) {
            const block_spk4 * column = blocks + row0*layout->n_blocks + b;
            pack_lines(column, layout->n_blocks, n_rows, line_bytes, first + (size_t) (b*QK_SPK)*lines.stride, lines.stride);
            for (int64_t r = 0; r < n_rows; r++) {
                sound &= spike_is_sound(column + r*layout->n_blocks, b == 0);
            }
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                uint8_t * salients = packed + (spike_salients_of_tile(layout, packed, tile, b, slot) - packed);
                for (int64_t r = 0; r < SPIKE_TILE_ROWS; r++) {
                    salients[r] = r < n_rows && slot >= spike_first_slot(b) ? column[r*layout->n_blocks].salient[slot] : 0;
                }
            }
        }
        memset(first + (size_t) layout->n_inputs*lines.stride, 0, SPIKE_LINE_BYTES); // what is behind a shorter line is unused
        for (int64_t r = 0; r < SPIKE_TILE_ROWS; r++) {
            const uint16_t header = r < n_rows ? spike_header_of(blocks + (row0 + r)*layout->n_blocks) : 0;
            sound &= r >= n_rows || (header & SPK4_NOT_ROTATED) == rotation;
            memcpy(packed + layout->header_offset + (size_t) (row0 + r)*sizeof(header), &header, sizeof(header));
        }
    }
    return sound;
}

void spike_pack_matrix(const spike_layout * layout, const block_spk4 * blocks, uint8_t * packed) {
    spike_pack_tiles(layout, blocks, packed, 0, layout->n_tiles);
}

void spike_unpack_matrix(const spike_layout * layout, const uint8_t * packed, block_spk4 * blocks) {
    const uint16_t * headers = spike_headers(layout, packed);
    for (int64_t r = 0; r < layout->n_rows; r++) {
        const int64_t tile  = r/SPIKE_TILE_ROWS;
        const int     row   = (int) (r % SPIKE_TILE_ROWS);
        const int     line_bytes = (int) line_bytes_of(layout, tile);
        const int     shift = row < line_bytes ? 0 : 4;
        const spike_tile_lines lines = spike_lines_of_tile(layout, packed, tile);
        for (int64_t b = 0; b < layout->n_blocks; b++) {
            block_spk4 * y = blocks + r*layout->n_blocks + b;
            for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
                y->salient[slot] = spike_salients_of_tile(layout, packed, tile, b, slot)[row];
            }
            const uint8_t * line = lines.first + (size_t) (b*QK_SPK)*lines.stride + row % line_bytes;
            for (int j = 0; j < QK_SPK/2; j++) {
                const int low  = line[(size_t) j*lines.stride] >> shift & 15;
                const int high = line[(size_t) (j + QK_SPK/2)*lines.stride] >> shift & 15;
                y->codes[j] = (uint8_t) (low | high << 4);
            }
        }
        block_spk4 * first = blocks + r*layout->n_blocks;
        memcpy(first->salient, &headers[r], sizeof(headers[r]));
    }
}
