// GPTQ for uniform rows: one threshold and one zero-point per row, two salient weights in a row's first block and four in the others.
//
//  1. what the row shall compute from the inputs that it will see: part of their deviation from the float model's inputs
//     is predictable from them (after GPTAQ, Li et al. 2025), and the row makes up for a share of it
//  2. a threshold and zero-point by search, errors weighted by the diagonal of the moments
//  3. GPTQ (Frantar et al. 2022) over the inputs in descending order of their moment, for several thresholds and
//     zero-points; the two of least loss go on
//  4. coordinate descent on the codes, with free choice of the salient positions, and a least-squares threshold
//
// If it is known how much errors of the outputs matter, and which of them make up for each other, rows are not independent:
// each makes up for the errors of those before it, as inputs do in GPTQ (two-sided rounding, after YAQA, Tseng et al. 2025).
#include "spike-quantizer.h"
#include "spike-threads.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

namespace {

constexpr int     LANES = 32; // rows that go through GPTQ together, one per vector lane
constexpr int64_t GPTQ_BLOCK = 64; // inputs; a divisor of all numbers of inputs
constexpr int64_t FACTOR_BLOCK = 64; // rows of a factor that are finished before others take them over
constexpr int     STRIP = 8;  // inputs whose sums for all lanes stay in registers
constexpr int     THRESHOLD_STEPS = 22; // GPTQ tries 1.04, 1.02, ... times the searched threshold
constexpr int     FINALISTS = 2; // of the outcomes of GPTQ, per row
constexpr float   EXTENSION = 16.0f;

float clamp(float x, float lo, float hi) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
}

struct release {
    void operator()(void * memory) const { std::free(memory); }
};

using square = std::unique_ptr<float[], release>; // n x n, row by row

// U of (H + damping)^-1 = U^T U, upper triangular, its rows and columns in a given order of H's; below the diagonal is U^T.
// Null if H is not positive definite. Plain loops over rows, in double: each element sees one fixed sequence of operations.
// All in one array, which is the largest of a conversion: R is below its diagonal, the inverse grows above it.
square factor_inverse(const float * h, const std::vector<int> & order, int64_t n, int n_threads) {
    std::unique_ptr<double[], release> memory((double *) std::malloc((size_t) (n*n)*sizeof(double)));
    double * r = memory.get();
    if (r == nullptr) {
        throw std::bad_alloc();
    }
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j <= i; j++) {
            r[i*n + j] = h[order[i]*n + order[j]];
        }
    }
    // H = R R^T with R upper: from the last input to the first. Row k of r holds column k of R.
    auto take_away = [&](int64_t k, int64_t i) { // column k's part of row i
        const double * column = r + k*n;
        const double factor = column[i];
        double * row = r + i*n;
        for (int64_t j = 0; j <= i; j++) {
            row[j] -= factor*column[j];
        }
    };
    for (int64_t end = n; end > 0; end -= FACTOR_BLOCK) {
        const int64_t first = std::max<int64_t>(end - FACTOR_BLOCK, 0);
        for (int64_t k = end - 1; k >= first; k--) {
            double * column = r + k*n;
            if (!(column[k] > 0.0)) {
                return nullptr;
            }
            const double pivot = std::sqrt(column[k]);
            for (int64_t i = 0; i < k; i++) {
                column[i] /= pivot;
            }
            column[k] = pivot;
            for (int64_t i = first; i < k; i++) {
                take_away(k, i);
            }
        }
        share_out(n_threads, first, [&](int64_t i) {
            for (int64_t k = end - 1; k >= first; k--) {
                take_away(k, first - 1 - i); // the longest first
            }
        });
    }
    auto substitute = [&](int64_t i, int64_t k) { // row k of the inverse in row i
        double * row = r + i*n;
        const double factor = r[k*n + i];
        const double * other = r + k*n;
        for (int64_t j = k; j < n; j++) {
            row[j] -= factor*other[j];
        }
    };
    for (int64_t end = n; end > 0; end -= FACTOR_BLOCK) {
        const int64_t first = std::max<int64_t>(end - FACTOR_BLOCK, 0);
        std::vector<double> pivots((size_t) (end - first));
        for (int64_t i = first; i < end; i++) {
            pivots[i - first] = r[i*n + i];
        }
        share_out(n_threads, end - first, [&](int64_t part) {
            const int64_t i = first + part;
            r[i*n + i] = 1.0;
            std::fill(r + i*n + i + 1, r + i*n + n, 0.0);
            for (int64_t k = end; k < n; k++) {
                substitute(i, k);
            }
        });
        for (int64_t i = end - 1; i >= first; i--) {
            for (int64_t k = i + 1; k < end; k++) {
                substitute(i, k);
            }
            for (int64_t j = i; j < n; j++) {
                r[i*n + j] /= pivots[i - first];
            }
        }
    }
    // to single precision in place: no value is written over before it is read
    char * bytes = (char *) memory.release();
    for (int64_t i = 0; i < n*n; i++) {
        double value;
        std::memcpy(&value, bytes + i*sizeof(double), sizeof(double));
        const float rounded = (float) value;
        std::memcpy(bytes + i*sizeof(float), &rounded, sizeof(float));
    }
    void * smaller = std::realloc(bytes, (size_t) (n*n)*sizeof(float));
    square u((float *) (smaller != nullptr ? smaller : bytes));
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = i + 1; j < n; j++) {
            u[j*n + i] = u[i*n + j];
        }
    }
    return u;
}

