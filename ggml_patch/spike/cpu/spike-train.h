// A token as a spike train: for each input at most one spike, its time the larger the earlier.
//
// The train is cut into programs, one for each class of spikes and chunk of inputs. A program walks down the time axis,
// one step per magnitude: first the inputs that fire then (those with positive sign, then those with negative), then every
// potential grows by its current. Magnitude m fires at time 16 - m.
//
// Coarse spikes are few, so that a program for each chunk would be all overhead: those of several chunks (a span, of at most
// SPIKE_CHUNK_BLOCKS blocks) are in the program of the last of them, and the other coarse programs are empty.
#pragma once

#include "spike-layout.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SPIKE_MAX_MAGNITUDE 16
#define SPIKE_CLASSES       2  // 0 standard and finely salient values, 1 coarse ones
#define SPIKE_LIST_UNIT     4  // lists are padded to a multiple of it, with the line of zeros
#define SPIKE_LIST_SLACK    64 // places beyond the end of a list that may be overwritten
#define SPIKE_CHUNK_BLOCKS  63 // at most, in a program: 4032 inputs

// Kernels keep potentials in 16-bit lanes, as sums of code * steps modulo 2^16. With every code taken as 8 more than a
// signed one, a potential lies within 8*B of 8*C, where B counts a step for every spike that has fired so far, and C does
// the same with signs. B never passes 4095: before a step that would, the potentials move to 32 bits (a spill) and start
// again from zero, while the currents stay. A single step adds at most one per input of the chunk, 4032.
// |potential - 8*C| <= 8*4095 = 32760 < 2^15, so that the difference in 16 bits is the true one.
#define SPIKE_MAX_STEPS_COUNTED 4095

typedef struct {
    uint16_t n_positive; // lengths of the two lists, padded
    uint16_t n_negative;
    int16_t  spill;      // whether the potentials move to 32 bits after this step; always after the last
    int16_t  correction; // 8*C at a spill
} spike_step;

typedef struct {
    int32_t    n_steps; // from the largest magnitude down to 1; 0 if nothing fires
    uint32_t   first;   // where its lists start
    spike_step steps[SPIKE_MAX_MAGNITUDE];
} spike_program;

typedef struct {
    float    threshold;           // the token's step s
    float    coarse_unit;         // 2^salient_shift
    int32_t  sum[SPIKE_CLASSES];  // of all signed magnitudes: the zero-point's share
    int32_t  fires[SPIKE_CLASSES]; // whether any input does
    uint32_t n_spikes;            // length of all lists
    int32_t  n_chunks;            // set before the values; the rest is spike_train_build's
    uint64_t coarse_blocks[SPIKE_BLOCK_WORDS]; // bit by bit, the blocks in which any value is coarse
} spike_train;

// Inputs by magnitude and sign, 2*|value| + (value < 0). Bucket 0 is silent, and nothing is in bucket 1.
#define SPIKE_BUCKETS (2*(SPIKE_MAX_MAGNITUDE + 1))

// What lists of spikes hold.
typedef struct {
    uint32_t n_places; // of all lists, padding included
    uint32_t n_active; // inputs that fire
    uint16_t count[SPIKE_BUCKETS]; // that of buckets 0 and 1 is not set
} spike_lists;

// Lists the inputs of a chunk that fire, in the order of a program: for every bucket from the last to the second one the numbers
// of its inputs, in order, padded with that of the line of zeros; and all of them once more, in order of inputs. Up to
// SPIKE_LIST_SLACK places beyond the ends are overwritten.
// values: signed magnitudes of n inputs, a multiple of 64, from input `first` on. This one is plain C; kernels have their own.
void spike_list_spikes(const int8_t * values, int64_t n, int64_t first, uint16_t zero_line, uint16_t * lines, uint16_t * active,
                       spike_lists * lists);

// Sets the bits of blocks in which any value is not zero; the others are zero before.
void spike_find_blocks(const int8_t * values, int64_t n_blocks, uint64_t * found);

// The length of a list of n spikes, padding included.
static inline uint32_t spike_padded(uint32_t n) {
    return (n + SPIKE_LIST_UNIT - 1)/SPIKE_LIST_UNIT*SPIKE_LIST_UNIT;
}

// How many chunks of at most so many blocks (1..SPIKE_CHUNK_BLOCKS) an input takes. Their sizes differ by one block at most.
static inline int64_t spike_chunks(int64_t n_inputs, int64_t chunk_blocks) {
    return (n_inputs/QK_SPK + chunk_blocks - 1)/chunk_blocks;
}

// The first input of a chunk; that of chunk n_chunks is n_inputs.
static inline int64_t spike_chunk_start(int64_t n_inputs, int64_t n_chunks, int64_t chunk) {
    return chunk*(n_inputs/QK_SPK)/n_chunks*QK_SPK;
}

// Program of a class and chunk.
static inline const spike_program * spike_train_program(const spike_train * train, int spike_class, int64_t chunk) {
    return (const spike_program *) (train + 1) + chunk*SPIKE_CLASSES + spike_class;
}

// Length of a program's lists, padding included.
static inline uint32_t spike_program_places(const spike_train * train, int spike_class, int64_t chunk) {
    const int64_t index = chunk*SPIKE_CLASSES + spike_class;
    const spike_program * program = (const spike_program *) (train + 1) + index;
    return (index + 1 < train->n_chunks*SPIKE_CLASSES ? program[1].first : train->n_spikes) - program->first;
}

// Room for all lists, padding included, and for what is written beyond the last one: an even number.
static inline int64_t spike_max_spikes(int64_t n_inputs, int64_t n_chunks) {
    return n_inputs + n_chunks*SPIKE_CLASSES*2*SPIKE_MAX_MAGNITUDE*(SPIKE_LIST_UNIT - 1) + SPIKE_LIST_SLACK;
}

// The lines that fire: numbers of inputs, and n_inputs for the line of zeros.
static inline const uint16_t * spike_train_lines(const spike_train * train) {
    return (const uint16_t *) spike_train_program(train, 0, train->n_chunks);
}

// Signed magnitudes of all inputs of a class.
static inline const int8_t * spike_train_values(const spike_train * train, int64_t n_inputs, int spike_class) {
    return (const int8_t *) (spike_train_lines(train) + spike_max_spikes(n_inputs, train->n_chunks)) + spike_class*n_inputs;
}

static inline int8_t * spike_train_values_to_fill(spike_train * train, int64_t n_inputs) {
    return (int8_t *) (uintptr_t) spike_train_values(train, n_inputs, 0);
}

// Where the list of active inputs of each chunk starts, and where the last one ends: n_chunks + 1 numbers, then the lists.
static inline const uint32_t * spike_train_active_starts(const spike_train * train, int64_t n_inputs) {
    return (const uint32_t *) spike_train_values(train, n_inputs, SPIKE_CLASSES);
}

// Inputs that fire in the programs of a chunk.
static inline const uint16_t * spike_train_active(const spike_train * train, int64_t n_inputs, int64_t chunk, uint32_t * n) {
    const uint32_t * starts = spike_train_active_starts(train, n_inputs);
    *n = starts[chunk + 1] - starts[chunk];
    return (const uint16_t *) (starts + train->n_chunks + 1) + starts[chunk];
}

size_t spike_train_size(int64_t n_inputs, int64_t n_chunks);

// Builds the programs of a token. The train already holds n_chunks and the values.
void   spike_train_build(const block_spka * activations, int64_t n_inputs, spike_train * train);

#ifdef __cplusplus
}
#endif
