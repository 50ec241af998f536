#include "spike-quantizer.h"

#include "ggml.h"

#include <algorithm>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

namespace {

constexpr int64_t TILE  = 64; // square tiles of the matrix; sizes are multiples of it
constexpr int64_t STRIP = 4;  // rows of a tile whose sums stay in registers

struct site {
    int64_t             size;
    int64_t             n_tokens = 0;
    std::vector<double> sum; // lower triangle used, row by row; or the diagonal
};

// sum[i][j] += x[t][i]*x[t][j] over the tokens of one batch, for one tile of rows and columns.
// Single precision within a batch, double between batches.
void add_tile(const float * x, int64_t n_tokens, int64_t size, int64_t i0, int64_t j0, double * sum) {
    for (int64_t i = i0; i < i0 + TILE; i += STRIP) {
        float strip[STRIP][TILE] = {};
        for (int64_t t = 0; t < n_tokens; t++) {
            const float * a = x + t*size + i;
            const float * b = x + t*size + j0;
            for (int64_t k = 0; k < STRIP; k++) {
                for (int64_t j = 0; j < TILE; j++) {
                    strip[k][j] += a[k]*b[j];
                }
            }
        }
        for (int64_t k = 0; k < STRIP; k++) {
            for (int64_t j = 0; j < TILE; j++) {
                sum[(i + k)*size + j0 + j] += strip[k][j];
            }
        }
    }
}

} // namespace

struct spike_moments {
    std::unordered_map<std::string, int> index;
    std::vector<site>                    sites;
    bool                                 diagonal;
    int                                  n_threads;

    void add(site & s, const ggml_tensor * x) {
        const int64_t n_tokens = ggml_nrows(x);
        std::vector<float> rows((size_t) (n_tokens*s.size));
        for (int64_t t = 0; t < n_tokens; t++) {
            const int64_t i1 = t % x->ne[1], i2 = t/x->ne[1] % x->ne[2], i3 = t/(x->ne[1]*x->ne[2]);
            const float * row = (const float *) ((const char *) x->data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3]);
            std::copy(row, row + s.size, rows.data() + t*s.size);
        }
        s.n_tokens += n_tokens;
        if (diagonal) {
            for (int64_t t = 0; t < n_tokens; t++) {
                for (int64_t i = 0; i < s.size; i++) {
                    const float value = rows[(size_t) (t*s.size + i)];
                    s.sum[(size_t) i] += (double) value*value;
                }
            }
            return;
        }

        const int64_t n_tiles = s.size/TILE;
        auto work = [&](int64_t first) {
            for (int64_t i = first; i < n_tiles; i += n_threads) {
                for (int64_t j = 0; j <= i; j++) {
                    add_tile(rows.data(), n_tokens, s.size, i*TILE, j*TILE, s.sum.data());
                }
            }
        };
        std::vector<std::thread> threads;
        for (int k = 1; k < n_threads; k++) {
            threads.emplace_back(work, k);
        }
        work(0);
        for (auto & thread : threads) {
            thread.join();
        }
    }
};

spike_moments * spike_moments_new(const char * const * names, const int64_t * sizes, int n, bool diagonal, int n_threads) {
    auto * moments = new spike_moments;
    moments->diagonal  = diagonal;
    moments->n_threads = std::max(1, n_threads);
    for (int i = 0; i < n; i++) {
        GGML_ASSERT(sizes[i] % TILE == 0);
        moments->index[names[i]] = i;
        moments->sites.push_back({ sizes[i], 0, std::vector<double>((size_t) (diagonal ? sizes[i] : sizes[i]*sizes[i])) });
    }
    return moments;
}

void spike_moments_free(spike_moments * moments) {
    delete moments;
}

bool spike_moments_callback(ggml_tensor * node, bool ask, void * user_data) {
    auto * moments = (spike_moments *) user_data;
    if (node->op != GGML_OP_MUL_MAT) {
        return !ask; // not asked for; go on
    }
    const auto found = moments->index.find(node->src[0]->name);
    if (found == moments->index.end()) {
        return !ask;
    }
    site & s = moments->sites[(size_t) found->second];
    if (!ask && node->src[1]->type == GGML_TYPE_F32 && node->src[1]->ne[0] == s.size) {
        moments->add(s, node->src[1]);
    }
    return true;
}

void spike_moments_read(const spike_moments * moments, int index, float * matrix) {
    const site & s = moments->sites[(size_t) index];
    if (moments->diagonal) {
        std::copy(s.sum.begin(), s.sum.end(), matrix);
        return;
    }
    for (int64_t i = 0; i < s.size; i++) {
        for (int64_t j = 0; j <= i; j++) {
            matrix[i*s.size + j] = matrix[j*s.size + i] = (float) s.sum[i*s.size + j];
        }
    }
}

int64_t spike_moments_tokens(const spike_moments * moments, int index) {
    return moments->sites[(size_t) index].n_tokens;
}
