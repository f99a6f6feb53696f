// neighborhood_attention: rows in chunks that stay in a core's cache, some heads at a time.
//
// Forward, for a chunk of rows and a group of heads: logits of all edges (SDDMM), the softmax of
// each row, weighted sums of values (SPMM). Backward: the row pass makes logits and weights anew
// and writes the used weight and the logit's gradient of each edge, side by side, for the column
// pass. Symbols are those of kernels/attention.py.
#include "products.h"

namespace fastgt {
namespace {

struct AttentionCall {
    int64_t dtype, threads, heads, kv_heads;
    int64_t d, dv, attr_width;
    WalkArrays rows, columns;
    Array slot;  // of the column walk: each edge's place in the row walk
    Array q, k, v;
    double scale, low, high, eps;
    Array bias, gate, key, value, attr, attr_q;  // attr_q and its gradients are in A
    Array mask_rows, mask_cols;
    Array seed;
    int64_t threshold;  // a weight is kept where its 24 random bits are not below it
    double growth;      // of the kept weights
    int64_t gate_by_channel, key_is_value;
    Array o, lse, weights, scores, attr_o;
    Array d_o, dlse, dscores, dattr_o;
    Array dq, dk, dv_, dbias, dgate, dkey, dvalue, dattr, dattr_q;
    Array work;  // null: the call only says how many bytes it needs
};

constexpr int64_t CHUNK = 256;         // edges of a chunk, more where one row has more
constexpr int64_t ROW_BYTES = 1 << 14;  // of a chunk's row vectors
constexpr int64_t MOST_ROWS = 128;
constexpr int64_t SMALL_TASK = std::min<int64_t>(TASK, 1024);  // small graphs have several
constexpr int64_t MARGIN = 2 * AHEAD;   // indices beyond a chunk's that are read early

// ---- which weights dropout keeps: fastgt/philox.py

constexpr int PHILOX = 64;  // edges whose numbers are drawn side by side

// bits[i], its bit h: whether edge `first + i` keeps head 4 block + h. Philox-4x32-10.
inline void philox(uint64_t seed, int64_t first, uint32_t block, uint32_t threshold,
                   uint8_t bits[PHILOX]) {
    uint32_t c0[PHILOX], c1[PHILOX], c2[PHILOX], c3[PHILOX];
    for (int i = 0; i < PHILOX; i++) {
        c0[i] = uint32_t(first + i), c1[i] = uint32_t(uint64_t(first + i) >> 32);
        c2[i] = block, c3[i] = 0;
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < PHILOX; i++) {
            const uint64_t a = uint64_t(0xD2511F53u) * c0[i], b = uint64_t(0xCD9E8D57u) * c2[i];
            const uint32_t x = uint32_t(b >> 32) ^ c1[i] ^ k0, y = uint32_t(a >> 32) ^ c3[i] ^ k1;
            c0[i] = x, c1[i] = uint32_t(b), c2[i] = y, c3[i] = uint32_t(a);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < PHILOX; i++)
        bits[i] = uint8_t((c0[i] >> 8 >= threshold) | (c1[i] >> 8 >= threshold) << 1 |
                          (c2[i] >> 8 >= threshold) << 2 | (c3[i] >> 8 >= threshold) << 3);
}

// ---- heads

// The active heads of a chunk that go together.
struct Group {
    int count;    // of them
    int lanes;    // a power of two, at least count
    int head[8];  // past `count` the last one again
    bool adjacent;
};

// The heads that `mask` (null: all) leaves, from the `first`-th on, at most `most`.
inline Group make_group(const bool* mask, int64_t heads, int64_t first, int most) {
    Group g{0, 0, {}, true};
    int64_t active = 0;
    for (int64_t h = 0; h < heads && g.count < most; h++) {
        if (mask && !mask[h]) continue;
        if (active++ < first) continue;
        if (g.count && h != g.head[g.count - 1] + 1) g.adjacent = false;
        g.head[g.count++] = int(h);
    }
    g.lanes = power_of_two(g.count);
    for (int v = g.count; v < 8; v++) g.head[v] = g.count ? g.head[g.count - 1] : 0;
    if (g.lanes != g.count) g.adjacent = false;
    return g;
}

template <class T>
Pointed<T> pointed(const Array& x, const Group& g, int64_t share, int64_t width,
                   const int64_t* index, int64_t reach) {
    Pointed<T> p{(const T*)x.data, x.row, {}, width, index, reach};
    for (int v = 0; v < 8; v++) p.offset[v] = g.head[v] / share * x.head;
    return p;
}

template <class T>
Products<T> products_for(const Array& x, const Group& g, int64_t share, int64_t width) {
    return choose_products<T>(g.lanes, width,
                              g.adjacent && share == 1 && (x.head == width || g.count == 1));
}

// ---- one row's softmax, HG heads in lanes

// s [n][HG] logits -> weights; lse and dead [HG]
template <class A, int HG> void softmax_row(A* s, int64_t n, double eps, A* lse, bool* dead) {
    using V = Vec<A>;
    constexpr A INF = std::numeric_limits<A>::infinity();
    const int64_t count = n * HG;
    V top = splat(-INF);
    int64_t i = 0;
    constexpr int W = WIDTH<A>;
    for (; i + W <= count; i += W) top = larger<A>(load(s + i), top);
    const VecInt<A> lanes = lane_numbers<A>();
    const typename LanesOf<A>::Int rest = count - i;
    if (rest) top = larger<A>(lanes < rest ? load(s + i, int(rest)) : splat(-INF), top);
    top = max_across<A, HG>(top);
    const V pivot = top == -INF ? V{} : top;
    V total{};
    for (i = 0; i + W <= count;) {
        V some{};
        for (const int64_t stop = std::min(count, i + BLOCK * W); i + W <= stop; i += W) {
            const V p = exponential(load(s + i) - pivot);
            store(s + i, p);
            some += p;
        }
        total += some;
    }
    if (rest) {
        const V p = where_set<A>(lanes < rest, exponential(load(s + i, int(rest)) - pivot));
        store(s + i, p, int(rest));
        total += p;
    }
    total = sum_across<A, HG>(total);
    const V log_sum = pivot + logarithm(total);
    V divisor = total;
    if (eps != 0) divisor += exponential(splat(A(std::log(eps))) - pivot);
    const V norm = total == A(0) ? V{} : A(1) / divisor;
    for (i = 0; i + W <= count; i += W) store(s + i, load(s + i) * norm);
    if (rest) store(s + i, load(s + i, int(rest)) * norm, int(rest));
    A sums[W], logs[W];
    store(sums, total);
    store(logs, log_sum);
    for (int v = 0; v < HG; v++) {
        lse[v] = sums[v] == 0 ? -INF : logs[v];
        dead[v] = sums[v] == 0;
    }
}

template <class A> void softmax_row(int lanes, A* s, int64_t n, double eps, A* lse, bool* dead) {
    switch (lanes) {
        case 1: return softmax_row<A, 1>(s, n, eps, lse, dead);
        case 2: return softmax_row<A, 2>(s, n, eps, lse, dead);
        case 4:
            if constexpr (GROUP<A> >= 4) return softmax_row<A, 4>(s, n, eps, lse, dead);
            break;
        default:
            if constexpr (GROUP<A> >= 8) return softmax_row<A, 8>(s, n, eps, lse, dead);
    }
}

// p [n][HG] logits -> weights, dp [n][HG] -> gradients of the logits, with the row's lse and the
// gradient of that. `kept` is what dropout makes of a weight.
template <class A, int HG>
void softmax_row_backward(A* p, A* dp, int64_t n, double eps, const A* lse_of_head,
                          const A* dlse_of_head, const A* kept) {
    using V = Vec<A>;
    constexpr A INF = std::numeric_limits<A>::infinity();
    constexpr int W = WIDTH<A>;
    A lses[W], dlses[W];
    for (int l = 0; l < W; l++) {
        lses[l] = lse_of_head[l % HG];
        dlses[l] = dlse_of_head[l % HG];
    }
    const V lse = load(lses);
    const VecInt<A> dead = lse == -INF;
    const V pivot = dead ? splat(INF) : lse;
    const int64_t count = n * HG;
    V total{}, product{};
    auto first = [&](int64_t i, int lanes, V& sum, V& sum_product) __attribute__((always_inline)) {
        V x = exponential(load_some(p + i, lanes) - pivot);
        if (lanes < W) {
            const typename LanesOf<A>::Int most = lanes;
            x = where_set<A>(lane_numbers<A>() < most, x);
        }
        // nothing reaches a row without weights, whatever stands upstream
        V d = where_set<A>(~dead, load_some(dp + i, lanes));
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
    if (eps != 0) share = norm / (A(1) + exponential(splat(A(std::log(eps))) - lse));
    share = where_set<A>(~dead, share);
    const V mean = product * share;
    const V dlse = where_set<A>(~dead, load(dlses)) * norm;
    each_vector<A>(count, [&](int64_t j, int lanes) __attribute__((always_inline)) {
        const V x = load_some(p + j, lanes), d = load_some(dp + j, lanes), a = x * share;
        const V ds = a * (d - mean) + x * dlse;
        store_some(dp + j, ds, lanes);
        store_some(p + j, kept ? a * load_some(kept + j, lanes) : a, lanes);
    });
}

template <class A>
void softmax_row_backward(int lanes, A* p, A* dp, int64_t n, double eps, const A* lse,
                          const A* dlse, const A* kept) {
    switch (lanes) {
        case 1: return softmax_row_backward<A, 1>(p, dp, n, eps, lse, dlse, kept);
        case 2: return softmax_row_backward<A, 2>(p, dp, n, eps, lse, dlse, kept);
        case 4:
            if constexpr (GROUP<A> >= 4)
                return softmax_row_backward<A, 4>(p, dp, n, eps, lse, dlse, kept);
            break;
        default:
            if constexpr (GROUP<A> >= 8)
                return softmax_row_backward<A, 8>(p, dp, n, eps, lse, dlse, kept);
    }
}

// ---- the operator

template <class T> class Attention {
    using A = Accumulator<T>;
    using V = Vec<A>;
    static constexpr int W = WIDTH<A>;
    static constexpr A INF = std::numeric_limits<A>::infinity();

    const AttentionCall& call;
    const AnyWalk rows, columns;
    const int64_t share;     // query heads of a key head
    const int64_t most;      // heads of a group
    const int64_t groups;    // of heads
    const int64_t together;  // groups whose edges' weights are kept at once in a backward
    const bool backward;
    const bool clamped;
    const bool by_channel;  // products go channel by channel
    const int64_t wide_d, wide_dv, wide_c;
    int64_t longest_row, longest_column;
    uint8_t* kept_bits;
    A* pairs;  // [groups together][E][weight of each head, gradient of each logit]
    char* rooms;
    int64_t room_bytes;

    // What a thread has to itself.
    struct Room {
        A *s, *raw, *dp, *kept;               // [edges][lanes]
        A *q, *attr_q, *d_o, *dattr_o, *sum;  // [rows][heads of a group][width]
        A *lse, *dlse;                        // [rows][lanes]
        bool* dead;                           // [rows][lanes]
        int32_t* row;                         // [edges]
        int64_t *ptr, *other, *edge, *slot;   // of the chunk: copies of its part of the walk
        A* dattr;                             // [edges][C]
        A *dk, *dv;                           // [columns][key heads][width]
    };

    // Some rows whose heads are masked alike, or some columns.
    struct Chunk {
        int64_t begin, end;  // rows
        int64_t from, to;    // slots
        int64_t reach;       // slots of which there is a copy, from `from` on
        const bool* mask;

        int64_t count() const { return end - begin; }
        int64_t edges() const { return to - from; }
    };

   public:
    explicit Attention(const AttentionCall& c)
        : call(c),
          rows(c.rows),
          columns(c.columns),
          share(c.kv_heads ? c.heads / c.kv_heads : 1),
          most(GROUP<A>),
          groups((c.heads + GROUP<A> - 1) / GROUP<A>),
          together(share > 1 || c.dattr ? groups : 1),
          backward(c.d_o.data != nullptr),
          clamped(c.low > -double(INF) || c.high < double(INF)),
          by_channel(c.gate_by_channel || c.scores || c.dscores),
          wide_d(padded<A>(c.d)),
          wide_dv(padded<A>(c.dv)),
          wide_c(padded<A>(c.attr_width)),
          longest_row(longest(rows)),
          longest_column(backward ? longest(columns) : 0) {}

    // Places for everything in `work`, and how many bytes they take.
    int64_t lay_out(char* work) {
        char* place = work;
        kept_bits = take<uint8_t>(place, call.seed ? rows.edges * bytes_an_edge() : 0);
        pairs = take<A>(place, call.dk || call.dv_ ? together * rows.edges * pair_size() + W : 0);
        rooms = place;
        room_for(place);
        room_bytes = (place - rooms + 4095) / 4096 * 4096;
        return rooms - work + call.threads * room_bytes;
    }

    void run_forward() {
        draw();
        each_chunk(rows, call.mask_rows, [&](const Chunk& chunk, Room& room) {
            for (int64_t g = 0; g < groups; g++) {
                const Group group = make_group(chunk.mask, call.heads, g * most, int(most));
                if (group.count) forward_rows(chunk, group, room);
            }
        });
    }

    void run_backward() {
        draw();
        for (int64_t first = 0; first < groups; first += together) {
            const int64_t last = std::min(groups, first + together);
            each_chunk(rows, call.mask_rows, [&](const Chunk& chunk, Room& room) {
                if (call.dattr)
                    std::fill_n(room.dattr, chunk.edges() * call.attr_width, A(0));
                for (int64_t g = first; g < last; g++) {
                    const Group group = make_group(chunk.mask, call.heads, g * most, int(most));
                    if (group.count) backward_rows(chunk, group, g - first, room);
                }
                if (call.dattr)
                    for (int64_t e = 0; e < chunk.edges(); e++)
                        write(call.dattr.at<T>(room.edge[e]),
                              room.dattr + e * call.attr_width, call.attr_width);
            });
            if (!call.dk && !call.dv_) continue;
            each_chunk(columns, call.mask_cols, [&](const Chunk& chunk, Room& room) {
                if (share > 1) {
                    std::fill_n(room.dk, chunk.count() * call.kv_heads * wide_d, A(0));
                    std::fill_n(room.dv, chunk.count() * call.kv_heads * wide_dv, A(0));
                }
                for (int64_t g = first; g < last; g++) {
                    const Group group = make_group(chunk.mask, call.heads, g * most, int(most));
                    if (group.count) backward_columns(chunk, group, g - first, room);
                }
                if (share > 1)
                    for (int64_t r = 0; r < chunk.count(); r++)
                        for (int64_t h = 0; h < call.kv_heads; h++) {
                            const int64_t j = chunk.begin + r, at = r * call.kv_heads + h;
                            if (call.dk)
                                write(call.dk.at<T>(j, h), room.dk + at * wide_d, call.d);
                            if (call.dv_)
                                write(call.dv_.at<T>(j, h), room.dv + at * wide_dv, call.dv);
                        }
            });
        }
    }

    // Whether a row that has edges has no finite logit for an active head.
    bool has_dead_rows() const {
        for (int64_t r = 0; r < rows.segments; r++) {
            if (rows.ptr[r] == rows.ptr[r + 1]) continue;
            const bool* mask = call.mask_rows ? call.mask_rows.at<bool>(r) : nullptr;
            for (int64_t h = 0; h < call.heads; h++)
                if ((!mask || mask[h]) && call.lse.at<A>(r)[h] == -INF) return true;
        }
        return false;
    }

   private:
    static int64_t longest(const AnyWalk& walk) {
        int64_t x = 0;
        for (int64_t r = 0; r < walk.segments; r++)
            x = std::max<int64_t>(x, walk.ptr[r + 1] - walk.ptr[r]);
        return x;
    }

    int64_t bytes_an_edge() const { return (call.heads + 3) / 4; }

    int64_t pair_size() const { return 2 * power_of_two(int(std::min(call.heads, most))); }

    int64_t row_limit() const {
        const int64_t bytes = most * std::max(wide_d, wide_dv) * int64_t(sizeof(A));
        return std::min(MOST_ROWS, std::max<int64_t>(1, ROW_BYTES / std::max<int64_t>(1, bytes)));
    }

    Room room_for(char*& place) const {
        Room room{};
        const int64_t limit = row_limit(), n = limit * most;
        const int64_t edges = std::max({CHUNK, longest_row, longest_column});
        room.s = take<A>(place, edges * most + W);
        room.row = take<int32_t>(place, edges);
        room.ptr = take<int64_t>(place, MOST_ROWS + 1);
        room.other = take<int64_t>(place, edges + MARGIN);
        room.edge = take<int64_t>(place, edges + MARGIN);
        room.q = take<A>(place, n * wide_d);
        room.attr_q = take<A>(place, n * wide_c);
        room.sum = take<A>(place, n * std::max({wide_d, wide_dv, wide_c}));
        room.lse = take<A>(place, n + W);
        room.dead = take<bool>(place, n);
        if (call.seed) room.kept = take<A>(place, edges * most + W);
        if (call.gate || clamped) room.raw = take<A>(place, edges * most + W);
        if (!backward) return room;
        room.slot = take<int64_t>(place, edges + MARGIN);
        room.dp = take<A>(place, edges * most + W);
        room.d_o = take<A>(place, n * wide_dv);
        room.dattr_o = take<A>(place, n * wide_c);
        room.dlse = take<A>(place, n + W);
        if (call.dattr) room.dattr = take<A>(place, edges * call.attr_width);
        if (share > 1) {
            room.dk = take<A>(place, limit * call.kv_heads * wide_d);
            room.dv = take<A>(place, limit * call.kv_heads * wide_dv);
        }
        return room;
    }

    template <class F> void each_chunk(const AnyWalk& walk, const Array& masks, const F& f) const {
        const int64_t limit = row_limit();
        each_range(call.threads, walk, [&](int64_t begin, int64_t end, int64_t thread) {
            char* place = rooms + thread * room_bytes;
            Room room = room_for(place);
            for (int64_t r = begin; r < end;) {
                Chunk chunk{r, r + 1, walk.ptr[r], 0, 0, nullptr};
                if (masks) chunk.mask = masks.at<bool>(r);
                while (chunk.end < end && chunk.count() < limit &&
                       walk.ptr[chunk.end + 1] - chunk.from <= CHUNK &&
                       (!masks.row || std::equal(chunk.mask, chunk.mask + call.heads,
                                                 masks.at<bool>(chunk.end))))
                    chunk.end++;
                chunk.to = walk.ptr[chunk.end];
                copy_walk(walk, chunk, room);
                f(chunk, room);
                r = chunk.end;
            }
        }, SMALL_TASK);
    }

    void copy_walk(const AnyWalk& walk, Chunk& chunk, Room& room) const {
        chunk.reach = std::min(walk.edges - chunk.from, chunk.edges() + MARGIN);
        walk.other.copy(chunk.from, chunk.reach, room.other);
        walk.edge.copy(chunk.from, chunk.reach, room.edge);
        if (room.slot && walk.ptr.data == columns.ptr.data)
            Indices{call.slot.data, call.rows.wide != 0}.copy(chunk.from, chunk.reach, room.slot);
        walk.ptr.copy(chunk.begin, chunk.count() + 1, room.ptr);
        for (int64_t r = 0; r <= chunk.count(); r++) room.ptr[r] -= chunk.from;
        for (int64_t r = 0; r < chunk.count(); r++)
            std::fill(room.row + room.ptr[r], room.row + room.ptr[r + 1], int32_t(r));
    }

    // ---- dropout

    // Bit h % 4 of an edge's byte h / 4: whether head h keeps its weight.
    void draw() {
        if (!call.seed) return;
        const uint64_t seed = *(const uint64_t*)call.seed.data;
        const int64_t step = 1 << 13, blocks = bytes_an_edge();
        each_task(call.threads, (rows.edges + step - 1) / step, [&](int64_t task, int64_t) {
            const int64_t end = std::min(rows.edges, (task + 1) * step);
            for (int64_t block = 0; block < blocks; block++)
                for (int64_t e = task * step; e < end; e += PHILOX) {
                    uint8_t bits[PHILOX];
                    const int count = int(std::min<int64_t>(PHILOX, end - e));
                    philox(seed, e, uint32_t(block), uint32_t(call.threshold), bits);
                    for (int i = 0; i < count; i++) kept_bits[(e + i) * blocks + block] = bits[i];
                }
        });
    }

    // What dropout makes of the weights of a chunk's edges: 0, or by how much they grow.
    void keep(const Chunk& chunk, const Group& g, Room& room) const {
        const int64_t blocks = bytes_an_edge();
        for (int64_t e = 0; e < chunk.edges(); e++) {
            const uint8_t* bits = kept_bits + room.edge[e] * blocks;
            for (int v = 0; v < g.lanes; v++) {
                const int h = g.head[v];
                room.kept[e * g.lanes + v] = bits[h / 4] >> (h % 4) & 1 ? A(call.growth) : A(0);
            }
        }
    }

    // ---- pieces of the two passes

    static void write(T* to, const A* from, int64_t width) {
        each_vector<A>(width, [&](int64_t c, int n) { store_some(to + c, load(from + c), n); });
    }

    template <class S> static void write_times(S* to, const A* from, int64_t width, A factor) {
        each_vector<A>(width,
                       [&](int64_t c, int n) { store_some(to + c, load(from + c) * factor, n); });
    }

    template <class S> static void zero(S* to, int64_t width) {
        each_vector<A>(width, [&](int64_t c, int n) { store_some(to + c, V{}, n); });
    }

    // The parts of a group's heads of rows, times `factor`, as products read them.
    template <class S = T>
    Vectors<A> packed(const Array& x, const Chunk& chunk, const Group& g, int64_t width, int fold,
                      A factor, A* to) const {
        const int64_t head = fold > 1 ? W : padded<A>(width), size = g.lanes / fold * head;
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int v = 0; v < g.lanes; v++) {
                const S* from = x.at<S>(chunk.begin + r, g.head[v]);
                A* part = to + r * size + v / fold * head + v % fold * width;
                const A times = v < g.count ? factor : A(0);
                if (fold > 1)
                    each_vector<A>(width, [&](int64_t c, int n) {
                        store_some(part + c, load_some(from + c, n) * times, n);
                    });
                else  // whole vectors: products read the rest, which is 0
                    each_vector<A>(width, [&](int64_t c, int n) {
                        store(part + c, load_some(from + c, n) * times);
                    });
            }
        return {to, size, head};
    }

    Vectors<A> sums(const Chunk& chunk, const Group& g, int64_t width, int fold, A* to) const {
        const int64_t head = fold > 1 ? W : padded<A>(width), size = g.lanes / fold * head;
        std::fill_n(to, chunk.count() * size, A(0));
        return {to, size, head};
    }

    // f(row, head, its sum) for the sums of a group
    template <class F>
    void each_sum(const Chunk& chunk, const Group& g, int64_t width, int fold,
                  const Vectors<A>& sum, const F& f) const {
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int v = 0; v < g.count; v++) {
                const int64_t part = fold > 1 ? v / fold * W + v % fold * width : v * sum.head;
                f(r, v, sum.data + r * sum.stride + part);
            }
    }

