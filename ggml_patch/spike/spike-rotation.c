// The rotation that spreads outlier channels over a block.
#include "spike.h"

#include <string.h>

// The order of the stages is part of the format: it fixes the rounding.

#if defined(__GNUC__)

// Eight vectors of eight values. A stage within a vector adds each value to its partner's, with the sign of the upper of
// the two changed: upper = partner - own = partner + (-own), the same to the bit.
typedef float   vector __attribute__((vector_size(32)));
typedef int32_t lanes  __attribute__((vector_size(32)));

#    if defined(__clang__)
#        define SPIKE_SWAP(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#    else
#        define SPIKE_SWAP(v, ...) __builtin_shuffle(v, (lanes) { __VA_ARGS__ })
#    endif
#    define SPIKE_NEGATE(v, ...) ((vector) ((lanes) (v) ^ ((lanes) { __VA_ARGS__ } << 31)))

SPIKE_CLONES_WIDE void spike_rotate_block(float * x) {
    vector v[8];
    memcpy(v, x, sizeof(v));
    for (int i = 0; i < 8; i++) {
        v[i] = SPIKE_SWAP(v[i], 1, 0, 3, 2, 5, 4, 7, 6) + SPIKE_NEGATE(v[i], 0, 1, 0, 1, 0, 1, 0, 1);
        v[i] = SPIKE_SWAP(v[i], 2, 3, 0, 1, 6, 7, 4, 5) + SPIKE_NEGATE(v[i], 0, 0, 1, 1, 0, 0, 1, 1);
        v[i] = SPIKE_SWAP(v[i], 4, 5, 6, 7, 0, 1, 2, 3) + SPIKE_NEGATE(v[i], 0, 0, 0, 0, 1, 1, 1, 1);
    }
    for (int h = 1; h < 8; h *= 2) {
        for (int i = 0; i < 8; i++) {
            if (!(i & h)) {
                const vector a = v[i];
                const vector b = v[i + h];
                v[i]     = a + b;
                v[i + h] = a - b;
            }
        }
    }
    for (int i = 0; i < 8; i++) {
        v[i] = v[i] * 0.125f;
    }
    memcpy(x, v, sizeof(v));
}

#else

void spike_rotate_block(float * x) {
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

#endif
