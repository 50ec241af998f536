#include "spike-layout.h"

#include "spike-kernels.h"

#include <string.h>

// An even number of strips for that many tiles.
static int64_t even_strips(int64_t n_tiles) {
    return (n_tiles + 2*SPIKE_STRIP_TILES - 1)/(2*SPIKE_STRIP_TILES)*2;
}

spike_layout spike_layout_of(int64_t n_inputs, int64_t n_rows) {
    spike_layout layout;
    layout.n_inputs = n_inputs;
    layout.n_rows   = n_rows;
    layout.n_blocks = n_inputs/QK_SPK;
    layout.n_tiles  = (n_rows + SPIKE_TILE_ROWS - 1)/SPIKE_TILE_ROWS;
    const int64_t in_last = n_rows - (layout.n_tiles - 1)*SPIKE_TILE_ROWS;
    layout.n_whole_tiles = layout.n_tiles - (in_last <= SPIKE_HALF_TILE);
    layout.n_even_strips = spike_select_kernels()->even_strips ? even_strips(layout.n_tiles) : 0;
    layout.salient_offset = (size_t) (layout.n_whole_tiles*(n_inputs + 1))*SPIKE_LINE_BYTES
        + (size_t) ((layout.n_tiles - layout.n_whole_tiles)*(n_inputs + 2))*SPIKE_HALF_LINE; // with an unused line, to a multiple of 64
    layout.header_offset  = layout.salient_offset
        + (size_t) (layout.n_tiles*layout.n_blocks)*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS;
    layout.size = layout.header_offset + (size_t) (layout.n_tiles*SPIKE_TILE_ROWS)*sizeof(uint16_t);
    return layout;
}

// A tile's rows of one block of inputs, as they are packed: lines of codes, and salient slots.
typedef struct {
    uint8_t  lines[QK_SPK][SPIKE_LINE_BYTES];
    uint8_t  salients[SPIKE_SALIENT_SLOTS][SPIKE_TILE_ROWS];
    uint32_t slots[SPIKE_TILE_ROWS]; // of each row together
} packed_column;

static const block_spk4 no_row; // behind the last row of a matrix

// Row r of a tile's n_rows in a column of blocks.
static inline const block_spk4 * row_of(const block_spk4 * column, int64_t row_stride, int64_t n_rows, int64_t r) {
    return r < n_rows ? column + r*row_stride : &no_row;
}

enum { GROUP = 16 }; // rows that are transposed together

#if defined(__GNUC__)

// Bytes of one row; each 16 of them are transposed for themselves.
#    if defined(__AVX2__)
enum { WIDTH = 32 };
#        define LOWER  0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55
#        define HIGHER 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63
#    else
enum { WIDTH = 16 };
#        define LOWER  0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#        define HIGHER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#    endif

typedef uint8_t row_bytes __attribute__((vector_size(WIDTH)));

#    if defined(__clang__)
#        define INTERLEAVE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#    else
#        define INTERLEAVE(a, b, ...) __builtin_shuffle(a, b, (row_bytes) { __VA_ARGS__ })
#    endif

// Byte j of row k, j < 16, becomes byte k of lines[j]: four times, each row of the upper half is interleaved with its partner
// of the lower. The bytes from 16 on go to lines[16] and so forth.
static inline void transpose(row_bytes rows[GROUP], uint8_t lines[][SPIKE_LINE_BYTES]) {
    row_bytes next[GROUP];
    for (int stage = 0; stage < 4; stage++) {
        for (int k = 0; k < GROUP/2; k++) {
            next[2*k]     = INTERLEAVE(rows[k], rows[k + GROUP/2], LOWER);
            next[2*k + 1] = INTERLEAVE(rows[k], rows[k + GROUP/2], HIGHER);
        }
        for (int k = 0; k < GROUP; k++) {
            rows[k] = next[k];
        }
    }
    for (int k = 0; k < GROUP; k++) {
        for (int j = 0; j < WIDTH; j += GROUP) {
            memcpy(lines[j + k], (const uint8_t *) &rows[k] + j, GROUP);
        }
    }
}

// 16 bytes of the lines of a column, of rows near[] in their low nibbles and far[] in the high ones.
static inline void pack_codes(const block_spk4 * const near[GROUP], const block_spk4 * const far[GROUP], uint8_t lines[][SPIKE_LINE_BYTES]) {
    for (int j = 0; j < QK_SPK/2; j += WIDTH) {
        row_bytes first[GROUP], second[GROUP]; // nibbles of the first and of the second half of the block
        for (int k = 0; k < GROUP; k++) {
            row_bytes a, b;
            memcpy(&a, near[k]->codes + j, WIDTH);
            memcpy(&b, far[k]->codes + j, WIDTH);
            first[k]  = (a & 15) | b << 4;
            second[k] = a >> 4 | (b & 0xF0);
        }
        transpose(first, lines + j);
        transpose(second, lines + QK_SPK/2 + j);
    }
}

#    define REQUEST(address) __builtin_prefetch(address)

#else

