// Vectors of the width that the compiler's target has, and what every kernel does with them.
//
// A kernel computes in A (float, or double for double tensors) and stores T (float, double, Half or
// BFloat). GCC's and Clang's vector extensions carry the arithmetic. Intrinsics stand only where
// these have no word: partial loads, and halves.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FASTGT_INLINE static inline __attribute__((always_inline))
// for a lambda of a kernel's inner loop
#define FASTGT_INLINED __attribute__((always_inline))

namespace fastgt {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

typedef float VFloat __attribute__((vector_size(BYTES)));
typedef int32_t VFloatInt __attribute__((vector_size(BYTES)));
typedef double VDouble __attribute__((vector_size(BYTES)));
typedef int64_t VDoubleInt __attribute__((vector_size(BYTES)));
typedef uint16_t VBits __attribute__((vector_size(BYTES / 2)));
typedef uint32_t VWord __attribute__((vector_size(BYTES)));

template <class A> struct LanesOf;
template <> struct LanesOf<float> {
    typedef VFloat V;
    typedef VFloatInt I;
    typedef int32_t Int;
};
template <> struct LanesOf<double> {
    typedef VDouble V;
    typedef VDoubleInt I;
    typedef int64_t Int;
};
template <class A> using Vec = typename LanesOf<A>::V;
template <class A> using VecInt = typename LanesOf<A>::I;
template <class A> constexpr int WIDTH = BYTES / int(sizeof(A));

template <class T> struct AccumulatorOf {
    typedef float type;
};
template <> struct AccumulatorOf<double> {
    typedef double type;
};
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

// f(0) to f(N - 1), written out: at -O2 a compiler keeps arrays that a loop goes through in memory
template <int N, class F> FASTGT_INLINE void unrolled(const F& f) {
    if constexpr (N > 0) {
        unrolled<N - 1>(f);
        f(N - 1);
    }
}

template <class A> FASTGT_INLINE Vec<A> splat(A x) {
    return x - Vec<A>{};
}

template <class A> FASTGT_INLINE VecInt<A> lane_numbers() {
    VecInt<A> r;
    for (int l = 0; l < WIDTH<A>; l++) r[l] = l;
    return r;
}

template <class A> FASTGT_INLINE Vec<A> bits_as(VecInt<A> x) {
    return (Vec<A>)x;
}

// x where the mask's lane is set, else 0: no product with 0, which would keep NaN
template <class A> FASTGT_INLINE Vec<A> where_set(VecInt<A> mask, Vec<A> x) {
    return (Vec<A>)(mask & (VecInt<A>)x);
}

template <class A> FASTGT_INLINE Vec<A> choose(VecInt<A> mask, Vec<A> yes, Vec<A> no) {
    return mask ? yes : no;
}

template <class A> FASTGT_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
    return a > b ? a : b;
}

template <class A> FASTGT_INLINE bool all_zero(VecInt<A> x) {
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)x, (__m512i)x) == 0;
#elif defined(__AVX2__)
    return _mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    int64_t words[BYTES / 8], any = 0;
    std::memcpy(words, &x, BYTES);
    for (const int64_t word : words) any |= word;
    return any == 0;
#endif
}

// ---- loads and stores

FASTGT_INLINE float to_float(Half x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    uint32_t word = rest;
    float f;
    if (rest >= 0x0f800000u) {
        word = rest | 0x7f800000u;
        word |= sign;
        std::memcpy(&f, &word, 4);
        return f;
    }
    std::memcpy(&f, &word, 4);
    f *= 0x1p112f;
    std::memcpy(&word, &f, 4);
    word |= sign;
    std::memcpy(&f, &word, 4);
    return f;
#endif
}

FASTGT_INLINE float to_float(BFloat x) {
    uint32_t word = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &word, 4);
    return f;
}

FASTGT_INLINE BFloat to_bfloat(float f) {
    uint32_t word;
    std::memcpy(&word, &f, 4);
    if (f != f) return BFloat{uint16_t((word >> 16) | 0x40)};
    return BFloat{uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16)};
}

