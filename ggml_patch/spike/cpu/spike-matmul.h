// MUL_MAT and MUL_MAT_ID with SPK4 weights: encode every token to spikes once, then integrate tile by tile.
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml.h"

#include <cstddef>

namespace spike {

// How an SPK4 tensor lies in memory.
enum class weight_form {
    stored, // blocks as in the file
    tiles,  // repacked, see spike-layout.h
};

weight_form form_of(const ggml_tensor * weights);

bool   computes(const ggml_tensor * op);
size_t work_size(const ggml_tensor * op, int n_threads);
void   compute(const ggml_compute_params * params, ggml_tensor * op);

} // namespace spike
