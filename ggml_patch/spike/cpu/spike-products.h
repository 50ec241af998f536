// The products that a graph asks for, as jobs: a matrix with the tokens that go through it.
#pragma once

#include "spike-matmul.h"

#include "ggml-cpu-impl.h"
#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

namespace spike {

constexpr size_t ALIGNMENT = 64;

inline size_t aligned(size_t n) {
    return (n + ALIGNMENT - 1)/ALIGNMENT*ALIGNMENT;
}

// One matrix of the weights with all the tokens that go through it.
struct job {
    const void * matrix;
    int64_t      n_tokens;
};

struct token {
    int64_t column; // index of the encoded input
    float * output; // n_rows floats
};

class product {
  public:
    virtual ~product() = default;

    virtual int64_t n_jobs() const = 0;
    virtual job     get_job(int64_t j) const = 0;
    virtual token   get_token(int64_t j, int64_t t) const = 0;
};

// MUL_MAT: one job per slice of src1's outer dimensions.
class dense_product final : public product {
  public:
    dense_product(const ggml_tensor * dst, size_t matrix_stride);

    int64_t n_jobs() const override;
    job     get_job(int64_t j) const override;
    token   get_token(int64_t j, int64_t t) const override;

  private:
    const ggml_tensor * dst;
    const ggml_tensor * src0;
    const ggml_tensor * src1;
    const size_t        matrix_stride; // 0: as the tensor says
};

// MUL_MAT_ID: one job per expert. The routing table groups (token, slot) pairs by expert.
class routed_product final : public product {
  public:
    routed_product(const ggml_tensor * dst, size_t matrix_stride, void * table);

    static size_t table_size(const ggml_tensor * dst);

    // a counting sort by expert; called by one thread
    void fill_table() const;

    int64_t n_jobs() const override;
    job     get_job(int64_t expert) const override;
    token   get_token(int64_t expert, int64_t t) const override;

  private:
    struct route {
        int32_t slot;
        int32_t row;
    };

    template <typename F> void for_each_route(F f) const;

    const ggml_tensor * dst;
    const ggml_tensor * src0;
    const ggml_tensor * src1;
    const ggml_tensor * ids;
    const size_t        matrix_stride;
    int64_t *           first;
    route *             routes;
};

// Whether so few tokens (up to 3 or 4, on average) meet a matrix that its weights are best read where they lie.
bool serves_few_tokens(const ggml_tensor * op);

// How many units of its own range a thread, or another for it, has taken. Alone in a cache line.
struct alignas(ALIGNMENT) unit_cursor {
    std::atomic<int64_t> taken;
};

// Called by one thread before the units are shared out.
inline void reset_cursors(unit_cursor * cursors, int n_threads) {
    for (int i = 0; i < n_threads; i++) {
        new (cursors + i) unit_cursor { 0 };
    }
}

// Units of work in an order that keeps a thread on the same tokens: job, block of tokens, block of rows. Each thread has a range of
// them, which with many tokens are those that it encoded itself; what others have not yet come to, it takes when its own are done.
// compute_unit(job, row block, first token, number of tokens, whether the thread probably goes on with the next unit)
template <typename F>
void for_each_unit(const ggml_compute_params * params, unit_cursor * cursors, const product & product, int64_t token_block, int64_t n_row_blocks,
                   F compute_unit) {
    const auto units_of = [&](int64_t j) { return (product.get_job(j).n_tokens + token_block - 1)/token_block*n_row_blocks; };
    int64_t n_units = 0;
    for (int64_t j = 0; j < product.n_jobs(); j++) {
        n_units += units_of(j);
    }
    for (int i = 0; i < params->nth; i++) {
        const int     owner = (params->ith + i) % params->nth;
        const int64_t first = owner*n_units/params->nth, end = (owner + 1)*n_units/params->nth;
        int64_t j = 0, before = 0; // units of the jobs before j
        for (int64_t unit; (unit = first + cursors[owner].taken.fetch_add(1, std::memory_order_relaxed)) < end;) {
            while (unit >= before + units_of(j)) {
                before += units_of(j++);
            }
            const int64_t t0 = (unit - before)/n_row_blocks*token_block;
            compute_unit(j, (unit - before) % n_row_blocks, t0, std::min(token_block, product.get_job(j).n_tokens - t0), unit + 1 < end);
        }
    }
}

} // namespace spike
