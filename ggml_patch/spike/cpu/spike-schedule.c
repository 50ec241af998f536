#include "spike-schedule.h"

#include "spike-kernels.h"
#include "spike-prompt-kernels.h"
#include "spike-train.h"

#include <string.h>

enum {
    MAX_CHUNK = SPIKE_SCHEDULE_CHUNK_BLOCKS*QK_SPK,
    DIRECT_STEPS = 8,   // magnitudes that are steps of their own; most values have one
    RARE = 0xFF,        // stands for the magnitude of all others
    MAX_WEIGHT = 31,
};

_Static_assert(2*MAX_CHUNK <= SPIKE_SCHEDULE_MAX_COUNTED, "all spikes of a chunk may fire in one step");
_Static_assert(2*MAX_CHUNK + 1 <= UINT16_MAX, "lists hold lines in 16 bits");

size_t spike_schedule_size(int64_t n_inputs, int64_t n_chunks) {
    const size_t size = sizeof(spike_schedule) + (size_t) (n_chunks*SPIKE_SCHEDULE_CLASSES)*sizeof(spike_schedule_program)
        + (size_t) spike_schedule_max_spikes(n_inputs, n_chunks)*sizeof(uint16_t) + (size_t) (SPIKE_SCHEDULE_CLASSES*n_inputs);
    return (size + 63) & ~(size_t) 63;
}

// The unit of a step's octave is 2^this.
static int unit_of_step(int step) {
    return step <= DIRECT_STEPS ? 0 : (step - DIRECT_STEPS - 1)/4 + 1;
}

// Steps of the one or two spikes that make up a magnitude; 0: none.
typedef struct {
    uint8_t first, second;
} spike_steps;

static spike_steps steps_of(int magnitude) {
    int unit = 0;
    while (magnitude >> unit > DIRECT_STEPS) {
        unit++;
    }
    const int     quotient = magnitude >> unit; // 4..8 where unit > 0; 4 is the last step of the octave below
    spike_steps s = { (uint8_t) (quotient + 4*unit), 0 };
    if (magnitude != quotient << unit) {
        s.second = steps_of(magnitude - (quotient << unit)).first;
    }
    return s;
}

// Spikes of the inputs that are no direct steps, sorted by step.
typedef struct {
    uint16_t spikes[2*MAX_CHUNK];
    uint16_t start[SPIKE_SCHEDULE_STEPS + 2];      // of each step in spikes
    uint16_t negative[SPIKE_SCHEDULE_STEPS + 1];   // how many of a step are
    int      top;                                  // the largest step with a spike; 0 if there are none
} rare_spikes;

