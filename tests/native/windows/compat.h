// What the programs of this folder use of C11 and Windows' library lacks. Included in front of every source there.
#pragma once

#include <malloc.h>
#include <stdlib.h>

#define aligned_alloc(alignment, size) _aligned_malloc(size, alignment)
#define free(memory) ((void) (memory)) // one free() for both kinds of memory does not exist; the programs are short