FASTGT_INLINE Half to_half(float f) {
#if defined(__F16C__)
    return Half{uint16_t(_cvtss_sh(f, 0))};
#else
    uint32_t word;
    std::memcpy(&word, &f, 4);
    uint32_t sign = (word >> 16) & 0x8000, rest = word & 0x7fffffffu;
    if (rest > 0x7f800000u) return Half{uint16_t(sign | 0x7e00)};
    if (rest >= 0x477ff000u) return Half{uint16_t(sign | 0x7c00)};
    if (rest < 0x38800000u) {
        float magic, x;
        uint32_t half_one = 0x3f000000u;
        std::memcpy(&magic, &half_one, 4);
        std::memcpy(&x, &rest, 4);
        x += magic;
        std::memcpy(&word, &x, 4);
        return Half{uint16_t(sign | (word - half_one))};
    }
    return Half{uint16_t(sign | ((rest - 0x38000000u + 0xfff + ((rest >> 13) & 1)) >> 13))};
#endif
}

FASTGT_INLINE VFloat load(const float* p) {
    VFloat r;
    std::memcpy(&r, p, BYTES);
    return r;
}

FASTGT_INLINE VDouble load(const double* p) {
    VDouble r;
    std::memcpy(&r, p, BYTES);
    return r;
}

FASTGT_INLINE VFloat load(const BFloat* p) {
    VBits bits;
    std::memcpy(&bits, p, BYTES / 2);
    return (VFloat)(__builtin_convertvector(bits, VWord) << 16);
}

FASTGT_INLINE VFloat load(const Half* p) {
#if defined(__AVX512F__)
    return (VFloat)_mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
    return (VFloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    VFloat r;
    for (int l = 0; l < WIDTH<float>; l++) r[l] = to_float(p[l]);
    return r;
#endif
}

FASTGT_INLINE void store(float* p, VFloat x) {
    std::memcpy(p, &x, BYTES);
}

FASTGT_INLINE void store(double* p, VDouble x) {
    std::memcpy(p, &x, BYTES);
}

FASTGT_INLINE void store(BFloat* p, VFloat x) {
    VWord word = (VWord)x;
    VWord rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    VWord spoilt = (word >> 16) | 0x40;
    VBits bits = __builtin_convertvector(x == x ? rounded : spoilt, VBits);
    std::memcpy(p, &bits, BYTES / 2);
}

FASTGT_INLINE void store(Half* p, VFloat x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(-1, (__m512)x, 0));
#elif defined(__F16C__) && defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, 0));
#else
    for (int l = 0; l < WIDTH<float>; l++) p[l] = to_half(x[l]);
#endif
}

// the first n lanes, 0 in the others; n from 0 to the width
FASTGT_INLINE VFloat load(const float* p, int n) {
#if defined(__AVX512F__)
    return (VFloat)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
#elif defined(__AVX2__)
    return (VFloat)_mm256_maskload_ps(p, (__m256i)(lane_numbers<float>() < n));
#else
    VFloat r{};
    for (int l = 0; l < n; l++) r[l] = p[l];
    return r;
#endif
}

FASTGT_INLINE VDouble load(const double* p, int n) {
#if defined(__AVX512F__)
    return (VDouble)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#elif defined(__AVX2__)
    return (VDouble)_mm256_maskload_pd(p, (__m256i)(lane_numbers<double>() < int64_t(n)));
#else
    VDouble r{};
    for (int l = 0; l < n; l++) r[l] = p[l];
    return r;
#endif
}

template <class T> FASTGT_INLINE VFloat load(const T* p, int n) {
    T some[WIDTH<float>] = {};
    std::memcpy(some, p, n * sizeof(T));
    return load(some);
}

FASTGT_INLINE void store(float* p, VFloat x, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, (__m256i)(lane_numbers<float>() < n), (__m256)x);
#else
    for (int l = 0; l < n; l++) p[l] = x[l];
#endif
}

