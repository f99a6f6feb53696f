// gated_aggregate: sums of eta_ij (x_j + value_ij), eta_ij = weight_ij sigmoid(e_ij) with
// e_ij = gate_ij + gate_row_i + gate_col_j, divided by the sum of eta and eps; and their gradients.
#include "lines.h"

namespace fastgt {
namespace {

struct GatedAggregateCall {
    int64_t dtype, threads, width, normalize, one_weight;  // one: a number an edge
    double eps;
    WalkArrays rows, columns;
    Array x, gate, gate_row, gate_col;  // [M, D], [E, D], [N, D], [M, D]; null for None
    Array weight, value;                // [E, D] or [E, 1], [E, D]; null for None
    Array o, e, total, mean;            // [N, D] but e [E, D]; null where not asked for
    Array d_o, d_e, w;                  // [N, D], [E, D] or null, [N, 2 D]: w_i and w_i mean_i
    Array dx, dgate, drow, dcol;        // as the inputs; null where not needed
    Array dweight, dvalue;              // likewise; sums [E, 1] are accumulators
};

template <class A> FASTGT_INLINE Vec<A> sigmoid(Vec<A> x) {
    return A(1) / (A(1) + exponential(-x));
}

// Lines of two vectors: sigmoids of more do not run faster side by side.
constexpr int VECTORS = 2;

// e_ij, of whose terms the row's or the column's is at hand in `own`; `other` is that of the other.
template <class T, int Z>
FASTGT_INLINE Line<Accumulator<T>, Z> scores(
    const GatedAggregateCall& call, const Array& other, const Line<Accumulator<T>, Z>& own,
    const AnyWalk& walk, int64_t i, int64_t c, int n) {
    const int64_t next = std::min(i + AHEAD, walk.edges - 1);
    auto e = own;
    if (call.gate) {
        prefetch_line<Z>(call.gate.at<T>(walk.edge[next]) + c);
        e += load_line<Z>(call.gate.at<T>(walk.edge[i]) + c, n);
    }
    if (other) {
        prefetch_line<Z>(other.at<T>(walk.other[next]) + c);
        e += load_line<Z>(other.at<T>(walk.other[i]) + c, n);
    }
    return e;
}

// sigma times the weight of an edge, where it has one
template <class T, int Z>
FASTGT_INLINE Line<Accumulator<T>, Z> weighted(
    const GatedAggregateCall& call, Line<Accumulator<T>, Z> sigma, int64_t edge, int64_t c, int n) {
    if (!call.weight) return sigma;
    if (call.one_weight) {
        const auto weight = load_one(call.weight.at<T>(edge));
        unrolled<Z>([&](int v) FASTGT_INLINED { sigma.v[v] *= weight; });
    } else {
        const auto weight = load_line<Z>(call.weight.at<T>(edge) + c, n);
        unrolled<Z>([&](int v) FASTGT_INLINED { sigma.v[v] *= weight.v[v]; });
    }
    return sigma;
}

// x_j + value_ij
template <class T, int Z>
FASTGT_INLINE Line<Accumulator<T>, Z> with_value(
    const GatedAggregateCall& call, Line<Accumulator<T>, Z> x, int64_t edge, int64_t c, int n) {
    if (call.value) x += load_line<Z>(call.value.at<T>(edge) + c, n);
    return x;
}

template <int Z, class T>
FASTGT_INLINE void prefetch_edge(const GatedAggregateCall& call, int64_t edge, int64_t c) {
    if (call.value) prefetch_line<Z>(call.value.at<T>(edge) + c);
    if (call.weight && !call.one_weight) prefetch_line<Z>(call.weight.at<T>(edge) + c);
}

template <int Z, class T>
FASTGT_INLINE Line<Accumulator<T>, Z> line_or_zero(const Array& x, int64_t i, int64_t c, int n) {
    if (!x) return Line<Accumulator<T>, Z>{};
    return load_line<Z>(x.at<T>(i) + c, n);
}

template <class T> void forward(const GatedAggregateCall& call) {
    using A = Accumulator<T>;
    using V = Vec<A>;
    const AnyWalk walk(call.rows);
    each_segment(call.threads, walk, call.width, [&](int64_t r, int64_t from, int64_t to) {
        each_line<A, VECTORS>(call.width, [&](auto z, int64_t c, int n) {
            constexpr int Z = decltype(z)::COUNT;
            const auto own = line_or_zero<Z, T>(call.gate_row, r, c, n);
            // eta, then eta times x and value
            const auto sums = sum_line<A, 2 * Z>(from, to, [&](int64_t i) FASTGT_INLINED {
                const auto e = scores<T, Z>(call, call.gate_col, own, walk, i, c, n);
                if (call.e) store_line<Z>(call.e.at<T>(walk.edge[i]) + c, e, n);
                const int64_t next = std::min(i + AHEAD, walk.edges - 1);
                prefetch_line<Z>(call.x.at<T>(walk.other[next]) + c);
                prefetch_edge<Z, T>(call, walk.edge[next], c);
                auto x = load_line<Z>(call.x.at<T>(walk.other[i]) + c, n);
                x = with_value<T, Z>(call, x, walk.edge[i], c, n);
                auto eta =
                    by_vector<A, Z>([&](int v) FASTGT_INLINED { return sigmoid<A>(e.v[v]); });
                eta = weighted<T, Z>(call, eta, walk.edge[i], c, n);
                Line<A, 2 * Z> term;
                unrolled<Z>([&](int v) FASTGT_INLINED {
                    term.v[v] = eta.v[v];
                    term.v[Z + v] = eta.v[v] * x.v[v];
                });
                return term;
            });
            Line<A, Z> mean, total;
            unrolled<Z>([&](int v) FASTGT_INLINED {
                const V sum = sums.v[v] + A(call.eps);
                total.v[v] = sum == A(0) ? splat(std::numeric_limits<A>::infinity()) : sum;
                mean.v[v] = sums.v[Z + v];
                if (call.normalize) mean.v[v] /= total.v[v];
            });
            store_line<Z>(call.o.at<T>(r) + c, mean, n);
            if (call.total) store_line<Z>(call.total.at<A>(r) + c, total, n);
            if (call.mean) store_line<Z>(call.mean.at<A>(r) + c, mean, n);
        });
    });
}

// What rows pass on: w_i = do_i, divided by the sum of eta, and w_i mean_i.
template <class T> void pass_on(const GatedAggregateCall& call) {
    using A = Accumulator<T>;
    const AnyWalk walk(call.rows);
    each_segment(call.threads, walk, call.width, [&](int64_t r, int64_t, int64_t) {
        each_vector<A>(call.width, [&](int64_t c, int n) {
            Vec<A> w = load_some(call.d_o.at<T>(r) + c, n), shift{};
            if (call.normalize) {
                // lanes beyond the last channel are 0 / 0, and stored nowhere
                w = w / load_some(call.total.at<A>(r) + c, n);
                shift = w * load_some(call.mean.at<A>(r) + c, n);
            }
            store_some(call.w.at<A>(r) + c, w, n);
            store_some(call.w.at<A>(r) + call.width + c, shift, n);
        });
    });
}

// de_ij from sigmoid(e_ij), eta_ij, x_j + value_ij, and what row i passes on
template <class T, int Z>
FASTGT_INLINE Line<Accumulator<T>, Z> score_gradient(
    const GatedAggregateCall& call, const Line<Accumulator<T>, Z>& sigma,
    const Line<Accumulator<T>, Z>& eta, const Line<Accumulator<T>, Z>& x,
    const Line<Accumulator<T>, Z>& w, const Line<Accumulator<T>, Z>& shift, int64_t edge, int64_t c,
    int n) {
    using A = Accumulator<T>;
    auto ds = by_vector<A, Z>([&](int v) FASTGT_INLINED {
        return (w.v[v] * x.v[v] - shift.v[v]) * eta.v[v] * (A(1) - sigma.v[v]);
    });
    if (call.d_e) ds += load_line<Z>(call.d_e.at<T>(edge) + c, n);
    return ds;
}

// The gradients of the weight and value of an edge, from the same
template <class T, int Z>
FASTGT_INLINE void store_edge_gradients(
    const GatedAggregateCall& call, const Line<Accumulator<T>, Z>& sigma,
    const Line<Accumulator<T>, Z>& eta, const Line<Accumulator<T>, Z>& x,
    const Line<Accumulator<T>, Z>& w, const Line<Accumulator<T>, Z>& shift, int64_t edge, int64_t c,
    int n) {
    using A = Accumulator<T>;
    if (call.dweight) {
        const auto part = by_vector<A, Z>([&](int v) FASTGT_INLINED {
            return (w.v[v] * x.v[v] - shift.v[v]) * sigma.v[v];
        });
        if (call.one_weight)
            add_lanes<A, Z>(call.dweight.at<A>(edge), c == 0, part);
        else
            store_line<Z>(call.dweight.at<T>(edge) + c, part, n);
    }
    if (call.dvalue) {
        const auto part =
            by_vector<A, Z>([&](int v) FASTGT_INLINED { return eta.v[v] * w.v[v]; });
        store_line<Z>(call.dvalue.at<T>(edge) + c, part, n);
    }
}

// The gradients of x, gate, gate_col and of what edges have besides, column by column.
template <class T> void to_columns(const GatedAggregateCall& call) {
    using A = Accumulator<T>;
    const AnyWalk walk(call.columns);
    each_segment(call.threads, walk, call.width, [&](int64_t j, int64_t from, int64_t to) {
        each_line<A, VECTORS>(call.width, [&](auto z, int64_t c, int n) {
            constexpr int Z = decltype(z)::COUNT;
            const auto own = line_or_zero<Z, T>(call.gate_col, j, c, n);
            const auto x = load_line<Z>(call.x.at<T>(j) + c, n);
            // of x, then of gate_col
            const auto sums = sum_line<A, 2 * Z>(from, to, [&](int64_t i) FASTGT_INLINED {
                const int64_t next = std::min(i + AHEAD, walk.edges - 1), edge = walk.edge[i];
                const A* after = call.w.at<A>(walk.other[next]) + c;
                prefetch_line<Z>(after);
                prefetch_line<Z>(after + call.width);
                if (call.d_e) prefetch_line<Z>(call.d_e.at<T>(walk.edge[next]) + c);
                prefetch_edge<Z, T>(call, walk.edge[next], c);
                const auto e = scores<T, Z>(call, call.gate_row, own, walk, i, c, n);
                const auto sigma =
                    by_vector<A, Z>([&](int v) FASTGT_INLINED { return sigmoid<A>(e.v[v]); });
                const A* passed = call.w.at<A>(walk.other[i]) + c;
                const auto w = load_line<Z>(passed, n);
                const auto shift = load_line<Z>(passed + call.width, n);
                const auto eta = weighted<T, Z>(call, sigma, edge, c, n);
                const auto value = with_value<T, Z>(call, x, edge, c, n);
                const auto ds =
                    score_gradient<T, Z>(call, sigma, eta, value, w, shift, edge, c, n);
                if (call.dweight || call.dvalue)
                    store_edge_gradients<T, Z>(call, sigma, eta, value, w, shift, edge, c, n);
                if (call.dgate) store_line<Z>(call.dgate.at<T>(edge) + c, ds, n);
                Line<A, 2 * Z> term;
                unrolled<Z>([&](int v) FASTGT_INLINED {
                    term.v[v] = eta.v[v] * w.v[v];
                    term.v[Z + v] = ds.v[v];
                });
                return term;
            });
            Line<A, Z> dx, dcol;
            unrolled<Z>([&](int v) FASTGT_INLINED {
                dx.v[v] = sums.v[v], dcol.v[v] = sums.v[Z + v];
            });
            if (call.dx) store_line<Z>(call.dx.at<T>(j) + c, dx, n);
            if (call.dcol) store_line<Z>(call.dcol.at<T>(j) + c, dcol, n);
        });
    });
}

// The gradient of gate_row: sums of what gate has, but where that is rounded or not there.
template <class T> void to_rows(const GatedAggregateCall& call) {
    using A = Accumulator<T>;
    const AnyWalk walk(call.rows);
    const bool exact = call.dgate && sizeof(T) == sizeof(A);
    each_segment(call.threads, walk, call.width, [&](int64_t r, int64_t from, int64_t to) {
        each_line<A, VECTORS>(call.width, [&](auto z, int64_t c, int n) {
            constexpr int Z = decltype(z)::COUNT;
            const auto own = line_or_zero<Z, T>(call.gate_row, r, c, n);
            const auto w = load_line<Z>(call.w.at<A>(r) + c, n);
            const auto shift = load_line<Z>(call.w.at<A>(r) + call.width + c, n);
            const auto sum = sum_line<A, Z>(from, to, [&](int64_t i) FASTGT_INLINED {
                const int64_t next = std::min(i + AHEAD, walk.edges - 1), edge = walk.edge[i];
                if (exact) {
                    prefetch_line<Z>(call.dgate.at<T>(walk.edge[next]) + c);
                    return load_line<Z>(call.dgate.at<T>(edge) + c, n);
                }
                prefetch_line<Z>(call.x.at<T>(walk.other[next]) + c);
                prefetch_edge<Z, T>(call, walk.edge[next], c);
                const auto e = scores<T, Z>(call, call.gate_col, own, walk, i, c, n);
                const auto sigma =
                    by_vector<A, Z>([&](int v) FASTGT_INLINED { return sigmoid<A>(e.v[v]); });
                const auto eta = weighted<T, Z>(call, sigma, edge, c, n);
                auto x = load_line<Z>(call.x.at<T>(walk.other[i]) + c, n);
                x = with_value<T, Z>(call, x, edge, c, n);
                return score_gradient<T, Z>(call, sigma, eta, x, w, shift, edge, c, n);
            });
            store_line<Z>(call.drow.at<T>(r) + c, sum, n);
        });
    });
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t gated_aggregate_size() { return sizeof(GatedAggregateCall); }

FASTGT_EXPORT void gated_aggregate_fwd(const GatedAggregateCall* call) {
    with_type(call->dtype, [&](auto t) {
        using T = decltype(t);
        const int64_t line = call->width * int64_t(sizeof(T));
        expect_writes(call->e.data, AnyWalk(call->rows).edges * line);
        expect_writes(call->o.data, call->rows.segments * line);
        forward<T>(*call);
    });
}

FASTGT_EXPORT void gated_aggregate_bwd(const GatedAggregateCall* call) {
    with_type(call->dtype, [&](auto t) {
        using T = decltype(t);
        const int64_t line = call->width * int64_t(sizeof(T));
        const int64_t on_edges = AnyWalk(call->rows).edges * line;
        expect_writes(call->dgate.data, on_edges);
        expect_writes(call->dvalue.data, on_edges);
        if (!call->one_weight) expect_writes(call->dweight.data, on_edges);
        pass_on<T>(*call);
        const bool edges = call->dgate || call->dweight || call->dvalue;
        if (call->dx || call->dcol || edges) to_columns<T>(*call);
        if (call->drow) to_rows<T>(*call);
    });
}
