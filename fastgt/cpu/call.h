// What every kernel is called with: arrays, walks through the edges, and PyTorch's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "lanes.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define FASTGT_EXPORT extern "C" __attribute__((visibility("default")))

namespace fastgt {

// A tensor whose last dimension is contiguous. Strides count elements. `data` is null for None.
struct Array {
    void* data;
    int64_t row, head;

    explicit operator bool() const { return data != nullptr; }
    template <class T> T* at(int64_t r) const { return (T*)data + r * row; }
    template <class T> T* at(int64_t r, int64_t h) const { return (T*)data + r * row + h * head; }
};

// Advice to the system, without a change of values: fresh memory (or null) in huge pages.
inline void expect_writes(void* data, int64_t bytes) {
    if (!data) return;
#if defined(__linux__)
    constexpr int64_t LARGE = 1 << 21;
    const int64_t begin = (int64_t(data) + LARGE - 1) / LARGE * LARGE;
    const int64_t end = (int64_t(data) + bytes) / LARGE * LARGE;
    if (end - begin >= 2 * LARGE) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)bytes;
#endif
}

// dtypes as fastgt/cpu/library.py numbers them
enum Dtype : int64_t { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };

// Edges by segment (row or column): segment s has the slots ptr[s] to ptr[s + 1] of the arrays
// below. Each is of 32 or of 64 bits.
struct WalkArrays {
    void* ptr;
    void* other;  // the node at the edge's other end
    void* edge;   // the edge's number in the caller's order
    int64_t segments;
    int64_t wide;  // whether indices have 64 bits
};

template <class I> struct Walk {
    const I *ptr, *other, *edge;
    int64_t segments, edges;

    explicit Walk(const WalkArrays& w)
        : ptr((const I*)w.ptr),
          other((const I*)w.other),
          edge((const I*)w.edge),
          segments(w.segments),
          edges(w.segments ? int64_t(ptr[w.segments]) : 0) {}
};

constexpr int64_t BLOCK = 64;  // terms that are added one after another before they join a sum

// Indices of either width, told apart at each access: a kernel need not be compiled twice.
struct Indices {
    const void* data;
    bool wide;

    int64_t operator[](int64_t i) const {
        return wide ? ((const int64_t*)data)[i] : ((const int32_t*)data)[i];
    }

    void copy(int64_t from, int64_t count, int64_t* to) const {
        if (wide)
            std::copy_n((const int64_t*)data + from, count, to);
        else
            std::copy_n((const int32_t*)data + from, count, to);
    }
};

// A walk of either width.
struct AnyWalk {
    Indices ptr, other, edge;
    int64_t segments, edges;

    explicit AnyWalk(const WalkArrays& w)
        : ptr{w.ptr, w.wide != 0},
          other{w.other, w.wide != 0},
          edge{w.edge, w.wide != 0},
          segments(w.segments),
          edges(w.segments ? ptr[w.segments] : 0) {}
};

typedef void (*Body)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Body, void* context);
extern ParallelFor parallel_for;  // torch_parallel_for, handed over when the library is loaded

// f(thread) for each of `threads`, side by side where PyTorch grants it
template <class F> void on_threads(int64_t threads, const F& f) {
    if (threads <= 1) {
        f(0);
        return;
    }
    parallel_for(
        0, threads, 1,
        [](int64_t begin, int64_t end, void* context) {
            for (int64_t t = begin; t < end; t++) (*(const F*)context)(t);
        },
        (void*)&f);
}

// f(task, thread) for each of `tasks`: a thread takes the next one when it has time
template <class F> void each_task(int64_t threads, int64_t tasks, const F& f) {
    std::atomic<int64_t> next{0};
    on_threads(std::min(threads, tasks), [&](int64_t thread) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
            f(task, thread);
    });
}

#ifndef FASTGT_TASK
#define FASTGT_TASK 4096
#endif
constexpr int64_t TASK = FASTGT_TASK;  // edges and segments of a task; a segment is never cut

template <class W> int64_t count_tasks(const W& walk, int64_t task) {
    return std::max<int64_t>(1, (walk.edges + walk.segments) / task);
}

// the first segment of task t, where edges and segments are shared out evenly
template <class W> int64_t first_segment(const W& walk, int64_t t, int64_t tasks) {
    if (t >= tasks) return walk.segments;
    const int64_t share = (walk.edges + walk.segments) * t / tasks;
    int64_t low = 0, high = walk.segments;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (int64_t(walk.ptr[middle]) + middle < share)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// f(begin, end, thread) for ranges of segments that share out the edges
template <class W, class F>
void each_range(int64_t threads, const W& walk, const F& f, int64_t task = TASK) {
    const int64_t tasks = count_tasks(walk, task);
    each_task(threads, tasks, [&](int64_t t, int64_t thread) {
        const int64_t begin = first_segment(walk, t, tasks);
        const int64_t end = first_segment(walk, t + 1, tasks);
        if (begin < end) f(begin, end, thread);
    });
}

// f(T{}) for the type that a call names
template <class F> void with_type(int64_t dtype, const F& f) {
    switch (dtype) {
        case FLOAT32: f(float{}); break;
        case FLOAT64: f(double{}); break;
        case FLOAT16: f(Half{}); break;
        default: f(BFloat{}); break;
    }
}

// f(T{}, I{}) for the types that a call names
template <class F> void with_types(int64_t dtype, bool wide, const F& f) {
    with_type(dtype, [&](auto t) { wide ? f(t, int64_t{}) : f(t, int32_t{}); });
}

// room for `count` numbers of type A at the next cache line; `place` moves on
template <class A> A* take(char*& place, int64_t count) {
    A* here = (A*)place;
    place += (count * int64_t(sizeof(A)) + 127) / 64 * 64;
    return here;
}

}  // namespace fastgt
