// linear_attention: the states of a graph and head stay in a cache, features too.
//
// The symbols are those of fastgt.linear_attention. A task is a graph and a head, or a piece of a
// graph that has many nodes; it goes through slices of its nodes:
//
//     keys      S += phi(k)^T v,  z += phi(k)
//     queries   o = phi(q) S / (phi(q) . z + eps)
//
// and back: with do' and dd the gradients of numerator and denominator,
//
//     queries   dphi(q) = do' S^T + dd z,  dS += phi(q)^T do',  dz += phi(q) dd
//     keys      dphi(k) = v dS^T + dz,  dv = phi(k) dS
//
// A graph of few nodes for the number of its features has no state, but a = phi(q) phi(k)^T:
//
//     o' = a v,  da = do' v^T,  dphi(q) = da phi(k),  dphi(k) = da^T phi(q),  dv = a^T do'
//
// All of it is products of small matrices, which `product` does tile by tile in registers. Rows of
// matrices are filled up to whole vectors; what stands there is used for nothing.
#include <memory>
#include <vector>

#include "matrix.h"

namespace fastgt {
namespace {

// as fastgt/cpu/linear_attention.py numbers them
enum Map : int64_t { IDENTITY, RELU, ELU, SIGMOID, SOFTMAX, RELU_RANDOM };

struct LinearAttentionCall {
    int64_t dtype, threads, map, heads, d, dv, m;
    int64_t graphs, wide;  // whether offsets have 64 bits
    const void* offsets;
    Array mask;  // [G, H] bool
    double eps;
    int64_t normalize;
    int64_t slice, piece;  // nodes
    Array q, k, v, o, d_o, dq, dk, d_v;
    Array projection;  // [M, D] in the accumulator's precision
    void* states;      // of the pieces, or their gradients: [pieces, H, numbers of a state]
    void* kept;        // of the graphs in pieces, from the forward: [graphs, H, numbers of a state]
};

// ---- one thread

// S, z and the stabiliser of a graph and head. `s` is null where there is no S, but a.
template <class A> struct State {
    A *s, *z, *top;

    State(A* at, int64_t m, int64_t ldv) : s(at), z(at + m * ldv), top(z + filled(m)) {}
    State without_s() const {
        State copy = *this;
        copy.s = nullptr;
        return copy;
    }
    static int64_t size(int64_t m, int64_t ldv) { return m * ldv + filled(m) + FILL; }
};

// A graph, or a piece of one
struct Part {
    int64_t begin, end, graph, first, count, number;  // count pieces from slot `first` on; this one
    int64_t place;                                    // of the graph among those in pieces
};

template <class T> struct Worker {
    using A = Accumulator<T>;
    using V = Vec<A>;
    static constexpr int W = WIDTH<A>;

    const LinearAttentionCall& call;
    const A *w, *wt;  // [M, D] and [D, M] of the projection
    int64_t m, d, dv, ldm, ldd, ldv, rows, lda;
    A *x, *f, *e, *g, *ge, *kx, *v, *o, *flow, *dphi, *dx, *den, *dden, *own, *own_d, *st, *dst,
        *a, *da, *gt, *vt;

    Worker(const LinearAttentionCall& call, const A* w, const A* wt, char* place)
        : call(call), w(w), wt(wt), m(call.m), d(call.d), dv(call.dv), ldm(filled(m)),
          ldd(filled(d)), ldv(filled(dv)), rows(call.slice), lda(filled(rows)) {
        lay(place);
    }
    int64_t lay(char* const from) {
        char* place = from;
        for (A** at : {&f, &e, &g, &ge, &dphi}) *at = take<A>(place, rows * ldm);
        for (A** at : {&x, &kx, &dx}) *at = take<A>(place, rows * ldd);
        for (A** at : {&v, &o, &flow}) *at = take<A>(place, rows * ldv);
        for (A** at : {&den, &dden}) *at = take<A>(place, rows);
        for (A** at : {&own, &own_d}) *at = take<A>(place, State<A>::size(m, ldv));
        for (A** at : {&st, &dst}) *at = take<A>(place, dv * ldm);
        for (A** at : {&a, &da}) *at = take<A>(place, rows * lda);
        gt = take<A>(place, m * lda);
        vt = take<A>(place, dv * lda);
        return place - from;
    }

    // ---- rows

    void get(A* to, int64_t ld, const Array& from, int64_t begin, int64_t count, int64_t head,
             int64_t width) const {
        read_rows<T>(to, ld, from, begin, count, head, width);
    }
    void put(const Array& to, const A* from, int64_t ld, int64_t begin, int64_t count, int64_t head,
             int64_t width) const {
        write_rows<T>(to, from, ld, begin, count, head, width);
    }
    void zeros(const Array& to, const Part& part, int64_t head, int64_t width) const {
        for (int64_t j = part.begin; to && j < part.end; j++)
            std::memset(to.at<T>(j, head), 0, width * sizeof(T));
    }

    // f(row's offset, first lane, mask of the lanes that are there) for `count` rows of features
    template <class F> void each_feature(int64_t count, const F& f) const {
        for (int64_t j = 0; j < count; j++)
            each_vector<A>(m, [&](int64_t c, int n) {
                f(j, c, lane_numbers<A>() < typename LanesOf<A>::Int(n));
            });
    }
    static A dot(const A* a, const A* b, int64_t width) {
        V sum{};
        for (int64_t c = 0; c < width; c += W) sum += load(a + c) * load(b + c);
        return sum_across<A>(sum)[0];
    }

    // ---- features

    bool random() const { return call.map >= SOFTMAX; }

    void inner(A* to, const A* x, int64_t count) const {
        product<A>(to, ldm, x, ldd, 1, wt, ldm, count, d, m);
    }
    A largest(const A* row) const {
        V top = splat(-std::numeric_limits<A>::infinity());
        each_vector<A>(m, [&](int64_t c, int n) {
            const VecInt<A> there = lane_numbers<A>() < typename LanesOf<A>::Int(n);
            const V y = load(row + c);
            top = choose<A>(there & ((y > top) | (y != y)), y, top);  // NaN stays
        });
        return across<A, 1>(top, [](V a, V b) { return choose<A>((a > b) | (a != a), a, b); })[0];
    }

    // phi [count, M] of x; where it is random, `inner` has the products, and then what the gradient
    // takes: exp(), or the products. `top`: the keys' stabiliser.
    void features(A* phi, A* inner, const A* x, int64_t count, const A* top) const {
        auto each = [&](auto f) {
            each_feature(count, [&](int64_t j, int64_t c, VecInt<A> there) {
                store(phi + j * ldm + c, where_set<A>(there, f(load(x + j * ldd + c))));
            });
        };
        switch (call.map) {
            case IDENTITY: return each([](V y) { return y; });
            case RELU: return each([](V y) { return choose<A>(y < A(0), V{}, y); });
            case ELU:
                return each([](V y) { return choose<A>(y > A(0), y + A(1), exponential(y)); });
            case SIGMOID: return each([](V y) { return A(1) / (A(1) + exponential(-y)); });
            case RELU_RANDOM:
                return each_feature(count, [&](int64_t j, int64_t c, VecInt<A> there) {
                    const V y = load(inner + j * ldm + c);
                    const V up = choose<A>(y < A(0), V{}, y) + A(1e-3);
                    store(phi + j * ldm + c, where_set<A>(there, up));
                });
        }
        const A scale = A(1) / std::sqrt(A(m)), half = A(0.5) / std::sqrt(A(d));
        for (int64_t j = 0; j < count; j++) {
            A* row = inner + j * ldm;
            const A low = half * square(x + j * ldd) + (top ? *top : largest(row));
            each_vector<A>(m, [&](int64_t c, int n) {
                const VecInt<A> there = lane_numbers<A>() < typename LanesOf<A>::Int(n);
                const V y = exponential(load(row + c) - low);
                store(row + c, where_set<A>(there, y));
                store(phi + j * ldm + c, where_set<A>(there, (y + A(1e-4)) * scale));
            });
        }
    }
    A square(const A* x) const {
        V sum{};
        for (int64_t c = 0; c < d; c += W) sum += load(x + c) * load(x + c);
        return sum_across<A>(sum)[0];
    }

    // dx [count, D], of dphi
    void gradient(const A* phi, const A* inner, const A* x, int64_t count) const {
        auto each = [&](A* to, int64_t ld, auto f) {
            each_feature(count, [&](int64_t j, int64_t c, VecInt<A>) {
                const V y = load((inner ? inner : phi) + j * ldm + c);
                store(to + j * ld + c, f(y, load(dphi + j * ldm + c)));
            });
        };
        switch (call.map) {
            case IDENTITY: return each(dx, ldd, [](V, V dy) { return dy; });
            case RELU:
                return each(dx, ldd, [](V y, V dy) { return choose<A>(y <= A(0), V{}, dy); });
            case ELU:
                return each(dx, ldd, [](V y, V dy) {
                    return dy * choose<A>(y > A(1), splat(A(1)), y);
                });
            case SIGMOID: return each(dx, ldd, [](V y, V dy) { return dy * y * (A(1) - y); });
            case RELU_RANDOM:
                each(dphi, ldm, [](V y, V dy) { return choose<A>(y <= A(0), V{}, dy); });
                break;
            case SOFTMAX: {
                const A scale = A(1) / std::sqrt(A(m));
                each(dphi, ldm, [=](V y, V dy) { return y * dy * scale; });
            }
        }
        product<A>(dx, ldd, dphi, ldm, 1, w, ldd, count, m, d);
        if (call.map != SOFTMAX) return;
        const A scale = A(1) / std::sqrt(A(d));
        for (int64_t j = 0; j < count; j++) {
            V sum{};
            each_vector<A>(m, [&](int64_t c, int n) {
                const VecInt<A> there = lane_numbers<A>() < typename LanesOf<A>::Int(n);
                sum += where_set<A>(there, load(dphi + j * ldm + c));
            });
            const A total = sum_across<A>(sum)[0] * scale;
            A* row = dx + j * ldd;
            for (int64_t c = 0; c < d; c += W)
                store(row + c, load(row + c) - load(x + j * ldd + c) * total);
        }
    }
    A* inner_of(A* at) const { return random() ? at : nullptr; }

    // ---- keys and queries

    template <class F> void each_slice(const Part& part, const F& f) const {
        for (int64_t at = part.begin; at < part.end; at += rows)
            f(at, std::min(rows, part.end - at));
    }

    // keys, and their products where they are random
    void read_keys(int64_t at, int64_t count, int64_t head) const {
        get(kx, ldd, call.k, at, count, head, d);
        if (random()) inner(ge, kx, count);
    }
    void find_top(const Part& part, int64_t head, A* top) const {
        *top = -std::numeric_limits<A>::infinity();
        each_slice(part, [&](int64_t at, int64_t count) {
            read_keys(at, count, head);
            for (int64_t j = 0; j < count; j++) {
                const A y = largest(ge + j * ldm);
                if (y > *top || y != y) *top = y;
            }
        });
    }
    void key_features(int64_t at, int64_t count, int64_t head, const A* top) const {
        features(g, inner_of(ge), kx, count, top);
        get(v, ldv, call.v, at, count, head, dv);
    }
    // `read`: the one slice of the keys is there, from find_top
    void sum_keys(const Part& part, int64_t head, const State<A>& state, bool read) const {
        clear(state);
        each_slice(part, [&](int64_t at, int64_t count) {
            if (!read) read_keys(at, count, head);
            key_features(at, count, head, state.top);
            if (state.s)
                product<A>(state.s, ldv, g, 1, ldm, v, ldv, m, count, dv, true);
            else
                transpose(gt, lda, g, ldm, count, m);
            if (call.normalize) weigh(state.z, g, nullptr, count);
        });
    }
    void clear(const State<A>& state) const {
        if (state.s) std::fill_n(state.s, m * ldv, A(0));
        std::fill_n(state.z, ldm, A(0));
    }
    // z += sum of rows of phi, times `weight`
    void weigh(A* z, const A* phi, const A* weight, int64_t count) const {
        for (int64_t c = 0; c < m; c += W) {
            V sum{};
            for (int64_t j = 0; j < count; j++) {
                const V y = load(phi + j * ldm + c);
                sum += weight ? y * weight[j] : y;
            }
            store(z + c, load(z + c) + sum);
        }
    }
    void query_features(int64_t at, int64_t count, int64_t head) const {
        get(x, ldd, call.q, at, count, head, d);
        if (random()) inner(e, x, count);
        features(f, inner_of(e), x, count, nullptr);
    }
    // phi(q), the numerator o, and 1 / (d + eps) as `den`
    void attend(int64_t at, int64_t count, int64_t head, const State<A>& state) const {
        query_features(at, count, head);
        if (state.s) {
            product<A>(o, ldv, f, ldm, 1, state.s, ldv, count, m, dv);
        } else {
            product<A>(a, lda, f, ldm, 1, gt, lda, count, m, count);
            product<A>(o, ldv, a, lda, 1, v, ldv, count, count, dv);
        }
        for (int64_t j = 0; call.normalize && j < count; j++)
            den[j] = A(1) / (dot(f + j * ldm, state.z, m) + A(call.eps));
    }
    void queries(const Part& part, int64_t head, const State<A>& state) const {
        each_slice(part, [&](int64_t at, int64_t count) {
            attend(at, count, head, state);
            for (int64_t j = 0; call.normalize && j < count; j++)
                for (int64_t c = 0; c < dv; c += W)
                    store(o + j * ldv + c, load(o + j * ldv + c) * den[j]);
            put(call.o, o, ldv, at, count, head, dv);
        });
    }
    // dq, and the gradient of the state
    void queries_backward(const Part& part, int64_t head, const State<A>& state,
                          const State<A>& dstate) const {
        if (call.dq && state.s) transpose(st, ldm, state.s, ldv, m, dv);
        clear(dstate);
        each_slice(part, [&](int64_t at, int64_t count) {
            attend(at, count, head, state);
            get(flow, ldv, call.d_o, at, count, head, dv);
            for (int64_t j = 0; call.normalize && j < count; j++) {
                A* row = flow + j * ldv;
                for (int64_t c = 0; c < dv; c += W) store(row + c, load(row + c) * den[j]);
                dden[j] = -den[j] * dot(row, o + j * ldv, dv);
            }
            if (call.dk || call.d_v) {
                if (state.s) product<A>(dstate.s, ldv, f, 1, ldm, flow, ldv, m, count, dv, true);
                if (call.normalize) weigh(dstate.z, f, dden, count);
            }
            if (!state.s) {
                transpose(vt, lda, v, ldv, count, dv);
                product<A>(da, lda, flow, ldv, 1, vt, lda, count, dv, count);
            }
            if (!call.dq) return;
            if (state.s)
                product<A>(dphi, ldm, flow, ldv, 1, st, ldm, count, dv, m);
            else
                product<A>(dphi, ldm, da, lda, 1, g, ldm, count, count, m);
            for (int64_t j = 0; call.normalize && j < count; j++)
                for (int64_t c = 0; c < m; c += W) {
                    A* to = dphi + j * ldm + c;
                    store(to, load(to) + load(state.z + c) * dden[j]);
                }
            gradient(f, inner_of(e), x, count);
            put(call.dq, dx, ldd, at, count, head, d);
        });
    }
    // `read`: features of the one slice are there, from sum_keys
    void keys_backward(const Part& part, int64_t head, const State<A>& state,
                       const State<A>& dstate, bool read) const {
        if (call.dk && state.s) transpose(dst, ldm, dstate.s, ldv, m, dv);
        each_slice(part, [&](int64_t at, int64_t count) {
            if (!read) {
                read_keys(at, count, head);
                key_features(at, count, head, state.top);
            }
            if (call.d_v) {
                if (state.s)
                    product<A>(o, ldv, g, ldm, 1, dstate.s, ldv, count, m, dv);
                else
                    product<A>(o, ldv, a, 1, lda, flow, ldv, count, count, dv);
                put(call.d_v, o, ldv, at, count, head, dv);
            }
            if (!call.dk) return;
            if (state.s)
                product<A>(dphi, ldm, v, ldv, 1, dst, ldm, count, dv, m);
            else
                product<A>(dphi, ldm, da, 1, lda, f, ldm, count, count, m);
            for (int64_t j = 0; call.normalize && j < count; j++)
                for (int64_t c = 0; c < m; c += W) {
                    A* to = dphi + j * ldm + c;
                    store(to, load(to) + load(dstate.z + c));
                }
            gradient(g, inner_of(ge), kx, count);
            put(call.dk, dx, ldd, at, count, head, d);
        });
    }

    // a graph that is not in pieces
    void whole(const Part& part, int64_t head, bool backward) const {
        State<A> state(own, m, ldv), dstate(own_d, m, ldv);
        const int64_t nodes = part.end - part.begin;
        const bool one = nodes <= rows;
        if (one && nodes * (m + dv) < m * dv) {
            state = state.without_s();
            dstate = dstate.without_s();
        }
        if (call.map == SOFTMAX) find_top(part, head, state.top);
        sum_keys(part, head, state, one && call.map == SOFTMAX);
        if (!backward) return queries(part, head, state);
        queries_backward(part, head, state, dstate);
        if (call.dk || call.d_v) keys_backward(part, head, state, dstate, one);
    }
    void masked(const Part& part, int64_t head, bool backward) const {
        if (!backward) return zeros(call.o, part, head, dv);
        zeros(call.dq, part, head, d);
        zeros(call.dk, part, head, d);
        zeros(call.d_v, part, head, dv);
    }
};

// ---- all threads

template <class T> void run(const LinearAttentionCall& call, bool backward) {
    using A = Accumulator<T>;
    const int64_t ldm = filled(call.m), ldd = filled(call.d), ldv = filled(call.dv);
    const int64_t heads = call.heads, size = State<A>::size(call.m, ldv);
    auto offset = [&](int64_t g) {
        return call.wide ? ((const int64_t*)call.offsets)[g]
                         : int64_t(((const int32_t*)call.offsets)[g]);
    };
    std::vector<Part> parts, first;
    int64_t slots = 0;
    for (int64_t g = 0; g < call.graphs; g++) {
        const int64_t begin = offset(g), end = offset(g + 1), nodes = end - begin;
        const int64_t count = (nodes + call.piece - 1) / call.piece;
        for (int64_t i = 0; i < count; i++) {
            const int64_t from = begin + i * call.piece, to = std::min(from + call.piece, end);
            parts.push_back({from, to, g, slots, count, i, int64_t(first.size())});
        }
        if (count > 1) first.push_back(parts.back()), slots += count;
    }

    auto expect = [&](const Array& to, int64_t width) {
        if (to) expect_writes(to.data, offset(call.graphs) * heads * width * sizeof(T));
    };
    expect(backward ? call.d_v : call.o, call.dv);
    if (backward) expect(call.dq, call.d), expect(call.dk, call.d);

    std::unique_ptr<A[]> projection;
    A *w = nullptr, *wt = nullptr;
    if (call.projection) {
        projection.reset(new A[call.m * ldd + call.d * ldm]());
        w = projection.get(), wt = w + call.m * ldd;
        for (int64_t i = 0; i < call.m; i++)
            std::memcpy(w + i * ldd, call.projection.at<A>(i), call.d * sizeof(A));
        transpose(wt, ldm, w, ldd, call.m, call.d);
    }
    const int64_t bytes = Worker<T>(call, w, wt, nullptr).lay(nullptr);
    std::unique_ptr<char[]> room(new char[call.threads * bytes + 64]);
    char* const aligned = (char*)((int64_t(room.get()) + 63) / 64 * 64);

    // f(worker, item) for each of them
    auto each = [&](int64_t items, auto f) {
        const int64_t group = std::max<int64_t>(1, items / (16 * call.threads));
        each_task(call.threads, (items + group - 1) / group, [&](int64_t t, int64_t thread) {
            const Worker<T> worker(call, w, wt, aligned + thread * bytes);
            for (int64_t i = t * group; i < std::min((t + 1) * group, items); i++) f(worker, i);
        });
    };
    auto active = [&](int64_t graph, int64_t head) {
        return !call.mask || *call.mask.template at<uint8_t>(graph, head);
    };
    // f(worker, part, head, slot) for active heads of graphs in pieces
    auto each_piece = [&](auto f) {
        each(int64_t(parts.size()) * heads, [&](const Worker<T>& worker, int64_t i) {
            const Part& part = parts[i / heads];
            const int64_t head = i % heads;
            if (part.count > 1 && active(part.graph, head))
                f(worker, part, head, (part.first + part.number) * heads + head);
        });
    };
    auto state = [&](int64_t slot) { return State<A>((A*)call.states + slot * size, call.m, ldv); };
    // the state of a graph in pieces, once they are added up, or its gradient
    auto of_graph = [&](const Part& part, int64_t head, bool gradient) {
        if (gradient) return state(part.first * heads + head);
        return State<A>((A*)call.kept + (part.place * heads + head) * size, call.m, ldv);
    };
    auto add_up = [&](bool gradient) {
        each(int64_t(first.size()) * heads, [&](const Worker<T>&, int64_t i) {
            const Part& part = first[i / heads];
            const int64_t head = i % heads;
            if (!active(part.graph, head)) return;
            A* sum = of_graph(part, head, gradient).s;
            if (!gradient) std::copy_n(state(part.first * heads + head).s, size, sum);
            for (int64_t p = 1; p < part.count; p++) {
                const A* more = state((part.first + p) * heads + head).s;
                for (int64_t c = 0; c < call.m * ldv + ldm; c++) sum[c] += more[c];
            }
        });
    };

    each(int64_t(parts.size()) * heads, [&](const Worker<T>& worker, int64_t i) {
        const Part& part = parts[i / heads];
        const int64_t head = i % heads;
        if (!active(part.graph, head)) return worker.masked(part, head, backward);
        if (part.count == 1) return worker.whole(part, head, backward);
        if (backward) return;  // its state is kept
        const State<A> own = state((part.first + part.number) * heads + head);
        if (call.map == SOFTMAX)
            worker.find_top(part, head, own.top);
        else
            worker.sum_keys(part, head, own, false);
    });
    if (first.empty()) return;
    if (!backward && call.map == SOFTMAX) {
        each(int64_t(first.size()) * heads, [&](const Worker<T>&, int64_t i) {
            const Part& part = first[i / heads];
            auto top = [&](int64_t p) { return state((part.first + p) * heads + i % heads).top; };
            for (int64_t p = 1; p < part.count; p++)
                if (*top(p) > *top(0) || *top(p) != *top(p)) *top(0) = *top(p);
            for (int64_t p = 1; p < part.count; p++) *top(p) = *top(0);
        });
        each_piece([&](const Worker<T>& worker, const Part& part, int64_t head, int64_t slot) {
            worker.sum_keys(part, head, state(slot), false);
        });
    }
    if (!backward) add_up(false);
    each_piece([&](const Worker<T>& worker, const Part& part, int64_t head, int64_t slot) {
        const State<A> sum = of_graph(part, head, false);
        if (backward)
            worker.queries_backward(part, head, sum, state(slot));
        else
            worker.queries(part, head, sum);
    });
    if (!backward || !(call.dk || call.d_v)) return;
    add_up(true);
    each_piece([&](const Worker<T>& worker, const Part& part, int64_t head, int64_t) {
        const State<A> sum = of_graph(part, head, false), dsum = of_graph(part, head, true);
        worker.keys_backward(part, head, sum, dsum, false);
    });
}

void run_typed(const LinearAttentionCall& call, bool backward) {
    switch (call.dtype) {
        case FLOAT32: return run<float>(call, backward);
        case FLOAT64: return run<double>(call, backward);
        case FLOAT16: return run<Half>(call, backward);
        default: return run<BFloat>(call, backward);
    }
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t linear_attention_size() { return sizeof(LinearAttentionCall); }

FASTGT_EXPORT void linear_attention_fwd(const LinearAttentionCall* call) {
    run_typed(*call, false);
}

FASTGT_EXPORT void linear_attention_bwd(const LinearAttentionCall* call) {
    run_typed(*call, true);
}
