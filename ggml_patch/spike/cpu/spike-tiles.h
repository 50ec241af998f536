// Products of repacked weights, tile by tile: what prompts and few tokens have in common.
#pragma once

#include "spike-kernels.h"
#include "spike-products.h"
#include "spike-work.h"

namespace spike {

constexpr int64_t DECODE_CHUNK_BLOCKS = 2;  // lines of 16 tiles for three such chunks (384 KB) stay in the second-level cache
constexpr int64_t DECODE_SHORT_CHUNK_BLOCKS = 3; // of short inputs (few chunks, and usually narrow strips) and of several tokens (longer lists)
constexpr int64_t SHORT_INPUTS        = 1024;
constexpr int64_t PROMPT_CHUNK_BLOCKS = 12; // a tile's lines fill six of eight ways of the second-level cache's sets that a full strip leaves them

// Many tokens per matrix (spike-prompt.cpp).
size_t prompt_scratch_size(int64_t n_inputs);
void   compute_prompt(const ggml_compute_params * params, const product & product, const ggml_tensor * op, char * work, const work_layout & w);

// Few tokens per matrix (spike-decode.cpp). n_tokens: the most that a matrix may have.
size_t decode_scratch_size(int64_t n_inputs, int64_t n_chunks, int64_t n_tokens);
void   compute_few_tokens(const ggml_compute_params * params, const product & product, const ggml_tensor * op, char * work, const work_layout & w);

// Takes arrays one after the other out of a thread's scratch; from nullptr it finds the size.
class scratch_arrays {
  public:
    explicit scratch_arrays(char * memory) : start(memory), next(memory) {}

    template <typename T> void take(T *& array, int64_t n) {
        array = (T *) next;
        next += aligned((size_t) n*sizeof(T));
    }

    size_t size() const { return (size_t) (next - start); }

  private:
    char * start;
    char * next;
};

// Adds the share of a tile's salient weights to the potentials [class][row]. next_tile: those that will be needed next, or nullptr.
void add_salient_of_token(const uint8_t * salients, const spike_layout & layout, const spike_train * train, int32_t * potential,
                          const uint8_t * next_tile);

// Offsets of the lines that fire where lines are so far apart.
void find_offsets(const spike_train * train, size_t stride, uint32_t * offsets);

// Potentials [class][row] of a tile to outputs. Kernels count every code from 8; the row's own zero-point makes up for the difference.
void read_out(const spike_train * train, float * output, const spike_layout & layout, const uint8_t * packed, int64_t tile, const int32_t * potential);

} // namespace spike