FASTGT_INLINE void store(double* p, VDouble x, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)x);
#elif defined(__AVX2__)
    _mm256_maskstore_pd(p, (__m256i)(lane_numbers<double>() < int64_t(n)), (__m256d)x);
#else
    for (int l = 0; l < n; l++) p[l] = x[l];
#endif
}

template <class T> FASTGT_INLINE void store(T* p, VFloat x, int n) {
    T some[WIDTH<float>];
    store(some, x);
    std::memcpy(p, some, n * sizeof(T));
}

FASTGT_INLINE float load_one(const float* p) { return *p; }
FASTGT_INLINE double load_one(const double* p) { return *p; }
FASTGT_INLINE float load_one(const Half* p) { return to_float(*p); }
FASTGT_INLINE float load_one(const BFloat* p) { return to_float(*p); }
FASTGT_INLINE void store_one(float* p, float x) { *p = x; }
FASTGT_INLINE void store_one(double* p, double x) { *p = x; }
FASTGT_INLINE void store_one(Half* p, float x) { *p = to_half(x); }
FASTGT_INLINE void store_one(BFloat* p, float x) { *p = to_bfloat(x); }

// a line of `count` numbers, vector by vector: f(offset, lanes of this vector)
template <class A, class F> FASTGT_INLINE void each_vector(int64_t count, F f) {
    int64_t i = 0;
    for (; i + WIDTH<A> <= count; i += WIDTH<A>) f(i, WIDTH<A>);
    if (i < count) f(i, int(count - i));
}

template <class T> FASTGT_INLINE Vec<Accumulator<T>> load_some(const T* p, int n) {
    return n == WIDTH<Accumulator<T>> ? load(p) : load(p, n);
}

template <class T> FASTGT_INLINE void store_some(T* p, Vec<Accumulator<T>> x, int n) {
    if (n == WIDTH<Accumulator<T>>)
        store(p, x);
    else
        store(p, x, n);
}

// ---- exponential and logarithm

// exp to about 1 ulp where it is normal, 0 below that, infinity beyond, NaN of NaN
FASTGT_INLINE VFloat exponential(VFloat x) {
    const VFloat magic = splat(12582912.0f);
    VFloat y = larger<float>(splat(-90.0f), x);
    y = y > 89.0f ? splat(89.0f) : y;
    const VFloat moved = y * 1.44269504f + magic;
    const VFloat n = moved - magic;
    VFloat f = y - n * 0.693359375f;
    f = f + n * 2.12194440e-4f;
    VFloat p = splat(1.9875691500e-4f);
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * (f * f) + (f + 1.0f);
    // 2^n in two steps: n may be 128 or below -126
    const VFloatInt whole = (VFloatInt)moved - (VFloatInt)magic, half = whole >> 1;
    const VFloat low = (VFloat)((half + 127) << 23), high = (VFloat)((whole - half + 127) << 23);
    p = p * low * high;
    p = x > 88.72284f ? splat(std::numeric_limits<float>::infinity()) : p;
    p = x < -87.3f ? VFloat{} : p;
    return x == x ? p : x;
}

FASTGT_INLINE VDouble exponential(VDouble x) {
    const VDouble magic = splat(6755399441055744.0);
    VDouble y = larger<double>(splat(-710.0), x);
    y = y > 711.0 ? splat(711.0) : y;
    const VDouble moved = y * 1.4426950408889634 + magic;
    const VDouble n = moved - magic;
    VDouble f = y - n * 6.93145751953125e-1;
    f = f - n * 1.42860682030941723212e-6;
    const VDouble z = f * f;
    VDouble p = splat(1.26177193074810590878e-4);
    p = p * z + 3.02994407707441961300e-2;
    p = p * z + 9.99999999999999999910e-1;
    p = p * f;
    VDouble q = splat(3.00198505138664455042e-6);
    q = q * z + 2.52448340349684104192e-3;
    q = q * z + 2.27265548208155028766e-1;
    q = q * z + 2.00000000000000000009e0;
    p = 1.0 + 2.0 * (p / (q - p));
    const VDoubleInt whole = (VDoubleInt)moved - (VDoubleInt)magic, half = whole >> 1;
    const VDouble low = (VDouble)((half + 1023) << 52),
                  high = (VDouble)((whole - half + 1023) << 52);
    p = p * low * high;
    p = x > 709.782712893384 ? splat(std::numeric_limits<double>::infinity()) : p;
    p = x < -708.3 ? VDouble{} : p;
    return x == x ? p : x;
}

