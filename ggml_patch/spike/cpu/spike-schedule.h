// A token of a prompt as a schedule of spikes, both classes on one time axis that is laid out like a float's grid.
//
//   step       1  2 ... 8   9 10 11 12  13 14 15 16  17 ...
//   magnitude  1  2 ... 8  10 12 14 16  20 24 28 32  40 ...     four steps per octave
//
// Steps go from the largest magnitude down to 1. After each the potential grows by the current; at the border of an octave
// it doubles. A spike of magnitude 12*2^k, say, so enters it as many times as its size says, by additions only. A magnitude
// between two steps (an odd one from 9 to 15, times 2^k) takes two spikes, at the largest step below it and at that of the rest.
//
// Classes. A fine value counts for itself and a coarse one for 2^shift times itself, so that the potential is N + S*2^shift.
// The readout's float(N) + float(S)*2^shift is that integer rounded once, and so float(N + S*2^shift), as long as
// float(N) and float(S) are exact (|N|, |S| <= 2^24) and the sum fits 32 bits. With |weight| <= 31 the token's own sums of
// magnitudes bound all three; where they do not suffice (see spike_schedule_build) the classes get programs of their own.
//
// Signs. A negative spike adds the complement of its line, 15 - code, instead of taking the line away. So one list per step
// holds both signs, and the difference is a constant of the step.
#pragma once

#include "spike-layout.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SPIKE_SCHEDULE_CLASSES 2  // 0 fine (or both, merged), 1 coarse
#define SPIKE_SCHEDULE_UNIT    2  // lists are padded to a multiple of it, with the line of zeros
#define SPIKE_SCHEDULE_STEPS   72 // 8, and four for each octave up to the largest magnitude, 16*2^15
#define SPIKE_SCHEDULE_SLACK   64 // places behind the lists that a kernel may overwrite
#define SPIKE_SCHEDULE_SCALE   8  // lists hold numbers of lines times this, so that scaled addresses find them

// Kernels keep potentials in 16-bit lanes modulo 2^16, in the unit of the current octave. A code c counts c - 8 for a
// positive spike and 8 - c for a negative one; kernels add c or 15 - c instead, which is 8 or 7 more. With P and Q counting
// a step for every positive and negative spike that has fired so far since the last spill, a lane so lies within 8*(P + Q)
// of 8*P + 7*Q. P + Q never passes 4095, so that the difference, |.| <= 32760 < 2^15, is true when taken in 16 bits.
// Before a step or a doubling that would pass it, the potentials move to 32 bits (a spill), times the unit, and start again
// from zero, while the currents stay. A step adds one per spike of the chunk, at most two for each of 1984 inputs: 3968.
#define SPIKE_SCHEDULE_MAX_COUNTED  4095
#define SPIKE_SCHEDULE_CHUNK_BLOCKS 31

enum spike_action { SPIKE_NEXT_STEP, SPIKE_DOUBLE, SPIKE_SPILL };

typedef struct {
    uint16_t n_spikes;   // padded
    uint16_t correction; // at a spill: what the lanes hold too much
    uint16_t action;     // after the potentials have grown
    uint16_t shift;      // at a spill: the unit is 2^shift
} spike_schedule_step;

typedef struct {
    uint32_t            n_steps; // the last one spills; 0 if nothing fires
    uint32_t            first;   // where its lists start
    spike_schedule_step steps[SPIKE_SCHEDULE_STEPS];
} spike_schedule_program;

typedef struct {
    float    threshold;   // the token's step s
    float    coarse_unit; // 2^shift
    int32_t  shift;
    int32_t  merged;      // whether class 0 holds both
    int32_t  sum[SPIKE_SCHEDULE_CLASSES]; // of all signed magnitudes: the zero-point's share
    int32_t  largest;     // magnitude, of merged values; INT32_MAX if they are not
    int32_t  n_chunks;    // set before the values; the rest is spike_schedule_build's
    uint64_t coarse_blocks[SPIKE_BLOCK_WORDS]; // bit by bit, the blocks in which any value is coarse
} spike_schedule;

// Lines of a chunk: line 2*i of its input i, 2*i + 1 that line's complement, and zeros at the end.
static inline int64_t spike_schedule_lines(int64_t chunk_inputs) {
    return 2*chunk_inputs + 1;
}

static inline uint16_t spike_schedule_zero_line(int64_t chunk_inputs) {
    return (uint16_t) (SPIKE_SCHEDULE_SCALE*2*chunk_inputs);
}

static inline const uint8_t * spike_schedule_line(const uint8_t * lines, size_t line_bytes, uint16_t listed) {
    return lines + (size_t) listed*(line_bytes/SPIKE_SCHEDULE_SCALE);
}

static inline const spike_schedule_program * spike_schedule_program_of(const spike_schedule * schedule, int spike_class, int64_t chunk) {
    return (const spike_schedule_program *) (schedule + 1) + chunk*SPIKE_SCHEDULE_CLASSES + spike_class;
}

static inline int64_t spike_schedule_max_spikes(int64_t n_inputs, int64_t n_chunks) {
    const int64_t padding = n_chunks*SPIKE_SCHEDULE_CLASSES*SPIKE_SCHEDULE_STEPS*(SPIKE_SCHEDULE_UNIT - 1);
    return (2*n_inputs + padding + SPIKE_SCHEDULE_SLACK + 1)/2*2;
}

// All lists.
static inline const uint16_t * spike_schedule_spikes(const spike_schedule * schedule) {
    return (const uint16_t *) spike_schedule_program_of(schedule, 0, schedule->n_chunks);
}

// Signed magnitudes of all inputs of a class, in its own unit.
static inline const int8_t * spike_schedule_values(const spike_schedule * schedule, int64_t n_inputs, int spike_class) {
    return (const int8_t *) (spike_schedule_spikes(schedule) + spike_schedule_max_spikes(n_inputs, schedule->n_chunks)) + spike_class*n_inputs;
}

static inline int8_t * spike_schedule_values_to_fill(spike_schedule * schedule, int64_t n_inputs) {
    return (int8_t *) (uintptr_t) spike_schedule_values(schedule, n_inputs, 0);
}

size_t spike_schedule_size(int64_t n_inputs, int64_t n_chunks);

// Builds the programs of a token. The schedule already holds n_chunks and the values. chunks of at most
// SPIKE_SCHEDULE_CHUNK_BLOCKS blocks, see spike_chunks.
void spike_schedule_build(const block_spka * activations, int64_t n_inputs, spike_schedule * schedule);

#ifdef __cplusplus
}
#endif
