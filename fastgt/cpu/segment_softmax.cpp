// segment_softmax: y = exp(x - the largest of the row) / their sum, channel by channel.
#include "call.h"

namespace fastgt {
namespace {

struct SegmentSoftmaxCall {
    int64_t dtype, threads, width;
    WalkArrays rows;
    Array x, y, dy, dx;  // [E, D] in the caller's order; a forward has x and y, a backward the rest
};

constexpr int64_t AHEAD = 16;  // edges whose numbers are asked for before they are needed

template <class T, class I> void forward(const SegmentSoftmaxCall& call) {
    using A = Accumulator<T>;
    using V = Vec<A>;
    constexpr A INF = std::numeric_limits<A>::infinity();
    constexpr bool rounded = sizeof(T) < sizeof(A);  // a result cannot hold what is not yet divided
    const Walk<I> walk(call.rows);
    expect_writes(call.y.data, walk.edges * call.width * int64_t(sizeof(T)));
    each_range(call.threads, walk, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t r = begin; r < end; r++) {
            const int64_t from = walk.ptr[r], to = walk.ptr[r + 1];
            each_vector<A>(call.width, [&](int64_t c, int n) FASTGT_INLINED {
                auto x = [&](int64_t i) FASTGT_INLINED {
                    return load_some(call.x.at<T>(walk.edge[i]) + c, n);
                };
                auto y = [&](int64_t i) FASTGT_INLINED { return call.y.at<T>(walk.edge[i]) + c; };
                V top = splat(-INF);
                for (int64_t i = from; i < to; i++) {
                    const I next = walk.edge[std::min(i + AHEAD, walk.edges - 1)];
                    __builtin_prefetch(call.x.at<T>(next) + c);
                    top = larger<A>(x(i), top);
                }
                top = top == -INF ? V{} : top;
                V total{};
                for (int64_t i = from; i < to;) {
                    V some{};
                    for (const int64_t stop = std::min(to, i + BLOCK); i < stop; i++) {
                        const V p = exponential(x(i) - top);
                        if (!rounded) store_some(y(i), p, n);
                        some += p;
                    }
                    total += some;
                }
                const V norm = total == A(0) ? V{} : A(1) / total;
                for (int64_t i = from; i < to; i++)
                    store_some(y(i),
                               (rounded ? exponential(x(i) - top) : load_some(y(i), n)) * norm, n);
            });
        }
    });
}

template <class T, class I> void backward(const SegmentSoftmaxCall& call) {
    using A = Accumulator<T>;
    using V = Vec<A>;
    const Walk<I> walk(call.rows);
    expect_writes(call.dx.data, walk.edges * call.width * int64_t(sizeof(T)));
    each_range(call.threads, walk, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t r = begin; r < end; r++) {
            const int64_t from = walk.ptr[r], to = walk.ptr[r + 1];
            each_vector<A>(call.width, [&](int64_t c, int n) FASTGT_INLINED {
                auto y = [&](int64_t i) FASTGT_INLINED {
                    return load_some(call.y.at<T>(walk.edge[i]) + c, n);
                };
                auto dy = [&](int64_t i) FASTGT_INLINED {
                    return load_some(call.dy.at<T>(walk.edge[i]) + c, n);
                };
                V total{}, product{};
                for (int64_t i = from; i < to;) {
                    V some{}, products{};
                    for (const int64_t stop = std::min(to, i + BLOCK); i < stop; i++) {
                        const I next = walk.edge[std::min(i + AHEAD, walk.edges - 1)];
                        __builtin_prefetch(call.y.at<T>(next) + c);
                        __builtin_prefetch(call.dy.at<T>(next) + c);
                        some += y(i);
                        products += y(i) * dy(i);
                    }
                    total += some;
                    product += products;
                }
                // weights of 16 bits do not sum to 1
                const V mean = product / (total == A(0) ? splat(A(1)) : total);
                for (int64_t i = from; i < to; i++)
                    store_some(call.dx.at<T>(walk.edge[i]) + c, y(i) * (dy(i) - mean), n);
            });
        }
    });
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t segment_softmax_size() { return sizeof(SegmentSoftmaxCall); }

FASTGT_EXPORT void segment_softmax_fwd(const SegmentSoftmaxCall* call) {
    with_types(call->dtype, call->rows.wide,
               [&](auto t, auto i) { forward<decltype(t), decltype(i)>(*call); });
}

FASTGT_EXPORT void segment_softmax_bwd(const SegmentSoftmaxCall* call) {
    with_types(call->dtype, call->rows.wide,
               [&](auto t, auto i) { backward<decltype(t), decltype(i)>(*call); });
}
