// GPTQ for uniform rows: one threshold and one zero-point per row, two salient weights per block.
//
//  1. a threshold and zero-point by search, errors weighted by the diagonal of the moments
//  2. GPTQ (Frantar et al. 2022) over the inputs in descending order of their moment, for several thresholds;
//     the one of least loss stays
//  3. coordinate descent on the codes, with free choice of the salient positions, and a least-squares threshold
#include "spike-quantizer.h"

#include "ggml-impl.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

namespace {

constexpr int     LANES = 32; // rows that go through GPTQ together, one per vector lane
constexpr float   THRESHOLD_GRID[] = { 1.0f, 0.9f, 0.8f, 0.7f, 0.6f }; // of the searched one
constexpr float   EXTENSION = 16.0f;

float clamp(float x, float lo, float hi) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
}

// The upper triangular U with (H + damping)^-1 = U^T U, row by row. False if H is not positive definite.
// Plain loops over rows, in double: each element sees one fixed sequence of operations.
bool factor_inverse(const std::vector<float> & h, int64_t n, std::vector<float> & u) {
    // H = R R^T with R upper: from the last input to the first. Row k of r holds column k of R.
    std::vector<double> r(h.begin(), h.end());
    for (int64_t k = n - 1; k >= 0; k--) {
        double * column = r.data() + k*n;
        if (!(column[k] > 0.0)) {
            return false;
        }
        const double pivot = std::sqrt(column[k]);
        for (int64_t i = 0; i < k; i++) {
            column[i] /= pivot;
        }
        column[k] = pivot;
        for (int64_t i = 0; i < k; i++) {
            const double factor = column[i];
            double * row = r.data() + i*n;
            for (int64_t j = 0; j <= i; j++) {
                row[j] -= factor*column[j];
            }
        }
    }
    std::vector<double> inverse((size_t) (n*n));
    for (int64_t i = n - 1; i >= 0; i--) {
        double * row = inverse.data() + i*n;
        row[i] = 1.0;
        for (int64_t k = i + 1; k < n; k++) {
            const double factor = r[k*n + i];
            const double * other = inverse.data() + k*n;
            for (int64_t j = k; j < n; j++) {
                row[j] -= factor*other[j];
            }
        }
        const double pivot = r[i*n + i];
        for (int64_t j = i; j < n; j++) {
            row[j] /= pivot;
        }
    }
    u.assign(inverse.begin(), inverse.end());
    return true;
}

