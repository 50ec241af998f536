// Few tokens: tiles side by side, chunk by chunk, and what comes next always on its way from memory.
//
// A product of few tokens is bound by memory, which is read at full speed only if requests for lines come evenly and in the
// order of their addresses: a CPU drops prefetches that come in bursts, and its own prefetcher loses track where silent
// inputs are left out. So the work of a thread is a sequence of stages, one for each chunk of inputs, and while a stage
// computes, the lines of the next one are requested, one for every so many places of its spike lists, with a part of the salient
// weights (see append_salients); and with what follows the last chunk the first one of the next product.
//
// Several tokens meet the lines of a stage one after the other, so that these come from memory once. The first token goes with the
// requests; they are for all inputs, of which hardly any is silent in all tokens.
#include "spike-encoding.h"
#include "spike-tiles.h"

#include <algorithm>
#include <cstring>

namespace spike {
namespace {

constexpr int64_t  MOST_TOGETHER  = 8;    // tokens
constexpr int64_t  MOST_TILES     = SPIKE_STRIP_TILES; // of a group
constexpr uint32_t MAX_STAGE_RUNS = 1024; // further ones are left to the CPU's own prefetcher
constexpr uint32_t MAX_RUNS       = SPIKE_AHEAD_FIRST + 4*MAX_STAGE_RUNS; // few, so that the list stays near

int64_t count_together(int64_t n_tokens) { return std::min(n_tokens, MOST_TOGETHER); }

// Tiles that a thread computes together: neighbours in strips of equal width, and a matrix's half tile with the last of them.
struct tile_group {
    int64_t first_tile, n_whole;
    bool    with_half;

    int64_t n_tiles() const { return n_whole + with_half; }
    int64_t half_tile() const { return first_tile + n_whole; }

    // The whole tiles strip by strip: f(first tile, how many).
    template <typename F> void for_each_strip(const spike_layout & layout, F f) const {
        const int64_t end = first_tile + n_whole;
        for (int64_t tile = first_tile, next; tile < end; tile = next) {
            next = std::min(end, spike_end_of_strip(&layout, tile));
            f(tile, next - tile);
        }
    }
};

// A token that a thread serves, with what it keeps for it.
struct served_token {
    const spike_train * train;
    float *             output;
    int32_t *           potential;    // [tile][class][row]
    uint32_t *          offsets;      // [spike], of lines in a strip
    uint32_t *          half_offsets; // the same in half a tile
};

// Memory of a thread.
struct decode_scratch {
    const uint8_t ** runs; // of lines to request
    served_token     tokens[MOST_TOGETHER];
    size_t           size;

    decode_scratch(char * memory, int64_t n_inputs, int64_t n_chunks, int64_t n_tokens) {
        scratch_arrays arrays(memory);
        arrays.take(runs, MAX_RUNS);
        for (int64_t t = 0; t < n_tokens; t++) {
            arrays.take(tokens[t].potential, (MOST_TILES + 1)*SPIKE_CLASSES*SPIKE_TILE_ROWS);
            arrays.take(tokens[t].offsets, spike_max_spikes(n_inputs, n_chunks));
            arrays.take(tokens[t].half_offsets, spike_max_spikes(n_inputs, n_chunks));
        }
        size = arrays.size();
    }
};

// Tokens that meet a chunk of lines one after the other, before the next chunk.
struct token_group {
    const served_token * tokens;
    int64_t              n;

    const spike_train * first() const { return tokens[0].train; }
};

void prefetch(const uint8_t * line) {
#if defined(__GNUC__)
    __builtin_prefetch(line, 0, 2);
#else
    (void) line;
#endif
}

// The lines of so many inputs, before anything computes that requests could be spread over. Reads are never dropped, and
// those of silent inputs are among them: a stream with gaps comes at half the speed.
void wait_for(const spike_tile_lines & lines, int64_t n_tiles, int64_t n_inputs) {
    constexpr size_t FAR = 64*SPIKE_LINE_BYTES;
    for (int64_t i = 0; i < n_inputs; i++) {
        const uint8_t * line = lines.first + (size_t) i*lines.stride;
        for (const uint8_t * end = line + n_tiles*SPIKE_LINE_BYTES; line < end; line += SPIKE_LINE_BYTES) {
            prefetch(line + FAR);
            (void) *(const volatile uint8_t *) line;
        }
    }
}

// The share of a matrix's tiles that a thread has.
struct share {
    spike_layout layout;
    bool         by_strips; // lines of two strips for several tokens at once would not stay near
    int64_t      first_tile, end_tile;