static void sort_rare(const int8_t * fine, const int8_t * coarse, const uint16_t * inputs, uint32_t n, const spike_steps table[2][17], rare_spikes * rare) {
    uint16_t spikes[2*MAX_CHUNK + 1];
    uint8_t  steps[2*MAX_CHUNK + 1];
    uint16_t count[SPIKE_SCHEDULE_STEPS + 1] = { 0 };
    uint32_t n_spikes = 0;
    memset(rare->negative, 0, sizeof(rare->negative));
    for (uint32_t e = 0; e < n; e++) {
        const uint32_t    i         = inputs[e] >> 1;
        const int         value     = fine[i] + coarse[i]; // one of them is 0
        const int         negative  = value < 0;
        const spike_steps s         = table[coarse[i] != 0][negative ? -value : value];
        const uint16_t    line      = (uint16_t) (2*i + (uint32_t) negative);
        spikes[n_spikes] = line;
        steps[n_spikes]  = s.first;
        count[s.first]++;
        rare->negative[s.first] = (uint16_t) (rare->negative[s.first] + negative);
        n_spikes++;
        spikes[n_spikes] = line;
        steps[n_spikes]  = s.second;
        count[s.second]++;
        rare->negative[s.second] = (uint16_t) (rare->negative[s.second] + negative);
        n_spikes += s.second != 0;
    }
    uint16_t next[SPIKE_SCHEDULE_STEPS + 1];
    uint16_t start = 0;
    rare->top = 0;
    for (int step = 1; step <= SPIKE_SCHEDULE_STEPS; step++) {
        rare->start[step] = next[step] = start;
        start = (uint16_t) (start + count[step]);
        rare->top = count[step] ? step : rare->top;
    }
    rare->start[SPIKE_SCHEDULE_STEPS + 1] = start;
    for (uint32_t e = 0; e < n_spikes; e++) {
        rare->spikes[next[steps[e]]++] = spikes[e];
    }
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

// The program of one class and chunk, or of both classes; fine or coarse may be all zeros. Returns where the lists end.
static uint32_t build_program(const int8_t * fine, const int8_t * coarse, int64_t n, const spike_steps table[2][17],
                              spike_schedule_program * program, uint16_t * spikes, uint32_t next) {
    const spike_prompt_kernels * kernels = spike_select_kernels()->prompt;
    uint8_t  magnitude[MAX_CHUNK];
    uint16_t line[MAX_CHUNK];
    uint16_t rare_inputs[MAX_CHUNK + SPIKE_SCHEDULE_SLACK];
    for (int64_t i = 0; i < n; i++) {
        const uint8_t negative = (uint8_t) (fine[i] < 0);
        const uint8_t size     = (uint8_t) (negative ? -fine[i] : fine[i]);
        magnitude[i] = size > DIRECT_STEPS || coarse[i] != 0 ? RARE : size;
    }
    for (int64_t i = 0; i < n; i++) {
        line[i] = (uint16_t) (2*i + (fine[i] < 0));
    }
    rare_spikes rare;
    sort_rare(fine, coarse, rare_inputs, kernels->gather(magnitude, line, n, RARE, rare_inputs), table, &rare);

    const uint16_t zero_line = spike_schedule_zero_line(n);
    uint32_t   n_steps = 0;
    step_count fired = { 0, 0 }, counted = { 0, 0 }, before = { 0, 0 };
    program->first = next;
    for (int step = rare.top > DIRECT_STEPS ? rare.top : DIRECT_STEPS; step > 0; step--) {
        const uint32_t start  = next;
        const uint32_t n_rare = (uint32_t) (rare.start[step + 1] - rare.start[step]);
        uint32_t negative = 0;
        if (step <= DIRECT_STEPS) {
            next += kernels->gather(magnitude, line, n, (uint8_t) step, spikes + next);
            for (uint32_t e = start; e < next; e++) {
                negative += spikes[e] & 1;
            }
        }
        memcpy(spikes + next, rare.spikes + rare.start[step], n_rare*sizeof(uint16_t));
        next     += n_rare;
        negative += rare.negative[step];
        const uint32_t n_spikes = next - start;
        if (n_spikes == 0 && n_steps == 0) {
            continue; // nothing has fired yet
        }
        while ((next - start) % SPIKE_SCHEDULE_UNIT) {
            spikes[next++] = zero_line;
        }
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

// Sum of values and of their magnitudes.
static void sum_values(const int8_t * values, int64_t n, int32_t * sum, int64_t * magnitudes) {
    int32_t s = 0, m = 0; // |m| <= 16*n < 2^31
    for (int64_t i = 0; i < n; i++) {
        s += values[i];
        m += values[i] < 0 ? -values[i] : values[i];
    }
    *sum        = s;
    *magnitudes = m;
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

    int64_t magnitudes[SPIKE_SCHEDULE_CLASSES];
    sum_values(fine,   n_inputs, &schedule->sum[0], &magnitudes[0]);
    sum_values(coarse, n_inputs, &schedule->sum[1], &magnitudes[1]);
    const int64_t exact = 1 << 24;
    schedule->merged = MAX_WEIGHT*magnitudes[0] <= exact && MAX_WEIGHT*magnitudes[1] <= exact
        && MAX_WEIGHT*(magnitudes[0] + (magnitudes[1] << shift)) <= INT32_MAX;
    schedule->largest = !schedule->merged ? INT32_MAX : magnitudes[1] > 0 ? SPIKE_MAX_MAGNITUDE << shift : SPIKE_MAX_MAGNITUDE;

    spike_steps table[SPIKE_SCHEDULE_CLASSES][17];
    for (int m = 0; m <= SPIKE_MAX_MAGNITUDE; m++) {
        table[0][m] = steps_of(m);
        table[1][m] = schedule->merged ? steps_of(m << shift) : steps_of(m);
    }
    spike_schedule_program * programs = (spike_schedule_program *) (schedule + 1);
    uint16_t * spikes = (uint16_t *) (programs + n_chunks*SPIKE_SCHEDULE_CLASSES);
    uint32_t next = 0;
    for (int64_t c = 0; c < n_chunks; c++) {
        const int64_t first = spike_chunk_start(n_inputs, n_chunks, c), n = spike_chunk_start(n_inputs, n_chunks, c + 1) - first;
        spike_schedule_program * program = programs + c*SPIKE_SCHEDULE_CLASSES;
        if (schedule->merged) {
            next = build_program(fine + first, coarse + first, n, table, program, spikes, next);
            program[1].n_steps = 0;
        } else {
            next = build_program(fine + first, NONE, n, table, program, spikes, next);
            next = build_program(NONE, coarse + first, n, table, program + 1, spikes, next);
        }
    }
}