class quantizer {
  public:
    quantizer(const float * weights, const float * moments, int64_t n_rows, int64_t n, const spike_quantizer_options & options) :
        weights(weights), n_rows(n_rows), n(n), n_blocks(n/QK_SPK), options(options), h(moments, moments + n*n), order(n) {
        double diagonal = 0.0;
        for (int64_t i = 0; i < n; i++) {
            diagonal += h[i*n + i];
        }
        mean_diagonal = (float) (diagonal/(double) n);
        if (!(mean_diagonal > 0.0f)) { // inputs that never fire: any code will do, take the nearest
            mean_diagonal = 1.0f;
        }
        damped = h;
        for (int64_t i = 0; i < n; i++) {
            damped[i*n + i] += options.damping*mean_diagonal;
        }
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return h[(int64_t) a*n + a] > h[(int64_t) b*n + b]; });
    }

    bool prepare() {
        std::vector<float> permuted((size_t) (n*n));
        for (int64_t i = 0; i < n; i++) {
            for (int64_t j = 0; j < n; j++) {
                permuted[i*n + j] = damped[(int64_t) order[i]*n + order[j]];
            }
        }
        return factor_inverse(permuted, n, u);
    }

    // Rows r0 .. r0 + LANES - 1, as far as they exist.
    void quantize_batch(int64_t r0, block_spk4 * blocks, float * error) const {
        const int n_lanes = (int) std::min<int64_t>(LANES, n_rows - r0);
        std::vector<float> codes((size_t) (LANES*n)); // [row][input], threshold units, zero at the zero-point
        float threshold[LANES], zero_point[LANES];
        search(r0, n_lanes, threshold, zero_point);
        choose_threshold(r0, n_lanes, threshold, zero_point, codes);
        for (int lane = 0; lane < n_lanes; lane++) {
            const float * w = weights + (r0 + lane)*n;
            float * v = codes.data() + lane*n;
            for (int round = 0; round < options.rounds; round++) {
                descend(w, v, threshold[lane], zero_point[lane]);
                threshold[lane] = refit(w, v, threshold[lane]);
            }
            store(v, threshold[lane], zero_point[lane], blocks + (r0 + lane)*n_blocks);
            error[r0 + lane] = relative_error(w, v, threshold[lane]);
        }
    }

  private:
    // Nearest rounding at several thresholds and zero-points; the errors are weighted by the diagonal of H.
    void search(int64_t r0, int n_lanes, float * threshold, float * zero_point) const {
        std::vector<float> importance((size_t) n);
        for (int64_t i = 0; i < n; i++) {
            importance[i] = h[i*n + i]/mean_diagonal;
        }
        for (int lane = 0; lane < n_lanes; lane++) {
            spike_search_row(weights + (r0 + lane)*n, importance.data(), n, options.salient_weights, &threshold[lane], &zero_point[lane]);
        }
    }

    // Marks the inputs whose codes may be extended during GPTQ: the largest magnitudes of each block.
    void mark_salient(const float * w, std::vector<float> & reach) const {
        for (int64_t b = 0; b < n; b += QK_SPK) {
            int largest[QK_SPK];
            std::iota(largest, largest + QK_SPK, 0);
            std::stable_sort(largest, largest + QK_SPK, [&](int i, int j) { return std::fabs(w[b + i]) > std::fabs(w[b + j]); });
            for (int s = 0; s < QK_SPK; s++) {
                reach[b + largest[s]] = s < options.salient_weights ? EXTENSION : 0.0f;
            }
        }
    }

    void choose_threshold(int64_t r0, int n_lanes, float * threshold, const float * zero_point, std::vector<float> & codes) const {
        // lanes side by side, inputs in GPTQ's order
        std::vector<float> w0((size_t) (n*LANES)), reach((size_t) (n*LANES)), row_reach((size_t) n), w((size_t) (n*LANES));
        for (int lane = 0; lane < LANES; lane++) {
            const float * row = weights + (r0 + std::min(lane, n_lanes - 1))*n;
            mark_salient(row, row_reach);
            for (int64_t i = 0; i < n; i++) {
                w0[i*LANES + lane]    = row[order[i]];
                reach[i*LANES + lane] = row_reach[order[i]];
            }
        }
        float best_loss[LANES], best_threshold[LANES] = {};
        std::fill(best_loss, best_loss + LANES, INFINITY);
        for (const float factor : THRESHOLD_GRID) {
            float theta[LANES], zero[LANES], loss[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                const int source = std::min(lane, n_lanes - 1);
                theta[lane] = spike_threshold_on_grid(threshold[source]*factor);
                zero[lane]  = zero_point[source];
            }
            w = w0;
            run_gptq(w, reach, theta, zero, loss);
            for (int lane = 0; lane < n_lanes; lane++) {
                if (loss[lane] < best_loss[lane]) {
                    best_loss[lane]      = loss[lane];
                    best_threshold[lane] = theta[lane];
                    for (int64_t i = 0; i < n; i++) {
                        codes[lane*n + order[i]] = w[i*LANES + lane];
                    }
                }
            }
        }
        std::copy(best_threshold, best_threshold + n_lanes, threshold);
    }

    // Rounds input after input and lets the inputs to come make up for the error. On return w holds the codes.
    void run_gptq(std::vector<float> & w, const std::vector<float> & reach, const float * theta, const float * zero, float * loss) const {
        float inverse[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            inverse[lane] = 1.0f/theta[lane];
            loss[lane]    = 0.0f;
        }
        for (int64_t c = 0; c < n; c++) {
            float * x = w.data() + c*LANES;
            const float * extra  = reach.data() + c*LANES;
            const float * factor = u.data() + c*n;
            const float   pivot  = 1.0f/factor[c];
            float error[LANES], code[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                const float lo = -zero[lane] - extra[lane];
                const float hi = 15.0f - zero[lane] + extra[lane];
                code[lane]  = spike_round(clamp(x[lane]*inverse[lane], lo, hi));
                error[lane] = (x[lane] - code[lane]*theta[lane])*pivot;
                loss[lane] += error[lane]*error[lane];
            }
            for (int64_t k = c + 1; k < n; k++) {
                float * y = w.data() + k*LANES;
                const float f = factor[k];
                for (int lane = 0; lane < LANES; lane++) {
                    y[lane] -= error[lane]*f;
                }
            }
            std::memcpy(x, code, sizeof(code));
        }
    }

    // Gradient of the loss by the dequantized weights: (theta v - w) H.
    void gradient(const float * w, const float * v, float theta, std::vector<float> & g) const {
        std::fill(g.begin(), g.end(), 0.0f);
        for (int64_t i = 0; i < n; i++) {
            add_to_gradient(i, theta*v[i] - w[i], g);
        }
    }

    void add_to_gradient(int64_t i, float change, std::vector<float> & g) const {
        const float * row = damped.data() + i*n;
        float * out = g.data();
        for (int64_t k = 0; k < n; k++) {
            out[k] += change*row[k];
        }
    }

    // Sets each code to its best value given the others, until nothing changes.
    void descend(const float * w, float * v, float theta, float zero) const {
        const float lo = -zero, hi = 15.0f - zero;
        std::vector<float> g((size_t) n);
        std::vector<int>   n_salient((size_t) n_blocks);
        for (int64_t i = 0; i < n; i++) {
            n_salient[i/QK_SPK] += v[i] < lo || v[i] > hi;
        }
        gradient(w, v, theta, g);
        for (int sweep = 0; sweep < options.descent_sweeps; sweep++) {
            bool changed = false;
            for (int64_t i = 0; i < n; i++) {
                const float best = v[i] - g[i]/(damped[i*n + i]*theta);
                int & used = n_salient[i/QK_SPK];
                const bool  was_salient = v[i] < lo || v[i] > hi;
                const bool  may_extend  = was_salient || used < options.salient_weights;
                const float extra = may_extend ? EXTENSION : 0.0f;
                const float code  = spike_round(clamp(best, lo - extra, hi + extra));
                if (code != v[i]) {
                    add_to_gradient(i, (code - v[i])*theta, g);
                    v[i] = code;
                    used += (code < lo || code > hi) - was_salient;
                    changed = true;
                }
            }
            if (!changed) {
                break;
            }
        }
    }

    // The threshold of least loss for the given codes: (v H w) / (v H v).
    float refit(const float * w, const float * v, float theta) const {
        std::vector<float> vh((size_t) n);
        for (int64_t i = 0; i < n; i++) {
            if (v[i] != 0.0f) {
                add_to_gradient(i, v[i], vh);
            }
        }
        double vhw = 0.0, vhv = 0.0;
        for (int64_t i = 0; i < n; i++) {
            vhw += (double) vh[i]*w[i];
            vhv += (double) vh[i]*v[i];
        }
        const float fitted = (float) (vhw/vhv);
        // a row of zeros or an ill-conditioned fit keeps what it has
        return fitted > 0.5f*theta && fitted < 2.0f*theta ? spike_threshold_on_grid(fitted) : theta;
    }

    float relative_error(const float * w, const float * v, float theta) const {
        double loss = 0.0, energy = 0.0;
        std::vector<float> g((size_t) n), wh((size_t) n);
        gradient(w, v, theta, g);
        for (int64_t i = 0; i < n; i++) {
            add_to_gradient(i, w[i], wh);
        }
        for (int64_t i = 0; i < n; i++) {
            loss   += (double) g[i]*(theta*v[i] - w[i]);
            energy += (double) wh[i]*w[i];
        }
        return energy > 0.0 ? (float) (loss/energy) : 0.0f;
    }

    void store(const float * v, float theta, float zero, block_spk4 * y) const {
        for (int64_t b = 0; b < n_blocks; b++) {
            spike_store_codes(v + b*QK_SPK, theta, (int) zero, options.rotated != 0, y + b);
        }
    }

    const float *           weights;
    int64_t                 n_rows, n, n_blocks;
    spike_quantizer_options options;
    std::vector<float>      h, damped, u; // u: in GPTQ's order
    std::vector<int>        order;
    float                   mean_diagonal;
};

} // namespace

bool spike_quantize_calibrated(const float * weights, const float * moments, int64_t n_rows, int64_t n_inputs,
                               const spike_quantizer_options * options, block_spk4 * blocks, float * error) {
    GGML_ASSERT(n_inputs % QK_SPK == 0 && options->salient_weights >= 0 && options->salient_weights <= SPIKE_SALIENT_SLOTS);
    quantizer q(weights, moments, n_rows, n_inputs, *options);
    if (!q.prepare()) {
        return false;
    }
    std::atomic<int64_t> next { 0 };
    auto work = [&] {
        for (int64_t r0 = next.fetch_add(LANES); r0 < n_rows; r0 = next.fetch_add(LANES)) {
            q.quantize_batch(r0, blocks, error);
        }
    };
    std::vector<std::thread> threads;
    for (int k = 1; k < options->n_threads; k++) {
        threads.emplace_back(work);
    }
    work();
    for (auto & thread : threads) {
        thread.join();
    }
    return true;
}
