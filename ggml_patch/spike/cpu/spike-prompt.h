// Lines of tokens: the tokens' values input by input, so that a salient weight adds its input of 64 tokens at once.
#pragma once

#include "spike-kernels.h"
#include "spike-schedule.h"

namespace spike {

// How many tokens share a copy of a tile's lines and are a unit of work with it: as many as leave some for each thread, which then
// mostly reads what it has written itself. A power of two, and half as many or less where there are more threads.
int64_t tokens_per_unit(const ggml_tensor * op, int n_threads);

// Whether so many tokens are added as lines, or each alone.
inline bool goes_by_lines(int64_t n_tokens) {
    return n_tokens >= spike_select_kernels()->prompt->tokens_for_lines;
}

// Up to SPIKE_TOKEN_LINE tokens to lines[input][token]. What is beyond the last one, in eights, becomes zero.
void transpose_tokens(const spike_schedule * const * schedules, int64_t n_tokens, int64_t n_inputs, int16_t * lines);

} // namespace spike
