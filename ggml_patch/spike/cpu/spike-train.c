#include "spike-train.h"

#include "spike-layout.h"

#include <string.h>

size_t spike_train_size(int64_t n_inputs, int64_t n_chunks) {
    const size_t size = sizeof(spike_train) + (size_t) (n_chunks*SPIKE_CLASSES)*sizeof(spike_program)
        + (size_t) spike_max_spikes(n_inputs, n_chunks)*sizeof(uint32_t) + (size_t) (SPIKE_CLASSES*n_inputs);
    return (size + 63) & ~(size_t) 63;
}

static uint32_t padded(uint32_t n) {
    return (n + SPIKE_LIST_UNIT - 1)/SPIKE_LIST_UNIT*SPIKE_LIST_UNIT;
}

enum { BUCKETS = 2*(SPIKE_MAX_MAGNITUDE + 1) };

// Magnitude and sign as one number, 2*|value| + (value < 0); 0 and 1 are silent. Signs are as good as random, so that
// a branch would be mispredicted half of the time.
static inline int bucket_of(int value) {
    const int negative  = -(value < 0);
    const int magnitude = (value ^ negative) - negative;
    return magnitude + magnitude - negative;
}

// Steps and places of the lists from the number of inputs in each bucket. Returns where the lists end.
static uint32_t lay_out_program(const uint32_t count[BUCKETS], uint32_t zero_line, spike_program * program, uint32_t * offsets,
                                uint32_t next, uint32_t place[BUCKETS]) {
    int largest = SPIKE_MAX_MAGNITUDE;
    while (largest > 0 && count[2*largest] + count[2*largest + 1] == 0) {
        largest--;
    }
    memset(program, 0, sizeof(*program));
    program->n_steps = largest;
    program->first   = next;

    int32_t fired = 0, fired_signed = 0, steps = 0, steps_signed = 0;
    for (int m = largest; m > 0; m--) {
        spike_step * step = &program->steps[largest - m];
        for (int bucket = 2*m; bucket < 2*m + 2; bucket++) {
            place[bucket] = next;
            for (uint32_t e = count[bucket]; e < padded(count[bucket]); e++) {
                offsets[next + e] = zero_line;
            }
            next += padded(count[bucket]);
        }
        step->n_positive = (uint16_t) padded(count[2*m]);
        step->n_negative = (uint16_t) padded(count[2*m + 1]);

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

// Most inputs fire finely: a counting sort without branches.
static uint32_t build_fine_program(const int8_t * values, int64_t first, int64_t last, uint32_t zero_line, spike_program * program,
                                   uint32_t * offsets, uint32_t next) {
    uint32_t counts[4][BUCKETS] = { { 0 } }; // neighbours do not wait for each other's counter
    for (int64_t i = first; i < last; i += 4) {
        for (int k = 0; k < 4; k++) {
            counts[k][bucket_of(values[i + k])]++;
        }
    }
    for (int bucket = 0; bucket < BUCKETS; bucket++) {
        counts[0][bucket] += counts[1][bucket] + counts[2][bucket] + counts[3][bucket];
    }
    uint32_t place[BUCKETS];
    const uint32_t end = lay_out_program(counts[0], zero_line, program, offsets, next, place);

    uint32_t * lists[BUCKETS];
    uint32_t   silent[SPIKE_CHUNK_BLOCKS*QK_SPK];
    for (int bucket = 0; bucket < BUCKETS; bucket++) {
        lists[bucket] = counts[0][bucket] == 0 || bucket < 2 ? silent : offsets + place[bucket];
    }
    for (int64_t i = first; i < last; i++) {
        *lists[bucket_of(values[i])]++ = (uint32_t) i << SPIKE_LINE_SHIFT;
    }
    return end;
}

// Coarse values are few, and the blocks say where.
static uint32_t build_coarse_program(const int8_t * values, const block_spka * activations, int64_t first, int64_t last,
                                     uint32_t zero_line, spike_program * program, uint32_t * offsets, uint32_t next) {
    uint32_t count[BUCKETS] = { 0 };
    uint32_t inputs[SPIKE_CHUNK_BLOCKS*QK_SPK];
    uint32_t n = 0;
    for (int64_t b = first/QK_SPK; b < last/QK_SPK; b++) {
        for (uint64_t left = activations[b].coarse_mask & activations[b].salient_mask; left != 0; left &= left - 1) {
            uint64_t lowest = left & -left;
            uint32_t position = 0;
            while (lowest >>= 1) {
                position++;
            }
            inputs[n] = (uint32_t) (b*QK_SPK) + position;
            count[bucket_of(values[inputs[n]])]++;
            n++;
        }
    }
    count[0] = count[1] = 0; // a coarse zero is silent
    uint32_t place[BUCKETS];
    const uint32_t end = lay_out_program(count, zero_line, program, offsets, next, place);
    for (uint32_t e = 0; e < n; e++) {
        const int bucket = bucket_of(values[inputs[e]]);
        if (bucket > 1) {
            offsets[place[bucket]++] = inputs[e] << SPIKE_LINE_SHIFT;
        }
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
        const int8_t * values = spike_train_values(train, n_inputs, k);
        int32_t sum = 0;
        for (int64_t i = 0; i < n_inputs; i++) {
            sum += values[i];
        }
        train->sum[k] = sum;
    }
    spike_program * programs  = (spike_program *) (train + 1);
    uint32_t *      offsets   = (uint32_t *) (programs + n_chunks*SPIKE_CLASSES);
    const uint32_t  zero_line = (uint32_t) n_inputs << SPIKE_LINE_SHIFT;
    uint32_t next = 0;
    for (int64_t c = 0; c < n_chunks; c++) {
        const int64_t first = spike_chunk_start(n_inputs, n_chunks, c), last = spike_chunk_start(n_inputs, n_chunks, c + 1);
        spike_program * program = &programs[c*SPIKE_CLASSES];
        next = build_fine_program(spike_train_values(train, n_inputs, 0), first, last, zero_line, program, offsets, next);
        next = build_coarse_program(spike_train_values(train, n_inputs, 1), activations, first, last, zero_line, program + 1, offsets, next);
        for (int k = 0; k < SPIKE_CLASSES; k++) {
            train->fires[k] |= program[k].n_steps > 0;
        }
    }
    train->n_spikes = next;
}