    Pointed<T> by_column(const Array& x, const Chunk& chunk, const Group& g, int64_t width,
                         const Room& room) const {
        return pointed<T>(x, g, share, width, room.other, chunk.reach);
    }

    Pointed<T> by_edge(const Array& x, const Chunk& chunk, const Group& g, int64_t width,
                       const Room& room) const {
        return pointed<T>(x, g, 1, width, room.edge, chunk.reach);
    }

    // Of attributes, which all heads share.
    Pointed<T> attributes(const Chunk& chunk, const Room& room) const {
        return {(const T*)call.attr.data, call.attr.row, {}, call.attr_width, room.edge,
                chunk.reach};
    }

    // s = scale * q . (k + key) * gate, by whichever way
    void logits(const Chunk& chunk, const Group& g, Room& room) const {
        const auto p = products_for<T>(call.k, g, share, call.d);
        const Vectors<A> q =
            packed(call.q, chunk, g, call.d, by_channel ? 1 : p.fold, A(call.scale), room.q);
        const int64_t n = chunk.edges();
        const auto keys = by_column(call.k, chunk, g, call.d, room);
        if (by_channel) {
            channel_logits(chunk, g, q, keys, room);
        } else {
            p.sddmm(q, room.row, keys, n, false, room.s);
            if (call.key) {
                const auto on_edges = products_for<T>(call.key, g, 1, call.d);
                const Vectors<A> again =
                    on_edges.fold == p.fold
                        ? q
                        : packed(call.q, chunk, g, call.d, on_edges.fold, A(call.scale), room.q);
                on_edges.sddmm(again, room.row, by_edge(call.key, chunk, g, call.d, room), n, true,
                               room.s);
            }
            if (call.attr_q) {
                const Vectors<A> a = packed<A>(call.attr_q, chunk, g, call.attr_width, 1,
                                            A(call.scale), room.attr_q);
                attribute_products(g).sddmm(a, room.row, attributes(chunk, room), n, true, room.s);
            }
        }
        finish_logits(chunk, g, room);
    }