class quantizer {
  public:
    // Adds the damping to the diagonal of the moments, as long as the quantizer lives.
    quantizer(const float * weights, float * moments, const float * deviations, int64_t n_rows, int64_t n, const spike_quantizer_options & options) :
        weights(weights), deviations(deviations), damped(moments), n_rows(n_rows), n(n), n_blocks(n/QK_SPK), options(options),
        diagonal((size_t) n), order((size_t) n) {
        double sum = 0.0;
        for (int64_t i = 0; i < n; i++) {
            diagonal[i] = moments[i*n + i];
            sum += diagonal[i];
        }
        mean_diagonal = (float) (sum/(double) n);
        if (!(mean_diagonal > 0.0f)) { // inputs that never fire: any code will do, take the nearest
            mean_diagonal = 1.0f;
        }
        for (int64_t i = 0; i < n; i++) {
            damped[i*n + i] += options.damping*mean_diagonal;
        }
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return diagonal[a] > diagonal[b]; });
    }

    ~quantizer() {
        for (int64_t i = 0; i < n; i++) {
            damped[i*n + i] = diagonal[i];
        }
    }

    quantizer(const quantizer &) = delete;
    quantizer & operator=(const quantizer &) = delete;

    bool prepare() {
        u = factor_inverse(damped, order, n, options.n_threads);
        return u != nullptr;
    }

    // Each row by itself: threads share out the batches.
    void quantize_rows(block_spk4 * blocks, float * error) {
        std::vector<int> all((size_t) n_rows);
        std::iota(all.begin(), all.end(), 0);
        share_out(options.n_threads, (n_rows + LANES - 1)/LANES, [&](int64_t k) {
            rows unused((size_t) (LANES*n));
            quantize_batch(all.data() + k*LANES, lanes_from(k*LANES), nullptr, unused, blocks, error);
        });
    }

    // Batch after batch, the rows that matter most first; those to come make up for the errors of a batch as well as they can.
    // inverse: factor_inverse of the moments of the outputs, in row_order. Threads share out the work within a batch.
    void quantize_rows_in_order(const std::vector<int> & row_order, const float * inverse, block_spk4 * blocks, float * error) {
        inner_threads = options.n_threads;
        rows shifts((size_t) (n_rows*n)), residual((size_t) (LANES*n));
        for (int64_t r0 = 0; r0 < n_rows; r0 += LANES) {
            const int n_lanes = lanes_from(r0);
            quantize_batch(row_order.data() + r0, n_lanes, shifts.data() + r0*n, residual, blocks, error);
            // As in a block of GPTQ's inputs: what each row has left to be made up for, given the batch's rows before it ...
            for (int lane = 0; lane < n_lanes; lane++) {
                float * z = residual.data() + lane*n;
                for (int other = 0; other < lane; other++) {
                    subtract(inverse[(r0 + other)*n_rows + r0 + lane], residual.data() + other*n, z);
                }
                const float pivot = 1.0f/inverse[(r0 + lane)*(n_rows + 1)];
                for (int64_t i = 0; i < n; i++) {
                    z[i] *= pivot;
                }
            }
            // ... is added to what later rows shall be
            const int64_t first = r0 + n_lanes;
            share_out(inner_threads, n_rows - first, [&](int64_t k) {
                for (int lane = 0; lane < n_lanes; lane++) {
                    subtract(-inverse[(r0 + lane)*n_rows + first + k], residual.data() + lane*n, shifts.data() + (first + k)*n);
                }
            });
        }
    }

  private:
    using rows = std::vector<float>; // rows of n inputs, LANES of them unless said otherwise

    int lanes_from(int64_t row) const { return (int) std::min<int64_t>(LANES, n_rows - row); }

    void subtract(float factor, const float * x, float * y) const {
        for (int64_t i = 0; i < n; i++) {
            y[i] -= factor*x[i];
        }
    }

    // Some rows. shifts: added to what they shall be, or NULL. residual: what they became, less what they should be.
    void quantize_batch(const int * chosen, int n_lanes, const float * shifts, rows & residual, block_spk4 * blocks, float * error) const {
        rows wanted((size_t) (LANES*n)), wh((size_t) (LANES*n));
        for (int lane = 0; lane < n_lanes; lane++) {
            std::copy_n(weights + chosen[lane]*n, n, wanted.begin() + lane*n);
        }
        if (deviations != nullptr) {
            correct(wanted);
        }
        for (int64_t i = 0; shifts != nullptr && i < n_lanes*n; i++) {
            wanted[i] += shifts[i];
        }
        times(wanted, damped, wh);
        std::vector<outcome> outcomes(FINALISTS);
        find_outcomes(wanted, n_lanes, outcomes);
        float found[FINALISTS][LANES];
        for (int k = 0; k < FINALISTS; k++) {
            outcome & o = outcomes[k];
            rows difference((size_t) (LANES*n)), g((size_t) (LANES*n));
            for (int64_t i = 0; i < n_lanes*n; i++) {
                difference[i] = o.threshold[i/n]*o.codes[i] - wanted[i];
            }
            times(difference, damped, g);
            share_out(inner_threads, n_lanes, [&](int64_t lane) {
                const float * h = wh.data() + lane*n;
                float * v = o.codes.data() + lane*n;
                float * slope = g.data() + lane*n;
                float & threshold = o.threshold[lane];
                for (int round = 0; round < options.rounds; round++) {
                    descend(v, slope, threshold, o.zero_point[lane]);
                    threshold = refit(v, h, threshold, slope);
                }
                found[k][lane] = relative_error(wanted.data() + lane*n, h, v, slope, threshold);
            });
        }
        for (int lane = 0; lane < n_lanes; lane++) {
            int best = 0;
            for (int k = 1; k < FINALISTS; k++) {
                best = found[k][lane] < found[best][lane] ? k : best;
            }
            const outcome & o = outcomes[best];
            const float * v = o.codes.data() + lane*n;
            error[chosen[lane]] = found[best][lane];
            store(v, o.threshold[lane], o.zero_point[lane], blocks + chosen[lane]*n_blocks);
            for (int64_t i = 0; i < n; i++) {
                residual[lane*n + i] = o.threshold[lane]*v[i] - wanted[lane*n + i];
            }
        }
    }

    struct trial { // of GPTQ, with a threshold and zero-point for each lane
        rows  w; // what is still to be rounded, then the codes: lanes side by side, in GPTQ's order
        float theta[LANES], zero[LANES], loss[LANES];
    };

    struct outcome { // of GPTQ
        rows  codes; // threshold units, zero at the zero-point
        float threshold[LANES], zero_point[LANES], loss[LANES];
    };

    // Adds correction * w D (H + damping)^-1: the least-squares prediction of w (x - x^) from the inputs x^ that are seen.
    void correct(rows & w) const {
        rows s((size_t) (LANES*n)), permuted((size_t) (LANES*n));
        times(w, deviations, s);
        for (int64_t i = 0; i < LANES*n; i++) {
            permuted[i] = s[i - i%n + order[i%n]];
        }
        times(permuted, u.get(), s, part::upper); // (H + damping)^-1 = U^T U
        times(s, u.get(), permuted, part::lower);
        for (int64_t i = 0; i < LANES*n; i++) {
            w[i - i%n + order[i%n]] += options.correction*permuted[i];
        }
    }

    // Nearest rounding at several thresholds and zero-points; the errors are weighted by the diagonal of H.
    void search(const rows & w, float * threshold, float * zero_point) const {
        std::vector<float> importance((size_t) n);
        for (int64_t i = 0; i < n; i++) {
            importance[i] = diagonal[i]/mean_diagonal;
        }
        for (int lane = 0; lane < LANES; lane++) {
            spike_search_row(w.data() + lane*n, importance.data(), n, options.salient_weights, &threshold[lane], &zero_point[lane]);
        }
    }

    // Of a block of a row.
    int most_salient(int64_t block) const {
        return std::min<int>(options.salient_weights, SPIKE_SALIENT_SLOTS - spike_first_slot(block));
    }

    // Marks the inputs whose codes may be extended during GPTQ: the largest magnitudes of each block.
    void mark_salient(const float * w, std::vector<float> & reach) const {
        std::fill(reach.begin(), reach.end(), 0.0f);
        for (int64_t b = 0; b < n; b += QK_SPK) {
            for (int s = 0; s < most_salient(b/QK_SPK); s++) {
                int64_t largest = -1;
                for (int64_t i = b; i < b + QK_SPK; i++) {
                    if (reach[i] == 0.0f && (largest < 0 || std::fabs(w[i]) > std::fabs(w[largest]))) {
                        largest = i;
                    }
                }
                reach[largest] = EXTENSION;
            }
        }
    }

    // GPTQ with several thresholds and zero-points; the best of each row, the best first. Rows beyond n_lanes are zeros.
    void find_outcomes(const rows & wanted, int n_lanes, std::vector<outcome> & best) const {
        // lanes side by side, inputs in GPTQ's order
        std::vector<float> w0((size_t) (n*LANES)), reach((size_t) (n*LANES)), row_reach((size_t) n);
        for (int lane = 0; lane < LANES; lane++) {
            const float * row = wanted.data() + lane*n;
            mark_salient(row, row_reach);
            for (int64_t i = 0; i < n; i++) {
                w0[i*LANES + lane]    = row[order[i]];
                reach[i*LANES + lane] = row_reach[order[i]];
            }
        }
        for (outcome & o : best) {
            o.codes.resize((size_t) (LANES*n));
            std::fill(o.loss, o.loss + LANES, INFINITY);
        }
        float searched[LANES], searched_zero[LANES];
        search(wanted, searched, searched_zero);
        // attempts side by side, as many as there are threads; taken in their order
        auto attempt = [&](std::vector<trial> & trials) {
            for (size_t first = 0; first < trials.size(); first += inner_threads) {
                const size_t count = std::min(trials.size() - first, (size_t) inner_threads);
                share_out(inner_threads, (int64_t) count, [&](int64_t k) {
                    trials[first + k].w = w0;
                    run_gptq(trials[first + k], reach);
                });
                for (size_t k = first; k < first + count; k++) {
                    for (int lane = 0; lane < n_lanes; lane++) {
                        keep(trials[k], lane, best);
                    }
                    trials[k].w = {};
                }
            }
        };
        std::vector<trial> thresholds(THRESHOLD_STEPS), zero_points(2);
        for (int step = 0; step < THRESHOLD_STEPS; step++) {
            for (int lane = 0; lane < LANES; lane++) {
                thresholds[step].theta[lane] = spike_threshold_on_grid(searched[lane]*(1.04f - 0.02f*(float) step));
                thresholds[step].zero[lane]  = searched_zero[lane];
            }
        }
        attempt(thresholds);
        for (int k = 0; k < 2; k++) {
            for (int lane = 0; lane < LANES; lane++) {
                zero_points[k].theta[lane] = lane < n_lanes ? best[0].threshold[lane] : thresholds.back().theta[lane];
                zero_points[k].zero[lane]  = clamp(searched_zero[lane] + (k == 0 ? -1.0f : 1.0f), 0.0f, 15.0f);
            }
        }
        attempt(zero_points);
    }

    // Puts a row's outcome where it belongs among the best, which are sorted by loss.
    void keep(const trial & t, int lane, std::vector<outcome> & best) const {
        size_t place = best.size();
        while (place > 0 && t.loss[lane] < best[place - 1].loss[lane]) {
            place--;
        }
        if (place == best.size()) {
            return;
        }
        for (size_t k = best.size() - 1; k > place; k--) {
            std::copy_n(best[k - 1].codes.begin() + lane*n, n, best[k].codes.begin() + lane*n);
            best[k].threshold[lane]  = best[k - 1].threshold[lane];
            best[k].zero_point[lane] = best[k - 1].zero_point[lane];
            best[k].loss[lane]       = best[k - 1].loss[lane];
        }
        outcome & o = best[place];
        for (int64_t i = 0; i < n; i++) {
            o.codes[lane*n + order[i]] = t.w[i*LANES + lane];
        }
        o.threshold[lane]  = t.theta[lane];
        o.zero_point[lane] = t.zero[lane];
        o.loss[lane]       = t.loss[lane];
    }

    // Rounds input after input and lets the inputs to come make up for the error. On return w holds the codes.
    // In blocks: within one, every input at once; the inputs after it get all its errors in one go.
    void run_gptq(trial & t, const rows & reach) const {
        rows & w = t.w;
        const float * theta = t.theta;
        const float * zero  = t.zero;
        float * loss = t.loss;
        float inverse[LANES];
        std::vector<float> errors((size_t) (GPTQ_BLOCK*LANES));
        for (int lane = 0; lane < LANES; lane++) {
            inverse[lane] = 1.0f/theta[lane];
            loss[lane]    = 0.0f;
        }
        for (int64_t first = 0; first < n; first += GPTQ_BLOCK) {
            for (int64_t c = first; c < first + GPTQ_BLOCK; c++) {
                float * x = w.data() + c*LANES;
                float * error = errors.data() + (c - first)*LANES;
                const float * extra  = reach.data() + c*LANES;
                const float * factor = u.get() + c*n;
                const float   pivot  = 1.0f/factor[c];
                for (int lane = 0; lane < LANES; lane++) {
                    const float lo = -zero[lane] - extra[lane];
                    const float hi = 15.0f - zero[lane] + extra[lane];
                    const float code = spike_round(clamp(x[lane]*inverse[lane], lo, hi));
                    error[lane] = (x[lane] - code*theta[lane])*pivot;
                    loss[lane] += error[lane]*error[lane];
                    x[lane] = code;
                }
                for (int64_t k = c + 1; k < first + GPTQ_BLOCK; k++) {
                    float * y = w.data() + k*LANES;
                    const float f = factor[k];
                    for (int lane = 0; lane < LANES; lane++) {
                        y[lane] -= error[lane]*f;
                    }
                }
            }
            for (int64_t k = first + GPTQ_BLOCK; k < n; k += STRIP) {
                float strip[STRIP][LANES];
                std::memcpy(strip, w.data() + k*LANES, sizeof(strip));
                for (int64_t c = 0; c < GPTQ_BLOCK; c++) {
                    const float * error  = errors.data() + c*LANES;
                    const float * factor = u.get() + (first + c)*n + k;
                    for (int a = 0; a < STRIP; a++) {
                        for (int lane = 0; lane < LANES; lane++) {
                            strip[a][lane] -= error[lane]*factor[a];
                        }
                    }
                }
                std::memcpy(w.data() + k*LANES, strip, sizeof(strip));
            }
        }
    }

    // What of a matrix counts; the rest are zeros, whatever is stored there.
    enum class part { all, upper, lower };

    // out = x M, with the transpose of M at hand, row by row.
    void times(const rows & x, const float * transposed, rows & out, part used = part::all) const {
        std::vector<float> columns((size_t) (n*LANES));
        for (int lane = 0; lane < LANES; lane++) {
            for (int64_t i = 0; i < n; i++) {
                columns[i*LANES + lane] = x[lane*n + i];
            }
        }
        share_out(inner_threads, n/STRIP, [&](int64_t k_strip) {
            const int64_t i = k_strip*STRIP;
            float strip[STRIP][LANES] = {};
            const float * m = transposed + i*n;
            auto add = [&](int64_t first, int64_t end) {
                for (int64_t k = first; k < end; k++) {
                    const float * column = columns.data() + k*LANES;
                    for (int a = 0; a < STRIP; a++) {
                        for (int lane = 0; lane < LANES; lane++) {
                            strip[a][lane] += column[lane]*m[a*n + k];
                        }
                    }
                }
            };
            if (used == part::all) {
                add(0, n);
            } else {
                if (used == part::lower) {
                    add(0, i);
                }
                for (int64_t k = i; k < i + STRIP; k++) { // the diagonal
                    const float * column = columns.data() + k*LANES;
                    for (int a = 0; a < STRIP; a++) {
                        const bool  inside = used == part::lower ? k <= i + a : k >= i + a;
                        const float factor = inside ? m[a*n + k] : 0.0f;
                        for (int lane = 0; lane < LANES; lane++) {
                            strip[a][lane] += column[lane]*factor;
                        }
                    }
                }
                if (used == part::upper) {
                    add(i + STRIP, n);
                }
            }
            for (int a = 0; a < STRIP; a++) {
                for (int lane = 0; lane < LANES; lane++) {
                    out[lane*n + i + a] = strip[a][lane];
                }
            }
        });
    }

    void add_to_gradient(int64_t i, float change, float * g) const {
        const float * row = damped + i*n;
        for (int64_t k = 0; k < n; k++) {
            g[k] += change*row[k];
        }
    }

    // Sets each code to its best value given the others, until nothing changes.
    // g: gradient of the loss by the dequantized weights, (theta v - w) H; kept up to date.
    void descend(float * v, float * g, float theta, float zero) const {
        const float lo = -zero, hi = 15.0f - zero;
        std::vector<int>   n_salient((size_t) n_blocks);
        for (int64_t i = 0; i < n; i++) {
            n_salient[i/QK_SPK] += v[i] < lo || v[i] > hi;
        }
        for (int sweep = 0; sweep < options.descent_sweeps; sweep++) {
            bool changed = false;
            for (int64_t i = 0; i < n; i++) {
                const float best = v[i] - g[i]/(damped[i*n + i]*theta);
                int & used = n_salient[i/QK_SPK];
                const bool  was_salient = v[i] < lo || v[i] > hi;
                const bool  may_extend  = was_salient || used < most_salient(i/QK_SPK);
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

    // The threshold of least loss for the given codes, (v H w) / (v H v); g becomes the gradient there. wh: w H.
    float refit(const float * v, const float * wh, float theta, float * g) const {
        double vhw = 0.0, vhv = 0.0;
        for (int64_t i = 0; i < n; i++) {
            vhw += (double) wh[i]*v[i];
            vhv += (double) (g[i] + wh[i])*v[i]; // of theta v H
        }
        const float fitted = (float) (vhw/vhv)*theta;
        if (!(fitted > 0.5f*theta && fitted < 2.0f*theta)) {
            return theta; // a row of zeros or an ill-conditioned fit keeps what it has
        }
        const float on_grid = spike_threshold_on_grid(fitted);
        const float ratio   = on_grid/theta;
        for (int64_t i = 0; i < n; i++) {
            g[i] = (g[i] + wh[i])*ratio - wh[i];
        }
        return on_grid;
    }

    float relative_error(const float * w, const float * wh, const float * v, const float * g, float theta) const {
        double loss = 0.0, energy = 0.0;
        for (int64_t i = 0; i < n; i++) {
            loss   += (double) g[i]*(theta*v[i] - w[i]);
            energy += (double) wh[i]*w[i];
        }
        return energy > 0.0 ? (float) (loss/energy) : 0.0f;
    }

    void store(const float * v, float theta, float zero, block_spk4 * y) const {
        spike_store_row(v, n, theta, (int) zero, options.rotated != 0, y);
    }

    const float *           weights;
    const float *           deviations;
    float *                 damped;
    int64_t                 n_rows, n, n_blocks;
    spike_quantizer_options options;
    std::vector<float>      diagonal; // of the moments, undamped
    std::vector<int>        order;
    square                  u; // see factor_inverse; in GPTQ's order
    float                   mean_diagonal;
    int                     inner_threads = 1; // within a batch
};

// Their inverse's factor in the order of importance; null if no output matters, or if they are not positive definite.
square factor_outputs(const float * output_moments, int64_t n_rows, const spike_quantizer_options & options, std::vector<int> & order) {
    std::vector<float> damped(output_moments, output_moments + n_rows*n_rows);
    double sum = 0.0;
    for (int64_t i = 0; i < n_rows; i++) {
        sum += damped[i*n_rows + i];
    }
    if (!(sum > 0.0)) {
        return nullptr;
    }
    for (int64_t i = 0; i < n_rows; i++) {
        damped[i*n_rows + i] += options.output_damping*(float) (sum/(double) n_rows);
    }
    order.resize((size_t) n_rows);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return damped[a*(n_rows + 1)] > damped[b*(n_rows + 1)]; });
    return factor_inverse(damped.data(), order, n_rows, options.n_threads);
}

} // namespace

bool spike_quantize_calibrated(const float * weights, float * moments, const float * deviations, const float * output_moments, int64_t n_rows,
                               int64_t n_inputs, const spike_quantizer_options * options, block_spk4 * blocks, float * error) {
    GGML_ASSERT(n_inputs % QK_SPK == 0 && options->salient_weights >= 0 && options->salient_weights <= SPIKE_SALIENT_SLOTS);
    quantizer q(weights, moments, deviations, n_rows, n_inputs, *options);
    if (!q.prepare()) {
        return false;
    }
    std::vector<int> row_order;
    square outputs;
    if (output_moments != nullptr) {
        outputs = factor_outputs(output_moments, n_rows, *options, row_order);
    }
    if (outputs != nullptr) {
        q.quantize_rows_in_order(row_order, outputs.get(), blocks, error);
    } else {
        q.quantize_rows(blocks, error);
    }
    return true;
}
