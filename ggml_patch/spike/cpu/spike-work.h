// How the work buffer of a product is shared out.
#pragma once

#include "spike-products.h"

namespace spike {

constexpr size_t OTHERS_WORK = 2048; // bytes per thread at the start, for operations between products that share an input

struct work_layout {
    size_t  blocks, trains, scratch, table; // offsets; trains are spike_schedules where many tokens are served
    size_t  scratch_per_thread;
    size_t  size;
    int64_t n_chunks;   // of a train
    bool    own_encoding; // every thread encodes the one token for itself: sooner done than waiting for another thread
    size_t  train_size; // bytes from one train to the next
};

work_layout layout_work(const ggml_tensor * op, int n_threads);

// How many chunks the spike trains of an operation's inputs have.
int64_t chunks_of(const ggml_tensor * op);

} // namespace spike
