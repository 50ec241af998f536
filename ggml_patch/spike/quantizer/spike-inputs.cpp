// Inputs of a layer as the quantizer wants them, and sums of their products.
//
// Sums are taken in integers: each channel of a slice of the text is rounded to 12 bits, which is far finer than the noise of so few
// tokens, and integer products are twice to three times as fast as those of floats. Whatever the order and the instructions, the
// sum of a slice is the same.
#include "spike-quantizer.h"
#include "spike-threads.h"

#include "ggml.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t TILE  = 64;                     // channels of a tile; sizes are multiples of it
constexpr int64_t BATCH = 64;                     // tokens that a thread prepares at a time
constexpr int64_t TILE_CODES = SPIKE_SLICE*TILE;  // of a slice: [pair][channel][token of the pair]
constexpr int32_t LARGEST = 2047;                 // code; LARGEST^2*SPIKE_SLICE fits into 31 bits
constexpr float   SMALLEST = 1e-30f;              // largest value of a channel that counts

int64_t slices(int64_t n_tokens) {
    return (n_tokens + SPIKE_SLICE - 1)/SPIKE_SLICE;
}

// The largest magnitude of each channel of a tile; NaN or infinity if there is one.
void find_largest(const float * x, int64_t n_tokens, int64_t n, float * largest) {
    uint32_t bits[TILE] = {}; // those of magnitudes are in their order, NaN the largest of all
    for (int64_t t = 0; t < n_tokens; t++) {
        uint32_t row[TILE];
        std::memcpy(row, x + t*n, sizeof(row));
        for (int64_t j = 0; j < TILE; j++) {
            bits[j] = std::max(bits[j], row[j] & 0x7FFFFFFFu);
        }
    }
    std::memcpy(largest, bits, sizeof(bits));
}

void round_tile(const float * x, int64_t n_tokens, int64_t n, int16_t * codes, float * steps) {
    float largest[TILE], inverse[TILE];
    find_largest(x, n_tokens, n, largest);
    for (int64_t j = 0; j < TILE; j++) {
        const bool counts = largest[j] > SMALLEST && std::isfinite(largest[j]);
        steps[j]   = largest[j]/(float) LARGEST; // one that is not finite makes the sums so
        inverse[j] = counts ? (float) LARGEST/largest[j] : 0.0f;
    }
    for (int64_t t = 0; t < n_tokens; t++) {
        int16_t * out = codes + t/2*2*TILE + t%2;
        for (int64_t j = 0; j < TILE; j++) {
            out[2*j] = inverse[j] == 0.0f ? 0 : (int16_t) spike_round(x[t*n + j]*inverse[j]);
        }
    }
    if (n_tokens % 2 != 0) { // half a pair
        for (int64_t j = 0; j < TILE; j++) {
            codes[n_tokens/2*2*TILE + 2*j + 1] = 0;
        }
    }
}

// Vectors of pairs of codes, and of sums of their products.
#if defined(__AVX512BW__)

using vector = __m512i;
constexpr int64_t STRIP = 8; // rows whose sums stay in registers

inline vector load(const int16_t * pairs) { return _mm512_loadu_si512(pairs); }
inline vector repeat(int32_t pair) { return _mm512_set1_epi32(pair); }
inline void store(int32_t * sums, vector v) { _mm512_storeu_si512(sums, v); }

inline vector add_products(vector sums, vector a, vector b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sums, a, b);
#else
    return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
#endif
}

#elif defined(__AVX2__)

using vector = __m256i;
constexpr int64_t STRIP = 4;

inline vector load(const int16_t * pairs) { return _mm256_loadu_si256((const __m256i *) pairs); }
inline vector repeat(int32_t pair) { return _mm256_set1_epi32(pair); }
inline void store(int32_t * sums, vector v) { _mm256_storeu_si256((__m256i *) sums, v); }
inline vector add_products(vector sums, vector a, vector b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }

#else

constexpr int64_t STRIP = 4;
constexpr int64_t LANES = 8;

struct vector {
    int32_t lane[LANES];
};

inline vector load(const int16_t * pairs) {
    vector v;
    std::memcpy(&v, pairs, sizeof(v));
    return v;
}

inline vector repeat(int32_t pair) {
    vector v;
    std::fill(v.lane, v.lane + LANES, pair);
    return v;
}

inline void store(int32_t * sums, const vector & v) { std::memcpy(sums, &v, sizeof(v)); }

inline vector add_products(vector sums, const vector & a, const vector & b) {
    int16_t x[2*LANES], y[2*LANES];
    std::memcpy(x, &a, sizeof(x));
    std::memcpy(y, &b, sizeof(y));
    for (int64_t j = 0; j < LANES; j++) {
        sums.lane[j] += x[2*j]*y[2*j] + x[2*j + 1]*y[2*j + 1];
    }
    return sums;
}

