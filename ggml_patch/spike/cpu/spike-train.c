#include "spike-train.h"

#include "spike-layout.h"

#include <string.h>

_Static_assert(SPIKE_MAX_TILED_INPUTS <= UINT16_MAX, "inputs have numbers of 16 bits");

size_t spike_train_size(int64_t n_inputs, int64_t n_chunks) {
    const size_t size = sizeof(spike_train) + (size_t) (n_chunks*SPIKE_CLASSES)*sizeof(spike_program)
        + (size_t) spike_max_spikes(n_inputs, n_chunks)*sizeof(uint32_t) + (size_t) (SPIKE_CLASSES*n_inputs)
        + (size_t) (n_chunks + 1)*sizeof(uint32_t) + (size_t) (n_inputs + 1)*sizeof(uint16_t);
    return (size + 63) & ~(size_t) 63;
}

static uint32_t padded(uint32_t n) {
    return (n + SPIKE_LIST_UNIT - 1)/SPIKE_LIST_UNIT*SPIKE_LIST_UNIT;
}

enum { BUCKETS = 2*(SPIKE_MAX_MAGNITUDE + 1) };

// Magnitude and sign as one number, 2*|value| + (value < 0); 0 is silent, and nothing has 1. Signs are as good as random, so
// that a branch would be mispredicted half of the time.
static inline uint8_t bucket_of(int8_t value) {
    const int8_t  negative  = (int8_t) (value >> 7);
    const uint8_t magnitude = (uint8_t) ((value ^ negative) - negative);
    return (uint8_t) (magnitude + magnitude - negative);
}

SPIKE_CLONES static void find_buckets(const int8_t * values, int64_t n, uint8_t * buckets) {
    for (int64_t i = 0; i < n; i++) {
        buckets[i] = bucket_of(values[i]);
    }
}

SPIKE_CLONES static int32_t sum_of(const int8_t * values, int64_t n) {
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += values[i];
    }
    return sum;
}

// Steps and places of the lists from the number of inputs in each bucket. Returns where the lists end.
static uint32_t lay_out_program(const uint32_t count[BUCKETS], uint32_t zero_line, spike_program * program, uint32_t * offsets,
                                uint32_t next, uint32_t place[BUCKETS]) {
    int largest = SPIKE_MAX_MAGNITUDE;
    while (largest > 0 && count[2*largest] + count[2*largest + 1] == 0) {
        largest--;
    }
    program->n_steps = largest;
    program->first   = next;

    int32_t fired = 0, fired_signed = 0, steps = 0, steps_signed = 0;
    for (int m = largest; m > 0; m--) {
        spike_step * step = &program->steps[largest - m];
        for (int bucket = 2*m; bucket < 2*m + 2; bucket++) {
            place[bucket] = next;
            next += padded(count[bucket]);
            if (count[bucket] > 0) { // the last places, of which inputs will overwrite all but the padding
                for (uint32_t e = 1; e <= SPIKE_LIST_UNIT; e++) {
                    offsets[next - e] = zero_line;
                }
            }
        }
        step->n_positive = (uint16_t) padded(count[2*m]);
        step->n_negative = (uint16_t) padded(count[2*m + 1]);
        step->spill      = 0;

        fired        += (int32_t) (count[2*m] + count[2*m + 1]);
        fired_signed += (int32_t) count[2*m] - (int32_t) count[2*m + 1];
        if (steps + fired > SPIKE_MAX_STEPS_COUNTED) {
            step[-1].spill      = 1;
            step[-1].correction = (int16_t) (8*steps_signed);
            steps = steps_signed = 0;
        }
        steps        += fired;
        steps_signed += fired_signed;
        if (m == 1) {
            step->spill      = 1;
            step->correction = (int16_t) (8*steps_signed);
        }
    }
    return next;
}

