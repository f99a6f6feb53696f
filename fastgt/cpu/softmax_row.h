// The softmax of one row's logits and its gradient, HG heads side by side in lanes.
#pragma once

#include <algorithm>

#include "call.h"

namespace fastgt {

template <class A> constexpr A INF = std::numeric_limits<A>::infinity();

// x of HG lanes in all lanes, over and over
template <class A, int HG> FASTGT_INLINE Vec<A> repeated(const A* x) {
    return __builtin_shuffle(load(x, HG), lane_numbers<A>() & (HG - 1));
}

// the lanes of a vector that has `count` of them
template <class A> FASTGT_INLINE VecInt<A> first_lanes(int count) {
    return lane_numbers<A>() < typename LanesOf<A>::Int(count);
}

// s [n][HG] logits -> weights; lse [HG]. -> the lanes of the heads whose edges have no
// finite logit
template <class A, int HG>
FASTGT_INLINE VecInt<A> softmax_row(A* s, int64_t n, A log_eps, A* lse) {
    using V = Vec<A>;
    constexpr int W = WIDTH<A>;
    if (!n) {
        std::fill_n(lse, HG, -INF<A>);
        return VecInt<A>{};
    }
    const int64_t count = n * HG, whole = count / W * W;
    const int rest = int(count - whole);
    V top = splat(-INF<A>);
    for (int64_t i = 0; i < whole; i += W) top = larger<A>(load(s + i), top);
    if (rest)
        top = larger<A>(first_lanes<A>(rest) ? load(s + whole, rest) : splat(-INF<A>), top);
    top = max_across<A, HG>(top);
    const V pivot = top == -INF<A> ? V{} : top;
    V total{};
    for (int64_t i = 0; i < whole;) {
        V some{};
        for (const int64_t stop = std::min(whole, i + BLOCK * W); i < stop; i += W) {
            const V p = exponential(load(s + i) - pivot);
            store(s + i, p);
            some += p;
        }
        total += some;
    }
    V last{};
    if (rest) {
        last = where_set<A>(first_lanes<A>(rest), exponential(load(s + whole, rest) - pivot));
        total += last;
    }
    total = sum_across<A, HG>(total);
    V divisor = total;
    if (log_eps > -INF<A>) divisor += exponential(log_eps - pivot);
    const VecInt<A> dead = total == A(0);
    const V norm = dead ? V{} : A(1) / divisor;
    for (int64_t i = 0; i < whole; i += W) store(s + i, load(s + i) * norm);
    if (rest) store(s + whole, last * norm, rest);
    store(lse, dead ? splat(-INF<A>) : pivot + logarithm(total), HG);
    return dead;
}

// p [n][HG] logits -> weights, dp [n][HG] -> gradients of the logits, with the row's lse and the
// gradient of that (or null). `kept` is what dropout makes of a weight.
template <class A, int HG>
FASTGT_INLINE void softmax_row_backward(A* p, A* dp, int64_t n, A log_eps, const A* lse_of_head,
                                        const A* dlse_of_head, const A* kept) {
    using V = Vec<A>;
    constexpr int W = WIDTH<A>;
    const V lse = repeated<A, HG>(lse_of_head);
    const VecInt<A> alive = lse != -INF<A>;
    const V pivot = alive ? lse : splat(INF<A>);
    const int64_t count = n * HG;
    V total{}, product{};
    auto first = [&](int64_t i, int lanes, V& sum, V& sum_product) FASTGT_INLINED {
        V x = exponential(load_some(p + i, lanes) - pivot);
        if (lanes < W) x = where_set<A>(first_lanes<A>(lanes), x);
        // nothing reaches a row without weights, whatever stands upstream
        V d = where_set<A>(alive, load_some(dp + i, lanes));
        if (kept) d *= load_some(kept + i, lanes);
        store_some(p + i, x, lanes);
        store_some(dp + i, d, lanes);
        sum += x;
        sum_product += x * d;
    };
    int64_t i = 0;
    while (i + W <= count) {
        V some{}, products{};
        for (const int64_t stop = std::min(count, i + BLOCK * W); i + W <= stop; i += W)
            first(i, W, some, products);
        total += some;
        product += products;
    }
    if (i < count) first(i, int(count - i), total, product);
    total = sum_across<A, HG>(total);
    product = sum_across<A, HG>(product);
    // 1 but for the rounding of the stored lse, which is that of the largest logit
    const V norm = total == A(0) ? V{} : A(1) / total;
    V share = norm;
    if (log_eps > -INF<A>) share = norm / (A(1) + exponential(log_eps - lse));
    share = where_set<A>(alive, share);
    const V mean = product * share;
    V dlse{};
    if (dlse_of_head) dlse = where_set<A>(alive, repeated<A, HG>(dlse_of_head)) * norm;
    each_vector<A>(count, [&](int64_t j, int lanes) FASTGT_INLINED {
        const V x = load_some(p + j, lanes), d = load_some(dp + j, lanes), a = x * share;
        const V ds = a * (d - mean) + x * dlse;
        store_some(dp + j, ds, lanes);
        store_some(p + j, kept ? a * load_some(kept + j, lanes) : a, lanes);
    });
}

}  // namespace fastgt