#endif

constexpr int64_t WIDTH   = sizeof(vector)/sizeof(int32_t); // channels of a vector
constexpr int64_t VECTORS = 2;                              // of a row whose sums stay in registers

// sums[i][j] = sum of a[t][i]*b[t][j] over pairs of tokens, for two tiles. A product instruction takes a pair.
void multiply(const int16_t * a, const int16_t * b, int64_t n_pairs, int32_t * sums) {
    for (int64_t j = 0; j < TILE; j += VECTORS*WIDTH) {
        for (int64_t i = 0; i < TILE; i += STRIP) {
            vector strip[STRIP][VECTORS];
            for (int64_t k = 0; k < STRIP; k++) {
                for (int64_t c = 0; c < VECTORS; c++) {
                    strip[k][c] = repeat(0);
                }
            }
            for (int64_t p = 0; p < n_pairs; p++) {
                const int16_t * x = a + 2*(p*TILE + i);
                const int16_t * y = b + 2*(p*TILE + j);
                vector right[VECTORS];
                for (int64_t c = 0; c < VECTORS; c++) {
                    right[c] = load(y + 2*c*WIDTH);
                }
                for (int64_t k = 0; k < STRIP; k++) {
                    int32_t pair;
                    std::memcpy(&pair, x + 2*k, sizeof(pair));
                    const vector left = repeat(pair);
                    for (int64_t c = 0; c < VECTORS; c++) {
                        strip[k][c] = add_products(strip[k][c], left, right[c]);
                    }
                }
            }
            for (int64_t k = 0; k < STRIP; k++) {
                for (int64_t c = 0; c < VECTORS; c++) {
                    store(sums + (i + k)*TILE + j + c*WIDTH, strip[k][c]);
                }
            }
        }
    }
}

} // namespace

void spike_prepare_inputs(const float * x, int64_t n_tokens, int64_t n, const float * factors, const float * weights, float * y, int n_threads) {
    GGML_ASSERT(n % QK_SPK == 0);
    share_out(n_threads, (n_tokens + BATCH - 1)/BATCH, [&](int64_t batch) {
        for (int64_t t = batch*BATCH; t < std::min((batch + 1)*BATCH, n_tokens); t++) {
            const float * in = x + t*n;
            float * out = y + t*n;
            for (int64_t i = 0; i < n; i++) {
                out[i] = factors ? in[i]*factors[i] : in[i];
            }
            for (int64_t b = 0; b < n; b += QK_SPK) {
                spike_rotate_block(out + b);
            }
            for (int64_t i = 0; i < n; i++) {
                out[i] *= weights[t];
            }
        }
    });
}

void spike_round_inputs(const float * x, int64_t n_tokens, int64_t n, int16_t * codes, float * steps, int n_threads) {
    GGML_ASSERT(n % TILE == 0);
    const int64_t n_tiles = n/TILE;
    const int64_t n_slices = slices(n_tokens);
    share_out(n_threads, n_slices*n_tiles, [&](int64_t k) {
        const int64_t first = k/n_tiles*SPIKE_SLICE;
        const int64_t channel = k%n_tiles*TILE;
        round_tile(x + first*n + channel, std::min(SPIKE_SLICE, n_tokens - first), n, codes + k*TILE_CODES, steps + k*TILE);
    });
}

void spike_add_products(const int16_t * a, const float * a_steps, const int16_t * b, const float * b_steps, int64_t n_tokens, int64_t n,
                        bool symmetric, double * sum, int n_threads) {
    GGML_ASSERT(n % TILE == 0);
    const int64_t n_tiles = n/TILE;
    const int64_t n_slices = slices(n_tokens);
    std::atomic<int64_t> next { n_tiles - 1 }; // the longest first
    in_threads(n_threads, [&] {
        std::vector<int32_t> found((size_t) (TILE*TILE));
        for (int64_t i = next--; i >= 0; i = next--) {
            for (int64_t j = 0; j < (symmetric ? i + 1 : n_tiles); j++) {
                for (int64_t s = 0; s < n_slices; s++) {
                    const int64_t left = s*n_tiles + i, right = s*n_tiles + j;
                    const int64_t pairs = (std::min(SPIKE_SLICE, n_tokens - s*SPIKE_SLICE) + 1)/2;
                    multiply(a + left*TILE_CODES, b + right*TILE_CODES, pairs, found.data());
                    for (int64_t row = 0; row < TILE; row++) {
                        double * out = sum + (i*TILE + row)*n + j*TILE;
                        const double step = a_steps[left*TILE + row];
                        for (int64_t column = 0; column < TILE; column++) {
                            out[column] += found[row*TILE + column]*(step*b_steps[right*TILE + column]);
                        }
                    }
                }
            }
        }
    });
}
