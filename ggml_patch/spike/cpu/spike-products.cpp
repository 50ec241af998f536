#include "spike-products.h"

#include "spike-kernels.h"

#include "ggml-impl.h"

namespace spike {

dense_product::dense_product(const ggml_tensor * dst, size_t matrix_stride) :
    dst(dst), src0(dst->src[0]), src1(dst->src[1]), matrix_stride(matrix_stride) {}

int64_t dense_product::n_jobs() const {
    return src1->ne[2]*src1->ne[3];
}

job dense_product::get_job(int64_t j) const {
    const int64_t i2 = j % src1->ne[2], i3 = j/src1->ne[2];
    const int64_t m2 = i2/(src1->ne[2]/src0->ne[2]), m3 = i3/(src1->ne[3]/src0->ne[3]);
    const size_t offset = matrix_stride ? (size_t) (m3*src0->ne[2] + m2)*matrix_stride : (size_t) (m2*src0->nb[2] + m3*src0->nb[3]);
    return { (const char *) src0->data + offset, src1->ne[1] };
}

token dense_product::get_token(int64_t j, int64_t t) const {
    const int64_t i2 = j % src1->ne[2], i3 = j/src1->ne[2];
    return { j*src1->ne[1] + t, (float *) ((char *) dst->data + t*dst->nb[1] + i2*dst->nb[2] + i3*dst->nb[3]) };
}

routed_product::routed_product(const ggml_tensor * dst, size_t matrix_stride, void * table) :
    dst(dst), src0(dst->src[0]), src1(dst->src[1]), ids(dst->src[2]), matrix_stride(matrix_stride ? matrix_stride : src0->nb[2]),
    first((int64_t *) table), routes((route *) (first + src0->ne[2] + 1)) {}

size_t routed_product::table_size(const ggml_tensor * dst) {
    const ggml_tensor * ids = dst->src[2];
    return aligned((size_t) (dst->src[0]->ne[2] + 1)*sizeof(int64_t) + (size_t) (ids->ne[0]*ids->ne[1])*sizeof(route));
}

template <typename F> void routed_product::for_each_route(F f) const {
    for (int64_t row = 0; row < ids->ne[1]; row++) {
        for (int64_t slot = 0; slot < ids->ne[0]; slot++) {
            const int32_t expert = *(const int32_t *) ((const char *) ids->data + row*ids->nb[1] + slot*ids->nb[0]);
            GGML_ASSERT(expert >= 0 && expert < src0->ne[2]);
            f(expert, route { (int32_t) slot, (int32_t) row });
        }
    }
}

void routed_product::fill_table() const {
    const int64_t n_experts = src0->ne[2];
    std::fill(first, first + n_experts + 1, 0);
    for_each_route([&](int64_t expert, route) { first[expert + 1]++; });
    for (int64_t e = 0; e < n_experts; e++) {
        first[e + 1] += first[e];
    }
    // first[e] walks to the end of its own list, which is the start of the next
    for_each_route([&](int64_t expert, route r) { routes[first[expert]++] = r; });
    for (int64_t e = n_experts; e > 0; e--) {
        first[e] = first[e - 1];
    }
    first[0] = 0;
}

int64_t routed_product::n_jobs() const {
    return src0->ne[2];
}

job routed_product::get_job(int64_t expert) const {
    return { (const char *) src0->data + (size_t) expert*matrix_stride, first[expert + 1] - first[expert] };
}

token routed_product::get_token(int64_t expert, int64_t t) const {
    const route r = routes[first[expert] + t];
    return { r.row*src1->ne[1] + r.slot % src1->ne[1], (float *) ((char *) dst->data + r.slot*dst->nb[1] + r.row*dst->nb[2]) };
}

bool serves_few_tokens(const ggml_tensor * op) {
    // With weights from memory; with cached ones prompts gain from 4 tokens on.
    const int64_t many = spike_select_kernels()->prompt->integrate_schedule_ahead ? 4 : 5;
    if (op->op == GGML_OP_MUL_MAT_ID) {
        const ggml_tensor * ids = op->src[2];
        return ids->ne[0]*ids->ne[1] < many*op->src[0]->ne[2];
    }
    return op->src[1]->ne[1] < many;
}

} // namespace spike
