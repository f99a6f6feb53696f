// channelwise_attention: the softmax of a row's logits, channel by channel, and its mean of values.
//
// The symbols are those of kernels/channelwise_attention.py. A row's edges are gone through for up
// to GROUP vectors of channels at a time, so that what is read twice is still in the first cache.
#include "call.h"

namespace fastgt {
namespace {

// A tensor [., H, D], whose channels have one number each, or (`step` 0) one for a whole head.
struct Channels {
    Array x;
    int64_t step;
};

struct ChannelwiseCall {
    int64_t dtype, threads, heads, width;
    WalkArrays rows;
    WalkArrays cols;  // its `edge` has places of the walk by rows
    Channels logits, v, edge_value;
    Array on_rows, on_cols;  // [., H] bool: which heads are active
    double low, high, log_eps;
    int64_t clamped;
    Array o, lse, weights, stat;
    Channels d_o, dlse;
    Array dlogits, dv, dedge_value;
    Array pivot_u;  // [N, 2, C] of the backward: c and u
};

// vectors of channels that go together; those of doubles would only make the library larger
template <class T> constexpr int GROUP = sizeof(T) == 8 ? 1 : 4;
constexpr int64_t AHEAD = 12;  // edges whose lines are asked for before they are needed

// COUNT vectors of channels from `first` on; all are full, or there is one that has `lanes`
template <class A, int COUNT> struct Group {
    using V = Vec<A>;
    V vec[COUNT] = {};

    template <class F> static Group make(F f) {
        Group g;
        unrolled<COUNT>([&](int b) FASTGT_INLINED { g.vec[b] = f(b); });
        return g;
    }
    static Group of(A x) {
        return make([&](int) { return splat(x); });
    }
};

template <class A, int N> FASTGT_INLINE void add(Group<A, N>& sum, const Group<A, N>& x) {
    unrolled<N>([&](int b) FASTGT_INLINED { sum.vec[b] += x.vec[b]; });
}

template <class T, int COUNT> struct Place {
    using A = Accumulator<T>;
    using V = Vec<A>;
    using G = Group<A, COUNT>;
    int64_t head, first;
    int lanes;

    template <class U> V get(const U* p, int b) const {
        p += first + b * WIDTH<A>;
        return COUNT > 1 ? fastgt::load(p) : load_some(p, lanes);
    }
    template <class U = T> G load(const Channels& from, int64_t r) const {
        const U* p = from.x.at<U>(r, head);
        if (!from.step) return G::of(A(load_one(p)));
        return G::make([&](int b) FASTGT_INLINED { return get(p, b); });
    }
    // of a table [., C] in the accumulator's precision
    G load(const A* p) const {
        return G::make([&](int b) FASTGT_INLINED { return get(p, b); });
    }
    template <class U> void store(U* p, const G& x) const {
        unrolled<COUNT>([&](int b) FASTGT_INLINED {
            U* at = p + first + b * WIDTH<A>;
            if (COUNT > 1)
                fastgt::store(at, x.vec[b]);
            else
                store_some(at, x.vec[b], lanes);
        });
    }
    void store(const Array& to, int64_t r, const G& x) const { store(to.at<T>(r, head), x); }
    template <class U> void ask_for(const U* p) const {
        for (int64_t b = 0; b < COUNT * BYTES; b += 64) __builtin_prefetch((char*)(p + first) + b);
    }
    void ask_for(const Channels& from, int64_t r) const {
        const T* p = from.x.at<T>(r, head);
        if (from.step)
            ask_for(p);
        else
            __builtin_prefetch(p);
    }
};

// f(place) for all channels of a head
template <class T, class F> void each_place(int64_t head, int64_t width, const F& f) {
    constexpr int W = WIDTH<Accumulator<T>>;
    int64_t c = 0;
    for (; c + GROUP<T> * W <= width; c += GROUP<T> * W) f(Place<T, GROUP<T>>{head, c, W});
    for (; c < width; c += W) f(Place<T, 1>{head, c, int(std::min<int64_t>(W, width - c))});
}

bool active(const Array& on, int64_t segment, int64_t head) {
    return !on || *on.at<uint8_t>(segment, head);
}

int64_t share_of(const ChannelwiseCall& call) {
    return std::max<int64_t>(256, TASK * 8 / std::max<int64_t>(8, call.heads * call.width));
}

template <class T, int COUNT> struct Logits {
    using A = Accumulator<T>;
    const ChannelwiseCall& call;
    const Place<T, COUNT>& place;
    const A low = A(call.low), high = A(call.high);

    Group<A, COUNT> operator()(int64_t edge) const {
        return clamped(place.load(call.logits, edge));
    }
    Group<A, COUNT> clamped(const Group<A, COUNT>& x) const {
        if (!call.clamped) return x;
        return Group<A, COUNT>::make([&](int b) FASTGT_INLINED {
            const Vec<A> s = x.vec[b] < low ? splat(low) : x.vec[b];
            return s > high ? splat(high) : s;
        });
    }
    // where the clamp let a logit through
    VecInt<A> through(Vec<A> x) const {
        return call.clamped ? (x >= low) & (x <= high) : VecInt<A>{} == 0;
    }
};

template <class T, int COUNT>
Group<Accumulator<T>, COUNT> message(const ChannelwiseCall& call, const Place<T, COUNT>& place,
                                     int64_t edge, int64_t col) {
    if (!call.v.x) return place.load(call.edge_value, edge);
    auto x = place.load(call.v, col);
    if (call.edge_value.x) add(x, place.load(call.edge_value, edge));
    return x;
}

// r = Z / (Z + eps)
template <class A> Vec<A> eps_share(const ChannelwiseCall& call, Vec<A> lse) {
    if (call.log_eps == -std::numeric_limits<double>::infinity()) return splat(A(1));
    return A(1) / (A(1) + exponential(A(call.log_eps) - lse));
}

template <class T> void expect_rows(const Array& to, const ChannelwiseCall& call, int64_t rows) {
    if (to) expect_writes(to.data, rows * call.heads * call.width * sizeof(T));
}

// ---- forward

template <class T, class I, int COUNT>
void forward_row(const ChannelwiseCall& call, const Walk<I>& walk, int64_t r,
                 const Place<T, COUNT>& place) {
    using A = Accumulator<T>;
    using V = Vec<A>;
    using G = Group<A, COUNT>;
    constexpr A INF = std::numeric_limits<A>::infinity();
    const int64_t from = walk.ptr[r], to = walk.ptr[r + 1], last = walk.edges - 1;
    const Logits<T, COUNT> logit{call, place};

    G top = G::of(-INF);
    for (int64_t i = from; i < to; i++) {
        const int64_t next = std::min(i + AHEAD, last);
        place.ask_for(call.logits, walk.edge[next]);
        if (call.edge_value.x) place.ask_for(call.edge_value, walk.edge[next]);
        if (call.v.x) place.ask_for(call.v, walk.other[next]);
        const G s = logit(walk.edge[i]);
        unrolled<COUNT>([&](int b) FASTGT_INLINED {
            top.vec[b] = larger<A>(s.vec[b], top.vec[b]);
        });
    }
    for (V& t : top.vec) t = t == -INF ? V{} : t;

    auto powers_of = [&](int64_t edge) {
        const G s = logit(edge);
        return G::make([&](int b) FASTGT_INLINED { return exponential(s.vec[b] - top.vec[b]); });
    };
    G total, mean;
    for (int64_t i = from; i < to;) {
        G powers, products;
        for (const int64_t stop = std::min(to, i + BLOCK); i < stop; i++) {
            const int64_t edge = walk.edge[i];
            const G e = powers_of(edge), x = message(call, place, edge, int64_t(walk.other[i]));
            add(powers, e);
            unrolled<COUNT>([&](int b) FASTGT_INLINED { products.vec[b] += e.vec[b] * x.vec[b]; });
        }
        add(total, powers);
        add(mean, products);
    }

    G lse, norm, rate;
    bool finite = true;
    unrolled<COUNT>([&](int b) FASTGT_INLINED {
        const V z = total.vec[b];
        norm.vec[b] = z == A(0) ? V{} : A(1) / z;
        lse.vec[b] = top.vec[b] + logarithm(z);
        rate.vec[b] = norm.vec[b] * eps_share<A>(call, lse.vec[b]);
        mean.vec[b] *= rate.vec[b];
        mean.vec[b] = z == A(0) ? V{} : mean.vec[b];
        finite = finite && all_zero<A>((mean.vec[b] - mean.vec[b]) != A(0));
    });
    if (!finite || call.weights) {
        // values may be so large that only their mean is finite: weights are divided before the sum
        G again;
        for (int64_t i = from; i < to; i++) {
            const int64_t edge = walk.edge[i];
            G p = powers_of(edge);
            unrolled<COUNT>([&](int b) FASTGT_INLINED { p.vec[b] *= rate.vec[b]; });
            if (call.weights) place.store(call.weights, edge, p);
            if (finite) continue;
            const G x = message(call, place, edge, int64_t(walk.other[i]));
            unrolled<COUNT>([&](int b) FASTGT_INLINED { again.vec[b] += p.vec[b] * x.vec[b]; });
        }
        unrolled<COUNT>([&](int b) FASTGT_INLINED {
            const V m = mean.vec[b], whole = total.vec[b] == A(0) ? m : again.vec[b];
            mean.vec[b] = m - m == A(0) ? m : whole;
        });
    }
    place.store(call.o, r, mean);
    place.store(call.lse.template at<A>(r, place.head), lse);
    if (!call.stat) return;
    // no edge of a row without a finite logit gets a weight: exp(-inf - inf) = 0
    unrolled<COUNT>([&](int b) FASTGT_INLINED {
        top.vec[b] = total.vec[b] == A(0) ? splat(INF) : top.vec[b];
    });
    A* stat = call.stat.template at<A>(r) + place.head * call.width;
    const int64_t channels = call.heads * call.width;
    place.store(stat, top);
    place.store(stat + channels, norm);
    place.store(stat + 2 * channels, mean);
}

// `count` lines of C channels: a pivot of infinity, and zeros
template <class A>
void no_pivot(const ChannelwiseCall& call, const Array& to, int64_t r, int64_t head, int count) {
    for (int64_t i = 0; i < count; i++) {
        A* line = to.at<A>(r) + (i * call.heads + head) * call.width;
        std::fill_n(line, call.width, i ? A(0) : std::numeric_limits<A>::infinity());
    }
}

// to a masked head a row has no edges
template <class T> void forward_masked(const ChannelwiseCall& call, int64_t r, int64_t head) {
    using A = Accumulator<T>;
    std::memset(call.o.at<T>(r, head), 0, call.width * sizeof(T));
    std::fill_n(call.lse.at<A>(r, head), call.width, -std::numeric_limits<A>::infinity());
    if (call.stat) no_pivot<A>(call, call.stat, r, head, 3);
}

// zeros for a masked head's channels of some edges of `to`
template <class T, class I>
void no_edges(const Array& to, const Walk<I>& walk, int64_t r, int64_t head, int64_t width) {
    if (!to) return;
    for (int64_t i = walk.ptr[r]; i < int64_t(walk.ptr[r + 1]); i++)
        std::memset(to.at<T>(walk.edge[i], head), 0, width * sizeof(T));
}

template <class T, class I> void forward(const ChannelwiseCall& call) {
    using A = Accumulator<T>;
    const Walk<I> walk(call.rows);
    expect_rows<T>(call.weights, call, walk.edges);
    expect_rows<T>(call.o, call, walk.segments);
    expect_rows<A>(call.lse, call, walk.segments);
    expect_rows<A>(call.stat, call, 3 * walk.segments);
    auto rows = [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t r = begin; r < end; r++) {
            for (int64_t h = 0; h < call.heads; h++) {
                if (active(call.on_rows, r, h)) {
                    each_place<T>(h, call.width, [&](auto place) {
                        forward_row<T, I>(call, walk, r, place);
                    });
                    continue;
                }
                forward_masked<T>(call, r, h);
                no_edges<T>(call.weights, walk, r, h, call.width);
            }
        }
    };
    each_range(call.threads, walk, rows, share_of(call));
}

// ---- backward

template <class T, class I, int COUNT>
void backward_row(const ChannelwiseCall& call, const Walk<I>& walk, int64_t r,
                  const Place<T, COUNT>& place) {
    using A = Accumulator<T>;
    using V = Vec<A>;
    using G = Group<A, COUNT>;
    const int64_t from = walk.ptr[r], to = walk.ptr[r + 1], last = walk.edges - 1;
    const int64_t channels = call.heads * call.width, offset = place.head * call.width;
    const Logits<T, COUNT> logit{call, place};
    const A* stat = call.stat.template at<A>(r) + offset;
    const G pivot = place.load(stat), norm = place.load(stat + channels);
    const G mean = place.load(stat + 2 * channels);
    G u = place.load(call.d_o, r), h;
    if (call.dlse.x) h = place.template load<A>(call.dlse, r);
    VecInt<A> some[COUNT];
    unrolled<COUNT>([&](int b) FASTGT_INLINED {
        const V n = norm.vec[b];
        // where no edge counts, neither do the upstream gradients, finite or not
        some[b] = n != A(0);
        const V lse = pivot.vec[b] - logarithm(n);
        u.vec[b] = where_set<A>(some[b], n * eps_share<A>(call, lse) * u.vec[b]);
        h.vec[b] = where_set<A>(some[b], n * h.vec[b]);
    });
    if (call.pivot_u) {
        A* own = call.pivot_u.template at<A>(r) + offset;
        place.store(own, pivot);
        place.store(own + channels, u);
    }
    if (!call.dlogits && !call.dedge_value) return;
    for (int64_t i = from; i < to; i++) {
        const int64_t edge = walk.edge[i], next = std::min(i + AHEAD, last);
        place.ask_for(call.logits, walk.edge[next]);
        if (call.dlogits && call.edge_value.x) place.ask_for(call.edge_value, walk.edge[next]);
        if (call.dlogits && call.v.x) place.ask_for(call.v, walk.other[next]);
        const G x = place.load(call.logits, edge), s = logit.clamped(x);
        const G e = G::make(
            [&](int b) FASTGT_INLINED { return exponential(s.vec[b] - pivot.vec[b]); });
        const G dx = G::make([&](int b) FASTGT_INLINED { return e.vec[b] * u.vec[b]; });
        if (call.dedge_value) place.store(call.dedge_value, edge, dx);
        if (!call.dlogits) continue;
        const G value = message(call, place, edge, int64_t(walk.other[i]));
        place.store(call.dlogits, edge, G::make([&](int b) FASTGT_INLINED {
            const V ds = dx.vec[b] * (value.vec[b] - mean.vec[b]) + e.vec[b] * h.vec[b];
            return where_set<A>(logit.through(x.vec[b]) & some[b], ds);
        }));
    }
}

template <class T, class I> void backward_rows(const ChannelwiseCall& call) {
    const Walk<I> walk(call.rows);
    for (const Array& to : {call.dlogits, call.dedge_value}) expect_rows<T>(to, call, walk.edges);
    expect_rows<Accumulator<T>>(call.pivot_u, call, 2 * walk.segments);
    auto rows = [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t r = begin; r < end; r++) {
            for (int64_t h = 0; h < call.heads; h++) {
                if (active(call.on_rows, r, h)) {
                    each_place<T>(h, call.width, [&](auto place) {
                        backward_row<T, I>(call, walk, r, place);
                    });
                    continue;
                }
                if (call.pivot_u) no_pivot<Accumulator<T>>(call, call.pivot_u, r, h, 2);
                no_edges<T>(call.dlogits, walk, r, h, call.width);
                no_edges<T>(call.dedge_value, walk, r, h, call.width);
            }
        }
    };
    each_range(call.threads, walk, rows, share_of(call));
}

