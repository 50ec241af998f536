// Work of the quantizer, shared out among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// work() in each of several threads.
template <typename work_t> void in_threads(int n_threads, const work_t & work) {
    std::vector<std::thread> threads;
    for (int k = 1; k < n_threads; k++) {
        threads.emplace_back([&work] { work(); });
    }
    work();
    for (auto & thread : threads) {
        thread.join();
    }
}

// work(0) to work(count - 1), by several threads.
template <typename work_t> void share_out(int n_threads, int64_t count, const work_t & work) {
    std::atomic<int64_t> next { 0 };
    in_threads((int) std::min<int64_t>(n_threads, count), [&] {
        for (int64_t k = next.fetch_add(1); k < count; k = next.fetch_add(1)) {
            work(k);
        }
    });
}
