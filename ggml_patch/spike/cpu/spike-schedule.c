#include "spike-schedule.h"

#include "spike-kernels.h"
#include "spike-prompt-kernels.h"
#include "spike-train.h"

#include <string.h>

enum {
    MAX_CHUNK = SPIKE_SCHEDULE_CHUNK_BLOCKS*QK_SPK,
    MAX_RARE = 2*MAX_CHUNK, // spikes
    DIRECT_STEPS = 8,   // magnitudes that are steps of their own; most values have one
    MAX_WEIGHT = 31,
    MAX_CHUNKS = SPIKE_MAX_TILED_INPUTS/QK_SPK,
};

_Static_assert(2*MAX_CHUNK <= SPIKE_SCHEDULE_MAX_COUNTED, "all spikes of a chunk may fire in one step");
_Static_assert(SPIKE_SCHEDULE_SCALE*(2*MAX_CHUNK + 1) <= UINT16_MAX, "lists hold lines in 16 bits");

size_t spike_schedule_size(int64_t n_inputs, int64_t n_chunks) {
    const size_t size = sizeof(spike_schedule) + (size_t) (n_chunks*SPIKE_SCHEDULE_CLASSES)*sizeof(spike_schedule_program)
        + (size_t) spike_schedule_max_spikes(n_inputs, n_chunks)*sizeof(uint16_t) + (size_t) (SPIKE_SCHEDULE_CLASSES*n_inputs);
    return (size + 63) & ~(size_t) 63;
}

// The unit of a step's octave is 2^this.
static int unit_of_step(int step) {
    return step <= DIRECT_STEPS ? 0 : (step - DIRECT_STEPS - 1)/4 + 1;
}

static inline int bit_length(uint32_t x) {
#if defined(__GNUC__)
    return 32 - __builtin_clz(x | 1);
#else
    int n = 1;
    while (x >> n) {
        n++;
    }
    return n;
#endif
}

// The largest step that is no larger than a magnitude of 1 or more, and what is left of it.
static inline int step_below(int magnitude, int * rest) {
    const int above = bit_length((uint32_t) magnitude - 1) - 3;
    const int unit  = above > 0 ? above : 0;
    const int quotient = magnitude >> unit; // 4..8 where unit > 0; 4 is the last step of the octave below
    *rest = magnitude - (quotient << unit);
    return quotient + 4*unit;
}

// Steps of the one or two spikes that make up a magnitude.
static void set_rare_steps(spike_rare_steps * rare, int place, int magnitude) {
    int rest, nothing;
    rare->first[place]  = (uint8_t) step_below(magnitude, &rest);
    rare->second[place] = (uint8_t) (rest ? step_below(rest, &nothing) : 0); // the rest of up to 16*2^shift is a step itself
}

uint32_t spike_list_rare(const spike_chunk_values * values, const spike_rare_steps * of, uint16_t * lines, uint8_t * steps) {
    uint16_t inputs[MAX_CHUNK + SPIKE_SCHEDULE_SLACK]; // their lines
    const spike_prompt_kernels * kernels = spike_select_kernels()->prompt;
    const uint32_t n_inputs = kernels->gather_inputs(values->key, values->line_in_block, values->n, SPIKE_RARE, inputs);
    uint32_t n = 0;
    for (uint32_t e = 0; e < n_inputs; e++) {
        const uint32_t i         = inputs[e]/(2*SPIKE_SCHEDULE_SCALE);
        const int      value     = values->fine[i] + values->coarse[i]; // one of them is 0
        const int      magnitude = value < 0 ? -value : value;
        const int      place     = magnitude + (values->coarse[i] != 0)*SPIKE_RARE_COARSE;
        lines[n] = lines[n + 1] = inputs[e];
        steps[n]     = of->first[place];
        steps[n + 1] = of->second[place];
        n += 1 + (of->second[place] != 0);
    }
    return n;
}

SPIKE_CLONES static int largest_of(const uint8_t * steps, uint32_t n) {
    uint8_t largest = 0;
    for (uint32_t e = 0; e < n; e++) {
        largest = steps[e] > largest ? steps[e] : largest;
    }
    return largest;
}

SPIKE_CLONES static uint32_t count_negative(const uint16_t * spikes, uint32_t n) {
    uint32_t negative = 0;
    for (uint32_t e = 0; e < n; e++) {
        negative += spikes[e]/SPIKE_SCHEDULE_SCALE & 1;
    }
    return negative;
}

typedef struct {
    int32_t sum, magnitudes; // of values
} value_sums;

