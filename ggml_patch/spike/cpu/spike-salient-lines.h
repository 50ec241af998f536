// Lines of tokens, half or whole: add_salient_lines of the kernels that take vectors.
#pragma once

#include "spike-prompt-kernels.h"

_Static_assert(2*SPIKE_TOKENS_AT_ONCE == SPIKE_TOKEN_LINE, "a line is half or whole");

// add_salient_lines for so many tokens, which are known when this is compiled; the including file has it.
SPIKE_INLINE void add_lines_of(const uint8_t * salients, int64_t n_rows, const int16_t * values, int64_t n_blocks, int n_tokens, int64_t stride,
                               int32_t * potential);

static void add_salient_lines(const uint8_t * salients, int64_t n_rows, const int16_t * values, int64_t n_blocks, int64_t n_tokens, int64_t stride,
                              int32_t * potential) {
    if (n_tokens == SPIKE_TOKENS_AT_ONCE) {
        add_lines_of(salients, n_rows, values, n_blocks, SPIKE_TOKENS_AT_ONCE, stride, potential);
    } else {
        add_lines_of(salients, n_rows, values, n_blocks, SPIKE_TOKEN_LINE, stride, potential);
    }
}
