// One token: tiles side by side, chunk by chunk, and what comes next always on its way from memory.
//
// A product of one token is bound by memory, which is read at full speed only if requests for lines come evenly and in the
// order of their addresses: a CPU drops prefetches that come in bursts, and its own prefetcher loses track where silent
// inputs are left out. So the work of a thread is a sequence of stages (each chunk of inputs, then the salient weights), and
// while a stage computes, the lines of the next one are requested, one for every so many places of its spike lists.
#include "spike-encoding.h"
#include "spike-tiles.h"

#include <algorithm>
#include <cstring>

namespace spike {
namespace {

constexpr uint32_t LEAD_RUNS      = 512;   // requested beyond the next stage
constexpr uint32_t MAX_STAGE_RUNS = 4096;  // further ones are left to the CPU's own prefetcher
constexpr uint32_t MAX_RUNS       = 16384; // of a few stages
static_assert(SPIKE_AHEAD_AGAIN + 4*MAX_STAGE_RUNS <= MAX_RUNS + MAX_STAGE_RUNS, "three stages are on the list at a time");

// Tiles that a thread computes together: neighbours in a strip.
struct tile_group {
    int64_t first_tile, n_tiles;
};

// What a thread keeps while it serves one token.
struct decode_scratch {
    int32_t *  potential; // [tile][class][row]
    uint32_t * offsets;   // [spike], of lines in a strip
    uint32_t * ahead;     // runs of lines to request
    size_t     size;

    decode_scratch(char * memory, int64_t n_inputs, int64_t n_chunks) {
        scratch_arrays arrays(memory);
        arrays.take(potential, SPIKE_STRIP_TILES*SPIKE_CLASSES*SPIKE_TILE_ROWS);
        arrays.take(offsets, spike_max_spikes(n_inputs, n_chunks));
        arrays.take(ahead, MAX_RUNS + SPIKE_STRIP_TILES);
        size = arrays.size();
    }
};

void prefetch(const uint8_t * line) {
#if defined(__GNUC__)
    __builtin_prefetch(line, 0, 2);
#else
    (void) line;
#endif
}

// Waits for a line: unlike a prefetch it is never dropped.
void touch(const uint8_t * line) {
    (void) *(const volatile uint8_t *) line;
}

// The share of a matrix's tiles that a thread has.
struct share {
    int64_t first_tile, end_tile;

    share(const spike_layout & layout, const ggml_compute_params * params) :
        first_tile(params->ith*layout.n_tiles/params->nth), end_tile((params->ith + 1)*layout.n_tiles/params->nth) {}
};

// The lines that a thread will need first in its next product: those of a chunk of inputs, of which nobody knows yet which
// will fire. They come while the salient weights of this product are added, and stay in the cache until then.
class next_product {
  public:
    next_product(const ggml_tensor * op, const ggml_compute_params * params) {
        if (op == nullptr) {
            return;
        }
        const spike_layout layout = spike_layout_of(op->src[0]->ne[0], op->src[0]->ne[1]);
        const share own(layout, params);
        if (own.first_tile >= own.end_tile) {
            return;
        }
        const spike_tile_lines lines = spike_lines_of_tile(&layout, (const uint8_t *) op->src[0]->data, own.first_tile);
        line   = lines.first;
        stride = lines.stride;
        width  = std::min(own.end_tile - own.first_tile, SPIKE_STRIP_TILES - own.first_tile % SPIKE_STRIP_TILES);
        n      = spike_chunk_start(layout.n_inputs, spike_chunks(layout.n_inputs, DECODE_CHUNK_BLOCKS), 1);
    }

    // Requests as much as is due when such a share of the work is done.
    void request(int64_t done, int64_t of) {
        for (; next < n*done/of; next++) {
            for (int64_t t = 0; t < width; t++) {
                prefetch(line + (size_t) next*stride + t*SPIKE_LINE_BYTES);
            }
        }
    }

  private:
    const uint8_t * line   = nullptr;
    size_t          stride = 0;
    int64_t         width = 0, n = 0, next = 0; // tiles, inputs
};

// The stages of a thread's share of a matrix, and the lines that they read.
class stage_list {
  public:
    stage_list(const spike_layout & layout, const uint8_t * packed, const spike_train * train, int64_t first_tile, int64_t end_tile, uint32_t * runs) :
        layout(layout), packed(packed), train(train), end_tile(end_tile), runs(runs) {
        next.first_tile = first_tile;
        next.n_tiles    = size_of_group(first_tile);
    }

    // Before the first stage: nothing computes yet that requests could be spread over.
    void start() {
        const spike_tile_lines lines = spike_lines_of_tile(&layout, packed, next.first_tile);
        for (uint32_t e = 0; e < SPIKE_AHEAD_AGAIN; e++) {
            runs[e] = (uint32_t) (lines.first - packed);
        }
        begin = end = SPIKE_AHEAD_AGAIN;
        append_stage();
        for (uint32_t e = begin; e < end; e++) {
            touch(packed + runs[e]);
            touch(packed + runs[e] + SPIKE_LINE_BYTES);
        }
        begin = end;
        append_stage();
    }