    share(const ggml_tensor * op, const ggml_compute_params * params) :
        layout(spike_layout_of(op->src[0]->ne[0], op->src[0]->ne[1])), by_strips(most_tokens_of(op) > 1),
        first_tile(params->ith*layout.n_tiles/params->nth), end_tile((params->ith + 1)*layout.n_tiles/params->nth) {}

    tile_group group_at(int64_t tile) const {
        const int64_t end_whole = std::min(end_tile, layout.n_whole_tiles);
        int64_t end = tile;
        while (end < end_whole && stride_of(end) == stride_of(tile)) {
            const int64_t next = std::min(end_whole, spike_end_of_strip(&layout, end));
            if (next - tile > MOST_TILES) {
                break;
            }
            end = next;
            if (by_strips) {
                break;
            }
        }
        return { tile, end - tile, end < end_tile && spike_is_half_tile(&layout, end) };
    }

    size_t stride_of(int64_t tile) const { return spike_lines_of_tile(&layout, nullptr, tile).stride; }
};

// What a thread needs first in its next product: the lines of a chunk of inputs, of which nobody knows yet which will fire.
// They come while this product is computed, and stay in the cache until then.
struct next_product {
    spike_layout    layout   = {};
    const uint8_t * packed   = nullptr;
    tile_group      group    = { 0, 0, false }; // without tiles: there is none
    int64_t         n_inputs = 0;

    next_product() = default;

    next_product(const ggml_tensor * op, const ggml_compute_params * params) {
        if (op == nullptr) {
            return;
        }
        const share own(op, params);
        layout = own.layout;
        packed = (const uint8_t *) op->src[0]->data;
        if (own.first_tile < own.end_tile) {
            group    = own.group_at(own.first_tile);
            n_inputs = spike_chunk_start(layout.n_inputs, chunks_of(op), 1);
        }
    }
};

// Requests of lines in the order in which they will be needed, in runs of four or six lines side by side: so that there
// are no more of them than requests while the lines of as many inputs are added, one for every four. What is left then comes in
// one burst, which costs more than all the others.
class request_list {
  public:
    explicit request_list(const uint8_t ** runs) : runs(runs) {}

    // For an empty list: so many places that nobody requests for the first time.
    void begin_with(const uint8_t * line) {
        std::fill(runs, runs + SPIKE_AHEAD_FIRST, line);
        begin = end = SPIKE_AHEAD_FIRST;
    }

    // What is appended next is another stage's.
    void next_stage() { due_lines_of_run = lines_of_run; }

    // What is on the list is there.
    void skip() { begin = end; }

    // Room for a stage, behind the runs that are still to be requested, for the first time or again.
    void make_room() {
        if (end + 2*MAX_STAGE_RUNS > MAX_RUNS) {
            const uint32_t done = begin - SPIKE_AHEAD_FIRST;
            memmove(runs, runs + done, (end - done)*sizeof(*runs));
            begin  -= done;
            end    -= done;
        }
    }

    // The lines of whole tiles for n_inputs of the inputs from first_input to end_input; input_at(e): which one is the e-th. The last
    // runs of an input overlap rather than reach beyond it. In a narrow strip lines are so close that those of silent inputs come along.
    template <typename F>
    void append_lines(const spike_layout & layout, const uint8_t * packed, const tile_group & group, int64_t first_input, int64_t end_input,
                      int64_t n_inputs, F input_at) {
        const size_t stride = spike_lines_of_tile(&layout, packed, group.first_tile).stride;
        const bool   narrow = stride < 4*SPIKE_LINE_BYTES;
        int64_t widest = 0;
        group.for_each_strip(layout, [&](int64_t, int64_t n_tiles) { widest = std::max(widest, n_tiles); });
        lines_of_run = narrow ? 4 : std::min<int64_t>(std::max<int64_t>(widest, 2), widest % 4 == 0 ? 4 : 6);
        group.for_each_strip(layout, [&](int64_t tile, int64_t n_tiles) {
            const spike_tile_lines lines = spike_lines_of_tile(&layout, packed, tile);
            if (narrow) {
                append_bytes(lines.first + (size_t) first_input*stride, (end_input - first_input)*(int64_t) stride);
                return;
            }
            const int64_t n_runs = (n_tiles + lines_of_run - 1)/lines_of_run;
            const int64_t last   = std::max<int64_t>(n_tiles - lines_of_run, 0)*SPIKE_LINE_BYTES;
            const int64_t n      = std::min(n_inputs, MAX_STAGE_RUNS/n_runs);
            switch (n_runs) {
                case 1: list_runs<1>(lines, last, n, input_at); break;
                case 2: list_runs<2>(lines, last, n, input_at); break;
                case 3: list_runs<3>(lines, last, n, input_at); break;
                case 4: list_runs<4>(lines, last, n, input_at); break;
                default: GGML_ABORT("a strip has %d tiles at most", SPIKE_STRIP_TILES);
            }
        });
    }

