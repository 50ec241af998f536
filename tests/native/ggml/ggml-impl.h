#pragma once

#include "ggml.h"

#include <stdio.h>
#include <stdlib.h>

#define GGML_ASSERT(x)     ((x) ? (void) 0 : abort())
#define GGML_LOG_WARN(...) ((void) fprintf(stderr, __VA_ARGS__))