FASTGT_INLINE VFloat logarithm(VFloat x) {
    // x = m 2^e with m from sqrt(1/2) to sqrt(2)
    const VFloat tiny = splat(0x1p23f);
    const VFloatInt small = x < 1.17549435e-38f;
    const VFloat y = small ? x * tiny : x;
    VFloatInt word = (VFloatInt)y;
    VFloatInt e = ((word - 0x3f3504f3) >> 23);
    const VFloat m = (VFloat)(word - (e << 23));
    e = e - (small & 23);
    const VFloat f = m - 1.0f, z = f * f, n = __builtin_convertvector(e, VFloat);
    VFloat p = splat(7.0376836292e-2f);
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = p * f * z;
    p = p - n * 2.12194440e-4f - z * 0.5f;
    p = n * 0.693359375f + (f + p);
    p = x > 3.4028234e38f ? x : p;
    p = x == 0.0f ? splat(-std::numeric_limits<float>::infinity()) : p;
    return x >= 0.0f ? p : splat(std::numeric_limits<float>::quiet_NaN());
}

FASTGT_INLINE VDouble logarithm(VDouble x) {
    VDouble r;
    for (int l = 0; l < WIDTH<double>; l++) r[l] = std::log(x[l]);
    return r;
}

// ---- sums across lanes

// lane l of the first where bit `step` of l is 0, of the second where it is 1: after all steps of
// a tree of vectors, lane l holds the sum of vector l
template <class A, int STEP> FASTGT_INLINE Vec<A> pair_sum(Vec<A> a, Vec<A> b) {
    VecInt<A> l = lane_numbers<A>(), odd = (l & STEP) != 0;
    VecInt<A> own = odd ? l + WIDTH<A> : l, other = odd ? (l ^ STEP) + WIDTH<A> : (l ^ STEP);
    return __builtin_shuffle(a, b, own) + __builtin_shuffle(a, b, other);
}

template <class A, int STEP> FASTGT_INLINE Vec<A> swapped(Vec<A> a) {
    return __builtin_shuffle(a, lane_numbers<A>() ^ STEP);
}

// COUNT vectors, from `get(0)` on, to one: each lane has the sum of its vector's run of COUNT lanes
template <class A, int COUNT, int FIRST = 0, class F> FASTGT_INLINE Vec<A> tree(F get) {
    if constexpr (COUNT == 1) {
        return get(FIRST);
    } else {
        Vec<A> a = tree<A, COUNT / 2, FIRST>(get);
        Vec<A> b = tree<A, COUNT / 2, FIRST + COUNT / 2>(get);
        return pair_sum<A, COUNT / 2>(a, b);
    }
}

// what lanes have whose numbers differ by multiples of STEP, put together, in each of them
template <class A, int STEP, class F> FASTGT_INLINE Vec<A> across(Vec<A> x, F f) {
    if constexpr (STEP < WIDTH<A>) {
        return across<A, STEP * 2>(f(x, swapped<A, STEP>(x)), f);
    } else {
        return x;
    }
}

template <class A, int STEP = 1> FASTGT_INLINE Vec<A> sum_across(Vec<A> x) {
    return across<A, STEP>(x, [](Vec<A> a, Vec<A> b) { return a + b; });
}

template <class A, int STEP = 1> FASTGT_INLINE Vec<A> max_across(Vec<A> x) {
    return across<A, STEP>(x, [](Vec<A> a, Vec<A> b) { return larger<A>(a, b); });
}

}  // namespace fastgt