    // At the start of a stage that will visit so many places: what to request meanwhile.
    spike_ahead enter(uint32_t n_places) {
        const uint32_t needed = end; // the next stage's
        make_room();
        append_stage();
        target = std::min(needed - moved + LEAD_RUNS, end);
        spike_ahead ahead = { packed, runs, begin << SPIKE_AHEAD_SHIFT, 0 };
        if (n_places > 0) {
            ahead.step = (uint32_t) std::min<uint64_t>(((uint64_t) (target - begin) << SPIKE_AHEAD_SHIFT)*SPIKE_AHEAD_LINES/n_places, 1 << SPIKE_AHEAD_SHIFT);
        }
        return ahead;
    }

    // Within a stage without places: requests as much as is due when such a share of it is done.
    void request(int64_t done, int64_t of) {
        for (const uint32_t due = begin + (uint32_t) ((target - begin)*done/of); begin < due; begin++) {
            prefetch(packed + runs[begin]);
            prefetch(packed + runs[begin] + SPIKE_LINE_BYTES);
        }
    }

    // At the end of the stage: what has not been requested yet.
    void leave(const spike_ahead & ahead) {
        begin = std::min(target, ahead.position >> SPIKE_AHEAD_SHIFT);
        request(1, 1);
    }

    int64_t size_of_group(int64_t first) const {
        const int64_t end_of_strip = (first/SPIKE_STRIP_TILES + 1)*SPIKE_STRIP_TILES;
        return std::min(end_tile, end_of_strip) - first;
    }

  private:
    // For another stage, behind the runs that are still to be requested, for the first time or again.
    void make_room() {
        moved = 0;
        if (end + MAX_STAGE_RUNS > MAX_RUNS) {
            moved = begin - SPIKE_AHEAD_AGAIN;
            memmove(runs, runs + moved, (end - moved)*sizeof(*runs));
            begin -= moved;
            end   -= moved;
        }
    }

    void append_stage() {
        if (next.n_tiles <= 0) {
            return;
        }
        if (next_chunk < train->n_chunks) {
            append_chunk(next_chunk++);
            return;
        }
        append_salients();
        next.first_tile += next.n_tiles;
        next.n_tiles     = size_of_group(next.first_tile);
        next_chunk       = 0;
    }

    // The active lines of a chunk. Of an odd number of tiles the last two runs share a line; of a single one a run has
    // a line that may not be needed.
    void append_chunk(int64_t chunk) {
        const spike_tile_lines first = spike_lines_of_tile(&layout, packed, next.first_tile);
        const uint32_t start  = (uint32_t) (first.first - packed);
        const uint32_t stride = (uint32_t) first.stride;
        const uint32_t n_runs = (uint32_t) (next.n_tiles + 1)/2;
        const uint32_t last   = next.n_tiles > 1 ? (uint32_t) (next.n_tiles - 2)*SPIKE_LINE_BYTES : 0;
        uint32_t n_active;
        const uint16_t * active = spike_train_active(train, layout.n_inputs, chunk, &n_active);
        n_active = std::min(n_active, MAX_STAGE_RUNS/(SPIKE_STRIP_TILES/2));
        uint32_t * list = runs + end;
        for (uint32_t e = 0; e < n_active; e++) {
            const uint32_t line = start + active[e]*stride;
            for (uint32_t k = 0; k < SPIKE_STRIP_TILES/2; k++) { // a whole vector; the next input overwrites what is too much
                list[k] = line + k*2*SPIKE_LINE_BYTES;
            }
            list[n_runs - 1] = line + last;
            list += n_runs;
        }
        end += n_active*n_runs;
    }

    void append_salients() {
        constexpr uint32_t RUN_BYTES = SPIKE_AHEAD_LINES*SPIKE_LINE_BYTES;
        const uint32_t start = (uint32_t) (spike_salients_of_tile(&layout, packed, next.first_tile, 0, 0) - packed);
        const int64_t  bytes = next.n_tiles*layout.n_blocks*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS;
        const uint32_t n     = (uint32_t) std::min<int64_t>(bytes/RUN_BYTES, MAX_STAGE_RUNS);
        for (uint32_t e = 0; e < n; e++) {
            runs[end + e] = start + e*RUN_BYTES;
        }
        end += n;
    }

