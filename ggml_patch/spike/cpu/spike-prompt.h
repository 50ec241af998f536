// Lines of tokens: the tokens' values input by input, so that a salient weight adds its input of 64 tokens at once.
#pragma once

#include "spike-kernels.h"
#include "spike-schedule.h"

namespace spike {

// Whether so many tokens are added as lines, or each alone.
inline bool goes_by_lines(int64_t n_tokens) {
    return n_tokens >= spike_select_kernels()->prompt->tokens_for_lines;
}

// Up to SPIKE_TOKEN_LINE tokens to lines[input][token]. What is beyond the last one, in eights, becomes zero.
void transpose_tokens(const spike_schedule * const * schedules, int64_t n_tokens, int64_t n_inputs, int16_t * lines);

} // namespace spike
