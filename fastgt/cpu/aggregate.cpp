// aggregate: sums, means and maxima of the messages weight_ij act(x_j + e_ij), and their gradients.
// In sums and means, e_ij may be of low rank, attr_ij W: `LowRank` makes it for some edges at a time.
#include <memory>

#include "lines.h"
#include "matrix.h"

namespace fastgt {
namespace {

enum Reduce : int64_t { SUM, MEAN, MAX };

struct AggregateCall {
    int64_t dtype, threads, width, reduce, relu, one_weight;  // one: a number an edge
    int64_t attr_width;
    WalkArrays rows, columns;
    // [M, D]; [E, D] in the caller's order; [E, D] or [E, 1] likewise; null for None
    Array x, edge_value, weight;
    Array attr, value_weight;  // [E, C], [C, D]: both or none
    Array o, first;  // [N, D]; edges of a maximum, -1 for none, as wide as indices
    // as the above, but sums [E, 1]; null where not needed
    Array d_o, d_x, d_edge, d_weight, d_attr, d_value_weight;
};

constexpr int64_t PIECE = 4096;  // edges over which the place of a maximum is counted

template <class A> FASTGT_INLINE Vec<A> relu_of(Vec<A> x) {
    return larger<A>(Vec<A>{}, x);  // NaN stays
}

// g where x is above 0 or NaN, else 0
template <class A> FASTGT_INLINE Vec<A> through_relu(Vec<A> g, Vec<A> x) {
    return where_set<A>(~(x <= A(0)), g);
}

// x_j + e_ij of the edge in a slot of the walk by rows
template <class T, int Z>
FASTGT_INLINE Line<Accumulator<T>, Z> message(
    const AggregateCall& call, const AnyWalk& walk, int64_t i, int64_t c, int n) {
    auto x = [&](int64_t i) FASTGT_INLINED { return call.x.at<T>(walk.other[i]); };
    auto edge = [&](int64_t i) FASTGT_INLINED { return call.edge_value.at<T>(walk.edge[i]); };
    const int64_t next = std::min(i + AHEAD, walk.edges - 1);
    if (!call.edge_value) {
        prefetch_line<Z>(x(next) + c);
        return load_line<Z>(x(i) + c, n);
    }
    prefetch_line<Z>(edge(next) + c);
    auto m = load_line<Z>(edge(i) + c, n);
    if (call.x) {
        prefetch_line<Z>(x(next) + c);
        m += load_line<Z>(x(i) + c, n);
    }
    return m;
}

// m times the weight of an edge
template <class T, int Z>
FASTGT_INLINE void times_weight(
    const AggregateCall& call, Line<Accumulator<T>, Z>& m, int64_t edge, int64_t c, int n) {
    if (call.one_weight) {
        const auto weight = load_one(call.weight.at<T>(edge));
        unrolled<Z>([&](int v) FASTGT_INLINED { m.v[v] *= weight; });
    } else {
        const auto weight = load_line<Z>(call.weight.at<T>(edge) + c, n);
        unrolled<Z>([&](int v) FASTGT_INLINED { m.v[v] *= weight.v[v]; });
    }
}

// weight_ij act(x_j + e_ij)
template <class T, int Z>
FASTGT_INLINE Line<Accumulator<T>, Z> weighted_message(
    const AggregateCall& call, const AnyWalk& walk, int64_t i, int64_t c, int n) {
    using A = Accumulator<T>;
    auto m = message<T, Z>(call, walk, i, c, n);
    if (!call.one_weight) {
        const int64_t next = std::min(i + AHEAD, walk.edges - 1);
        prefetch_line<Z>(call.weight.at<T>(walk.edge[next]) + c);
    }
    if (call.relu) m = by_vector<A, Z>([&](int v) { return relu_of<A>(m.v[v]); });
    times_weight<T, Z>(call, m, walk.edge[i], c, n);
    return m;
}

template <class T> void sums(const AggregateCall& call) {
    using A = Accumulator<T>;
    const AnyWalk walk(call.rows);
    each_segment(call.threads, walk, call.width, [&](int64_t r, int64_t from, int64_t to) {
        const A count = A(std::max<int64_t>(to - from, 1));
        each_line<A, 4>(call.width, [&](auto z, int64_t c, int n) {
            constexpr int Z = decltype(z)::COUNT;
            Line<A, Z> total;
            if (call.weight) {
                total = sum_line<A, Z>(from, to, [&](int64_t i) FASTGT_INLINED {
                    return weighted_message<T, Z>(call, walk, i, c, n);
                });
            } else {
                total = sum_line<A, Z>(from, to, [&](int64_t i) FASTGT_INLINED {
                    auto m = message<T, Z>(call, walk, i, c, n);
                    if (call.relu) m = by_vector<A, Z>([&](int v) { return relu_of<A>(m.v[v]); });
                    return m;
                });
            }
            if (call.reduce == MEAN)
                unrolled<Z>([&](int v) FASTGT_INLINED { total.v[v] /= count; });
            store_line<Z>(call.o.at<T>(r) + c, total, n);
        });
    });
}

// The largest message of each channel, and the least number of the edges that have it.
template <class T> void maxima(const AggregateCall& call) {
    using A = Accumulator<T>;
    using V = Vec<A>;
    const AnyWalk walk(call.rows);
    each_segment(call.threads, walk, call.width, [&](int64_t r, int64_t from, int64_t to) {
        bool ordered = true;  // by number: an earlier slot wins
        for (int64_t i = from + 1; i < to; i++) ordered &= walk.edge[i - 1] < walk.edge[i];
        each_vector<A>(call.width, [&](int64_t c, int n) {
            auto get = [&](int64_t i) FASTGT_INLINED {
                if (call.weight) return weighted_message<T, 1>(call, walk, i, c, n).v[0];
                return message<T, 1>(call, walk, i, c, n).v[0];
            };
            A value[WIDTH<A>] = {};
            int64_t number[WIDTH<A>];
            std::fill_n(number, WIDTH<A>, -1);
            for (int64_t start = from; start < to; start += PIECE) {
                V top = get(start);
                VecInt<A> place{};
                for (int64_t i = start + 1; i < std::min(to, start + PIECE); i++) {
                    const V x = get(i);
                    const auto here = typename LanesOf<A>::Int(i - start);
                    const VecInt<A> more = (x > top) | ((x != x) & (top == top));
                    const VecInt<A> tie = (x == top) | ((x != x) & (top != top));
                    top = choose<A>(more, x, top);
                    place = more ? here - VecInt<A>{} : place;
                    if (ordered || all_zero<A>(tie)) continue;
                    for (int l = 0; l < WIDTH<A>; l++)
                        if (tie[l] && walk.edge[i] < walk.edge[start + place[l]]) place[l] = here;
                }
                for (int l = 0; l < WIDTH<A>; l++) {
                    const A x = top[l], t = value[l];
                    const int64_t e = walk.edge[start + place[l]];
                    const bool tie = x == t || (x != x && t != t);
                    if (start > from && !(x > t || (x != x && t == t) || (tie && e < number[l])))
                        continue;
                    value[l] = x;
                    number[l] = e;
                }
            }
            for (int l = 0; l < n; l++) {
                // nothing below 0 gets a gradient; but a weight may have made it of what does
                const bool dead = call.relu && !call.weight && value[l] <= 0;
                store_one(call.o.at<T>(r) + c + l, dead ? A(0) : value[l]);
                if (dead) number[l] = -1;
                if (walk.ptr.wide)
                    call.first.at<int64_t>(r)[c + l] = number[l];
                else
                    call.first.at<int32_t>(r)[c + l] = int32_t(number[l]);
            }
        });
    });
}

// What a row passes on to each of its messages: the gradient of its sum, or its share in a mean's.
template <int Z, class T>
FASTGT_INLINE Line<Accumulator<T>, Z> passed_on(
    const AggregateCall& call, const Indices& row_ptr, int64_t r, int64_t c, int n) {
    using A = Accumulator<T>;
    auto g = load_line<Z>(call.d_o.at<T>(r) + c, n);
    if (call.reduce == MEAN) {
        const A share = A(1) / A(row_ptr[r + 1] - row_ptr[r]);
        unrolled<Z>([&](int v) FASTGT_INLINED { g.v[v] *= share; });
    }
    return g;
}

template <class I, int COUNT> struct SomeOf {
    typedef I V __attribute__((vector_size(COUNT * sizeof(I))));
};

// g where edge e is the one that a maximum was found on, which the n numbers at p are, else 0
template <class A, class I> FASTGT_INLINE Vec<A> to_first(Vec<A> g, const I* p, I e, int n) {
    typename SomeOf<I, WIDTH<A>>::V first{};
    std::memcpy(&first, p, n * sizeof(I));
    return where_set<A>(__builtin_convertvector(first == e, VecInt<A>), g);
}

template <int Z, class T>
FASTGT_INLINE Line<Accumulator<T>, Z> to_first(
    const AggregateCall& call, Line<Accumulator<T>, Z> g, int64_t r, int64_t e, int64_t c, int n) {
    using A = Accumulator<T>;
    return by_vector<A, Z>([&](int v) {
        const int64_t at = c + v * WIDTH<A>;
        const int lanes = v < Z - 1 ? WIDTH<A> : n;
        if (call.rows.wide) return to_first<A>(g.v[v], call.first.at<int64_t>(r) + at, e, lanes);
        return to_first<A>(g.v[v], call.first.at<int32_t>(r) + at, int32_t(e), lanes);
    });
}

// The gradient of x_j + e_ij, from g, that of the weighted message. Writes those of the edge.
template <class T, int Z>
FASTGT_INLINE Line<Accumulator<T>, Z> through_weight(
    const AggregateCall& call, Line<Accumulator<T>, Z> g, const Line<Accumulator<T>, Z>& m,
    int64_t edge, int64_t c, int n) {
    using A = Accumulator<T>;
    if (call.d_weight) {
        const auto part = by_vector<A, Z>([&](int v) FASTGT_INLINED {
            return g.v[v] * (call.relu ? relu_of<A>(m.v[v]) : m.v[v]);
        });
        if (call.one_weight)
            add_lanes<A, Z>(call.d_weight.at<A>(edge), c == 0, part);
        else
            store_line<Z>(call.d_weight.at<T>(edge) + c, part, n);
    }
    times_weight<T, Z>(call, g, edge, c, n);
    if (call.relu)
        unrolled<Z>([&](int v) FASTGT_INLINED { g.v[v] = through_relu<A>(g.v[v], m.v[v]); });
    if (call.d_edge) store_line<Z>(call.d_edge.at<T>(edge) + c, g, n);
    return g;
}

// The gradients of edges, row by row: where columns need none, or relu looks at no x_j + e_ij.
template <class T> void spread_to_edges(const AggregateCall& call) {
    using A = Accumulator<T>;
    const AnyWalk walk(call.rows);
    each_segment(call.threads, walk, call.width, [&](int64_t r, int64_t from, int64_t to) {
        if (from == to) return;
        each_line<A, 4>(call.width, [&](auto z, int64_t c, int n) {
            constexpr int Z = decltype(z)::COUNT;
            const auto g = passed_on<Z, T>(call, walk.ptr, r, c, n);
            for (int64_t i = from; i < to; i++) {
                if (call.weight) {
                    auto part = g;
                    if (call.reduce == MAX)
                        part = to_first<Z, T>(call, g, r, walk.edge[i], c, n);
                    const auto m = message<T, Z>(call, walk, i, c, n);
                    through_weight<T, Z>(call, part, m, walk.edge[i], c, n);
                    continue;
                }
                T* out = call.d_edge.at<T>(walk.edge[i]) + c;
                auto part = g;
                if (call.reduce == MAX) {
                    part = to_first<Z, T>(call, g, r, walk.edge[i], c, n);
                } else if (call.relu) {
                    const auto m = message<T, Z>(call, walk, i, c, n);
                    unrolled<Z>([&](int v) FASTGT_INLINED {
                        part.v[v] = through_relu<A>(g.v[v], m.v[v]);
                    });
                }
                store_line<Z>(out, part, n);
            }
        });
    });
}

// The gradient of columns; and of edges on the way, where they have weights or relu looks at
// x_j + e_ij.
template <class T> void sum_to_columns(const AggregateCall& call, bool edges) {
    using A = Accumulator<T>;
    const AnyWalk walk(call.columns);
    const Indices row_ptr{call.rows.ptr, call.rows.wide != 0};
    const bool maximum = call.reduce == MAX, relu = call.relu && !maximum;
    each_segment(call.threads, walk, call.width, [&](int64_t j, int64_t from, int64_t to) {
        each_line<A, 4>(call.width, [&](auto z, int64_t c, int n) {
            constexpr int Z = decltype(z)::COUNT;
            Line<A, Z> x{};
            if (relu || call.weight) x = load_line<Z>(call.x.at<T>(j) + c, n);
            auto next = [&](int64_t i) FASTGT_INLINED {
                return std::min(i + AHEAD, walk.edges - 1);
            };
            auto get = [&](int64_t i) FASTGT_INLINED {
                prefetch_line<Z>(call.d_o.at<T>(walk.other[next(i)]) + c);
                return passed_on<Z, T>(call, row_ptr, walk.other[i], c, n);
            };
            Line<A, Z> total;
            if (call.weight) {
                total = sum_line<A, Z>(from, to, [&](int64_t i) FASTGT_INLINED {
                    const int64_t edge = walk.edge[i], after = walk.edge[next(i)];
                    if (!call.one_weight) prefetch_line<Z>(call.weight.at<T>(after) + c);
                    auto m = x, g = get(i);
                    if (maximum) g = to_first<Z, T>(call, g, walk.other[i], edge, c, n);
                    if (call.edge_value) {
                        prefetch_line<Z>(call.edge_value.at<T>(after) + c);
                        m += load_line<Z>(call.edge_value.at<T>(edge) + c, n);
                    }
                    return through_weight<T, Z>(call, g, m, edge, c, n);
                });
            } else if (maximum) {
                total = sum_line<A, Z>(from, to, [&](int64_t i) FASTGT_INLINED {
                    return to_first<Z, T>(call, get(i), walk.other[i], walk.edge[i], c, n);
                });
            } else if (relu && call.edge_value) {
                total = sum_line<A, Z>(from, to, [&](int64_t i) FASTGT_INLINED {
                    const T* edge = call.edge_value.at<T>(walk.edge[i]);
                    prefetch_line<Z>(call.edge_value.at<T>(walk.edge[next(i)]) + c);
                    auto m = load_line<Z>(edge + c, n), g = get(i);
                    m += x;
                    unrolled<Z>([&](int v) FASTGT_INLINED {
                        g.v[v] = through_relu<A>(g.v[v], m.v[v]);
                    });
                    if (edges) store_line<Z>(call.d_edge.at<T>(walk.edge[i]) + c, g, n);
                    return g;
                });
            } else {
                total = sum_line<A, Z>(from, to, get);
            }
            if (relu && !call.edge_value && !call.weight)
                unrolled<Z>([&](int v) FASTGT_INLINED {
                    total.v[v] = through_relu<A>(total.v[v], x.v[v]);
                });
            store_line<Z>(call.d_x.at<T>(j) + c, total, n);
        });
    });
}

// ---- values of low rank

// Products attr_ij W of some slots of a walk, in the memory of one thread, and their gradients.
template <class T> struct LowRank {
    using A = Accumulator<T>;

    static constexpr int64_t MANY = 256;  // slots that are summed up at once
    static constexpr int64_t FEW = 64;    // slots whose products join a sum at once

    const AggregateCall& call;
    const AnyWalk& walk;
    const A *w, *wt;              // [C, D] and [D, C]
    const int64_t ldc, ldd, room;  // `room`: slots that there is place for
    A *attr, *value, *of_value, *of_attr, *total;
    A* sums = nullptr;                          // of the task: the gradient of W
    int64_t begin = 0, end = 0, task_end = 0;  // slots whose values are there

    LowRank(const AggregateCall& call, const AnyWalk& walk, const A* w, const A* wt, char* place)
        : call(call), walk(walk), w(w), wt(wt), ldc(filled(call.attr_width)),
          ldd(filled(call.width)), room(std::clamp<int64_t>(32768 / (ldd + 1), MANY, 4 * MANY)) {
        lay(place);
    }
    int64_t lay(char* const from) {
        char* place = from;
        for (A** at : {&attr, &of_attr}) *at = take<A>(place, room * ldc);
        for (A** at : {&value, &of_value}) *at = take<A>(place, room * ldd);
        total = take<A>(place, ldd);
        return place - from;
    }
    bool gradients() const { return call.d_attr || call.d_value_weight; }
    const A* value_of(int64_t slot) const { return value + (slot - begin) * ldd; }
    A* gradient_of(int64_t slot) const { return of_value + (slot - begin) * ldd; }

    void start(int64_t from, int64_t to, A* sums_of_task) {
        begin = end = from;
        task_end = to;
        sums = sums_of_task;
    }
    // Values of the slots from `from` to `to`. Those before `from` are done with.
    void need(int64_t from, int64_t to) {
        if (to <= end) return;
        finish(from);
        begin = from;
        end = std::min(from + room, task_end);
        for (int64_t i = begin; i < end; i++) {
            const int64_t next = std::min(i + AHEAD, end - 1);
            __builtin_prefetch(call.attr.at<T>(walk.edge[next]));
            const T* row = call.attr.at<T>(walk.edge[i]);
            A* to_row = attr + (i - begin) * ldc;
            each_vector<A>(call.attr_width,
                           [&](int64_t c, int n) { store(to_row + c, load_some(row + c, n)); });
        }
        product<A>(value, ldd, attr, ldc, 1, w, ldd, end - begin, call.attr_width, call.width);
    }
    // From the gradients of values to those of both factors, for all slots before `to`.
    void finish(int64_t to) {
        const int64_t count = to - begin, c = call.attr_width;
        if (call.d_attr) {
            product<A>(of_attr, ldc, of_value, ldd, 1, wt, ldc, count, call.width, c);
            for (int64_t i = 0; i < count; i++) {
                T* row = call.d_attr.at<T>(walk.edge[begin + i]);
                each_vector<A>(c, [&](int64_t at, int n) {
                    store_some(row + at, load(of_attr + i * ldc + at), n);
                });
            }
        }
        if (!call.d_value_weight) return;
        for (int64_t i = 0; i < count; i += FEW)
            product<A>(sums, ldd, attr + i * ldc, 1, ldc, of_value + i * ldd, ldd, c,
                       std::min(FEW, count - i), call.width, true);
    }
};

// put(segment, sums) of each segment's sums of term(values, segment, slot, c, n), a line from channel
// c on whose last vector has n lanes. A segment's sum has one order, whatever lies beside it.
template <class T, class Term, class Put>
void sum_low_rank(const AggregateCall& call, const AnyWalk& walk, Term term, Put put) {
    using A = Accumulator<T>;
    using Values = LowRank<T>;
    const int64_t ldc = filled(call.attr_width), ldd = filled(call.width);
    const int64_t factor = call.attr_width * ldd, partial = call.d_value_weight ? factor : 0;
    // sums of tasks are added up in the order of tasks, which are the same for every thread count
    constexpr int64_t FEWEST_TASKS = 16, PARTIALS = 1 << 20;
    int64_t tasks = count_tasks(walk, TASK / 2);
    if (partial) tasks = std::min(tasks, std::max(FEWEST_TASKS, PARTIALS / partial));
    const std::unique_ptr<A[]> w(new A[factor]()), wt(new A[call.width * ldc]());
    for (int64_t c = 0; c < call.attr_width; c++)
        each_vector<A>(call.width, [&](int64_t d, int n) {
            store_some(w.get() + c * ldd + d, load_some(call.value_weight.at<T>(c) + d, n), n);
        });
    transpose(wt.get(), ldc, w.get(), ldd, call.attr_width, call.width);
    const int64_t bytes = Values(call, walk, nullptr, nullptr, nullptr).lay(nullptr);
    const std::unique_ptr<char[]> room(new char[call.threads * bytes + 64]);
    const std::unique_ptr<A[]> sums(new A[tasks * partial]());
    char* const aligned = (char*)((int64_t(room.get()) + 63) / 64 * 64);

    each_task(call.threads, tasks, [&](int64_t t, int64_t thread) {
        Values values(call, walk, w.get(), wt.get(), aligned + thread * bytes);
        const int64_t first = first_segment(walk, t, tasks), end = first_segment(walk, t + 1, tasks);
        if (first == end) return;
        values.start(walk.ptr[first], walk.ptr[end], sums.get() + t * partial);
        for (int64_t s = first; s < end; s++) {
            std::fill_n(values.total, ldd, A(0));
            const int64_t last = walk.ptr[s + 1];
            for (int64_t from = walk.ptr[s]; from < last; from += Values::MANY) {
                const int64_t to = std::min(last, from + Values::MANY);
                values.need(from, to);
                each_line<A, 4>(call.width, [&](auto z, int64_t c, int n) {
                    constexpr int Z = decltype(z)::COUNT;
                    auto more = sum_line<A, Z>(from, to, [&](int64_t i) FASTGT_INLINED {
                        return term(values, z, s, i, c, n);
                    });
                    more += load_line<Z>(values.total + c, n);
                    store_line<Z>(values.total + c, more, n);
                });
            }
            put(s, values.total);
        }
        values.finish(walk.ptr[end]);
    });
    each_task(call.threads, partial ? call.attr_width : 0, [&](int64_t c, int64_t) {
        each_vector<A>(call.width, [&](int64_t d, int n) {
            Vec<A> total{};
            for (int64_t t = 0; t < tasks;) {
                Vec<A> some{};
                for (const int64_t stop = std::min(tasks, t + BLOCK); t < stop; t++)
                    some += load(sums.get() + t * partial + c * ldd + d);
                total += some;
            }
            store_some(call.d_value_weight.at<T>(c) + d, total, n);
        });
    });
}

template <class T> void low_rank_forward(const AggregateCall& call) {
    using A = Accumulator<T>;
    const AnyWalk walk(call.rows);
    sum_low_rank<T>(
        call, walk,
        [&](const LowRank<T>& values, auto z, int64_t, int64_t i, int64_t c, int n)
            FASTGT_INLINED {
                constexpr int Z = decltype(z)::COUNT;
                auto m = message<T, Z>(call, walk, i, c, n);
                m += load_line<Z>(values.value_of(i) + c, n);
                if (call.relu) m = by_vector<A, Z>([&](int v) { return relu_of<A>(m.v[v]); });
                if (call.weight) times_weight<T, Z>(call, m, walk.edge[i], c, n);
                return m;
            },
        [&](int64_t r, const A* total) {
            const A count = A(std::max<int64_t>(walk.ptr[r + 1] - walk.ptr[r], 1));
            each_vector<A>(call.width, [&](int64_t c, int n) {
                Vec<A> x = load(total + c);
                if (call.reduce == MEAN) x /= count;
                store_some(call.o.at<T>(r) + c, x, n);
            });
        });
}

// All gradients, column by column.
template <class T> void low_rank_backward(const AggregateCall& call) {
    using A = Accumulator<T>;
    const AnyWalk walk(call.columns);
    const Indices row_ptr{call.rows.ptr, call.rows.wide != 0};
    sum_low_rank<T>(
        call, walk,
        [&](const LowRank<T>& values, auto z, int64_t j, int64_t i, int64_t c, int n)
            FASTGT_INLINED {
                constexpr int Z = decltype(z)::COUNT;
                const int64_t edge = walk.edge[i], next = std::min(i + AHEAD, walk.edges - 1);
                prefetch_line<Z>(call.d_o.at<T>(walk.other[next]) + c);
                auto m = load_line<Z>(call.x.at<T>(j) + c, n);
                if (call.edge_value) {
                    prefetch_line<Z>(call.edge_value.at<T>(walk.edge[next]) + c);
                    m += load_line<Z>(call.edge_value.at<T>(edge) + c, n);
                }
                m += load_line<Z>(values.value_of(i) + c, n);
                auto g = passed_on<Z, T>(call, row_ptr, walk.other[i], c, n);
                if (call.weight) {
                    g = through_weight<T, Z>(call, g, m, edge, c, n);
                } else {
                    if (call.relu)
                        g = by_vector<A, Z>([&](int v) {
                            return through_relu<A>(g.v[v], m.v[v]);
                        });
                    if (call.d_edge) store_line<Z>(call.d_edge.at<T>(edge) + c, g, n);
                }
                if (values.gradients()) store_line<Z>(values.gradient_of(i) + c, g, n);
                return g;
            },
        [&](int64_t j, const A* total) {
            if (!call.d_x) return;
            each_vector<A>(call.width, [&](int64_t c, int n) {
                store_some(call.d_x.at<T>(j) + c, load(total + c), n);
            });
        });
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t aggregate_size() { return sizeof(AggregateCall); }

FASTGT_EXPORT void aggregate_fwd(const AggregateCall* call) {
    with_type(call->dtype, [&](auto t) {
        using T = decltype(t);
        expect_writes(call->o.data, call->rows.segments * call->width * int64_t(sizeof(T)));
        if (call->attr) return low_rank_forward<T>(*call);
        call->reduce == MAX ? maxima<T>(*call) : sums<T>(*call);
    });
}

FASTGT_EXPORT void aggregate_bwd(const AggregateCall* call) {
    with_type(call->dtype, [&](auto t) {
        using T = decltype(t);
        const int64_t line = call->width * int64_t(sizeof(T));
        expect_writes(call->d_edge.data, AnyWalk(call->rows).edges * line);
        if (!call->one_weight) expect_writes(call->d_weight.data, AnyWalk(call->rows).edges * line);
        expect_writes(call->d_x.data, call->columns.segments * line);
        if (call->attr) return low_rank_backward<T>(*call);
        const bool looked_at = call->edge_value && call->relu && call->reduce != MAX;
        const bool together = call->d_x && (call->weight || looked_at);
        if (call->d_x) sum_to_columns<T>(*call, bool(call->d_edge));
        if ((call->d_edge || call->d_weight) && !together) spread_to_edges<T>(*call);
    });
}
