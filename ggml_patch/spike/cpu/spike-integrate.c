#include "spike-integrate.h"

#include <string.h>

// Bytes hold 17 codes of at most 15 without overflow.
enum { SPIKES_PER_BYTE_SUM = 17 };

// Two rows of neurons, 64 each, in byte lanes.
typedef struct {
    uint8_t low[SPIKE_LINE_BYTES];
    uint8_t high[SPIKE_LINE_BYTES];
} byte_sums;

static inline void add_line(byte_sums * sums, const uint8_t * line) {
    uint8_t codes[SPIKE_LINE_BYTES]; // a copy that nothing aliases, so that the loop becomes vector instructions
    memcpy(codes, line, sizeof(codes));
    for (int j = 0; j < SPIKE_LINE_BYTES; j++) {
        sums->low[j] = (uint8_t) (sums->low[j] + (codes[j] & 15));
    }
    for (int j = 0; j < SPIKE_LINE_BYTES; j++) {
        sums->high[j] = (uint8_t) (sums->high[j] + (codes[j] >> 4));
    }
}

static inline void add_bytes(const uint8_t * restrict bytes, int32_t * restrict current) {
    for (int j = 0; j < SPIKE_LINE_BYTES; j++) {
        current[j] += bytes[j];
    }
}

static inline void subtract_bytes(const uint8_t * restrict bytes, int32_t * restrict current) {
    for (int j = 0; j < SPIKE_LINE_BYTES; j++) {
        current[j] -= bytes[j];
    }
}

// Adds (or subtracts) the codes of the listed inputs to the neurons' current.
static void add_arrivals(const uint8_t * lines, const uint32_t * inputs, uint32_t n, int negative, int32_t * current) {
    while (n > 0) {
        const uint32_t group = n < SPIKES_PER_BYTE_SUM ? n : SPIKES_PER_BYTE_SUM;
        byte_sums sums;
        memset(&sums, 0, sizeof(sums));
        for (uint32_t e = 0; e < group; e++) {
            add_line(&sums, lines + ((size_t) inputs[e] << SPIKE_LINE_SHIFT));
        }
        if (negative) {
            subtract_bytes(sums.low, current);
            subtract_bytes(sums.high, current + SPIKE_LINE_BYTES);
        } else {
            add_bytes(sums.low, current);
            add_bytes(sums.high, current + SPIKE_LINE_BYTES);
        }
        inputs += group;
        n      -= group;
    }
}

// A spike that arrives at magnitude m stays in the current for the m steps to come, so that its weight enters the
// potential m times: the product, by additions (Abel summation).
void spike_integrate_tile(const uint8_t * lines, const spike_train * train, int spike_class, int32_t potential[SPIKE_TILE_ROWS]) {
    int32_t current[SPIKE_TILE_ROWS] = { 0 };
    memset(potential, 0, SPIKE_TILE_ROWS*sizeof(int32_t));

    const uint32_t * inputs = spike_train_inputs(train);
    if (spike_class == 1) {
        for (int m = 1; m <= SPIKE_MAX_MAGNITUDE; m++) {
            inputs += train->count[0][m][0] + train->count[0][m][1];
        }
    }
    for (int m = train->largest[spike_class]; m > 0; m--) {
        for (int negative = 0; negative < 2; negative++) {
            const uint32_t n = train->count[spike_class][m][negative];
            add_arrivals(lines, inputs, n, negative, current);
            inputs += n;
        }
        for (int r = 0; r < SPIKE_TILE_ROWS; r++) {
            potential[r] += current[r];
        }
    }
}