    // All lines of a half tile from one input to another: two share a cache line, and hardly ever are both silent.
    void append_half(const spike_layout & layout, const uint8_t * packed, const tile_group & group, int64_t first, int64_t end) {
        if (group.with_half) {
            append_bytes(spike_lines_of_tile(&layout, packed, group.half_tile()).first + first*SPIKE_HALF_LINE, (end - first)*SPIKE_HALF_LINE);
        }
    }

    int64_t run_bytes() const { return lines_of_run*SPIKE_LINE_BYTES; }

    void append_bytes(const uint8_t * first, int64_t n_bytes) {
        const int64_t n = std::min<int64_t>(n_bytes/run_bytes(), MAX_STAGE_RUNS);
        for (int64_t e = 0; e < n; e++) {
            runs[end + e] = first + e*run_bytes();
        }
        end += (uint32_t) n;
    }

    // What is not requested yet of the list without its last `beyond` runs, spread over so many places.
    spike_ahead spread(uint32_t beyond, uint32_t n_places) {
        target = end - beyond;
        spike_ahead ahead = { runs, second_pair(), third_pair(), begin << SPIKE_AHEAD_SHIFT, 0 };
        if (n_places > 0 && target > begin) {
            const uint64_t step = ((uint64_t) (target - begin) << SPIKE_AHEAD_SHIFT)*SPIKE_LIST_UNIT/n_places;
            ahead.step = (uint32_t) std::min<uint64_t>(step, 1 << SPIKE_AHEAD_SHIFT);
        }
        return ahead;
    }

    // Requests the rest of that, after the stage.
    void finish(const spike_ahead & ahead) {
        begin = std::max(begin, std::min(target, ahead.position >> SPIKE_AHEAD_SHIFT));
        for (; begin < target; begin++) {
            for (uint32_t time = 0; time < SPIKE_AHEAD_TIMES; time++) {
                const uint8_t * run = runs[begin - time*SPIKE_AHEAD_AGAIN];
                for (const uint8_t * pair : { run, run + second_pair(), run + third_pair() }) { // a third of 0: the first again
                    prefetch(pair);
                    prefetch(pair + SPIKE_LINE_BYTES);
                }
            }
        }
    }

    uint32_t size() const { return end; }

  private:
    // So many runs for each input, the last one `last` bytes behind the first; with loops of known length, one vector for an input.
    template <int N_RUNS, typename F>
    void list_runs(const spike_tile_lines & lines, int64_t last, int64_t n_inputs, F input_at) {
        int64_t place[N_RUNS];
        for (int k = 0; k < N_RUNS; k++) {
            place[k] = k + 1 < N_RUNS ? k*lines_of_run*SPIKE_LINE_BYTES : last;
        }
        const uint8_t ** list = runs + end;
        for (int64_t e = 0; e < n_inputs; e++) {
            const uint8_t * line = lines.first + (size_t) input_at(e)*lines.stride;
            for (int k = 0; k < N_RUNS; k++) {
                list[e*N_RUNS + k] = line + place[k];
            }
        }
        end += (uint32_t) (n_inputs*N_RUNS);
    }

    size_t second_pair() const { return (size_t) std::min<int64_t>(due_lines_of_run - 2, 2)*SPIKE_LINE_BYTES; }
    size_t third_pair() const { return due_lines_of_run > 4 ? (size_t) (due_lines_of_run - 2)*SPIKE_LINE_BYTES : 0; }

    const uint8_t ** runs;
    int64_t          lines_of_run = 4, due_lines_of_run = 4; // of the stage that is appended, and of the one before it
    uint32_t         begin = 0, end = 0, target = 0; // what is to be requested
};

// The stages of a thread's share of a matrix, and the requests that are due while each of them computes.
class stage_list {
  public:
    stage_list(const spike_layout & layout, const uint8_t * packed, const token_group & tokens, const share & own, const next_product & after,
               const uint8_t ** runs) :
        layout(layout), packed(packed), train(tokens.first()), alone(tokens.n == 1), own(own), after(after), requests(runs),
        group(own.group_at(own.first_tile)) {}

    void start() {
        const tile_group first = own.group_at(own.first_tile);
        const int64_t    n_inputs = spike_chunk_start(layout.n_inputs, train->n_chunks, 1);
        first.for_each_strip(layout, [&](int64_t tile, int64_t n_tiles) {
            wait_for(spike_lines_of_tile(&layout, packed, tile), n_tiles, n_inputs);
        });
        if (first.with_half) {
            wait_for(spike_lines_of_tile(&layout, packed, first.half_tile()), 1, n_inputs);
        }
        requests.begin_with(packed);
        append_stage();
        requests.skip();
        append_stage();
    }

