// Kernels for many tokens, see spike-schedule.h: additions only. The plain C ones define the result.
#pragma once

#include "spike-schedule.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SPIKE_TOKEN_LINE     64 // tokens whose values for one input lie side by side
#define SPIKE_TOKENS_AT_ONCE 32 // of a line

// Values of a chunk under construction: n of each, a multiple of 64.
typedef struct {
    const int8_t *  fine;
    const int8_t *  coarse;
    const uint8_t * key; // of inputs whose spikes are to be found: a step, or SPIKE_RARE
    const uint8_t * line_in_block;
    int64_t         n;
} spike_chunk_values;

// Steps of the one or two spikes of a magnitude m (see spike-schedule.h): a fine one's at place m, a coarse one's
// SPIKE_RARE_COARSE further. 0: none.
#define SPIKE_RARE        0xFF
#define SPIKE_RARE_COARSE 32
typedef struct {
    uint8_t first[64], second[64];
} spike_rare_steps;

// A token of which salient weights are to be added: 16 * sum over extended weights of +-(fine + coarse * 2^shift) to each row's
// potential. Values are -16..15, and the sums of fine and of coarse ones fit 16 bits.
typedef struct {
    const int8_t *   fine;
    const int8_t *   coarse;        // NULL if all are zero
    const uint64_t * coarse_blocks; // bits of the blocks in which any is not
    int32_t          shift;
    int32_t *        potential;
} spike_salient_token;

// Lines that will be copied together soon, to be requested while others are added.
typedef struct {
    const uint8_t * next;    // of them
    const uint8_t * end;     // a multiple of the stride behind it
    size_t          stride;
    int             at_once; // how many with every group of up to 16 spikes of a step
} spike_line_requests;

typedef struct {
    // Copies the lines of n inputs of a tile, the complement of each behind it, and a line of zeros: to[line][64].
    void (*copy_lines)(const uint8_t * from, size_t stride, int64_t n, uint8_t * to);

    // The same of half a tile: to[line][32].
    void (*copy_half)(const uint8_t * from, size_t stride, int64_t n, uint8_t * to);

    // Runs a program over such lines: potential[row] += sum over spikes of (code - 8) * signed magnitude.
    void (*integrate_schedule)(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                               int32_t potential[SPIKE_TILE_ROWS]);

    // The same, with prefetches into the second-level cache. NULL: there is only integrate_schedule.
    void (*integrate_schedule_ahead)(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                                     int32_t potential[SPIKE_TILE_ROWS], spike_line_requests * requests);

    // Over lines of half a tile, with half of the work. requests: NULL, or as of integrate_schedule_ahead if that is there.
    void (*integrate_half_schedule)(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                                    int32_t potential[SPIKE_HALF_TILE], spike_line_requests * requests);

    // Salient weights of a tile, for each token by a look at its values. They reach 16 codes further, up or down, so that their
    // inputs enter the potential 16 times more. salients: [block][slot][row]; n_rows: of a tile or half of one.
    void (*add_salient_tokens)(const uint8_t * salients, int64_t n_rows, int64_t n_blocks, const spike_salient_token * tokens, int64_t n_tokens);

    // From how many tokens on it is faster to add whole lines of tokens. INT64_MAX: never, and the next two are NULL.
    int64_t tokens_for_lines;

    // Merged values, fine + coarse * 2^shift, of eight tokens into lines: lines[i][0..7], SPIKE_TOKEN_LINE values apart.
    // NULL for fine: a token without values. n is a multiple of 64.
    void (*transpose_values)(const int8_t * const fine[8], const int8_t * const coarse[8], const int shift[8], int64_t n, int16_t * lines);

    // Salient weights of a tile for the first n_tokens of a line: potential[token*stride + row] += 16 * sum over extended weights of
    // +-value. values: [input][token]; sums fit 16 bits. n_tokens is a multiple of SPIKE_TOKENS_AT_ONCE.
    void (*add_salient_lines)(const uint8_t * salients, int64_t n_rows, const int16_t * values, int64_t n_blocks, int64_t n_tokens,
                              int64_t stride, int32_t * potential);

    // The lines whose key is the wanted one, in order. Returns how many; up to SPIKE_SCHEDULE_SLACK more places of the list
    // are overwritten. n is a multiple of 64.
    uint32_t (*gather_lines)(const uint8_t * key, const uint16_t * line, int64_t n, uint8_t wanted, uint16_t * list);

    // The same for the lines of all inputs of a chunk: input i has line i/64*128 + line_in_block[i]. The list is to hold them
    // times SPIKE_SCHEDULE_SCALE.
    uint32_t (*gather_inputs)(const uint8_t * key, const uint8_t * line_in_block, int64_t n, uint8_t wanted, uint16_t * list);

    // The spikes of all inputs with the key SPIKE_RARE, in any order: lines, as lists hold them, and steps. Returns how many; up to
    // SPIKE_SCHEDULE_SLACK more places are overwritten.
    uint32_t (*list_rare)(const spike_chunk_values * values, const spike_rare_steps * of, uint16_t * lines, uint8_t * steps);
} spike_prompt_kernels;

// Class by class, with add_salient of the kernels in use. Without fine values (NULL) there are only coarse ones.
void spike_add_salient_tokens(const uint8_t * salients, int64_t n_rows, int64_t n_blocks, const spike_salient_token * tokens, int64_t n_tokens);

// The same of one token. next_tile: as of add_salient.
void spike_add_salient_token(const uint8_t * salients, int64_t n_rows, int64_t n_blocks, const spike_salient_token * token, const uint8_t * next_tile);

// By gather_inputs of the kernels in use.
uint32_t spike_list_rare(const spike_chunk_values * values, const spike_rare_steps * of, uint16_t * lines, uint8_t * steps);

extern const spike_prompt_kernels spike_prompt_kernels_plain_c;
extern const spike_prompt_kernels spike_prompt_kernels_avx2;
extern const spike_prompt_kernels spike_prompt_kernels_avx512;
extern const spike_prompt_kernels spike_prompt_kernels_neon;

#ifdef __cplusplus
}
#endif