    Products<T> attribute_products(const Group& g) const {
        return choose_products<T>(g.lanes, call.attr_width, false);
    }

    // room.raw: before the gate of one number and the clamp. room.s: the logit.
    void finish_logits(const Chunk& chunk, const Group& g, Room& room) const {
        const int64_t n = chunk.edges();
        const bool factor = call.gate && !call.gate_by_channel;
        if (room.raw) std::copy_n(room.s, n * g.lanes, room.raw);
        if (!factor && !clamped && !call.bias) return;
        const A low = A(call.low), high = A(call.high);
        for (int64_t e = 0; e < n; e++) {
            const int64_t edge = room.edge[e];
            A* s = room.s + e * g.lanes;
            for (int v = 0; v < g.count; v++) {
                A x = s[v];
                if (factor) x *= load_one(call.gate.at<T>(edge, g.head[v]));
                if (clamped) x = x < low ? low : x > high ? high : x;
                if (call.bias) x += load_one(call.bias.at<T>(edge, g.head[v]));
                s[v] = x;
            }
        }
    }

    A factor_at(int64_t edge, int head) const {
        return call.gate && !call.gate_by_channel ? load_one(call.gate.at<T>(edge, head)) : A(1);
    }

    // Channel by channel: the terms of the logits are results, or have gates of their own.
    template <int HG>
    void channel_logits(const Chunk& chunk, const Group& g, const Vectors<A>& q,
                        const Pointed<T>& keys, Room& room) const {
        const Array& gate = call.gate_by_channel ? call.gate : none;
        products<A, HG, 1>(
            chunk.edges(), false, room.s,
            [&](int64_t e, int v, bool real) __attribute__((always_inline)) {
                const int64_t edge = room.edge[e];
                const int h = g.head[v];
                const A* x = q.data + room.row[e] * q.stride + v * q.head;
                const T* y = keys.at(e) + keys.offset[v];
                const T* edge_key = call.key ? call.key.at<T>(edge, h) : nullptr;
                const T* edge_gate = gate ? gate.at<T>(edge, h) : nullptr;
                T* scores = call.scores && real && v < g.count ? call.scores.at<T>(edge, h) : nullptr;
                const A factor = scores ? factor_at(edge, h) : A(1);
                V s{};
                each_vector<A>(call.d, [&](int64_t c, int n) __attribute__((always_inline)) {
                    V key = load_some(y + c, n);
                    if (edge_key) key += load_some(edge_key + c, n);
                    if (edge_gate) key *= load_some(edge_gate + c, n);
                    const V term = load(x + c) * key;
                    if (scores) store_some(scores + c, term * factor, n);
                    s += term;
                });
                return s;
            },
            [&](int64_t e) __attribute__((always_inline)) {
                ask<0>(keys, e, g.count);
                const int64_t edge = room.edge[std::min(e + AHEAD, keys.reach - 1)];
                if (call.key) ask_edge(call.key, edge, g);
                if (gate) ask_edge(gate, edge, g);
            });
    }

