#include "spike-train.h"

#include "spike-kernels.h"
#include "spike-layout.h"

#include <string.h>

_Static_assert(SPIKE_MAX_TILED_INPUTS <= UINT16_MAX, "inputs have numbers of 16 bits");

size_t spike_train_size(int64_t n_inputs, int64_t n_chunks) {
    const size_t size = sizeof(spike_train) + (size_t) (n_chunks*SPIKE_CLASSES)*sizeof(spike_program)
        + (size_t) spike_max_spikes(n_inputs, n_chunks)*sizeof(uint16_t) + (size_t) (SPIKE_CLASSES*n_inputs)
        + (size_t) (n_chunks + 1)*sizeof(uint32_t) + (size_t) (n_inputs + SPIKE_LIST_SLACK)*sizeof(uint16_t);
    return (size + 63) & ~(size_t) 63;
}

// The bucket of a value. Signs are as good as random, so that a branch would be mispredicted half of the time.
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

// Where the list of each bucket starts, its padding set. Returns where the lists end.
static uint32_t place_lists(const uint16_t count[SPIKE_BUCKETS], uint16_t zero_line, uint16_t * lines, uint32_t place[SPIKE_BUCKETS]) {
    uint32_t next = 0;
    for (int m = SPIKE_MAX_MAGNITUDE; m > 0; m--) {
        for (int bucket = 2*m; bucket < 2*m + 2; bucket++) {
            place[bucket] = next;
            next += spike_padded(count[bucket]);
            if (count[bucket] > 0) { // the last places, of which inputs will overwrite all but the padding
                for (uint32_t e = 1; e <= SPIKE_LIST_UNIT; e++) {
                    lines[next - e] = zero_line;
                }
            }
        }
    }
    return next;
}

// A counting sort without branches: most inputs fire.
void spike_list_spikes(const int8_t * values, int64_t n, int64_t first, uint16_t zero_line, uint16_t * lines, uint16_t * active,
                       spike_lists * lists) {
    enum { COUNTERS = 4 }; // neighbours do not wait for each other's
    uint8_t  buckets[SPIKE_CHUNK_BLOCKS*QK_SPK];
    uint16_t counts[COUNTERS][SPIKE_BUCKETS] = { { 0 } };
    find_buckets(values, n, buckets);
    uint32_t fires = 0;
    for (int64_t i = 0; i < n; i += COUNTERS) {
        for (int k = 0; k < COUNTERS; k++) {
            counts[k][buckets[i + k]]++;
            active[fires] = (uint16_t) (first + i + k);
            fires += buckets[i + k] != 0;
        }
    }
    lists->n_active = fires;
    for (int bucket = 2; bucket < SPIKE_BUCKETS; bucket++) {
        lists->count[bucket] = (uint16_t) (counts[0][bucket] + counts[1][bucket] + counts[2][bucket] + counts[3][bucket]);
    }
    uint32_t place[SPIKE_BUCKETS];
    lists->n_places = place_lists(lists->count, zero_line, lines, place);
    place[0] = lists->n_places; // what is silent goes beyond the end
    for (int64_t i = 0; i < n; i++) {
        const uint8_t bucket = buckets[i];
        lines[place[bucket]] = (uint16_t) (first + i);
        place[bucket] += bucket != 0;
    }
}

// Coarse values are few.
static void list_coarse_spikes(const int8_t * values, int64_t n, int64_t first, uint16_t zero_line, uint16_t * lines, uint16_t * active,
                               spike_lists * lists) {
    uint32_t found = 0;
    memset(lists->count, 0, sizeof(lists->count));
    for (int64_t i = 0; i < n; i += 8) {
        uint64_t eight;
        memcpy(&eight, values + i, sizeof(eight));
        if (eight == 0) {
            continue;
        }
        for (int64_t k = i; k < i + 8; k++) {
            if (values[k] != 0) {
                lists->count[bucket_of(values[k])]++;
                active[found++] = (uint16_t) (first + k);
            }
        }
    }
    uint32_t place[SPIKE_BUCKETS];
    lists->n_active = found;
    lists->n_places = place_lists(lists->count, zero_line, lines, place);
    for (uint32_t e = 0; e < found; e++) {
        lines[place[bucket_of(values[active[e] - first])]++] = active[e];
    }
}

