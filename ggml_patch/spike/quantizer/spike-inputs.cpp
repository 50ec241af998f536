// Inputs of a layer as the quantizer wants them, and sums of their products.
#include "spike-quantizer.h"

#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace {

constexpr int64_t TILE  = 64;  // square tiles of the matrix; sizes are multiples of it
constexpr int64_t STRIP = 4;   // rows of a tile whose sums stay in registers
constexpr int64_t BATCH = 256; // tokens summed in single precision before they are added in double

template <typename F> void in_threads(int n_threads, F && work) {
    std::vector<std::thread> threads;
    for (int k = 1; k < n_threads; k++) {
        threads.emplace_back([&work] { work(); });
    }
    work();
    for (auto & thread : threads) {
        thread.join();
    }
}

// Columns first .. first + TILE of n_tokens rows, one after the other.
void pack(const float * x, int64_t n_tokens, int64_t size, int64_t first, float * out) {
    for (int64_t t = 0; t < n_tokens; t++) {
        std::copy(x + t*size + first, x + t*size + first + TILE, out + t*TILE);
    }
}

// sum[i][j] += a[t][i]*b[t][j] over packed tokens.
void add_tile(const float * a, const float * b, int64_t n_tokens, int64_t size, double * sum) {
    for (int64_t i = 0; i < TILE; i += STRIP) {
        float strip[STRIP][TILE] = {};
        for (int64_t t = 0; t < n_tokens; t++) {
            const float * x = a + t*TILE + i;
            const float * y = b + t*TILE;
            for (int64_t k = 0; k < STRIP; k++) {
                for (int64_t j = 0; j < TILE; j++) {
                    strip[k][j] += x[k]*y[j];
                }
            }
        }
        for (int64_t k = 0; k < STRIP; k++) {
            for (int64_t j = 0; j < TILE; j++) {
                sum[(i + k)*size + j] += strip[k][j];
            }
        }
    }
}

} // namespace

void spike_prepare_inputs(const float * x, int64_t n_tokens, int64_t n, const float * factors, float * y, int n_threads) {
    GGML_ASSERT(n % QK_SPK == 0);
    std::atomic<int64_t> next { 0 };
    in_threads(n_threads, [&] {
        for (int64_t first = next.fetch_add(BATCH); first < n_tokens; first = next.fetch_add(BATCH)) {
            for (int64_t t = first; t < std::min(first + BATCH, n_tokens); t++) {
                const float * in = x + t*n;
                float * out = y + t*n;
                for (int64_t i = 0; i < n; i++) {
                    out[i] = factors ? in[i]*factors[i] : in[i];
                }
                for (int64_t b = 0; b < n; b += QK_SPK) {
                    spike_rotate_block(out + b);
                }
            }
        }
    });
}

void spike_add_products(const float * a, const float * b, int64_t n_tokens, int64_t n, bool symmetric, double * sum, int n_threads) {
    GGML_ASSERT(n % TILE == 0);
    const int64_t n_tiles = n/TILE;
    std::atomic<int64_t> next { 0 };
    in_threads(n_threads, [&] {
        std::vector<float> left((size_t) (BATCH*TILE)), right((size_t) (BATCH*TILE));
        for (int64_t i = next++; i < n_tiles; i = next++) {
            for (int64_t t = 0; t < n_tokens; t += BATCH) {
                const int64_t m = std::min(BATCH, n_tokens - t);
                pack(a + t*n, m, n, i*TILE, left.data());
                for (int64_t j = 0; j < (symmetric ? i + 1 : n_tiles); j++) {
                    pack(b + t*n, m, n, j*TILE, right.data());
                    add_tile(left.data(), right.data(), m, n, sum + i*TILE*n + j*TILE);
                }
            }
        }
    });
}