    void channel_logits(const Chunk& chunk, const Group& g, const Vectors<A>& q,
                        const Pointed<T>& keys, Room& room) const {
        switch (g.lanes) {
            case 1: return channel_logits<1>(chunk, g, q, keys, room);
            case 2: return channel_logits<2>(chunk, g, q, keys, room);
            case 4:
                if constexpr (GROUP<A> >= 4) return channel_logits<4>(chunk, g, q, keys, room);
                break;
            default:
                if constexpr (GROUP<A> >= 8) return channel_logits<8>(chunk, g, q, keys, room);
        }
    }

    static constexpr Array none{};

    void ask_edge(const Array& x, int64_t edge, const Group& g) const {
        for (int v = 0; v < g.count; v++) {
            const char* line = (const char*)x.at<T>(edge, g.head[v]);
            for (int64_t i = 0; i < call.d * int64_t(sizeof(T)); i += 64)
                __builtin_prefetch(line + i);
        }
    }

    // Adds what the weights make of rows that edges point at to the sums.
    void add_weighted(const A* weights, const Chunk& chunk, const Group& g, const Array& x,
                      int64_t width, const Pointed<T>& to, int fold, const Vectors<A>& sum,
                      int64_t heads_share, const Room& room) const {
        auto p = products_for<T>(x, g, heads_share, width);
        if (p.fold != fold) p = choose_products<T>(g.lanes, width, false);
        p.spmm(weights, room.ptr, chunk.count(), to, g.count, sum);
    }

