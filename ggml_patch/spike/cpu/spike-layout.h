// Repacked matrices: 128 neurons side by side, so that one spike adds one line of weights.
//
//   line    64 bytes: the codes of 128 rows for one input; low nibble row j, high nibble row j + 64
//   tile    128 rows. The last tile of a matrix, if it has no more than 64, is half a tile: lines of 32 bytes, rows j and j + 32
//   strip   up to 16 tiles; input-major, so that the lines of one input lie together (1 KB in a full strip);
//           one line of zeros per tile ends the strip, for lists of inputs padded to a fixed length.
//           As wide as can be, or an even number of them, all but alike, which is the kernel's choice (spike_kernels.even_strips): two
//           threads then have strips of their own. Half a tile is a strip of its own
//   matrix  strips | salient weights [tile][block][slot][128 rows] | headers [row]
//           the slots of a row's first block that hold its header are unused here
//
// Nothing is lost: unpacking gives the stored blocks back to the byte.
#pragma once

#include "spike/spike.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SPIKE_TILE_ROWS   128
#define SPIKE_HALF_TILE   64 // rows
#define SPIKE_LINE_BYTES  64
#define SPIKE_HALF_LINE   32 // bytes
#define SPIKE_STRIP_TILES 16

// Salient sums are kept in 16 bits: four weights of 16 steps in every block of up to 32704 inputs.
#define SPIKE_MAX_TILED_INPUTS (QK_SPK*(INT16_MAX/(SPIKE_SALIENT_SLOTS*16)))

#define SPIKE_BLOCK_WORDS ((SPIKE_MAX_TILED_INPUTS/QK_SPK + 63)/64) // of 64 bits, one for each block

typedef struct {
    int64_t n_inputs;
    int64_t n_rows;
    int64_t n_blocks; // n_inputs / 64
    int64_t n_tiles;  // the last one may hold unused rows, with codes 0, and may be half a tile
    int64_t n_whole_tiles;
    int64_t n_even_strips; // 0: strips are as wide as can be
    size_t  salient_offset;
    size_t  header_offset;
    size_t  size; // bytes of one matrix, a multiple of 64
} spike_layout;

spike_layout spike_layout_of(int64_t n_inputs, int64_t n_rows);

// The line of input i in a tile is at first + i*stride.
typedef struct {
    const uint8_t * first;
    size_t          stride;
} spike_tile_lines;

static inline bool spike_is_half_tile(const spike_layout * layout, int64_t tile) {
    return tile >= layout->n_whole_tiles;
}

// The strip of a whole tile.
static inline int64_t spike_strip_of(const spike_layout * layout, int64_t tile) {
    return layout->n_even_strips > 0 ? ((tile + 1)*layout->n_even_strips - 1)/layout->n_tiles : tile/SPIKE_STRIP_TILES;
}

// A strip's first tile. Several threads share the tiles of a matrix in the same way.
static inline int64_t spike_start_of(const spike_layout * layout, int64_t strip) {
    return layout->n_even_strips > 0 ? strip*layout->n_tiles/layout->n_even_strips : strip*SPIKE_STRIP_TILES;
}

// The first tile of a tile's strip.
static inline int64_t spike_start_of_strip(const spike_layout * layout, int64_t tile) {
    return spike_is_half_tile(layout, tile) ? tile : spike_start_of(layout, spike_strip_of(layout, tile));
}

// The first tile behind a tile's strip.
static inline int64_t spike_end_of_strip(const spike_layout * layout, int64_t tile) {
    if (spike_is_half_tile(layout, tile)) {
        return layout->n_tiles;
    }
    const int64_t end = spike_start_of(layout, spike_strip_of(layout, tile) + 1);
    return end < layout->n_whole_tiles ? end : layout->n_whole_tiles;
}

static inline spike_tile_lines spike_lines_of_tile(const spike_layout * layout, const uint8_t * packed, int64_t tile) {
    const bool    half       = spike_is_half_tile(layout, tile);
    const int64_t first_tile = spike_start_of_strip(layout, tile);
    const int64_t width      = spike_end_of_strip(layout, tile) - first_tile;
    const size_t  lines_before = (size_t) (first_tile * (layout->n_inputs + 1) + (tile - first_tile));
    const spike_tile_lines lines = { packed + lines_before*SPIKE_LINE_BYTES, half ? SPIKE_HALF_LINE : (size_t) width*SPIKE_LINE_BYTES };
    return lines;
}

// Salient weights of (tile, block, slot): 128 bytes, one per row, as stored in block_spk4.
static inline const uint8_t * spike_salients_of_tile(const spike_layout * layout, const uint8_t * packed, int64_t tile,
                                                     int64_t block, int slot) {
    const int64_t index = (tile*layout->n_blocks + block)*SPIKE_SALIENT_SLOTS + slot;
    return packed + layout->salient_offset + (size_t) index*SPIKE_TILE_ROWS;
}

static inline const uint16_t * spike_headers(const spike_layout * layout, const uint8_t * packed) {
    return (const uint16_t *) (packed + layout->header_offset);
}

// Some tiles of a matrix, or all of them; each writes its own lines, salient weights and headers. Returns whether all
// their blocks are sound, as spike_validate_tensor would find them.
bool spike_pack_tiles(const spike_layout * layout, const block_spk4 * blocks, uint8_t * packed, int64_t first_tile, int64_t end_tile);
void spike_pack_matrix(const spike_layout * layout, const block_spk4 * blocks, uint8_t * packed);
void spike_unpack_matrix(const spike_layout * layout, const uint8_t * packed, block_spk4 * blocks);

#ifdef __cplusplus
}
#endif
