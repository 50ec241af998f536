// Lines in vectors of 256 bits, for many tokens: AVX2 takes all lines so, and AVX-512 those of half a tile.
#pragma once

#include "spike-sums-256.h"

#include "spike/cpu/spike-prompt-kernels.h"

#include <string.h>

// vectors: of a line, 1 or 2, here and below; known when this is compiled.
SPIKE_INLINE void copy256(const uint8_t * from, size_t stride, int vectors, int64_t n, uint8_t * to) {
    const __m256i ones = _mm256_set1_epi8(-1);
    const uint8_t * ahead = from + (stride << 4); // lines of a strip come from afar, and no prefetcher sees their order
    for (const uint8_t * end = to + 2*n*vectors*(int64_t) sizeof(ones); to < end; to += 2*(size_t) vectors*sizeof(ones)) {
        _mm_prefetch((const char *) ahead, _MM_HINT_T0);
        for (int v = 0; v < vectors; v++) {
            const __m256i y = _mm256_loadu_si256((const __m256i *) from + v);
            _mm256_storeu_si256((__m256i *) to + v, y);
            _mm256_storeu_si256((__m256i *) to + vectors + v, _mm256_xor_si256(y, ones));
        }
        from  += stride;
        ahead += stride;
    }
    memset(to, 0, (size_t) vectors*sizeof(ones));
}

// Up to 16 spikes of a step to the currents.
SPIKE_INLINE void add_group256(const uint8_t * lines, int vectors, const uint16_t * spikes, int n, tile256 * current) {
    const size_t line_bytes = (size_t) vectors*sizeof(__m256i);
    __m256i both[MAX_VECTORS], upper[MAX_VECTORS];
    for (int v = 0; v < vectors; v++) {
        both[v] = upper[v] = _mm256_setzero_si256();
    }
    if (n == SPIKES_PER_BYTE_SUM) {
        for (int e = 0; e < SPIKES_PER_BYTE_SUM; e++) {
            add_line256(spike_schedule_line(lines, line_bytes, spikes[e]), vectors, both, upper);
        }
    } else {
        do {
            for (int e = 0; e < SPIKE_SCHEDULE_UNIT; e++) {
                add_line256(spike_schedule_line(lines, line_bytes, spikes[e]), vectors, both, upper);
            }
            spikes += SPIKE_SCHEDULE_UNIT;
            n      -= SPIKE_SCHEDULE_UNIT;
        } while (n > 0);
    }
    flush256(both, upper, vectors, false, current);
}

// With a group of spikes.
SPIKE_INLINE void request_lines(spike_line_requests * requests) {
    const uint8_t * line = requests->next;
    for (int i = 0; i < requests->at_once && line != requests->end; i++) {
        _mm_prefetch((const char *) line, _MM_HINT_T1);
        line += requests->stride;
    }
    requests->next = line;
}

// requests: or NULL.
SPIKE_INLINE void run_schedule256(const uint8_t * lines, int vectors, const spike_schedule_program * program, const uint16_t * spikes,
                                  int32_t * potential, spike_line_requests * requests) {
    spike_line_requests due = { NULL, NULL, 0, 0 };
    if (requests) {
        due = *requests;
    }
    const lanes256 silent = { _mm256_setzero_si256(), _mm256_setzero_si256() };
    tile256 current = { { silent, silent }, { silent, silent } }, sum = current;
    spikes += program->first;
    const spike_schedule_step * step = program->steps;
    for (const spike_schedule_step * end = step + program->n_steps; step < end; step++) {
        int left = step->n_spikes;
        for (; left >= SPIKES_PER_BYTE_SUM; left -= SPIKES_PER_BYTE_SUM) {
            if (requests) {
                request_lines(&due);
            }
            add_group256(lines, vectors, spikes, SPIKES_PER_BYTE_SUM, &current);
            spikes += SPIKES_PER_BYTE_SUM;
        }
        if (left > 0) {
            if (requests) {
                request_lines(&due);
            }
            add_group256(lines, vectors, spikes, left, &current);
            spikes += left;
        }
        grow256(&sum, vectors, &current);
        if (step->action == SPIKE_DOUBLE) {
            grow256(&sum, vectors, &sum);
        } else if (step->action == SPIKE_SPILL) {
            spill256(&sum, vectors, step->correction, step->shift, potential);
        }
    }
    if (requests) {
        *requests = due;
    }
}

static void copy_half(const uint8_t * from, size_t stride, int64_t n, uint8_t * to) {
    copy256(from, stride, SPIKE_HALF_LINE/32, n, to);
}

static void integrate_half_schedule(const uint8_t * lines, const spike_schedule_program * program, const uint16_t * spikes,
                                    int32_t potential[SPIKE_HALF_TILE], spike_line_requests * requests) {
    run_schedule256(lines, SPIKE_HALF_LINE/32, program, spikes, potential, requests);
}