    // ---- forward

    void forward_rows(const Chunk& chunk, const Group& g, Room& room) const {
        logits(chunk, g, room);
        for (int64_t r = 0; r < chunk.count(); r++) {
            const int64_t from = room.ptr[r], n = room.ptr[r + 1] - from;
            A* lse = room.lse + r * g.lanes;
            softmax_row<A>(g.lanes, room.s + from * g.lanes, n, call.eps, lse,
                           room.dead + r * g.lanes);
            for (int v = 0; v < g.count; v++) call.lse.at<A>(chunk.begin + r)[g.head[v]] = lse[v];
        }
        if (call.weights)
            for (int64_t e = 0; e < chunk.edges(); e++)
                for (int v = 0; v < g.count; v++)
                    store_one(call.weights.at<T>(room.edge[e], g.head[v]),
                              room.s[e * g.lanes + v]);
        if (call.seed) {
            keep(chunk, g, room);
            for (int64_t i = 0; i < chunk.edges() * g.lanes; i++) room.s[i] *= room.kept[i];
        }
        const int fold = values_fold(g);
        const Vectors<A> sum = sums(chunk, g, call.dv, fold, room.sum);
        add_weighted(room.s, chunk, g, call.v, call.dv, by_column(call.v, chunk, g, call.dv, room), fold,
                     sum, share, room);
        const Array& value = call.key_is_value ? call.key : call.value;
        if (value)
            add_weighted(room.s, chunk, g, value, call.dv, by_edge(value, chunk, g, call.dv, room), fold,
                         sum, 1, room);
        each_sum(chunk, g, call.dv, fold, sum, [&](int64_t r, int v, const A* from) {
            T* to = call.o.at<T>(chunk.begin + r, g.head[v]);
            if (room.dead[r * g.lanes + v])
                zero(to, call.dv);
            else
                write(to, from, call.dv);
        });
        if (!call.attr_o) return;
        const Vectors<A> attr_sum = sums(chunk, g, call.attr_width, 1, room.sum);
        attribute_products(g).spmm(room.s, room.ptr, chunk.count(),
                                   attributes(chunk, room), g.count, attr_sum);
        each_sum(chunk, g, call.attr_width, 1, attr_sum, [&](int64_t r, int v, const A* from) {
            A* to = call.attr_o.at<A>(chunk.begin + r, g.head[v]);
            const bool dead = room.dead[r * g.lanes + v];
            for (int64_t c = 0; c < call.attr_width; c++) to[c] = dead ? A(0) : from[c];
        });
    }