static inline void pack_codes(const block_spk4 * const near[GROUP], const block_spk4 * const far[GROUP], uint8_t lines[][SPIKE_LINE_BYTES]) {
    for (int j = 0; j < QK_SPK/2; j++) {
        for (int k = 0; k < GROUP; k++) {
            lines[j][k]            = (uint8_t) ((near[k]->codes[j] & 15) | far[k]->codes[j] << 4);
            lines[j + QK_SPK/2][k] = (uint8_t) (near[k]->codes[j] >> 4 | (far[k]->codes[j] & 0xF0));
        }
    }
}

#    define REQUEST(address) ((void) (address))

#endif

enum { AHEAD = 4 }; // blocks: rows are too far from each other for the hardware to see a stream

static void pack_column(const block_spk4 * column, bool first_of_row, int64_t row_stride, int64_t n_rows, size_t line_bytes, packed_column * to) {
    for (size_t k0 = 0; k0 < line_bytes; k0 += GROUP) {
        const block_spk4 * halves[2][GROUP];
        for (int half = 0; half < 2; half++) {
            for (int k = 0; k < GROUP; k++) {
                const int64_t      r = (int64_t) (k0 + half*line_bytes) + k;
                const block_spk4 * x = row_of(column, row_stride, n_rows, r);
                REQUEST(x + AHEAD);
                halves[half][k] = x;
                to->slots[r]    = spike_slots_of(x, first_of_row);
            }
        }
        uint8_t (*lines)[SPIKE_LINE_BYTES] = (uint8_t (*)[SPIKE_LINE_BYTES]) &to->lines[0][k0];
        pack_codes(halves[0], halves[1], lines);
    }
    for (int slot = 0; slot < SPIKE_SALIENT_SLOTS; slot++) {
        for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
            to->salients[slot][r] = (uint8_t) (to->slots[r] >> 8*slot);
        }
    }
}

static size_t line_bytes_of(const spike_layout * layout, int64_t tile) {
    return spike_is_half_tile(layout, tile) ? SPIKE_HALF_LINE : SPIKE_LINE_BYTES;
}

// Whether the salient slots of all rows are sound, as spike_is_sound would find them.
static bool is_sound_column(const packed_column * column, bool first_of_row) {
    uint8_t unsound = 0;
    for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
        unsound |= !spike_slots_are_sound(column->slots[r], first_of_row);
    }
    return unsound == 0;
}

bool spike_pack_tiles(const spike_layout * layout, const block_spk4 * blocks, uint8_t * packed, int64_t first_tile, int64_t end_tile) {
    const uint16_t rotation = layout->n_rows > 0 ? spike_header_of(blocks) & SPK4_NOT_ROTATED : 0;
    bool sound = true;
    packed_column column = { 0 }; // half a tile leaves the rest of it as it is
    for (int64_t tile = first_tile; tile < end_tile; tile++) {
        const spike_tile_lines lines = spike_lines_of_tile(layout, packed, tile);
        uint8_t * first = packed + (lines.first - packed);
        const size_t  line_bytes = line_bytes_of(layout, tile);
        const int64_t row0   = tile*SPIKE_TILE_ROWS;
        const int64_t n_rows = layout->n_rows - row0 < SPIKE_TILE_ROWS ? layout->n_rows - row0 : SPIKE_TILE_ROWS;
        uint16_t headers[SPIKE_TILE_ROWS] = { 0 };
        for (int64_t r = 0; r < n_rows; r++) {
            headers[r] = spike_header_of(blocks + (row0 + r)*layout->n_blocks);
            sound &= spike_header_is_sound(headers[r]) & ((headers[r] & SPK4_NOT_ROTATED) == rotation);
        }
        memcpy(packed + layout->header_offset + (size_t) row0*sizeof(*headers), headers, sizeof(headers));
        if (spike_is_half_tile(layout, tile)) {
            memset(&column, 0, sizeof(column));
        }
        for (int64_t b = 0; b < layout->n_blocks; b++) {
            pack_column(blocks + row0*layout->n_blocks + b, b == 0, layout->n_blocks, n_rows, line_bytes, &column);
            sound &= is_sound_column(&column, b == 0);
            uint8_t * to = first + (size_t) (b*QK_SPK)*lines.stride;
            if (line_bytes == SPIKE_LINE_BYTES) {
                for (int j = 0; j < QK_SPK; j++) {
                    memcpy(to + (size_t) j*lines.stride, column.lines[j], SPIKE_LINE_BYTES);
                }
            } else {
                for (int j = 0; j < QK_SPK; j++) {
                    memcpy(to + (size_t) j*lines.stride, column.lines[j], SPIKE_HALF_LINE);
                }
            }
            uint8_t * salients = packed + (spike_salients_of_tile(layout, packed, tile, b, 0) - packed);
            memcpy(salients, column.salients, sizeof(column.salients));
        }
        memset(first + (size_t) layout->n_inputs*lines.stride, 0, SPIKE_LINE_BYTES); // what is behind a shorter line is unused
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
