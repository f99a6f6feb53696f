// Sampled products (SDDMM) and weighted sums (SPMM) of rows that edges point at.
//
// A group of heads goes together: HG of them, a power of two. The numbers of a group lie edge by
// edge: that of edge e and the group's head v at [e * HG + v]. W such numbers come from one tree of
// additions. Its order is the same in every lane, so results do not depend on where an edge lies.
#pragma once

#include <type_traits>

#include "call.h"

namespace fastgt {

template <class A> constexpr int GROUP = WIDTH<A> < 8 ? WIDTH<A> : 8;  // heads of a group, at most

template <class A> constexpr int64_t padded(int64_t width) {
    return (width + WIDTH<A> - 1) / WIDTH<A> * WIDTH<A>;
}

inline int power_of_two(int count) {
    int x = 1;
    while (x < count) x *= 2;
    return x;
}

// Which row of a tensor each edge points at, and where the heads of a group lie in such a row.
// `reach` index entries may be read ahead, from index[0] on.
template <class T> struct Pointed {
    const T* base;
    int64_t stride;
    int64_t offset[8];
    int64_t width;
    const int64_t* index;
    int64_t reach;

    const T* at(int64_t e) const { return base + index[e] * stride; }
};

constexpr int64_t AHEAD = 6;  // edges; what they point at is asked for early

// Asks for head v of what an edge after e points at: LINES of it, or as many as its width takes.
template <int LINES, class T> FASTGT_INLINE void ask(const Pointed<T>& x, int64_t e, int v) {
    const T* row = x.at(std::min(e + AHEAD, x.reach - 1));
    const char* line = (const char*)(row + x.offset[v]);
    if constexpr (LINES == 1) {
        __builtin_prefetch(line);
    } else {
        for (int64_t i = 0; i < x.width * int64_t(sizeof(T)); i += 64) __builtin_prefetch(line + i);
    }
}

// What rows have for a group's heads, in A, as products read and write it: HG heads with whole
// vectors each, or, folded, HG / F vectors. It lies in a buffer or in a tensor.
template <class A> struct HeadParts {
    A* data;
    int64_t stride;  // of a row
    int64_t head;    // of a head
};

// out[e * HG + v] = scale times the sum of the lanes that `leaf(e, v, real)` gives, for n edges. F
// heads share a vector: v counts vectors. Past the last edge leaves are those of the last, with
// real = false. A leaf of few instructions is SHORT: each stands in the code by itself.
template <class A, int HG, int F, bool SHORT, class Leaf, class Ask>
FASTGT_INLINE void products(int64_t n, A scale, bool add, A* out, Leaf leaf, Ask ask_for) {
    constexpr int W = WIDTH<A>, LEAVES = W / F, A_EDGE = HG / F, EDGES = W / HG;
    for (int64_t e0 = 0; e0 < n; e0 += EDGES) {
        unrolled<EDGES>([&](int u) FASTGT_INLINED { ask_for(std::min(e0 + u, n - 1)); });
        auto leaf_at = [&](int p) FASTGT_INLINED {
            const int64_t e = e0 + p / A_EDGE;
            return leaf(std::min(e, n - 1), p % A_EDGE, e < n);
        };
        Vec<A> s;
        if constexpr (SHORT) {
            s = tree<A, LEAVES>(leaf_at);
        } else {
            Vec<A> leaves[LEAVES];
            for (int p = 0; p < LEAVES; p++) leaves[p] = leaf_at(p);
            s = tree<A, LEAVES>([&](int p) FASTGT_INLINED { return leaves[p]; });
        }
        if constexpr (F > 1) {
            const VecInt<A> l = lane_numbers<A>();
            s = __builtin_shuffle(s, (l & (F - 1)) * LEAVES + l / F);
        }
        s *= scale;
        A* to = out + e0 * HG;
        const int count = int(std::min<int64_t>(W, (n - e0) * HG));
        if (add) s += load_some(to, count);
        store_some(to, s, count);
    }
}

// FULL: a head's part is one whole vector, or a fold of F heads is. Else vectors and a rest.
template <class T, int HG, bool FULL, int F>
void sddmm(HeadParts<Accumulator<T>> a, const int32_t* row, const Pointed<T>& b, int64_t n,
           Accumulator<T> scale, bool add, Accumulator<T>* out) {
    using A = Accumulator<T>;
    constexpr int W = WIDTH<A>;
    const int64_t whole = b.width / W * W;
    const int rest = int(b.width - whole);
    products<A, HG, F, sizeof(T) == 4>(
        n, scale, add, out,
        [&](int64_t e, int v, bool) FASTGT_INLINED {
            const A* x = a.data + row[e] * a.stride + v * a.head;
            const T* y = b.at(e) + b.offset[v * F];
            if constexpr (FULL) {
                return load(x) * load(y);
            } else {
                Vec<A> s{};
                int64_t c = 0;
                for (; c < whole; c += W) s += load(x + c) * load(y + c);
                if (rest) s += load(x + c, rest) * load(y + c, rest);
                return s;
            }
        },
        [&](int64_t e) FASTGT_INLINED {
            unrolled<HG / F>([&](int v) FASTGT_INLINED { ask<FULL ? 1 : 0>(b, e, v); });
        });
}

// The weights of one edge for the heads of vector v.
template <class A, int F> FASTGT_INLINE Vec<A> weights_of(const A* w, int v) {
    if constexpr (F == 1) {
        return splat(w[v]);
    } else {
        constexpr int RUN = WIDTH<A> / F;
        Vec<A> some = load(w + v * F);  // buffers of weights end with room for a vector
        return __builtin_shuffle(some, lane_numbers<A>() / RUN);
    }
}

// out[r][v] = factor times the sum over row r's edges of weight[e * HG + v] times what e points at,
// or that is added to it. Every form adds in one order, so neither strides nor the other heads
// change a bit. Row r has the edges ptr[r] to ptr[r + 1].
template <class T, int HG, bool FULL, int F>
void spmm(const Accumulator<T>* weight, const int64_t* ptr, int64_t rows, const Pointed<T>& b,
          int heads, Accumulator<T> factor, bool add, HeadParts<Accumulator<T>> out) {
    using A = Accumulator<T>;
    using V = Vec<A>;
    constexpr int W = WIDTH<A>, VECTORS = HG / F;
    for (int64_t r = 0; r < rows; r++) {
        const int64_t from = ptr[r], to = ptr[r + 1];
        A* o = out.data + r * out.stride;
        if constexpr (FULL) {
            V total[VECTORS] = {};
            for (int64_t e = from; e < to;) {
                V sum[VECTORS] = {};
                for (const int64_t stop = std::min(to, e + BLOCK); e < stop; e++) {
                    unrolled<VECTORS>([&](int v) FASTGT_INLINED { ask<1>(b, e, v); });
                    const T* y = b.at(e);
                    unrolled<VECTORS>([&](int v) FASTGT_INLINED {
                        const V w = weights_of<A, F>(weight + e * HG, v);
                        sum[v] += w * load(y + b.offset[v * F]);
                    });
                }
                unrolled<VECTORS>([&](int v) FASTGT_INLINED { total[v] += sum[v]; });
            }
            unrolled<VECTORS>([&](int v) FASTGT_INLINED {
                A* to_v = o + v * out.head;
                const V x = total[v] * factor;
                store(to_v, add ? load(to_v) + x : x);
            });
        } else {
            for (int v = 0; v < heads; v++) {
                int64_t c = 0;
                auto columns = [&](auto count, int rest) FASTGT_INLINED {
                    constexpr int N = decltype(count)::value;
                    V total[N] = {};
                    for (int64_t e = from; e < to;) {
                        V sum[N] = {};
                        for (const int64_t stop = std::min(to, e + BLOCK); e < stop; e++) {
                            const T* y = b.at(e) + b.offset[v] + c;
                            const T* next =
                                b.at(std::min(e + AHEAD, b.reach - 1)) + b.offset[v] + c;
                            const V w = splat(weight[e * HG + v]);
                            unrolled<N>([&](int i) FASTGT_INLINED {
                                if (i * W * sizeof(T) % 64 == 0) __builtin_prefetch(next + i * W);
                                sum[i] += w * (rest ? load(y + i * W, rest) : load(y + i * W));
                            });
                        }
                        unrolled<N>([&](int i) FASTGT_INLINED { total[i] += sum[i]; });
                    }
                    A* to_v = o + v * out.head + c;
                    unrolled<N>([&](int i) FASTGT_INLINED {
                        const int lanes = rest ? rest : W;
                        V x = total[i] * factor;
                        if (add) x += load_some(to_v + i * W, lanes);
                        store_some(to_v + i * W, x, lanes);
                    });
                    c += N * W;
                };
                const std::integral_constant<int, 4> four;
                const std::integral_constant<int, 1> one;
                while (c + 4 * W <= b.width) columns(four, 0);
                while (c + W <= b.width) columns(one, 0);
                if (c < b.width) columns(one, int(b.width - c));
            }
        }
    }
}

// The two for a group of HG heads whose parts have `width` numbers.
template <class T> struct Products {
    using A = Accumulator<T>;
    void (*sddmm)(HeadParts<A>, const int32_t*, const Pointed<T>&, int64_t, A, bool, A*);
    void (*spmm)(const A*, const int64_t*, int64_t, const Pointed<T>&, int, A, bool, HeadParts<A>);
    int fold;
};

template <class T, int HG, bool FULL, int F> Products<T> products_of() {
    return {sddmm<T, HG, FULL, F>, spmm<T, HG, FULL, F>, F};
}

// f(a constant) for the heads of a group
template <class A, class F> auto with_lanes(int lanes, const F& f) {
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    const std::integral_constant<int, std::min(4, GROUP<A>)> four;
    const std::integral_constant<int, std::min(8, GROUP<A>)> eight;
    return lanes == 1 ? f(one) : lanes == 2 ? f(two) : lanes == 4 ? f(four) : f(eight);
}

// `adjacent`: the heads of a row lie one behind the other, so that narrow ones may share a vector.
template <class T>
Products<T> choose_products(int group, int64_t width, bool adjacent) {
    using A = Accumulator<T>;
    constexpr int W = WIDTH<A>;
    return with_lanes<A>(group, [&](auto lanes) -> Products<T> {
        constexpr int HG = decltype(lanes)::value;
        // other types have the general form alone: each form is code
        if constexpr (sizeof(T) == 4) {
            if (width == W) return products_of<T, HG, true, 1>();
            if constexpr (HG >= 2)
                if (width * 2 == W && adjacent) return products_of<T, HG, true, 2>();
            if constexpr (HG >= 4 && W >= 8)
                if (width * 4 == W && adjacent) return products_of<T, HG, true, 4>();
        }
        return products_of<T, HG, false, 1>();
    });
}

}  // namespace fastgt