    // One fold for all that is added to the sums of values.
    int values_fold(const Group& g) const {
        int fold = products_for<T>(call.v, g, share, call.dv).fold;
        const Array& value = call.key_is_value ? call.key : call.value;
        if (value) fold = std::min(fold, products_for<T>(value, g, 1, call.dv).fold);
        return fold;
    }

    int keys_fold(const Group& g) const {
        int fold = products_for<T>(call.k, g, share, call.d).fold;
        if (call.key) fold = std::min(fold, products_for<T>(call.key, g, 1, call.d).fold);
        return fold;
    }

    // ---- backward

    void backward_rows(const Chunk& chunk, const Group& g, int64_t kept_at, Room& room) const {
        const int64_t n = chunk.edges();
        const Array& value = call.key_is_value ? call.key : call.value;
        logits(chunk, g, room);
        weight_gradients(chunk, g, room);
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int v = 0; v < g.lanes; v++) {
                const int64_t row = chunk.begin + r;
                room.lse[r * g.lanes + v] = call.lse.at<A>(row)[g.head[v]];
                room.dlse[r * g.lanes + v] = call.dlse ? call.dlse.at<A>(row)[g.head[v]] : A(0);
                room.dead[r * g.lanes + v] = room.lse[r * g.lanes + v] == -INF;
            }
        if (call.seed) keep(chunk, g, room);
        for (int64_t r = 0; r < chunk.count(); r++) {
            const int64_t from = room.ptr[r], degree = room.ptr[r + 1] - from;
            const int64_t at = from * g.lanes;
            softmax_row_backward<A>(g.lanes, room.s + at, room.dp + at, degree, call.eps,
                                    room.lse + r * g.lanes, room.dlse + r * g.lanes,
                                    call.seed ? room.kept + at : nullptr);
        }
        const A *used = room.s, *ds = room.dp;
        if (call.dbias)
            for (int64_t e = 0; e < n; e++)
                for (int v = 0; v < g.count; v++)
                    store_one(call.dbias.at<T>(room.edge[e], g.head[v]), ds[e * g.lanes + v]);
        before_the_clamp(chunk, g, room);
        if (pairs && (call.dk || call.dv_)) {
            A* pair = pairs + (kept_at * rows.edges + chunk.from) * pair_size();
            for (int64_t e = 0; e < n; e++, pair += pair_size()) {
                std::memcpy(pair, used + e * g.lanes, g.lanes * sizeof(A));
                std::memcpy(pair + g.lanes, ds + e * g.lanes, g.lanes * sizeof(A));
            }
        }
        if (value && (call.dvalue || (call.key_is_value && call.dkey))) {
            const Array& to = call.key_is_value ? call.dkey : call.dvalue;
            spread(chunk, g, used, room, call.dv, to);
        }
        if (by_channel) {
            channel_gradients(chunk, g, room);
        } else {
            if (call.dq) {
                const int fold = keys_fold(g);
                const Vectors<A> sum = sums(chunk, g, call.d, fold, room.sum);
                add_weighted(ds, chunk, g, call.k, call.d, by_column(call.k, chunk, g, call.d, room),
                             fold, sum, share, room);
                if (call.key)
                    add_weighted(ds, chunk, g, call.key, call.d, by_edge(call.key, chunk, g, call.d, room),
                                 fold, sum, 1, room);
                write_rows(chunk, g, call.d, fold, sum, room, call.dq);
            }
            if (call.dkey) key_gradients(chunk, g, ds, room);
        }
        if (call.dattr_q) {
            const Vectors<A> sum = sums(chunk, g, call.attr_width, 1, room.sum);
            attribute_products(g).spmm(ds, room.ptr, chunk.count(),
                                       attributes(chunk, room), g.count, sum);
            write_rows<A>(chunk, g, call.attr_width, 1, sum, room, call.dattr_q);
        }
        if (call.dattr) attribute_gradients(chunk, g, room);
    }

    // dp = do . (v + value) + dattr_o . attr, of each edge
    void weight_gradients(const Chunk& chunk, const Group& g, Room& room) const {
        const int64_t n = chunk.edges();
        const Array& value = call.key_is_value ? call.key : call.value;
        const auto p = products_for<T>(call.v, g, share, call.dv);
        Vectors<A> d_o = packed(call.d_o, chunk, g, call.dv, p.fold, A(1), room.d_o);
        p.sddmm(d_o, room.row, by_column(call.v, chunk, g, call.dv, room), n, false, room.dp);
        if (value) {
            const auto on_edges = products_for<T>(value, g, 1, call.dv);
            if (on_edges.fold != p.fold)
                d_o = packed(call.d_o, chunk, g, call.dv, on_edges.fold, A(1), room.d_o);
            on_edges.sddmm(d_o, room.row, by_edge(value, chunk, g, call.dv, room), n, true, room.dp);
        }
        if (call.dattr_o) {
            const Vectors<A> d = packed<A>(call.dattr_o, chunk, g, call.attr_width, 1, A(1),
                                        room.dattr_o);
            attribute_products(g).sddmm(d, room.row, attributes(chunk, room), n, true, room.dp);
        }
    }

