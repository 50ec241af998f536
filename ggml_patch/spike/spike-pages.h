// Memory of a mapped file that is no longer needed because its data was laid out anew elsewhere.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__linux__)
#    include <sys/mman.h>
#    include <unistd.h>
#endif

// The process gives up the whole pages of a part of a shared mapping; the system may keep them as its cache of the file, and
// who reads them again gets the same bytes. Never for other memory, which would lose its content.
static inline void spike_give_up_pages(const void * data, size_t size) {
#if defined(__linux__)
    const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t) data + page - 1)/page*page, end = ((uintptr_t) data + size)/page*page;
    if (begin < end) {
        // A file that lies in the cache in huge pages would come back with the next small tensor beside it, 2 MB at a time.
        madvise((void *) begin, end - begin, MADV_NOHUGEPAGE);
        madvise((void *) begin, end - begin, MADV_DONTNEED); // refused for locked pages, which then stay
    }
#else
    (void) data;
    (void) size;
#endif
}
