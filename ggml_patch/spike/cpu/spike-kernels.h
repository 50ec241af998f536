// Kernels: integrate-and-fire neurons in tiles of 128, additions only. One table per instruction set; the plain C one
// defines the result, and the others give the same integers.
#pragma once

#include "spike-layout.h"
#include "spike-prompt-kernels.h"
#include "spike-train.h"

#ifdef __cplusplus
extern "C" {
#endif

// Lines to prefetch while something else computes: a position that moves on by a fraction of a place each time, so that
// the requests are spread evenly. The memory system drops some all the same, wherever they come faster than it reads;
// so every line is requested SPIKE_AHEAD_TIMES times, SPIKE_AHEAD_AGAIN places apart.
#define SPIKE_AHEAD_SHIFT 16
#define SPIKE_AHEAD_TIMES 4
#define SPIKE_AHEAD_AGAIN 16
#define SPIKE_AHEAD_FIRST (SPIKE_AHEAD_AGAIN*(SPIKE_AHEAD_TIMES - 1)) // the first place of a list, so that none lies before it
typedef struct {
    const uint8_t * const * runs; // each of four or six lines: two at the address, two at `second` bytes from there, two at `third`
    size_t                  second, third; // third 0: four
    uint32_t                position; // of the next run, times 2^SPIKE_AHEAD_SHIFT; from SPIKE_AHEAD_FIRST places on
    uint32_t                step;     // for every SPIKE_LIST_UNIT spikes
} spike_ahead;

typedef struct {
    const char * name;

    // Runs a program over a tile: potential[row] += sum over spikes of (code - 8) * signed magnitude.
    // lines + offset is the line of an input that fires.
    void (*integrate)(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                      int32_t potential[SPIKE_TILE_ROWS]);

    // The same of half a tile, with requests as of integrate_ahead unless ahead is NULL.
    void (*integrate_half)(const uint8_t * lines, const spike_program * program, const uint32_t * offsets,
                           int32_t potential[SPIKE_HALF_TILE], spike_ahead * ahead);

    // Salient weights of a tile for one token: sum[row] = sum over extended weights of +-value.
    // salients: [block][slot][row]; values: one per input. n_blocks <= SPIKE_MAX_TILED_INPUTS/64. next_tile: as many salient
    // weights that will be needed next, or NULL.
    void (*add_salient)(const uint8_t * salients, const int8_t * values, int64_t n_blocks, int16_t sum[SPIKE_TILE_ROWS],
                        const uint8_t * next_tile);

    // Whether add_salient prefetches those of the next tile. Else integrate_ahead requests them with the lines.
    bool salients_ahead;

    // Whether matrices are stored in an even number of strips (see spike-layout.h).
    bool even_strips;

    // integrate for neighbouring tiles of a strip, and for every SPIKE_LIST_UNIT places in the program's lists and every tile
    // (see spike_program_places) prefetches of a run into the second-level cache, of lines that a later program needs.
    // The potentials of tile t are at potential + t*potential_stride. NULL: there is only integrate.
    void (*integrate_ahead)(const uint8_t * lines, int64_t n_tiles, const spike_program * program, const uint32_t * offsets,
                            int32_t * potential, int64_t potential_stride, spike_ahead * ahead);

    // See spike_list_spikes, with the same result but for what is beyond the ends of the lists.
    void (*list_spikes)(const int8_t * values, int64_t n, int64_t first, uint16_t zero_line, uint16_t * lines, uint16_t * active,
                        spike_lists * lists);

    const spike_prompt_kernels * prompt; // for many tokens
} spike_kernels;

extern const spike_kernels spike_kernels_plain_c;
#if defined(__x86_64__) && defined(__GNUC__)
#    define SPIKE_X86
extern const spike_kernels spike_kernels_avx2;
extern const spike_kernels spike_kernels_avx512;
#elif defined(__aarch64__) && defined(__GNUC__)
#    define SPIKE_AARCH64 // NEON is part of the architecture
extern const spike_kernels spike_kernels_neon;
#endif

// The fastest table that this CPU runs, or the one that the environment variable SPIKEQUANT_FORCE_ISA names
// (plain-c, avx2, avx512, neon; a name that the CPU cannot run is reported and ignored).
const spike_kernels * spike_select_kernels(void);

#ifdef __cplusplus
}
#endif