    // At the start of a stage that will visit so many places.
    spike_ahead enter(uint32_t n_places) {
        requests.make_room();
        const uint32_t before = requests.size();
        append_stage();
        return requests.spread(requests.size() - before, n_places);
    }

    void leave(const spike_ahead & ahead) { requests.finish(ahead); }

  private:
    void append_stage() {
        requests.next_stage();
        if (group.first_tile >= own.end_tile) {
            append_next_product();
            return;
        }
        const int64_t first = spike_chunk_start(layout.n_inputs, train->n_chunks, chunk);
        const int64_t end   = spike_chunk_start(layout.n_inputs, train->n_chunks, chunk + 1);
        if (alone) {
            uint32_t n_active;
            const uint16_t * active = spike_train_active(train, layout.n_inputs, chunk, &n_active);
            requests.append_lines(layout, packed, group, first, end, n_active, [&](int64_t e) { return active[e]; });
        } else {
            requests.append_lines(layout, packed, group, first, end, end - first, [&](int64_t e) { return first + e; });
        }
        chunk++;
        requests.append_half(layout, packed, group, first, end);
        append_salients();
        if (chunk == train->n_chunks) {
            group = own.group_at(group.first_tile + group.n_tiles());
            chunk = 0;
        }
    }

    // The group's salient weights are needed after its last chunk. In all they may be as many bytes as two chunks of lines, too many to wait in
    // a small second-level cache: so that with the last chunk come those of the first tile, and the others while those before them are added.
    // Where the kernel does not request any, a part of all comes with each chunk.
    void append_salients() {
        const uint8_t * first   = spike_salients_of_tile(&layout, packed, group.first_tile, 0, 0);
        const int64_t   of_tile = layout.n_blocks*SPIKE_SALIENT_SLOTS*SPIKE_TILE_ROWS/requests.run_bytes(); // runs
        if (!spike_select_kernels()->salients_ahead) {
            const int64_t n_runs = group.n_tiles()*of_tile;
            const int64_t begin  = (chunk - 1)*n_runs/train->n_chunks, end = chunk*n_runs/train->n_chunks;
            requests.append_bytes(first + begin*requests.run_bytes(), (end - begin)*requests.run_bytes());
        } else if (chunk == train->n_chunks) {
            requests.append_bytes(first, of_tile*requests.run_bytes());
        }
    }

    void append_next_product() {
        if (after.group.n_tiles() > 0 && !appended_next) {
            requests.append_lines(after.layout, after.packed, after.group, 0, after.n_inputs, after.n_inputs, [](int64_t e) { return e; });
            requests.append_half(after.layout, after.packed, after.group, 0, after.n_inputs);
            appended_next = true;
        }
    }