    // From the gradient of the logit to that of scale * q . k: through clamp and gate.
    void before_the_clamp(const Chunk& chunk, const Group& g, Room& room) const {
        const bool factor = call.gate && !call.gate_by_channel;
        if (!clamped && !factor) return;
        for (int64_t e = 0; e < chunk.edges(); e++) {
            const int64_t edge = room.edge[e];
            for (int v = 0; v < g.count; v++) {
                A &ds = room.dp[e * g.lanes + v], raw = room.raw[e * g.lanes + v];
                const A times = factor_at(edge, g.head[v]);
                if (clamped && !(raw * times >= A(call.low) && raw * times <= A(call.high))) ds = 0;
                if (factor && call.dgate && !by_channel)
                    store_one(call.dgate.at<T>(edge, g.head[v]), ds * raw);
                if (factor && by_channel) room.raw[e * g.lanes + v] = ds * raw;
                ds *= times;
            }
        }
    }

    template <class S = T>
    void write_rows(const Chunk& chunk, const Group& g, int64_t width, int fold,
                    const Vectors<A>& sum, const Room& room, const Array& to) const {
        each_sum(chunk, g, width, fold, sum, [&](int64_t r, int v, const A* from) {
            S* row = to.at<S>(chunk.begin + r, g.head[v]);
            if (room.dead[r * g.lanes + v] && !call.dscores)
                zero(row, width);
            else
                write_times(row, from, width, A(call.scale));
        });
    }

    const A* vector_of(const Room& room, const A* vectors, const Group& g, int64_t width,
                       int64_t e, int v) const {
        return vectors + (room.row[e] * g.lanes + v) * padded<A>(width);
    }

    // Of an edge's value: its used weight times the row's gradient.
    void spread(const Chunk& chunk, const Group& g, const A* used, Room& room, int64_t width,
                const Array& to) const {
        packed(call.d_o, chunk, g, width, 1, A(1), room.d_o);
        for (int64_t e = 0; e < chunk.edges(); e++) {
            const int64_t edge = room.edge[e];
            for (int v = 0; v < g.count; v++) {
                const A* d = vector_of(room, room.d_o, g, width, e, v);
                T* out = to.at<T>(edge, g.head[v]);
                if (room.dead[room.row[e] * g.lanes + v])
                    zero(out, width);
                else
                    write_times(out, d, width, used[e * g.lanes + v]);
            }
        }
    }

    // Of an edge's key, which may be the value too: `spread` has written that part.
    void key_gradients(const Chunk& chunk, const Group& g, const A* ds, Room& room) const {
        packed(call.q, chunk, g, call.d, 1, A(call.scale), room.q);
        for (int64_t e = 0; e < chunk.edges(); e++) {
            const int64_t edge = room.edge[e];
            for (int v = 0; v < g.count; v++) {
                const A* q = vector_of(room, room.q, g, call.d, e, v);
                const bool dead = room.dead[room.row[e] * g.lanes + v];
                const A* d_o = vector_of(room, room.d_o, g, call.d, e, v);
                const V rate = splat(ds[e * g.lanes + v]), used = splat(room.s[e * g.lanes + v]);
                T* out = call.dkey.at<T>(edge, g.head[v]);
                each_vector<A>(call.d, [&](int64_t c, int n) {
                    V x = rate * load(q + c);
                    if (call.key_is_value) x += used * load(d_o + c);
                    store_some(out + c, dead ? V{} : x, n);
                });
            }
        }
    }

    // dq, and the gradients of edge keys and gates, where products go channel by channel.
    void channel_gradients(const Chunk& chunk, const Group& g, Room& room) const {
        const Vectors<A> q = packed(call.q, chunk, g, call.d, 1, A(call.scale), room.q);
        const Vectors<A> sum = sums(chunk, g, call.d, 1, room.sum);
        const auto keys = by_column(call.k, chunk, g, call.d, room);
        const bool factor = call.gate && !call.gate_by_channel;
        const Array& gate = call.gate_by_channel ? call.gate : none;
        const Array& dgate = call.gate_by_channel ? call.dgate : none;
        for (int64_t e = 0; e < chunk.edges(); e++) {
            const int64_t edge = room.edge[e];
            ask<0>(keys, e, g.count);
            const int64_t next = room.edge[std::min(e + AHEAD, keys.reach - 1)];
            if (gate) ask_edge(gate, next, g);
            if (call.dscores) ask_edge(call.dscores, next, g);
            for (int v = 0; v < g.count; v++) {
                const int h = g.head[v];
                const A* x = q.data + room.row[e] * q.stride + v * q.head;
                A* dq = sum.data + room.row[e] * sum.stride + v * sum.head;
                const T* y = keys.at(e) + keys.offset[v];
                const T* edge_key = call.key ? call.key.at<T>(edge, h) : nullptr;
                const T* edge_gate = gate ? gate.at<T>(edge, h) : nullptr;
                const T* dscores = call.dscores ? call.dscores.at<T>(edge, h) : nullptr;
                T* out_key = call.dkey ? call.dkey.at<T>(edge, h) : nullptr;
                T* out_gate = dgate ? dgate.at<T>(edge, h) : nullptr;
                const V rate = splat(room.dp[e * g.lanes + v]), times = splat(factor_at(edge, h));
                const bool dead = room.dead[room.row[e] * g.lanes + v];
                const A* d_o = vector_of(room, room.d_o, g, call.d, e, v);
                const V used = splat(room.s[e * g.lanes + v]);
                V of_factor{};
                each_vector<A>(call.d, [&](int64_t c, int n) __attribute__((always_inline)) {
                    V key = load_some(y + c, n);
                    if (edge_key) key += load_some(edge_key + c, n);
                    const V ungated = key;
                    V flow = rate, qc = load(x + c), through = qc;
                    if (edge_gate) {
                        const V gates = load_some(edge_gate + c, n);
                        key *= gates;
                        through *= gates;
                    }
                    if (dscores) {
                        const V d = load_some(dscores + c, n);
                        flow += d * times;
                        if (factor) of_factor += d * qc * key;
                    }
                    store(dq + c, load(dq + c) + flow * key);
                    if (out_gate) store_some(out_gate + c, flow * qc * ungated, n);
                    if (out_key) {
                        V d = flow * through;
                        if (call.key_is_value && !dead) d += used * load(d_o + c);
                        store_some(out_key + c, d, n);
                    }
                });
                if (factor && call.dgate)
                    store_one(call.dgate.at<T>(edge, h),
                              room.raw[e * g.lanes + v] + sum_across<A>(of_factor)[0]);
            }
        }
        if (call.dq) write_rows(chunk, g, call.d, 1, sum, room, call.dq);
    }

