// The inputs of a product become spikes, once for all products that follow each other with the same input.
#pragma once

#include "spike-work.h"

namespace spike {

// Whether the work buffer already holds the encoded input: the last product before this one in the same run of the graph
// had the same input tensor and settings, and since then nothing wrote to that input or to the encoding. Every
// thread finds the same, for it depends on the graph alone.
bool is_encoded(const ggml_tensor * op);

// The next product with repacked weights that the calling thread will come to in its graph, if it serves few tokens, or if it does
// not; else nullptr.
const ggml_tensor * following_product(bool of_few_tokens);

// Each thread encodes a contiguous range of src1's rows, in groups of eight where there are many, or the only row for itself.
void encode_tokens(const ggml_compute_params * params, const ggml_tensor * op, char * work, const work_layout & w);

} // namespace spike