SPIKE_CLONES static value_sums sum_values(const int8_t * values, int64_t n) {
    enum { LANES = 64 };
    int16_t sum[LANES] = { 0 }, magnitudes[LANES] = { 0 }; // |.| <= 16*MAX_CHUNK/64
    for (int64_t i = 0; i < n; i += LANES) {
        for (int k = 0; k < LANES; k++) {
            const int16_t value = values[i + k];
            sum[k]        = (int16_t) (sum[k] + value);
            magnitudes[k] = (int16_t) (magnitudes[k] + (value < 0 ? -value : value));
        }
    }
    value_sums s = { 0, 0 };
    for (int k = 0; k < LANES; k++) {
        s.sum        += sum[k];
        s.magnitudes += magnitudes[k];
    }
    return s;
}

// Counts of a program under construction, see SPIKE_SCHEDULE_MAX_COUNTED.
typedef struct {
    int32_t positive, negative;
} step_count;

static uint16_t correction_of(step_count counted) {
    return (uint16_t) (8*counted.positive + 7*counted.negative);
}

static void set_spill(spike_schedule_step * step, int unit, step_count counted) {
    step->action     = SPIKE_SPILL;
    step->shift      = (uint16_t) unit;
    step->correction = correction_of(counted);
}

// The program of one class and chunk, or of both classes; fine or coarse may be all zeros. sums: of all its values together.
// Returns where the lists end.
SPIKE_CLONES static uint32_t build_program(const int8_t * fine, const int8_t * coarse, const spike_rare_steps * of, int64_t n, value_sums sums,
                                           spike_schedule_program * program, uint16_t * spikes, uint32_t next) {
    const spike_prompt_kernels * kernels = spike_select_kernels()->prompt;
    uint8_t  key[MAX_CHUNK], line_in_block[MAX_CHUNK];
    uint16_t rare_lines[MAX_RARE + SPIKE_SCHEDULE_SLACK];
    uint8_t  rare_steps[MAX_RARE + SPIKE_SCHEDULE_SLACK];
    for (int64_t b = 0; b < n; b += QK_SPK) {
        for (int i = 0; i < QK_SPK; i++) {
            const int8_t  sign = (int8_t) (fine[b + i] >> 7);
            const uint8_t size = (uint8_t) ((fine[b + i] ^ sign) - sign);
            key[b + i]           = (uint8_t) (size | -(size > DIRECT_STEPS) | -(coarse[b + i] != 0)); // SPIKE_RARE has all bits set
            line_in_block[b + i] = (uint8_t) (2*i - (sign | coarse[b + i] >> 7));
        }
    }
    const spike_chunk_values values = { fine, coarse, key, line_in_block, n };
    const uint32_t n_rare = kernels->list_rare(&values, of, rare_lines, rare_steps);
    memset(rare_steps + n_rare, 0, QK_SPK); // silent ones, to a multiple of 64
    const int top = largest_of(rare_steps, n_rare);

    const uint16_t zero_line = spike_schedule_zero_line(n);
    const bool never_full = sums.magnitudes <= SPIKE_SCHEDULE_MAX_COUNTED; // then only the last step spills, and the sums say all
    uint32_t   n_steps = 0;
    step_count fired = { 0, 0 }, counted = { 0, 0 }, before = { 0, 0 };
    program->first = next;
    for (int step = top > DIRECT_STEPS ? top : DIRECT_STEPS; step > 0; step--) {
        const uint32_t start  = next;
        if (step <= DIRECT_STEPS) {
            next += kernels->gather_inputs(key, line_in_block, n, (uint8_t) step, spikes + next);
        }
        if (step <= top) {
            next += kernels->gather_lines(rare_steps, rare_lines, (n_rare + QK_SPK - 1)/QK_SPK*QK_SPK, (uint8_t) step, spikes + next);
        }
        const uint32_t n_spikes = next - start;
        if (n_spikes == 0 && n_steps == 0) {
            continue; // nothing has fired yet
        }
        while ((next - start) % SPIKE_SCHEDULE_UNIT) {
            spikes[next++] = zero_line;
        }
        const uint32_t negative = never_full ? 0 : count_negative(spikes + start, n_spikes);
        fired.negative += (int32_t) negative;
        fired.positive += (int32_t) (n_spikes - negative);

        const int unit = unit_of_step(step);
        spike_schedule_step * own = &program->steps[n_steps++];
        if (counted.positive + counted.negative + fired.positive + fired.negative > SPIKE_SCHEDULE_MAX_COUNTED) {
            // a doubling that is given up leaves the unit of the step before
            const bool doubled = own[-1].action == SPIKE_DOUBLE;
            set_spill(own - 1, unit + doubled, doubled ? before : counted);
            counted = (step_count) { 0, 0 };
        }
        counted.positive += fired.positive;
        counted.negative += fired.negative;
        before = counted;
        own->n_spikes = (uint16_t) (next - start);
        own->action   = SPIKE_NEXT_STEP;
        if (step == 1) {
            if (never_full) {
                counted.negative = (sums.magnitudes - sums.sum)/2;
                counted.positive = (sums.magnitudes + sums.sum)/2;
            }
            set_spill(own, 0, counted);
        } else if (unit_of_step(step - 1) < unit) {
            if (2*(counted.positive + counted.negative) <= SPIKE_SCHEDULE_MAX_COUNTED) {
                own->action = SPIKE_DOUBLE;
                counted.positive *= 2;
                counted.negative *= 2;
            } else {
                set_spill(own, unit, counted);
                counted = (step_count) { 0, 0 };
            }
        }
    }
    program->n_steps = n_steps;
    return next;
}

