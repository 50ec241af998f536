#pragma once

#include "ggml.h"

#include <stdio.h>
#include <stdlib.h>

#define GGML_ASSERT(x)     ((x) ? (void) 0 : abort())
#define GGML_LOG_WARN(...) ((void) fprintf(stderr, __VA_ARGS__))
#ifdef SPIKE_SILENT_LOG // fuzzing makes an error of almost every input
#    define GGML_LOG_ERROR(...) ((void) 0)
#else
#    define GGML_LOG_ERROR(...) ((void) fprintf(stderr, __VA_ARGS__))
#endif