    const spike_layout & layout;
    const uint8_t *      packed;
    const spike_train *  train; // of the only token, or of any: all have the same chunks
    const bool           alone;
    const share &        own;
    const next_product & after;
    request_list         requests;
    tile_group           group; // whose stage is to be appended
    int64_t              chunk = 0;
    bool                 appended_next = false;
};

// Requests go with the token if ahead is not nullptr.
void integrate_chunk(const spike_kernels * kernels, const served_token & token, int64_t chunk, const spike_layout & layout, const uint8_t * packed,
                     const tile_group & group, spike_ahead * ahead) {
    constexpr int64_t STRIDE = SPIKE_CLASSES*SPIKE_TILE_ROWS;
    for (int k = 0; k < SPIKE_CLASSES; k++) {
        const spike_program * program = spike_train_program(token.train, k, chunk);
        if (program->n_steps == 0) {
            continue;
        }
        int32_t * potential = token.potential + k*SPIKE_TILE_ROWS;
        group.for_each_strip(layout, [&](int64_t tile, int64_t n_tiles) {
            const uint8_t * lines = spike_lines_of_tile(&layout, packed, tile).first;
            int32_t *       own   = potential + (tile - group.first_tile)*STRIDE;
            if (ahead) {
                kernels->integrate_ahead(lines, n_tiles, program, token.offsets, own, STRIDE, ahead);
                return;
            }
            for (int64_t t = 0; t < n_tiles; t++) {
                kernels->integrate(lines + t*SPIKE_LINE_BYTES, program, token.offsets, own + t*STRIDE);
            }
        });
        if (group.with_half) {
            kernels->integrate_half(spike_lines_of_tile(&layout, packed, group.half_tile()).first, program, token.half_offsets,
                                    potential + group.n_whole*STRIDE, ahead);
        }
    }
}

uint32_t places_of_chunk(const spike_train * train, int64_t chunk) {
    return spike_program_places(train, 0, chunk) + spike_program_places(train, 1, chunk);
}

// A share of a matrix's tiles for some tokens.
void compute_tiles(const spike_layout & layout, const uint8_t * packed, const token_group & tokens, const share & own, const next_product & after,
                   const uint8_t ** runs) {
    if (own.first_tile >= own.end_tile) {
        return;
    }
    const spike_kernels * kernels = spike_select_kernels();
    const bool requests = kernels->integrate_ahead != nullptr;
    stage_list stages(layout, packed, tokens, own, after, runs);
    if (requests) {
        stages.start();
    }
    size_t stride = 0;
    tile_group group;
    for (int64_t tile0 = own.first_tile; tile0 < own.end_tile; tile0 += group.n_tiles()) {
        group = own.group_at(tile0);
        const spike_tile_lines lines = spike_lines_of_tile(&layout, packed, tile0);
        for (int64_t t = 0; t < tokens.n; t++) {
            const served_token & token = tokens.tokens[t];
            if (stride != lines.stride) {
                find_offsets(token.train, lines.stride, token.offsets);
            }
            if (group.with_half) {
                find_offsets(token.train, SPIKE_HALF_LINE, token.half_offsets);
            }
            memset(token.potential, 0, (size_t) group.n_tiles()*SPIKE_CLASSES*SPIKE_TILE_ROWS*sizeof(int32_t));
        }
        stride = lines.stride;
        for (int64_t c = 0; c < tokens.first()->n_chunks; c++) {
            if (requests) {
                spike_ahead ahead = stages.enter(places_of_chunk(tokens.first(), c)*(uint32_t) group.n_tiles());
                integrate_chunk(kernels, tokens.tokens[0], c, layout, packed, group, &ahead);
                stages.leave(ahead);
            }
            for (int64_t t = requests ? 1 : 0; t < tokens.n; t++) {
                integrate_chunk(kernels, tokens.tokens[t], c, layout, packed, group, nullptr);
            }
        }
        for (int64_t tile = 0; tile < group.n_tiles(); tile++) {
            const uint8_t * salients = spike_salients_of_tile(&layout, packed, tile0 + tile, 0, 0);
            const uint8_t * next     = tile + 1 < group.n_tiles() ? spike_salients_of_tile(&layout, packed, tile0 + tile + 1, 0, 0) : nullptr;
            for (int64_t t = 0; t < tokens.n; t++) {
                const served_token & token = tokens.tokens[t];
                int32_t * potential = token.potential + tile*SPIKE_CLASSES*SPIKE_TILE_ROWS;
                add_salient_of_token(salients, layout, token.train, potential, t == 0 ? next : nullptr);
                read_out(token.train, token.output, layout, packed, tile0 + tile, potential);
            }
        }
    }
}

} // namespace

size_t decode_scratch_size(int64_t n_inputs, int64_t n_chunks, int64_t n_tokens) {
    return decode_scratch(nullptr, n_inputs, n_chunks, count_together(n_tokens)).size;
}

void compute_few_tokens(const ggml_compute_params * params, const product & product, const ggml_tensor * op, char * work, const work_layout & w) {
    const int64_t together = count_together(w.n_tokens);
    decode_scratch scratch(work + w.scratch + (size_t) params->ith*w.scratch_per_thread, w.n_inputs, w.n_chunks, together);
    const char * trains = work + w.trains + (w.own_encoding ? (size_t) params->ith*w.train_size : 0);
    const share own(op, params); // of every matrix
    const next_product none, next(following_product(true), params);
    for (int64_t j = 0; j < product.n_jobs(); j++) {
        const job work_of = product.get_job(j);
        for (int64_t t0 = 0; t0 < work_of.n_tokens; t0 += together) {
            const bool is_last = j + 1 == product.n_jobs() && t0 + together >= work_of.n_tokens;
            const token_group tokens = { scratch.tokens, std::min(work_of.n_tokens - t0, together) };
            for (int64_t t = 0; t < tokens.n; t++) {
                const token tok = product.get_token(j, t0 + t);
                scratch.tokens[t].train  = (const spike_train *) (trains + (size_t) tok.column*w.train_size);
                scratch.tokens[t].output = tok.output;
            }
            compute_tiles(own.layout, (const uint8_t *) work_of.matrix, tokens, own, is_last ? next : none, scratch.runs);
        }
    }
}

} // namespace spike
