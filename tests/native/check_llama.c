// Loads a model and writes on greedily from fixed tokens, with the library's public interface alone.
// Usage: check_llama MODEL N_TOKENS. Prints the tokens, and the logits behind the first ones.

#include "llama.h"

#include <stdio.h>
#include <stdlib.h>

enum { N_PROMPT = 24, FIRST_TOKEN = 5, N_SHOWN = 64 };

static void only_errors(enum ggml_log_level level, const char * text, void * data) {
    (void) data;
    if (level == GGML_LOG_LEVEL_ERROR) {
        fputs(text, stderr);
    }
}

static llama_token most_likely(const float * logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) {
        if (logits[i] > logits[best]) {
            best = i;
        }
    }
    return best;
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: check_llama MODEL N_TOKENS\n");
        return 2;
    }
    llama_log_set(only_errors, NULL);
    llama_backend_init();
    struct llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 128;
    params.n_threads = params.n_threads_batch = 2;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    struct llama_context * context = model ? llama_init_from_model(model, params) : NULL;
    if (!context) {
        return 1;
    }
    const int n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_token prompt[N_PROMPT];
    for (int i = 0; i < N_PROMPT; i++) {
        prompt[i] = FIRST_TOKEN + i*7 % (n_vocab - FIRST_TOKEN);
    }
    struct llama_batch batch = llama_batch_get_one(prompt, N_PROMPT);
    llama_token next;
    for (int n = 0; n < atoi(argv[2]); n++) {
        if (llama_decode(context, batch) != 0) {
            return 1;
        }
        const float * logits = llama_get_logits_ith(context, -1);
        if (n == 0) {
            printf("logits");
            for (int i = 0; i < N_SHOWN && i < n_vocab; i++) {
                printf(" %.6f", (double) logits[i]);
            }
            printf("\ntokens");
        }
        next = most_likely(logits, n_vocab);
        printf(" %d", next);
        batch = llama_batch_get_one(&next, 1);
    }
    printf("\n");
    llama_free(context);
    llama_model_free(model);
    llama_backend_free();
    return 0;
}
