// Some vectors of a row at once, and the work of a walk cut by them and by segments.
#pragma once

#include "call.h"

namespace fastgt {

constexpr int64_t AHEAD = 16;  // edges from which rows are asked for before they are needed

// Z vectors side by side
template <class A, int Z> struct Line {
    Vec<A> v[Z];
};

template <class A, int Z, class F> FASTGT_INLINE Line<A, Z> by_vector(F f) {
    Line<A, Z> r;
    unrolled<Z>([&](int z) FASTGT_INLINED { r.v[z] = f(z); });
    return r;
}

template <class A, int Z> FASTGT_INLINE void operator+=(Line<A, Z>& a, const Line<A, Z>& b) {
    unrolled<Z>([&](int z) FASTGT_INLINED { a.v[z] += b.v[z]; });
}

// the last vector has n lanes
template <int Z, class T> FASTGT_INLINE Line<Accumulator<T>, Z> load_line(const T* p, int n) {
    using A = Accumulator<T>;
    return by_vector<A, Z>([&](int z) FASTGT_INLINED {
        return z < Z - 1 ? load(p + z * WIDTH<A>) : load_some(p + z * WIDTH<A>, n);
    });
}

template <int Z, class T>
FASTGT_INLINE void store_line(T* p, const Line<Accumulator<T>, Z>& x, int n) {
    using A = Accumulator<T>;
    unrolled<Z - 1>([&](int z) FASTGT_INLINED { store(p + z * WIDTH<A>, x.v[z]); });
    store_some(p + (Z - 1) * WIDTH<A>, x.v[Z - 1], n);
}

template <int Z, class T> FASTGT_INLINE void prefetch_line(const T* p) {
    constexpr int BYTES_READ = Z * WIDTH<Accumulator<T>> * int(sizeof(T));
    unrolled<(BYTES_READ + 63) / 64>(
        [&](int line) FASTGT_INLINED { __builtin_prefetch((const char*)p + line * 64); });
}

// the sum of term(i) over the slots from `from` to `to`, in blocks of blocks: of terms that are alike,
// each would be rounded the same way where it joins a large sum
template <class A, int Z, class F>
FASTGT_INLINE Line<A, Z> sum_line(int64_t from, int64_t to, F term) {
    constexpr int64_t FEW = 16, MANY = 16 * FEW;
    Line<A, Z> total{};
    for (int64_t i = from; i < to;) {
        Line<A, Z> many{};
        for (const int64_t last = std::min(to, i + MANY); i < last;) {
            Line<A, Z> few{};
            for (const int64_t stop = std::min(last, i + FEW); i < stop; i++) few += term(i);
            many += few;
        }
        total += many;
    }
    return total;
}

// the sum of a line's lanes, to `p` alone or to what stands there: that of the lines before
template <class A, int Z>
FASTGT_INLINE void add_lanes(A* p, bool alone, const Line<A, Z>& x) {
    Vec<A> total = x.v[0];
    unrolled<Z - 1>([&](int z) FASTGT_INLINED { total += x.v[z + 1]; });
    const A sum = sum_across<A>(total)[0];
    *p = alone ? sum : *p + sum;
}

// A number of vectors as a type
template <int Z> struct Vectors {
    static constexpr int COUNT = Z;
};

// f(Vectors<Z>{}, c, n) for the lines of a row: Z vectors from channel c on, the last of n lanes
template <class A, int Z, class F> FASTGT_INLINE void each_line(int64_t width, const F& f) {
    constexpr int64_t channels = Z * WIDTH<A>;
    int64_t c = 0;
    for (; width - c > channels - WIDTH<A>; c += channels)
        f(Vectors<Z>{}, c, int(std::min(width - c - channels, int64_t(0))) + WIDTH<A>);
    if (c < width)
        each_vector<A>(width - c, [&](int64_t at, int n) { f(Vectors<1>{}, c + at, n); });
}

// f(segment, from, to) for each segment of a walk and its slots, where edges have so many channels
template <class W, class F>
void each_segment(int64_t threads, const W& walk, int64_t width, const F& f) {
    const int64_t size = std::max<int64_t>(64, TASK * 16 / std::max<int64_t>(width, 16));
    const int64_t tasks = std::max<int64_t>(1, (walk.edges + walk.segments) / size);
    each_task(threads, tasks, [&](int64_t t, int64_t) {
        const int64_t end = first_segment(walk, t + 1, tasks);
        for (int64_t s = first_segment(walk, t, tasks); s < end; s++)
            f(s, int64_t(walk.ptr[s]), int64_t(walk.ptr[s + 1]));
    });
}

}  // namespace fastgt