void spike_schedule_build(const block_spka * activations, int64_t n_inputs, spike_schedule * schedule) {
    static const int8_t NONE[MAX_CHUNK] = { 0 };
    const int32_t  n_chunks = schedule->n_chunks;
    const int      shift    = activations->salient_shift & SPIKE_MAX_SHIFT;
    const int8_t * fine     = spike_schedule_values(schedule, n_inputs, 0);
    const int8_t * coarse   = spike_schedule_values(schedule, n_inputs, 1);
    schedule->threshold   = activations->threshold;
    schedule->coarse_unit = (float) (1 << shift);
    schedule->shift       = shift;

    value_sums sums[MAX_CHUNKS][SPIKE_SCHEDULE_CLASSES];
    int64_t    magnitudes[SPIKE_SCHEDULE_CLASSES] = { 0, 0 };
    schedule->sum[0] = schedule->sum[1] = 0;
    for (int64_t c = 0; c < n_chunks; c++) {
        const int64_t first = spike_chunk_start(n_inputs, n_chunks, c), n = spike_chunk_start(n_inputs, n_chunks, c + 1) - first;
        for (int k = 0; k < SPIKE_SCHEDULE_CLASSES; k++) {
            sums[c][k] = sum_values((k == 0 ? fine : coarse) + first, n);
            schedule->sum[k] += sums[c][k].sum;
            magnitudes[k]    += sums[c][k].magnitudes;
        }
    }
    memset(schedule->coarse_blocks, 0, sizeof(schedule->coarse_blocks));
    if (magnitudes[1] > 0) {
        spike_find_blocks(coarse, n_inputs/QK_SPK, schedule->coarse_blocks);
    }
    const int64_t exact = 1 << 24;
    schedule->merged = MAX_WEIGHT*magnitudes[0] <= exact && MAX_WEIGHT*magnitudes[1] <= exact
        && MAX_WEIGHT*(magnitudes[0] + (magnitudes[1] << shift)) <= INT32_MAX;
    schedule->largest = !schedule->merged ? INT32_MAX : magnitudes[1] > 0 ? SPIKE_MAX_MAGNITUDE << shift : SPIKE_MAX_MAGNITUDE;

    spike_rare_steps steps = { { 0 }, { 0 } };
    const int unit = schedule->merged ? shift : 0; // of coarse values in a program
    for (int m = 1; m <= SPIKE_MAX_MAGNITUDE; m++) {
        set_rare_steps(&steps, m, m);
        if (magnitudes[1] > 0) {
            set_rare_steps(&steps, SPIKE_RARE_COARSE + m, m << unit);
        }
    }
    spike_schedule_program * programs = (spike_schedule_program *) (schedule + 1);
    uint16_t * spikes = (uint16_t *) (programs + n_chunks*SPIKE_SCHEDULE_CLASSES);
    uint32_t next = 0;
    for (int64_t c = 0; c < n_chunks; c++) {
        const int64_t first = spike_chunk_start(n_inputs, n_chunks, c), n = spike_chunk_start(n_inputs, n_chunks, c + 1) - first;
        spike_schedule_program * program = programs + c*SPIKE_SCHEDULE_CLASSES;
        if (schedule->merged) {
            const value_sums both = { sums[c][0].sum + (int32_t) ((uint32_t) sums[c][1].sum << shift),
                                      sums[c][0].magnitudes + (sums[c][1].magnitudes << shift) };
            next = build_program(fine + first, coarse + first, &steps, n, both, program, spikes, next);
            program[1].n_steps = 0;
        } else {
            next = build_program(fine + first, NONE, &steps, n, sums[c][0], program, spikes, next);
            next = build_program(NONE, coarse + first, &steps, n, sums[c][1], program + 1, spikes, next);
        }
    }
}