// The steps of a program whose lists start at `first`.
static void lay_out_program(const spike_lists * lists, uint32_t first, spike_program * program) {
    const uint16_t * count = lists->count;
    int largest = lists->n_active > 0 ? SPIKE_MAX_MAGNITUDE : 0;
    while (largest > 0 && count[2*largest] + count[2*largest + 1] == 0) {
        largest--;
    }
    program->n_steps = largest;
    program->first   = first;

    int32_t fired = 0, fired_signed = 0, steps = 0, steps_signed = 0;
    for (int m = largest; m > 0; m--) {
        spike_step * step = &program->steps[largest - m];
        step->n_positive = (uint16_t) spike_padded(count[2*m]);
        step->n_negative = (uint16_t) spike_padded(count[2*m + 1]);
        step->spill      = 0;

        fired        += count[2*m] + count[2*m + 1];
        fired_signed += count[2*m] - count[2*m + 1];
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
}

SPIKE_CLONES void spike_find_blocks(const int8_t * values, int64_t n_blocks, uint64_t * found) {
    for (int64_t b = 0; b < n_blocks; b++) {
        int8_t any = 0;
        for (int i = 0; i < QK_SPK; i++) {
            any |= values[b*QK_SPK + i];
        }
        found[b/64] |= (uint64_t) (any != 0) << b % 64;
    }
}

void spike_train_build(const block_spka * activations, int64_t n_inputs, spike_train * train) {
    const spike_kernels * kernels = spike_select_kernels();
    const int32_t n_chunks = train->n_chunks;
    memset(train, 0, sizeof(*train));
    train->n_chunks    = n_chunks;
    train->threshold   = activations->threshold;
    train->coarse_unit = (float) (1 << (activations->salient_shift & SPIKE_MAX_SHIFT));
    const int8_t * fine = spike_train_values(train, n_inputs, 0), * coarse = spike_train_values(train, n_inputs, 1);
    train->sum[0] = sum_of(fine, n_inputs);
    train->sum[1] = sum_of(coarse, n_inputs);
    spike_find_blocks(coarse, n_inputs/QK_SPK, train->coarse_blocks);
    spike_program * programs  = (spike_program *) (train + 1);
    uint16_t *      lines     = (uint16_t *) (programs + n_chunks*SPIKE_CLASSES);
    uint32_t *      starts    = (uint32_t *) (uintptr_t) spike_train_active_starts(train, n_inputs);
    uint16_t *      active    = (uint16_t *) (starts + n_chunks + 1);
    const uint16_t  zero_line = (uint16_t) n_inputs;
    uint32_t next = 0, n_active = 0;
    int64_t  span = 0; // where the coarse inputs start that are in no program yet
    for (int64_t c = 0; c < n_chunks; c++) {
        const int64_t first = spike_chunk_start(n_inputs, n_chunks, c), last = spike_chunk_start(n_inputs, n_chunks, c + 1);
        const bool    ends_span = c + 1 == n_chunks || spike_chunk_start(n_inputs, n_chunks, c + 2) - span > SPIKE_CHUNK_BLOCKS*QK_SPK;
        spike_program * program = &programs[c*SPIKE_CLASSES];
        spike_lists lists;
        starts[c] = n_active;
        kernels->list_spikes(fine + first, last - first, first, zero_line, lines + next, active + n_active, &lists);
        lay_out_program(&lists, next, &program[0]);
        next     += lists.n_places;
        n_active += lists.n_active;
        if (ends_span) {
            list_coarse_spikes(coarse + span, last - span, span, zero_line, lines + next, active + n_active, &lists);
            lay_out_program(&lists, next, &program[1]);
            next     += lists.n_places;
            n_active += lists.n_active;
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
