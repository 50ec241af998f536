// How the work buffer of a product is shared out.
#pragma once

#include "spike-products.h"

namespace spike {

constexpr size_t OTHERS_WORK = 2048; // bytes per thread at the start, for operations between products that share an input

struct work_layout {
    size_t  cursors, blocks, trains, lines, scratch, table; // offsets; trains are spike_schedules where many tokens are served
    int64_t tokens_per_unit;                       // of work, where many tokens are served
    int64_t units_per_job, lines_per_unit;         // lines of 64 tokens, see spike-prompt.h; 0 lines: none are kept here
    size_t  scratch_per_thread;
    size_t  size;
    int64_t n_inputs;
    int64_t n_tokens;   // of a matrix, at most
    int64_t n_chunks;   // of a train
    bool    own_encoding; // every thread encodes the one token for itself: sooner done than waiting for another thread
    size_t  train_size; // bytes from one train to the next

    // Where the values of a job's token start, those of its first input.
    int16_t * values_in_line(char * work, int64_t job, int64_t t) const;
};

enum class near_for { reading, writing };

// Brings memory near that this thread will soon use.
template <near_for USE = near_for::reading> void bring_near(const void * memory, size_t size) {
#if defined(__GNUC__)
    for (size_t i = 0; i < size; i += ALIGNMENT) {
        __builtin_prefetch((const char *) memory + i, USE == near_for::writing, 3);
    }
#else
    (void) memory, (void) size;
#endif
}

work_layout layout_work(const ggml_tensor * op, int n_threads);

// How many tokens an operation has for one matrix, at most.
int64_t most_tokens_of(const ggml_tensor * op);

// How many chunks the spike trains of an operation's inputs have.
int64_t chunks_of(const ggml_tensor * op);

} // namespace spike
