// aggregate: sums, means and maxima of the messages weight_ij act(x_j + e_ij), and their gradients.
#include "lines.h"

namespace fastgt {
namespace {

enum Reduce : int64_t { SUM, MEAN, MAX };

struct AggregateCall {
    int64_t dtype, threads, width, reduce, relu, one_weight;  // one: a number an edge
    WalkArrays rows, columns;
    // [M, D]; [E, D] in the caller's order; [E, D] or [E, 1] likewise; null for None
    Array x, edge_value, weight;
    Array o, first;                   // [N, D]; edges of a maximum, -1 for none, as wide as indices
    Array d_o, d_x, d_edge, d_weight;  // as the above, but sums [E, 1]; null where not needed
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

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t aggregate_size() { return sizeof(AggregateCall); }

FASTGT_EXPORT void aggregate_fwd(const AggregateCall* call) {
    with_type(call->dtype, [&](auto t) {
        using T = decltype(t);
        expect_writes(call->o.data, call->rows.segments * call->width * int64_t(sizeof(T)));
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
        const bool looked_at = call->edge_value && call->relu && call->reduce != MAX;
        const bool together = call->d_x && (call->weight || looked_at);
        if (call->d_x) sum_to_columns<T>(*call, bool(call->d_edge));
        if ((call->d_edge || call->d_weight) && !together) spread_to_edges<T>(*call);
    });
}
