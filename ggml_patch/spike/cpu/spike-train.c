#include "spike-train.h"

#include <string.h>

size_t spike_train_size(int64_t n_inputs) {
    const size_t size = sizeof(spike_train) + (size_t) n_inputs*(sizeof(uint32_t) + 2*sizeof(int8_t));
    return (size + 63) & ~(size_t) 63;
}

static int magnitude_of(int value) {
    return value < 0 ? -value : value;
}

// A counting sort by (class, magnitude, sign): first the counts, then the places, then the inputs.
void spike_train_build(const block_spka * activations, int64_t n_inputs, spike_train * train) {
    memset(train, 0, sizeof(*train));
    train->step        = activations->threshold;
    train->coarse_unit = (float) (1 << (activations->salient_shift & SPIKE_MAX_SHIFT));

    uint32_t * inputs = (uint32_t *) (train + 1);
    int8_t *   values[2] = { (int8_t *) (inputs + n_inputs), (int8_t *) (inputs + n_inputs) + n_inputs };
    for (int64_t b = 0; b < n_inputs/QK_SPK; b++) {
        spike_activation_values(activations + b, values[0] + b*QK_SPK, values[1] + b*QK_SPK);
    }
    for (int k = 0; k < 2; k++) {
        for (int64_t i = 0; i < n_inputs; i++) {
            const int v = values[k][i];
            train->count[k][magnitude_of(v)][v < 0]++;
            train->sum[k] += v;
        }
        train->count[k][0][0] = 0; // silent inputs are in no list
    }

    uint32_t place[SPIKE_MAX_MAGNITUDE + 1][2];
    uint32_t next = 0;
    for (int k = 0; k < 2; k++) {
        for (int m = SPIKE_MAX_MAGNITUDE; m > 0; m--) {
            for (int sign = 0; sign < 2; sign++) {
                place[m][sign] = next;
                next += train->count[k][m][sign];
                if (train->count[k][m][sign] && !train->largest[k]) {
                    train->largest[k] = m;
                }
            }
        }
        if (!train->largest[k]) {
            continue; // most tokens have no coarse value
        }
        for (int64_t i = 0; i < n_inputs; i++) {
            const int v = values[k][i];
            if (v != 0) {
                inputs[place[magnitude_of(v)][v < 0]++] = (uint32_t) i;
            }
        }
    }
}