    const spike_layout & layout;
    const uint8_t *      packed;
    const spike_train *  train;
    const int64_t        end_tile;
    uint32_t *           runs; // offsets of SPIKE_AHEAD_LINES lines each
    uint32_t             begin = 0, end = 0, target = 0, moved = 0;
    tile_group           next; // whose stage is to be appended
    int64_t              next_chunk = 0;
};

void integrate_chunk(const spike_kernels * kernels, const spike_train * train, int64_t chunk, const spike_tile_lines & lines, int64_t n_tiles,
                     decode_scratch & s, spike_ahead * ahead) {
    for (int k = 0; k < SPIKE_CLASSES; k++) {
        const spike_program * program = spike_train_program(train, k, chunk);
        if (program->n_steps == 0) {
            continue;
        }
        int32_t * potential = s.potential + k*SPIKE_TILE_ROWS;
        if (ahead) {
            kernels->integrate_ahead(lines.first, n_tiles, program, s.offsets, potential, SPIKE_CLASSES*SPIKE_TILE_ROWS, ahead);
            continue;
        }
        for (int64_t t = 0; t < n_tiles; t++) {
            kernels->integrate(lines.first + t*SPIKE_LINE_BYTES, program, s.offsets, potential + t*SPIKE_CLASSES*SPIKE_TILE_ROWS);
        }
    }
}

uint32_t places_of_chunk(const spike_train * train, int64_t chunk) {
    return spike_program_places(train, 0, chunk) + spike_program_places(train, 1, chunk);
}

// A share of a matrix's tiles for one token.
void compute_tiles(const spike_layout & layout, const uint8_t * packed, const spike_train * train, float * output, const share & own,
                   next_product * after, decode_scratch & s) {
    const int64_t first_tile = own.first_tile, end_tile = own.end_tile;
    if (first_tile >= end_tile) {
        return;
    }
    const spike_kernels * kernels = spike_select_kernels();
    const bool requests = kernels->integrate_ahead && layout.size <= UINT32_MAX;
    stage_list stages(layout, packed, train, first_tile, end_tile, s.ahead);
    if (requests) {
        stages.start();
    }
    size_t stride = 0;
    for (int64_t tile0 = first_tile, n_tiles; tile0 < end_tile; tile0 += n_tiles) {
        n_tiles = stages.size_of_group(tile0);
        const spike_tile_lines lines = spike_lines_of_tile(&layout, packed, tile0);
        if (stride != lines.stride) {
            stride = lines.stride;
            scale_offsets(train, stride, s.offsets);
        }
        memset(s.potential, 0, (size_t) n_tiles*SPIKE_CLASSES*SPIKE_TILE_ROWS*sizeof(int32_t));
        for (int64_t c = 0; c < train->n_chunks; c++) {
            if (requests) {
                spike_ahead ahead = stages.enter(places_of_chunk(train, c)*(uint32_t) n_tiles);
                integrate_chunk(kernels, train, c, lines, n_tiles, s, &ahead);
                stages.leave(ahead);
            } else {
                integrate_chunk(kernels, train, c, lines, n_tiles, s, nullptr);
            }
        }
        if (requests) {
            stages.enter(0);
        }
        for (int64_t t = 0; t < n_tiles; t++) {
            int32_t *       potential = s.potential + t*SPIKE_CLASSES*SPIKE_TILE_ROWS;
            const uint8_t * salients  = spike_salients_of_tile(&layout, packed, tile0 + t, 0, 0);
            for (int k = 0; k < SPIKE_CLASSES; k++) {
                add_salient_of_token(salients, layout, k, train, potential + k*SPIKE_TILE_ROWS);
            }
            read_out(train, output, layout, packed, tile0 + t, potential);
            if (requests) {
                stages.request(t + 1, n_tiles);
            }
            if (after && tile0 + n_tiles == end_tile) {
                after->request(t + 1, n_tiles);
            }
        }
    }
}

} // namespace

size_t decode_scratch_size(int64_t n_inputs, int64_t n_chunks) {
    return decode_scratch(nullptr, n_inputs, n_chunks).size;
}

void compute_single_tokens(const ggml_compute_params * params, const product & product, const ggml_tensor * op, char * work, const work_layout & w) {
    const spike_layout layout = spike_layout_of(op->src[0]->ne[0], op->src[0]->ne[1]);
    decode_scratch scratch(work + w.scratch + (size_t) params->ith*w.scratch_per_thread, layout.n_inputs, w.n_chunks);
    const char * trains = work + w.trains + (w.own_encoding ? (size_t) params->ith*w.train_size : 0);
    const share own(layout, params); // of every matrix, the same for each token
    next_product after(w.own_encoding ? next_single_token_product() : nullptr, params);
    for (int64_t j = 0; j < product.n_jobs(); j++) {
        const job work_of = product.get_job(j);
        for (int64_t t = 0; t < work_of.n_tokens; t++) {
            const token tok = product.get_token(j, t);
            const spike_train * train = (const spike_train *) (trains + (size_t) tok.column*w.train_size);
            compute_tiles(layout, (const uint8_t *) work_of.matrix, train, tok.output, own, w.own_encoding ? &after : nullptr, scratch);
        }
    }
}

} // namespace spike
