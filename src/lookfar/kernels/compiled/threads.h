// Memory that fails in words, and threads that hand on what one of them throws.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "vectors.h"

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<float, Free>;

static inline Memory room(Int count) {
    auto* found = static_cast<float*>(std::aligned_alloc(64, up(count * 4 + 4, 64)));
    if (!found) throw std::bad_alloc();
#ifdef LOOKFAR_POISON  // a test's: what is read before it is written is no number
    std::fill(found, found + count, std::numeric_limits<float>::quiet_NaN());
#endif
    return Memory(found);
}

// Runs task(0) … task(threads - 1), as many at a time as can be started, and throws what the first of them threw.
template <class Task>
static void on_threads(Int threads, Task task) {
    std::exception_ptr failure;
    std::mutex telling;
    auto guarded = [&](Int thread) {
        try {
            task(thread);
        } catch (...) {
            std::lock_guard<std::mutex> alone(telling);
            if (!failure) failure = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    Int started = 1;
    try {
        for (; started < threads; ++started) others.emplace_back(guarded, started);
    } catch (const std::system_error&) {  // no more threads: the rest is done here
    }
    guarded(0);
    for (; started < threads; ++started) guarded(started);
    for (auto& each : others) each.join();
    if (failure) std::rethrow_exception(failure);
}
