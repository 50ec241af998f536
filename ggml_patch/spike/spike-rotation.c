// The rotation that spreads outlier channels over a block.
#include "spike.h"

SPIKE_CLONES void spike_rotate_block(float * x) {
    // The order of the stages is part of the format: it fixes the rounding.
    for (int h = 1; h < QK_SPK; h *= 2) {
        for (int i = 0; i < QK_SPK; i += 2*h) {
            for (int j = i; j < i + h; j++) {
                const float a = x[j];
                const float b = x[j + h];
                x[j]     = a + b;
                x[j + h] = a - b;
            }
        }
    }
    for (int j = 0; j < QK_SPK; j++) {
        x[j] *= 0.125f;
    }
}
