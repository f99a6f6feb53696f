// global_attention: logits of a block of queries and a block of keys stay in a cache.
//
// The symbols are those of fastgt.global_attention. Queries stand in lanes: with Q^T [D, queries],
// scaled, and for one block of keys after another,
//
//     S^T = K Q^T + bias,  P^T = exp(S^T - top),  O = (O's part of the keys before) + P V
//
// so that maxima and sums over keys go from vector to vector, and never across lanes. And back:
//
//     X^T = exp(S^T - lse),  dP^T = V dO^T,  total = sum X,  mean = sum X dP / total
//     A = X / total,  dS = A (dP - mean + dlse),  dV += A^T dO,  dK += dS^T Q,  dQ += dS K
//
// X and dP of all keys are held for one block of queries. Of a graph with more keys than there is
// room for they are computed once for the sums, and again.
//
// A task is some parts with a head of the keys each. A part is a graph, or some of its queries where
// it has many. Sums over several parts are kept by each of them and added up in their order. So no
// result depends on the number of threads.
#include <vector>

#include "matrix.h"
#include "philox.h"

namespace fastgt {
namespace {

struct GlobalAttentionCall {
    int64_t dtype, threads, heads, kv_heads, d, dv, graphs;
    int64_t wide;  // whether offsets have 64 bits
    const void *offsets, *key_offsets;
    Array mask;  // [G, H] bool
    double scale;
    Array bias;  // [M, H] where per_key, else [pairs, H]
    int64_t per_key;
    Array seed;
    Array query_numbers, key_numbers;  // by whose sums dropout knows pairs; null: their own
    int64_t first_head;                // by which it knows head 0
    int64_t threshold;  // a weight is kept where its 24 random bits are not below it
    double growth;      // of the weights that are kept
    int64_t hold;       // keys that there is room for, a multiple of 8
    int64_t piece;      // queries of a part
    int64_t pieces;     // of a graph, at most, where parts keep sums
    Array q, k, v, o, lse, d_o, dlse, dq, dk, d_v, d_bias;
    Array work;
};

constexpr int64_t QUERIES = 64, KEYS = 96;  // of a block: its logits take half of a first cache
constexpr int64_t DRAWN = 1 << 20;          // pairs whose dropout a thread remembers
constexpr int64_t PANEL = 8;                // rows that `product` is given are multiples of it

int64_t whole(int64_t rows) { return (rows + PANEL - 1) / PANEL * PANEL; }

typedef uint32_t VFloatBits __attribute__((vector_size(sizeof(VFloat))));

// exp, but for x that is far above 0
FASTGT_INLINE VFloat exponential_below(VFloat x) {
    const VFloat magic = splat(12582912.0f);
    const VFloat y = larger<float>(x, splat(-87.3f));
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
    // unsigned: in lanes that nothing reads, any number of steps may be added
    p = (VFloat)((VFloatBits)p + (((VFloatBits)moved - (VFloatBits)magic) << 23));
    p = x < -87.3f ? VFloat{} : p;
    return x == x ? p : x;
}
FASTGT_INLINE VDouble exponential_below(VDouble x) { return exponential(x); }

struct Part {
    int64_t graph, begin, end, keys_begin, keys;  // queries from begin to end
    int64_t pair;                                 // the number of the graph's first pair
    int64_t first;                                // its first query
    int64_t number, count;                        // which of the graph's parts, and their number
    int64_t slot;  // where the graph's sums begin, in numbers; -1 where a task alone makes them
};

bool sums_of_keys(const GlobalAttentionCall& call) {
    return call.dk || call.d_v || (call.d_bias && call.per_key);
}

// dK, dV and the gradients of a bias per key, of a graph and a key head
template <class A> struct Sums {
    A *dk, *dv, *dbias;  // [keys, D], [keys, Dv], [heads of a group, keys]
    int64_t keys;

    Sums(A* at, int64_t keys, int64_t ldd, int64_t ldv)
        : dk(at), dv(dk + keys * ldd), dbias(dv + keys * ldv), keys(keys) {}
    static int64_t size(int64_t keys, int64_t ldd, int64_t ldv, int64_t group) {
        return keys * (ldd + ldv + group);
    }
};

template <class T> struct Worker {
    using A = Accumulator<T>;
    using V = Vec<A>;
    static constexpr int W = WIDTH<A>;

    const GlobalAttentionCall& call;
    const bool backward;
    int64_t d, dv, ldd, ldv, group, block;
    A *q, *qt, *g, *gt, *o, *dq, *k, *v, *s, *ds, *keep, *own, *top, *total, *mean, *fall, *flow;
    uint8_t* drawn;
    mutable int64_t pairs_drawn = -1, heads_drawn = -1;

    Worker(const GlobalAttentionCall& call, bool backward, char* place)
        : call(call), backward(backward), d(call.d), dv(call.dv), ldd(filled(d)), ldv(filled(dv)),
          group(call.heads / call.kv_heads), block(std::min(KEYS, call.hold)) {
        lay(place);
    }
    int64_t lay(char* const from) {
        char* place = from;
        const int64_t rows = call.hold + PANEL, held = backward ? rows : block + PANEL;
        q = take<A>(place, QUERIES * ldd);
        qt = take<A>(place, ldd * QUERIES);
        o = take<A>(place, QUERIES * ldv);
        k = take<A>(place, rows * ldd);
        v = take<A>(place, rows * ldv);
        s = take<A>(place, held * QUERIES);
        keep = take<A>(place, call.seed ? held * QUERIES : 0);
        drawn = take<uint8_t>(place, call.seed ? DRAWN + PHILOX : 0);
        for (A** at : {&top, &total, &mean, &fall, &flow}) *at = take<A>(place, QUERIES);
        if (!backward) return place - from;
        g = take<A>(place, QUERIES * ldv);
        gt = take<A>(place, ldv * QUERIES);
        dq = take<A>(place, QUERIES * ldd);
        ds = take<A>(place, held * QUERIES);
        own = take<A>(place, Sums<A>::size(rows, ldd, ldv, group));
        return place - from;
    }

    bool held(const Part& part) const { return part.keys <= call.hold; }

    // ---- what both directions read

    // to [count, width], and 0 up to whole vectors of rows; its transpose too
    void read_lanes(A* to, A* turned, const Array& from, int64_t ld, int64_t at, int64_t count,
                    int64_t head, int64_t width, A scale) const {
        read_rows<T>(to, ld, from, at, count, head, width);
        const int64_t vectors = (width + W - 1) / W * W;
        for (int64_t i = 0; scale != A(1) && i < count; i++)
            for (int64_t c = 0; c < vectors; c += W)
                store(to + i * ld + c, load(to + i * ld + c) * scale);
        for (int64_t i = count; i < filled(count); i++) std::fill_n(to + i * ld, vectors, A(0));
        transpose_whole(turned, filled(count), to, ld, filled(count), vectors);
    }
    void read_queries(int64_t at, int64_t count, int64_t head) const {
        read_lanes(q, qt, call.q, ldd, at, count, head, d, A(call.scale));
    }
    void read_keys(const Part& part, int64_t key, int64_t count, int64_t key_head) const {
        read_rows<T>(k, ldd, call.k, part.keys_begin + key, count, key_head, d);
        read_rows<T>(v, ldv, call.v, part.keys_begin + key, count, key_head, dv);
    }
    // f(key, count, K, V, the row of s that is the first key's) for the blocks of a part's keys
    template <class F> void each_block(const Part& part, int64_t head, const F& f) const {
        const bool there = held(part);
        for (int64_t key = 0; key < part.keys; key += block) {
            const int64_t count = std::min(block, part.keys - key);
            if (!there) read_keys(part, key, count, head / group);
            f(key, count, k + (there ? key * ldd : 0), v + (there ? key * ldv : 0),
              there ? key : 0);
        }
    }
    // the number of the pair of query `at` with the graph's first key
    int64_t pair(const Part& part, int64_t at) const {
        return part.pair + (at - part.first) * part.keys;
    }
    // S^T of a block
    void logits(A* s, const Part& part, int64_t at, int64_t count, int64_t head, int64_t key,
                int64_t keys, const A* k) const {
        const int64_t ld = filled(count);
        product<A>(s, ld, k, ldd, 1, qt, ld, whole(keys), d, count);
        if (!call.bias) return;
        if (call.per_key) {
            for (int64_t j = 0; j < keys; j++) {
                const T* bias = call.bias.at<T>(part.keys_begin + key + j, head);
                const A more = load_one(bias);
                for (int64_t c = 0; c < ld; c += W)
                    store(s + j * ld + c, load(s + j * ld + c) + more);
            }
            return;
        }
        each_pair(call.bias, part, at, count, head, key, keys, [&](int64_t j, int64_t i, T* bias) {
            s[j * ld + i] += load_one(bias);
        });
    }
    // f(key, query, the pair's number in a tensor), 16 queries at a time
    template <class F>
    void each_pair(const Array& of, const Part& part, int64_t at, int64_t count, int64_t head,
                   int64_t key, int64_t keys, const F& f) const {
        for (int64_t i = 0; i < count; i += FILL) {
            const int64_t some = std::min(FILL, count - i);
            T* from = of.at<T>(pair(part, at + i) + key, head);
            const int64_t step = part.keys * of.row;
            for (int64_t j = 0; j < keys; j++)
                for (int64_t r = 0; r < some; r++) f(j, i + r, from + r * step + j * of.row);
        }
    }
    // by which dropout knows a head
    int64_t known(int64_t head) const { return call.first_head + head; }
    // of PHILOX pairs of a part, one after another
    void draw_pairs(const Part& part, int64_t first, int64_t head, uint8_t* bits) const {
        const uint64_t seed = *(const uint64_t*)call.seed.data;
        const uint32_t block = uint32_t(known(head) / 4), threshold = uint32_t(call.threshold);
        if (!call.query_numbers)
            return draw_heads(seed, [&](int i) { return first + i; }, block, threshold, bits);
        const int64_t* of_query = (const int64_t*)call.query_numbers.data;
        const int64_t* of_key = (const int64_t*)call.key_numbers.data + part.keys_begin;
        int64_t query = part.first + (first - part.pair) / part.keys;
        int64_t key = (first - part.pair) % part.keys;
        // asked for in order; beyond the part's last query nobody reads what is drawn
        const auto number = [&](int) {
            const int64_t found = of_query[std::min(query, part.end - 1)] + of_key[key];
            if (++key == part.keys) key = 0, query++;
            return found;
        };
        draw_heads(seed, number, block, threshold, bits);
    }
    // Which weights of a part are kept: bit h of a pair's byte is that of the head that is known as
    // 4 heads_drawn + h. A part of many pairs is drawn block by block, and again for every head.
    void draw_part(const Part& part, int64_t head) const {
        const int64_t first = pair(part, part.begin), count = pair(part, part.end) - first;
        if (!count || count > DRAWN) return;
        if (first == pairs_drawn && known(head) / 4 == heads_drawn) return;
        pairs_drawn = first, heads_drawn = known(head) / 4;
        for (int64_t e = 0; e < count; e += PHILOX)
            draw_pairs(part, first + e, head, drawn + e);
    }
    // what dropout makes of the weights of a block: 0, or by how much they grow
    void draw(A* keep, const Part& part, int64_t at, int64_t count, int64_t head, int64_t key,
              int64_t keys) const {
        const int64_t ld = filled(count), first = pair(part, part.begin);
        const bool there = pair(part, part.end) - first <= DRAWN;
        const uint8_t bit = uint8_t(1 << known(head) % 4);
        const A growth = A(call.growth);
        uint8_t some[FILL][PHILOX] = {};
        const uint8_t* bits[FILL];
        for (int64_t i = 0; i < count; i += FILL)
            for (int64_t j = 0; j < keys; j += PHILOX) {
                for (int64_t r = 0; r < FILL; r++) {
                    // beyond the last query that of the last one
                    const int64_t query = at + std::min(i + r, count - 1);
                    const int64_t number = pair(part, query) + key + j;
                    bits[r] = there ? drawn + number - first : some[r];
                    if (there || i + r >= count) continue;
                    draw_pairs(part, number, head, some[r]);
                }
                const int64_t end = std::min<int64_t>(PHILOX, keys - j);
                for (int64_t e = 0; e < end; e++) {
                    A* to = keep + (j + e) * ld + i;
                    for (int64_t r = 0; r < FILL; r++) to[r] = bits[r][e] & bit ? growth : A(0);
                }
            }
    }

    // ---- forward

    void attend(const Part& part, int64_t head) const {
        for (int64_t at = part.begin; at < part.end; at += QUERIES) {
            const int64_t count = std::min(QUERIES, part.end - at), ld = filled(count);
            read_queries(at, count, head);
            std::fill_n(top, ld, -std::numeric_limits<A>::infinity());
            std::fill_n(total, ld, A(0));
            each_block(part, head, [&](int64_t key, int64_t keys, const A* k, const A* v, int64_t) {
                logits(s, part, at, count, head, key, keys, k);
                weigh(ld, keys);
                for (int64_t i = 0; key && i < count; i++)
                    for (int64_t c = 0; c < dv; c += W)
                        store(o + i * ldv + c, load(o + i * ldv + c) * fall[i]);
                if (call.seed) {
                    draw(keep, part, at, count, head, key, keys);
                    for (int64_t c = 0; c < keys * ld; c += W)
                        store(s + c, load(s + c) * load(keep + c));
                }
                product<A>(o, ldv, s, 1, ld, v, ldv, whole(count), keys, dv, key > 0);
            });
            for (int64_t i = 0; i < count; i++) {
                const bool dead = total[i] == A(0);
                const A norm = A(1) / total[i];
                for (int64_t c = 0; c < dv; c += W) {
                    A* to = o + i * ldv + c;
                    store(to, dead ? V{} : load(to) * norm);
                }
                *call.lse.template at<A>(at + i, head) =
                    dead ? -std::numeric_limits<A>::infinity() : top[i] + std::log(total[i]);
            }
            write_rows<T>(call.o, o, ldv, at, count, head, dv);
        }
    }
    // Logits of a block -> exponentials. `fall`: what the sums so far are multiplied with.
    void weigh(int64_t ld, int64_t keys) const {
        const V none = splat(-std::numeric_limits<A>::infinity());
        for (int64_t c = 0; c < ld; c += W) {
            const V before = load(top + c);
            V now = before;
            for (int64_t j = 0; j < keys; j++) now = larger<A>(load(s + j * ld + c), now);
            const V pivot = now == none ? V{} : now;
            V sum{};
            for (int64_t j = 0; j < keys; j++) {
                const V p = exponential_below(load(s + j * ld + c) - pivot);
                store(s + j * ld + c, p);
                sum += p;
            }
            const V share = exponential_below(before - pivot);
            store(fall + c, share);
            store(top + c, now);
            store(total + c, load(total + c) * share + sum);
        }
    }

    // ---- backward

    void descend(const Part& part, int64_t head, const Sums<A>& sums) const {
        A* const dbias = sums.dbias + head % group * sums.keys;
        const bool of_logits = call.dq || call.dk || call.d_bias;
        for (int64_t at = part.begin; at < part.end; at += QUERIES) {
            const int64_t count = std::min(QUERIES, part.end - at), ld = filled(count);
            read_queries(at, count, head);
            read_lanes(g, gt, call.d_o, ldv, at, count, head, dv, A(1));
            for (int64_t i = 0; i < ld; i++) {
                const A lse = i < count ? *call.lse.template at<A>(at + i, head) : A(0);
                const bool dead = lse == -std::numeric_limits<A>::infinity();
                top[i] = dead ? -lse : lse;
                flow[i] = dead || i >= count || !call.dlse ? A(0)
                                                           : *call.dlse.template at<A>(at + i, head);
                // nothing reaches a row without weights, whatever stands upstream
                if (dead) std::fill_n(g + i * ldv, dv, A(0));
                total[i] = mean[i] = A(0);
            }
            if (call.dq) std::fill_n(dq, whole(count) * ldd, A(0));
            each_block(part, head, [&](int64_t key, int64_t keys, const A* k, const A* v,
                                       int64_t row) {
                powers(part, at, count, head, key, keys, k, v, row);
                sum_up(ld, keys, row);
            });
            for (int64_t c = 0; c < ld; c += W) {
                const V sum = load(total + c), norm = sum == A(0) ? V{} : A(1) / sum;
                store(total + c, norm);
                store(mean + c, load(mean + c) * norm - load(flow + c));
            }
            each_block(part, head, [&](int64_t key, int64_t keys, const A* k, const A* v,
                                       int64_t row) {
                if (!held(part)) powers(part, at, count, head, key, keys, k, v, row);
                A *const p = s + row * ld, *const dp = ds + row * ld;
                gradients(p, dp, keep + row * ld, ld, keys);
                const int64_t rows = whole(keys);
                if (call.d_v)
                    product<A>(sums.dv + key * ldv, ldv, p, ld, 1, g, ldv, rows, count, dv, true);
                if (!of_logits) return;
                if (call.dk)
                    product<A>(sums.dk + key * ldd, ldd, dp, ld, 1, q, ldd, rows, count, d, true);
                if (call.dq)
                    product<A>(dq, ldd, dp, 1, ld, k, ldd, whole(count), keys, d, true);
                if (!call.d_bias) return;
                if (!call.per_key)
                    return each_pair(call.d_bias, part, at, count, head, key, keys,
                                     [&](int64_t j, int64_t i, T* to) {
                                         store_one(to, dp[j * ld + i]);
                                     });
                for (int64_t j = 0; j < keys; j++) {
                    V sum{};
                    each_vector<A>(count, [&](int64_t c, int n) {
                        const V x = load(dp + j * ld + c);
                        sum += where_set<A>(lane_numbers<A>() < typename LanesOf<A>::Int(n), x);
                    });
                    dbias[key + j] += sum_across<A>(sum)[0];
                }
            });
            if (!call.dq) continue;
            for (int64_t i = 0; i < count; i++)
                for (int64_t c = 0; c < d; c += W)
                    store(dq + i * ldd + c, load(dq + i * ldd + c) * A(call.scale));
            write_rows<T>(call.dq, dq, ldd, at, count, head, d);
        }
    }
    // X^T and dP^T of a block, and what dropout makes of its weights
    void powers(const Part& part, int64_t at, int64_t count, int64_t head, int64_t key,
                int64_t keys, const A* k, const A* v, int64_t row) const {
        const int64_t ld = filled(count);
        A *const x = s + row * ld, *const dp = ds + row * ld;
        logits(x, part, at, count, head, key, keys, k);
        product<A>(dp, ld, v, ldv, 1, gt, ld, whole(keys), dv, count);
        if (call.seed) draw(keep + row * ld, part, at, count, head, key, keys);
        for (int64_t c = 0; c < ld; c += W) {
            const V pivot = load(top + c);
            for (int64_t j = 0; j < keys; j++)
                store(x + j * ld + c, exponential_below(load(x + j * ld + c) - pivot));
        }
    }
    void sum_up(int64_t ld, int64_t keys, int64_t row) const {
        const A *const x = s + row * ld, *const dp = ds + row * ld, *const kept = keep + row * ld;
        for (int64_t c = 0; c < ld; c += W) {
            V sum{}, products{};
            for (int64_t j = 0; j < keys; j++) {
                const V p = load(x + j * ld + c);
                V gradient = load(dp + j * ld + c);
                if (call.seed) gradient *= load(kept + j * ld + c);
                sum += p;
                products += p * gradient;
            }
            store(total + c, load(total + c) + sum);
            store(mean + c, load(mean + c) + products);
        }
    }
    // X -> A, times what dropout makes of it; dP -> dS
    void gradients(A* x, A* dp, const A* kept, int64_t ld, int64_t keys) const {
        for (int64_t c = 0; c < ld; c += W) {
            const V norm = load(total + c), low = load(mean + c);
            const VecInt<A> alive = load(top + c) != std::numeric_limits<A>::infinity();
            for (int64_t j = 0; j < keys; j++) {
                const int64_t n = j * ld + c;
                const V share = load(x + n) * norm, flow = load(dp + n);
                const V to_value = call.seed ? share * load(kept + n) : share;
                const V ds = (call.seed ? to_value * flow : share * flow) - share * low;
                store(x + n, to_value);
                store(dp + n, where_set<A>(alive, ds));
            }
        }
    }
    void write_sums(const Part& part, int64_t key_head, const Sums<A>& sums) const {
        if (call.dk) write_rows<T>(call.dk, sums.dk, ldd, part.keys_begin, part.keys, key_head, d);
        if (call.d_v)
            write_rows<T>(call.d_v, sums.dv, ldv, part.keys_begin, part.keys, key_head, dv);
        if (!(call.d_bias && call.per_key)) return;
        for (int64_t h = 0; h < group; h++)
            for (int64_t j = 0; j < part.keys; j++)
                store_one(call.d_bias.at<T>(part.keys_begin + j, key_head * group + h),
                          sums.dbias[h * sums.keys + j]);
    }

    // ---- a part and a key head

    void zeros(const Array& to, int64_t begin, int64_t end, int64_t head, int64_t width) const {
        for (int64_t j = begin; to && j < end; j++)
            std::memset(to.at<T>(j, head), 0, width * sizeof(T));
    }
    void masked(const Part& part, int64_t head) const {
        if (backward) {
            zeros(call.dq, part.begin, part.end, head, d);
            if (call.d_bias && !call.per_key)
                zeros(call.d_bias, pair(part, part.begin), pair(part, part.end), head, 1);
            return;
        }
        zeros(call.o, part.begin, part.end, head, dv);
        for (int64_t i = part.begin; i < part.end; i++)
            *call.lse.template at<A>(i, head) = -std::numeric_limits<A>::infinity();
    }
    bool active(const Part& part, int64_t head) const {
        return part.keys && (!call.mask || *call.mask.template at<uint8_t>(part.graph, head));
    }
    // `slots`: where sums of graphs stand that several tasks make
    void run(const Part& part, int64_t key_head, A* slots) const {
        Sums<A> sums(own, call.hold + PANEL, ldd, ldv);
        const bool of_keys = backward && sums_of_keys(call);
        if (of_keys) {
            const int64_t keys = whole(part.keys), size = Sums<A>::size(keys, ldd, ldv, group);
            A* const at = part.slot < 0
                              ? own
                              : slots + part.slot + (part.number * call.kv_heads + key_head) * size;
            sums = Sums<A>(at, keys, ldd, ldv);
            std::fill_n(at, size, A(0));
        }
        bool read = false;
        for (int64_t head = key_head * group; head < (key_head + 1) * group; head++) {
            if (!active(part, head)) {
                masked(part, head);
                continue;
            }
            if (!read && held(part)) read_keys(part, 0, part.keys, key_head);
            read = true;
            if (call.seed) draw_part(part, head);
            if (backward)
                descend(part, head, sums);
            else
                attend(part, head);
        }
        if (of_keys && part.slot < 0) write_sums(part, key_head, sums);
    }
};

// ---- all threads

template <class T> int64_t run(const GlobalAttentionCall& call, bool backward) {
    using A = Accumulator<T>;
    const Indices offsets{call.offsets, call.wide != 0}, ends{call.key_offsets, call.wide != 0};
    const int64_t ldd = filled(call.d), ldv = filled(call.dv), group = call.heads / call.kv_heads;
    const bool of_keys = backward && sums_of_keys(call);

    std::vector<Part> parts, shared;  // the second: one part of each graph that tasks share
    int64_t pairs = 0, slots = 0;
    double cost = 0;
    for (int64_t graph = 0; graph < call.graphs; graph++) {
        const int64_t begin = offsets[graph], end = offsets[graph + 1], queries = end - begin;
        const int64_t from = ends[graph], keys = ends[graph + 1] - from;
        int64_t count = std::max<int64_t>(1, (queries + call.piece - 1) / call.piece), slot = -1;
        if (of_keys) {
            count = std::min(count, call.pieces);
            if (count > 1 || keys > call.hold) {
                slot = slots;
                slots += count * call.kv_heads * Sums<A>::size(whole(keys), ldd, ldv, group);
            }
        }
        // parts begin where blocks of queries do
        const int64_t blocks = (queries + QUERIES - 1) / QUERIES;
        for (int64_t i = 0; i < count; i++) {
            const int64_t low = std::min(queries, blocks * i / count * QUERIES);
            const int64_t high = std::min(queries, blocks * (i + 1) / count * QUERIES);
            parts.push_back(
                {graph, begin + low, begin + high, from, keys, pairs, begin, i, count, slot});
            cost += double(high - low + QUERIES) * double(keys + KEYS);
        }
        if (slot >= 0) shared.push_back(parts.back());
        pairs += queries * keys;
    }

    const int64_t bytes = Worker<T>(call, backward, nullptr).lay(nullptr) + 64;
    const int64_t needed = call.threads * bytes + slots * int64_t(sizeof(A)) + 128;
    if (!call.work) return needed;
    char* const room = (char*)((int64_t(call.work.data) + 63) / 64 * 64);
    A* const sums = (A*)(room + call.threads * bytes / 64 * 64);

    // tasks of about the same cost: f(worker, item) for every item of theirs
    const int64_t items = int64_t(parts.size()) * call.kv_heads;
    std::vector<int64_t> tasks{0};
    double sum = 0;
    const double share = cost * call.kv_heads / double(24 * call.threads);
    for (int64_t i = 0; i < items; i++) {
        const Part& part = parts[i / call.kv_heads];
        sum += double(part.end - part.begin + QUERIES) * double(part.keys + KEYS);
        if (sum >= share || i + 1 == items) tasks.push_back(i + 1), sum = 0;
    }
    each_task(call.threads, int64_t(tasks.size()) - 1, [&](int64_t task, int64_t thread) {
        const Worker<T> worker(call, backward, room + thread * bytes / 64 * 64);
        for (int64_t i = tasks[task]; i < tasks[task + 1]; i++)
            worker.run(parts[i / call.kv_heads], i % call.kv_heads, sums);
    });
    each_task(call.threads, int64_t(shared.size()) * call.kv_heads, [&](int64_t i, int64_t thread) {
        const Worker<T> worker(call, backward, room + thread * bytes / 64 * 64);
        const Part& part = shared[i / call.kv_heads];
        const int64_t keys = whole(part.keys), key_head = i % call.kv_heads;
        const int64_t size = Sums<A>::size(keys, ldd, ldv, group);
        A* const first = sums + part.slot + key_head * size;
        for (int64_t piece = 1; piece < part.count; piece++) {
            const A* more = first + piece * call.kv_heads * size;
            for (int64_t c = 0; c < size; c++) first[c] += more[c];
        }
        worker.write_sums(part, key_head, Sums<A>(first, keys, ldd, ldv));
    });
    return needed;
}

int64_t run_typed(const GlobalAttentionCall& call, bool backward) {
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

FASTGT_EXPORT int64_t global_attention_size() { return sizeof(GlobalAttentionCall); }

// -> bytes of memory that the call works in: asked for without it
FASTGT_EXPORT int64_t global_attention_fwd(const GlobalAttentionCall* call) {
    return run_typed(*call, false);
}

FASTGT_EXPORT int64_t global_attention_bwd(const GlobalAttentionCall* call) {
    return run_typed(*call, true);
}