    // dattr += ds attr_q + used dattr_o, summed over heads in float (or double)
    void attribute_gradients(const Chunk& chunk, const Group& g, Room& room) const {
        const int64_t width = call.attr_width;
        if (call.attr_q) packed<A>(call.attr_q, chunk, g, width, 1, A(call.scale), room.attr_q);
        for (int64_t e = 0; e < chunk.edges(); e++)
            for (int v = 0; v < g.count; v++) {
                if (room.dead[room.row[e] * g.lanes + v]) continue;
                const A ds = room.dp[e * g.lanes + v], used = room.s[e * g.lanes + v];
                const A* a = vector_of(room, room.attr_q, g, width, e, v);
                const A* d = vector_of(room, room.dattr_o, g, width, e, v);
                A* to = room.dattr + e * width;
                each_vector<A>(width, [&](int64_t c, int n) {
                    V x = load_some(to + c, n);
                    if (call.attr_q) x += ds * load(a + c);
                    if (call.dattr_o) x += used * load(d + c);
                    store_some(to + c, x, n);
                });
            }
    }

    void backward_columns(const Chunk& chunk, const Group& g, int64_t kept_at, Room& room) const {
        const int64_t n = chunk.edges();
        const A* pair = pairs + kept_at * rows.edges * pair_size();
        for (int64_t e = 0; e < n; e++) {
            __builtin_prefetch(pair + room.slot[std::min(e + 2 * AHEAD, chunk.reach - 1)] * pair_size());
            const A* from = pair + room.slot[e] * pair_size();
            std::memcpy(room.s + e * g.lanes, from, g.lanes * sizeof(A));
            std::memcpy(room.dp + e * g.lanes, from + g.lanes, g.lanes * sizeof(A));
        }
        if (call.dv_) {
            const int fold = products_for<T>(call.d_o, g, 1, call.dv).fold;
            const Vectors<A> sum = sums(chunk, g, call.dv, fold, room.sum);
            add_weighted(room.s, chunk, g, call.d_o, call.dv,
                         pointed<T>(call.d_o, g, 1, call.dv, room.other, chunk.reach), fold, sum, 1, room);
            write_columns(chunk, g, call.dv, fold, sum, A(1), room.dv, wide_dv, call.dv_);
        }
        if (!call.dk) return;
        const auto queries = pointed<T>(call.q, g, 1, call.d, room.other, chunk.reach);
        if (by_channel) {
            const Vectors<A> sum = sums(chunk, g, call.d, 1, room.sum);
            channel_columns(chunk, g, queries, sum, room);
            write_columns(chunk, g, call.d, 1, sum, A(call.scale), room.dk, wide_d, call.dk);
        } else {
            const int fold = products_for<T>(call.q, g, 1, call.d).fold;
            const Vectors<A> sum = sums(chunk, g, call.d, fold, room.sum);
            add_weighted(room.dp, chunk, g, call.q, call.d, queries, fold, sum, 1, room);
            write_columns(chunk, g, call.d, fold, sum, A(call.scale), room.dk, wide_d, call.dk);
        }
    }

    void channel_columns(const Chunk& chunk, const Group& g, const Pointed<T>& queries,
                         const Vectors<A>& sum, Room& room) const {
        const Array& gate = call.gate_by_channel ? call.gate : none;
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int64_t e = room.ptr[r]; e < room.ptr[r + 1]; e++) {
                const int64_t edge = room.edge[e];
                ask<0>(queries, e, g.count);
                const int64_t next = room.edge[std::min(e + AHEAD, chunk.reach - 1)];
                if (gate) ask_edge(gate, next, g);
                if (call.dscores) ask_edge(call.dscores, next, g);
                for (int v = 0; v < g.count; v++) {
                    const int h = g.head[v];
                    const T* q = queries.at(e) + queries.offset[v];
                    const T* edge_gate = gate ? gate.at<T>(edge, h) : nullptr;
                    const T* dscores = call.dscores ? call.dscores.at<T>(edge, h) : nullptr;
                    const V rate = splat(room.dp[e * g.lanes + v]);
                    const V times = splat(factor_at(edge, h));
                    A* to = sum.data + r * sum.stride + v * sum.head;
                    each_vector<A>(call.d, [&](int64_t c, int n) __attribute__((always_inline)) {
                        V flow = rate;
                        if (dscores) flow += load_some(dscores + c, n) * times;
                        V x = load_some(q + c, n);
                        if (edge_gate) x *= load_some(edge_gate + c, n);
                        store(to + c, load(to + c) + flow * x);
                    });
                }
            }
    }

    void write_columns(const Chunk& chunk, const Group& g, int64_t width, int fold,
                       const Vectors<A>& sum, A factor, A* of_key_heads, int64_t wide,
                       const Array& to) const {
        each_sum(chunk, g, width, fold, sum, [&](int64_t r, int v, const A* from) {
            if (share == 1) {
                write_times(to.at<T>(chunk.begin + r, g.head[v]), from, width, factor);
                return;
            }
            A* total = of_key_heads + (r * call.kv_heads + g.head[v] / share) * wide;
            for (int64_t c = 0; c < width; c++) total[c] += from[c] * factor;
        });
    }
};

template <class F> int64_t with_attention(const AttentionCall& call, const F& f) {
    int64_t bytes = 0;
    with_type(call.dtype, [&](auto t) {
        Attention<decltype(t)> attention(call);
        bytes = attention.lay_out((char*)call.work.data);
        if (call.work) f(attention);
    });
    return bytes;
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t attention_size() { return sizeof(AttentionCall); }

FASTGT_EXPORT int64_t attention_fwd(const AttentionCall* call) {
    return with_attention(*call, [](auto& attention) { attention.run_forward(); });
}

FASTGT_EXPORT int64_t attention_bwd(const AttentionCall* call) {
    return with_attention(*call, [](auto& attention) { attention.run_backward(); });
}

FASTGT_EXPORT int64_t attention_dead(const AttentionCall* call) {
    bool dead = false;
    with_type(call->dtype, [&](auto t) {
        dead = Attention<decltype(t)>(*call).has_dead_rows();
    });
    return dead;
}
