// Small matrices in a cache: their rows come from tensors, products are made tile by tile.
//
// Rows of matrices are filled up to whole vectors; what stands there is used for nothing.
#pragma once

#include "call.h"

namespace fastgt {
// each file its own: a linker must not take one file's copy for all
namespace {

constexpr int64_t FILL = 16;
constexpr int64_t ROWS_AHEAD = 12;  // rows whose lines are asked for before they are needed

inline int64_t filled(int64_t width) { return (width + FILL - 1) / FILL * FILL; }

// ---- products

// c[R, COUNT vectors] = (or +=) sum_k a[r, k] b[k]; a(r, k) is at a[r si + k sk]
template <class A, int R, int COUNT>
inline void tile(A* c, int64_t ldc, const A* a, int64_t si, int64_t sk, const A* b, int64_t ldb,
          int64_t inner, bool onto) {
    using V = Vec<A>;
    constexpr int W = WIDTH<A>;
    V sum[R][COUNT] = {};
    for (int64_t k = 0; k < inner; k++, a += sk, b += ldb) {
        V row[COUNT];
        unrolled<COUNT>([&](int j) FASTGT_INLINED { row[j] = load(b + j * W); });
        unrolled<R>([&](int r) FASTGT_INLINED {
            const V x = splat(a[r * si]);
            unrolled<COUNT>([&](int j) FASTGT_INLINED { sum[r][j] += x * row[j]; });
        });
    }
    unrolled<R>([&](int r) FASTGT_INLINED {
        unrolled<COUNT>([&](int j) FASTGT_INLINED {
            A* at = c + r * ldc + j * W;
            store(at, onto ? load(at) + sum[r][j] : sum[r][j]);
        });
    });
}

template <class A, int R, int COUNT>
inline void panel(A* c, int64_t ldc, const A* a, int64_t si, int64_t sk, const A* b, int64_t ldb,
           int64_t rows, int64_t inner, bool onto) {
    int64_t r = 0;
    for (; r + R <= rows; r += R)
        tile<A, R, COUNT>(c + r * ldc, ldc, a + r * si, si, sk, b, ldb, inner, onto);
    if constexpr (R > 1)
        if (r < rows)
            panel<A, R / 2, COUNT>(c + r * ldc, ldc, a + r * si, si, sk, b, ldb, rows - r, inner,
                                   onto);
}

// c [rows, cols] = (or +=) a b. The sum over `inner` has one order, whatever the tiles.
template <class A>
inline void product(A* c, int64_t ldc, const A* a, int64_t si, int64_t sk, const A* b, int64_t ldb,
             int64_t rows, int64_t inner, int64_t cols, bool onto = false) {
    constexpr int W = WIDTH<A>;
    int64_t vectors = (cols + W - 1) / W;
    auto next = [&](int count) { c += count * W, b += count * W, vectors -= count; };
#if defined(__AVX512F__)
    for (; vectors >= 4; next(4))
        panel<A, 6, 4>(c, ldc, a, si, sk, b, ldb, rows, inner, onto);
    for (; vectors >= 2; next(2))
        panel<A, 8, 2>(c, ldc, a, si, sk, b, ldb, rows, inner, onto);
#else
    for (; vectors >= 2; next(2))
        panel<A, 4, 2>(c, ldc, a, si, sk, b, ldb, rows, inner, onto);
#endif
    for (; vectors; next(1)) panel<A, 8, 1>(c, ldc, a, si, sk, b, ldb, rows, inner, onto);
}

template <class A>
inline void transpose(A* to, int64_t ldt, const A* from, int64_t ldf, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t j = 0; j < cols; j++)
            for (int64_t r = i; r < std::min(i + 16, rows); r++)
                to[j * ldt + r] = from[r * ldf + j];
}

// lane l of row r and lane r of row l change places, bit by bit of their numbers
template <class A, int STEP> FASTGT_INLINE void exchange(Vec<A>* x) {
    if constexpr (STEP < WIDTH<A>) {
        const VecInt<A> l = lane_numbers<A>(), odd = (l & STEP) != 0;
        const VecInt<A> low = odd ? (l ^ STEP) + WIDTH<A> : l;
        const VecInt<A> high = odd ? l + WIDTH<A> : (l ^ STEP);
        unrolled<WIDTH<A>>([&](int r) FASTGT_INLINED {
            if (r & STEP) return;
            const Vec<A> a = x[r], b = x[r + STEP];
            x[r] = __builtin_shuffle(a, b, low);
            x[r + STEP] = __builtin_shuffle(a, b, high);
        });
        exchange<A, STEP * 2>(x);
    }
}

// to [cols, rows] of from [rows, cols], vectors on both sides: rows and columns are read and written
// up to whole vectors
template <class A>
inline void transpose_whole(A* to, int64_t ldt, const A* from, int64_t ldf, int64_t rows,
                            int64_t cols) {
    using V = Vec<A>;
    constexpr int W = WIDTH<A>;
    for (int64_t i = 0; i < rows; i += W)
        for (int64_t j = 0; j < cols; j += W) {
            V x[W];
            unrolled<W>([&](int r) FASTGT_INLINED { x[r] = load(from + (i + r) * ldf + j); });
            exchange<A, 1>(x);
            unrolled<W>([&](int r) FASTGT_INLINED { store(to + (j + r) * ldt + i, x[r]); });
        }
}

// ---- rows of tensors

// to [count, width] of rows of a tensor, filled up with 0
template <class T>
inline void read_rows(Accumulator<T>* to, int64_t ld, const Array& from, int64_t begin,
                      int64_t count, int64_t head, int64_t width) {
    using A = Accumulator<T>;
    for (int64_t j = 0; j < count; j++) {
        const T* row = from.at<T>(begin + j, head);
        const T* next = from.at<T>(begin + std::min(j + ROWS_AHEAD, count - 1), head);
        for (int64_t c = 0; c < width; c += 64 / sizeof(T)) __builtin_prefetch(next + c);
        each_vector<A>(width, [&](int64_t c, int n) {
            store(to + j * ld + c, load_some(row + c, n));
        });
    }
}

template <class T>
inline void write_rows(const Array& to, const Accumulator<T>* from, int64_t ld, int64_t begin,
                       int64_t count, int64_t head, int64_t width) {
    using A = Accumulator<T>;
    for (int64_t j = 0; j < count; j++) {
        T* row = to.at<T>(begin + j, head);
        each_vector<A>(width, [&](int64_t c, int n) {
            store_some(row + c, load(from + j * ld + c), n);
        });
    }
}

}  // namespace
}  // namespace fastgt