template <class T, class I, int COUNT>
void backward_column(const ChannelwiseCall& call, const Walk<I>& walk, int64_t c,
                     const Place<T, COUNT>& place) {
    using A = Accumulator<T>;
    using G = Group<A, COUNT>;
    const int64_t from = walk.ptr[c], to = walk.ptr[c + 1], last = walk.edges - 1;
    const int64_t channels = call.heads * call.width, offset = place.head * call.width;
    const I* number = (const I*)call.rows.edge;
    const Logits<T, COUNT> logit{call, place};
    // dx of 16 bits is rounded: it is made anew from c and u
    const bool made = call.dedge_value && sizeof(T) == sizeof(A);
    const Channels& read = made ? Channels{call.dedge_value, 1} : call.logits;
    G sum;
    for (int64_t i = from; i < to;) {
        G some;
        for (const int64_t stop = std::min(to, i + BLOCK); i < stop; i++) {
            const int64_t edge = number[walk.edge[i]];
            const int64_t next = std::min(i + AHEAD, last);
            place.ask_for(read, number[walk.edge[next]]);
            if (made) {
                add(some, place.load(read, edge));
                continue;
            }
            auto row = [&](I r) { return call.pivot_u.template at<A>(r) + offset; };
            const A* of_row = row(walk.other[i]);
            place.ask_for(row(walk.other[next]));
            place.ask_for(row(walk.other[next]) + channels);
            const G s = logit(edge), pivot = place.load(of_row), u = place.load(of_row + channels);
            unrolled<COUNT>([&](int b) FASTGT_INLINED {
                some.vec[b] += exponential(s.vec[b] - pivot.vec[b]) * u.vec[b];
            });
        }
        add(sum, some);
    }
    place.store(call.dv, c, sum);
}

template <class T, class I> void backward_columns(const ChannelwiseCall& call) {
    const Walk<I> walk(call.cols);
    auto columns = [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t c = begin; c < end; c++) {
            for (int64_t h = 0; h < call.heads; h++) {
                if (active(call.on_cols, c, h))
                    each_place<T>(h, call.width, [&](auto place) {
                        backward_column<T, I>(call, walk, c, place);
                    });
                else
                    std::memset(call.dv.at<T>(c, h), 0, call.width * sizeof(T));
            }
        }
    };
    each_range(call.threads, walk, columns, share_of(call));
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t channelwise_attention_size() { return sizeof(ChannelwiseCall); }

FASTGT_EXPORT void channelwise_attention_fwd(const ChannelwiseCall* call) {
    with_types(call->dtype, call->rows.wide,
               [&](auto t, auto i) { forward<decltype(t), decltype(i)>(*call); });
}

FASTGT_EXPORT void channelwise_attention_bwd(const ChannelwiseCall* call) {
    with_types(call->dtype, call->rows.wide, [&](auto t, auto i) {
        backward_rows<decltype(t), decltype(i)>(*call);
        if (call->dv) backward_columns<decltype(t), decltype(i)>(*call);
    });
}