// Most inputs fire finely: a counting sort without branches. Also lists those that fire.
static uint32_t build_fine_program(const int8_t * values, int64_t first, int64_t last, uint32_t zero_line, spike_program * program,
                                   uint32_t * offsets, uint32_t next, uint16_t * active, uint32_t * n_active) {
    enum { COUNTERS = 4 }; // neighbours do not wait for each other's
    uint8_t  buckets[SPIKE_CHUNK_BLOCKS*QK_SPK];
    uint16_t counts[COUNTERS][BUCKETS] = { { 0 } };
    const int64_t n = last - first;
    find_buckets(values + first, n, buckets);
    uint32_t fires = *n_active;
    for (int64_t i = 0; i < n; i += COUNTERS) {
        for (int k = 0; k < COUNTERS; k++) {
            counts[k][buckets[i + k]]++;
            active[fires] = (uint16_t) (first + i + k);
            fires += buckets[i + k] != 0;
        }
    }
    *n_active = fires;
    uint32_t count[BUCKETS], place[BUCKETS];
    for (int bucket = 0; bucket < BUCKETS; bucket++) {
        count[bucket] = counts[0][bucket] + (uint32_t) counts[1][bucket] + counts[2][bucket] + counts[3][bucket];
    }
    const uint32_t end = lay_out_program(count, zero_line, program, offsets, next, place);
    place[0] = end; // the next list will overwrite what is silent
    uint32_t line = (uint32_t) first << SPIKE_LINE_SHIFT;
    for (int64_t i = 0; i < n; i++) {
        const uint8_t bucket = buckets[i];
        offsets[place[bucket]] = line;
        place[bucket] += bucket != 0;
        line += SPIKE_LINE_BYTES;
    }
    return end;
}

// Coarse values are few, and the blocks say where.
static uint32_t build_coarse_program(const int8_t * values, const block_spka * activations, int64_t first, int64_t last,
                                     uint32_t zero_line, spike_program * program, uint32_t * offsets, uint32_t next,
                                     uint16_t * active, uint32_t * n_active) {
    uint32_t count[BUCKETS] = { 0 };
    uint16_t inputs[SPIKE_CHUNK_BLOCKS*QK_SPK];
    uint32_t n = 0;
    for (int64_t b = first/QK_SPK; b < last/QK_SPK; b++) {
        for (uint64_t left = activations[b].coarse_mask & activations[b].salient_mask; left != 0; left &= left - 1) {
            const uint16_t input = (uint16_t) (b*QK_SPK + spike_lowest_bit(left));
            inputs[n] = input;
            n += values[input] != 0; // a coarse zero is silent
        }
    }
    for (uint32_t e = 0; e < n; e++) {
        count[bucket_of(values[inputs[e]])]++;
        active[*n_active + e] = inputs[e];
    }
    *n_active += n;
    uint32_t place[BUCKETS];
    const uint32_t end = lay_out_program(count, zero_line, program, offsets, next, place);
    for (uint32_t e = 0; e < n; e++) {
        offsets[place[bucket_of(values[inputs[e]])]++] = (uint32_t) inputs[e] << SPIKE_LINE_SHIFT;
    }
    return end;
}

void spike_train_build(const block_spka * activations, int64_t n_inputs, spike_train * train) {
    const int32_t n_chunks = train->n_chunks;
    memset(train, 0, sizeof(*train));
    train->n_chunks    = n_chunks;
    train->threshold   = activations->threshold;
    train->coarse_unit = (float) (1 << (activations->salient_shift & SPIKE_MAX_SHIFT));
    for (int k = 0; k < SPIKE_CLASSES; k++) {
        train->sum[k] = sum_of(spike_train_values(train, n_inputs, k), n_inputs);
    }
    spike_program * programs  = (spike_program *) (train + 1);
    uint32_t *      offsets   = (uint32_t *) (programs + n_chunks*SPIKE_CLASSES);
    uint32_t *      starts    = (uint32_t *) (uintptr_t) spike_train_active_starts(train, n_inputs);
    uint16_t *      active    = (uint16_t *) (starts + n_chunks + 1);
    const uint32_t  zero_line = (uint32_t) n_inputs << SPIKE_LINE_SHIFT;
    uint32_t next = 0, n_active = 0;
    int64_t  span = 0; // where the coarse inputs start that are in no program yet
    for (int64_t c = 0; c < n_chunks; c++) {
        const int64_t first = spike_chunk_start(n_inputs, n_chunks, c), last = spike_chunk_start(n_inputs, n_chunks, c + 1);
        const bool    ends_span = c + 1 == n_chunks || spike_chunk_start(n_inputs, n_chunks, c + 2) - span > SPIKE_CHUNK_BLOCKS*QK_SPK;
        spike_program * program = &programs[c*SPIKE_CLASSES];
        starts[c] = n_active;
        next = build_fine_program(spike_train_values(train, n_inputs, 0), first, last, zero_line, program, offsets, next, active, &n_active);
        if (ends_span) {
            next = build_coarse_program(spike_train_values(train, n_inputs, 1), activations, span, last, zero_line, program + 1, offsets, next,
                                        active, &n_active);
            span = last;
        } else {
            program[1].n_steps = 0;
            program[1].first   = next;
        }
        for (int k = 0; k < SPIKE_CLASSES; k++) {
            train->fires[k] |= program[k].n_steps > 0;
        }
    }
    starts[n_chunks] = n_active;
    train->n_spikes  = next;
}
