// neighborhood_attention: rows in chunks that stay in a core's cache, some heads at a time.
//
// Forward, for a chunk of rows and a group of heads: logits of all edges (SDDMM), the softmax of
// each row, weighted sums of values (SPMM). Backward: the row pass makes logits and weights anew
// and writes the used weight and the logit's gradient of each edge, side by side, for the column
// pass. Symbols are those of kernels/attention.py.
#include "philox.h"
#include "products.h"
#include "softmax_row.h"

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
    Array seed, numbers;  // by which dropout knows the edges; null: their own
    int64_t first_head;   // by which it knows head 0
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

// ---- the operator

template <class T> class Attention {
    using A = Accumulator<T>;
    using V = Vec<A>;
    static constexpr int W = WIDTH<A>;

    const AttentionCall& call;
    const AnyWalk rows, columns;
    const int64_t share;     // query heads of a key head
    const int64_t most;      // heads of a group
    const int64_t groups;    // of heads
    const int64_t together;  // groups whose edges' weights are kept at once in a backward
    const bool backward;
    const bool clamped;
    const A log_eps;
    const bool on_edges;  // whether anything is read or written by an edge's number
    const bool by_channel;  // products go channel by channel
    const int64_t wide_d, wide_dv, wide_c;
    int64_t longest_row, longest_column;
    mutable std::atomic<bool> dead_rows{false};  // whether a row that has edges has no weights
    uint8_t* kept_bits;
    A* pairs;  // [groups together][E][weight of each head, gradient of each logit]
    char* rooms;
    int64_t room_bytes;

    // What a thread has to itself.
    struct Room {
        A *s, *raw, *dp, *kept;               // [edges][lanes]
        A *q, *attr_q, *d_o, *dattr_o, *sum;  // [rows][heads of a group][width]
        A* total;                             // [heads of a group][width], of one row
        A *lse, *dlse;                        // [rows][lanes]
        bool any_dead;                        // whether a row of the chunk has no weights
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
          clamped(c.low > -double(INF<A>) || c.high < double(INF<A>)),
          log_eps(c.eps == 0 ? -INF<A> : A(std::log(c.eps))),
          on_edges(c.bias || c.gate || c.key || c.value || c.attr || c.seed || c.weights ||
                   c.scores || c.dscores),
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
        expect(call.o, rows.segments, call.heads, call.dv);
        expect(call.scores, rows.edges, call.heads, call.d);
        each_chunk(rows, call.mask_rows, [&](const Chunk& chunk, Room& room) {
            blank_results(chunk, room);
            for (int64_t g = 0; g < groups; g++) {
                const Group group = make_group(chunk.mask, call.heads, g * most, int(most));
                if (group.count) forward_rows(chunk, group, room);
            }
        });
    }

    void run_backward() {
        draw();
        expect(call.dq, rows.segments, call.heads, call.d);
        expect(call.dk, columns.segments, call.kv_heads, call.d);
        expect(call.dv_, columns.segments, call.kv_heads, call.dv);
        expect(call.dgate, rows.edges, call.heads, call.gate_by_channel ? call.d : 1);
        expect(call.dkey, rows.edges, call.heads, call.d);
        expect(call.dvalue, rows.edges, call.heads, call.dv);
        if (call.dk || call.dv_)
            expect_writes(pairs, together * rows.edges * pair_size() * int64_t(sizeof(A)));
        for (int64_t first = 0; first < groups; first += together) {
            const int64_t last = std::min(groups, first + together);
            each_chunk(rows, call.mask_rows, [&](const Chunk& chunk, Room& room) {
                if (!first) blank_gradients(chunk, room);
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
                if (!first && share == 1) blank_columns(chunk);
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

   private:
    static int64_t longest(const AnyWalk& walk) {
        int64_t x = 0;
        for (int64_t r = 0; r < walk.segments; r++)
            x = std::max<int64_t>(x, walk.ptr[r + 1] - walk.ptr[r]);
        return x;
    }

    static void expect(const Array& x, int64_t rows, int64_t heads, int64_t width) {
        expect_writes(x.data, rows * heads * width * int64_t(sizeof(T)));
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
        if (call.seed) room.kept = take<A>(place, edges * most + W);
        if (call.gate || clamped) room.raw = take<A>(place, edges * most + W);
        if (!backward) return room;
        room.slot = take<int64_t>(place, edges + MARGIN);
        room.dp = take<A>(place, edges * most + W);
        room.d_o = take<A>(place, n * wide_dv);
        room.dattr_o = take<A>(place, n * wide_c);
        room.total = take<A>(place, most * wide_d);
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
        if (on_edges) walk.edge.copy(chunk.from, chunk.reach, room.edge);
        if (room.slot && walk.ptr.data == columns.ptr.data)
            Indices{call.slot.data, call.rows.wide != 0}.copy(chunk.from, chunk.reach, room.slot);
        walk.ptr.copy(chunk.begin, chunk.count() + 1, room.ptr);
        for (int64_t r = 0; r <= chunk.count(); r++) room.ptr[r] -= chunk.from;
        for (int64_t r = 0; r < chunk.count(); r++)
            std::fill(room.row + room.ptr[r], room.row + room.ptr[r + 1], int32_t(r));
    }

    // ---- heads that are not active

    template <class F> void each_masked(const Chunk& chunk, const F& f) const {
        if (!chunk.mask) return;
        for (int64_t h = 0; h < call.heads; h++)
            if (!chunk.mask[h]) f(h);
    }

    template <class S = T>
    static void blank(const Array& x, int64_t begin, int64_t end, int64_t h, int64_t width) {
        if (!x) return;
        for (int64_t r = begin; r < end; r++)
            std::memset((void*)x.at<S>(r, h), 0, width * sizeof(S));
    }

    void blank_edges(const Array& x, const Chunk& chunk, const Room& room, int64_t h,
                     int64_t width) const {
        if (!x) return;
        for (int64_t e = 0; e < chunk.edges(); e++)
            blank(x, room.edge[e], room.edge[e] + 1, h, width);
    }

    void blank_results(const Chunk& chunk, const Room& room) const {
        each_masked(chunk, [&](int64_t h) {
            blank(call.o, chunk.begin, chunk.end, h, call.dv);
            blank<A>(call.attr_o, chunk.begin, chunk.end, h, call.attr_width);
            for (int64_t r = chunk.begin; r < chunk.end; r++) call.lse.at<A>(r)[h] = -INF<A>;
            blank_edges(call.weights, chunk, room, h, 1);
            blank_edges(call.scores, chunk, room, h, call.d);
        });
    }

    void blank_gradients(const Chunk& chunk, const Room& room) const {
        each_masked(chunk, [&](int64_t h) {
            blank(call.dq, chunk.begin, chunk.end, h, call.d);
            blank<A>(call.dattr_q, chunk.begin, chunk.end, h, call.attr_width);
            blank_edges(call.dbias, chunk, room, h, 1);
            blank_edges(call.dgate, chunk, room, h, call.gate_by_channel ? call.d : 1);
            blank_edges(call.dkey, chunk, room, h, call.d);
            blank_edges(call.dvalue, chunk, room, h, call.dv);
        });
    }

    void blank_columns(const Chunk& chunk) const {
        each_masked(chunk, [&](int64_t h) {
            blank(call.dk, chunk.begin, chunk.end, h, call.d);
            blank(call.dv_, chunk.begin, chunk.end, h, call.dv);
        });
    }

    // ---- dropout

    // Bit h % 4 of an edge's byte h / 4: whether head h keeps its weight.
    void draw() {
        if (!call.seed) return;
        const uint64_t seed = *(const uint64_t*)call.seed.data;
        const int64_t* numbers = (const int64_t*)call.numbers.data;
        const int64_t step = 1 << 13, blocks = bytes_an_edge();
        each_task(call.threads, (rows.edges + step - 1) / step, [&](int64_t task, int64_t) {
            const int64_t end = std::min(rows.edges, (task + 1) * step);
            for (int64_t block = 0; block < blocks; block++)
                for (int64_t e = task * step; e < end; e += PHILOX) {
                    uint8_t bits[PHILOX];
                    const int count = int(std::min<int64_t>(PHILOX, end - e));
                    const int64_t last = end - 1;
                    const auto number = [&](int i) {
                        return numbers ? numbers[std::min(e + i, last)] : e + i;
                    };
                    draw_some_heads(seed, number, call.first_head + 4 * block,
                                    uint32_t(call.threshold), bits);
                    for (int i = 0; i < count; i++) kept_bits[(e + i) * blocks + block] = bits[i];
                }
        });
    }

    // What dropout makes of the weights of a chunk's edges: 0, or by how much they grow.
    void keep(const Chunk& chunk, const Group& g, Room& room) const {
        const int64_t blocks = bytes_an_edge();
        const int64_t first = g.head[0] / 4, last = g.head[g.count - 1] / 4;
        with_lanes<A>(g.lanes, [&](auto lanes) {
            constexpr int HG = decltype(lanes)::value;
            VecInt<A> bit{};
            for (int v = 0; v < HG; v++) bit[v] = 1 << v;
            for (int64_t e = 0; e < chunk.edges(); e++) {
                const uint8_t* bits = kept_bits + room.edge[e] * blocks;
                A* to = room.kept + e * HG;
                if (g.adjacent) {
                    uint32_t word = 0;
                    for (int64_t b = first; b <= last; b++) word |= bits[b] << 4 * (b - first);
                    const VecInt<A> kept =
                        (typename LanesOf<A>::Int(word >> g.head[0] % 4) & bit) != 0;
                    store(to, where_set<A>(kept, splat(A(call.growth))), HG);
                } else {
                    for (int v = 0; v < HG; v++) {
                        const int h = g.head[v];
                        to[v] = bits[h / 4] >> (h % 4) & 1 ? A(call.growth) : A(0);
                    }
                }
            }
        });
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
    HeadParts<A> packed(const Array& x, const Chunk& chunk, const Group& g, int64_t width, int fold,
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

    // Whether products read and write the heads of `x` where they lie.
    template <class S>
    static bool in_place(const Array& x, const Group& g, int64_t width, int fold) {
        return std::is_same_v<S, A> && g.adjacent && (fold == 1 || x.head == width);
    }

    template <class S>
    static HeadParts<A> place_of(const Array& x, const Chunk& chunk, const Group& g,
                                 int fold) {
        return {(A*)x.at<S>(chunk.begin, g.head[0]), x.row, fold > 1 ? W : x.head};
    }

    // As packed, but where they lie if that can be.
    template <class S = T>
    HeadParts<A> rows_of(const Array& x, const Chunk& chunk, const Group& g, int64_t width,
                         int fold, A* buffer) const {
        return in_place<S>(x, g, width, fold) ? place_of<S>(x, chunk, g, fold)
                                              : packed<S>(x, chunk, g, width, fold, A(1), buffer);
    }

    HeadParts<A> sums(const Group& g, int64_t width, int fold, A* to) const {
        const int64_t head = fold > 1 ? W : padded<A>(width), size = g.lanes / fold * head;
        return {to, size, head};
    }

    // Where the sums of a result are made: in place if that can be.
    template <class S = T>
    HeadParts<A> sums_for(const Array& to, const Chunk& chunk, const Group& g, int64_t width,
                          int fold, A* buffer) const {
        return in_place<S>(to, g, width, fold) ? place_of<S>(to, chunk, g, fold)
                                               : sums(g, width, fold, buffer);
    }

    // f(row, head, its sum) for the sums of a group
    template <class F>
    void each_sum(const Chunk& chunk, const Group& g, int64_t width, int fold,
                  const HeadParts<A>& sum, const F& f) const {
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
        const int64_t n = chunk.edges();
        const auto keys = by_column(call.k, chunk, g, call.d, room);
        if (by_channel) {
            const HeadParts<A> q = packed(call.q, chunk, g, call.d, 1, A(call.scale), room.q);
            with_lanes<A>(g.lanes, [&](auto lanes) {
                channel_logits<decltype(lanes)::value>(chunk, g, q, keys, room);
            });
        } else {
            const A scale = A(call.scale);
            const auto p = products_for<T>(call.k, g, share, call.d);
            p.sddmm(rows_of(call.q, chunk, g, call.d, p.fold, room.q), room.row, keys, n, scale,
                    false, room.s);
            if (call.key) {
                const auto on_edges = products_for<T>(call.key, g, 1, call.d);
                on_edges.sddmm(rows_of(call.q, chunk, g, call.d, on_edges.fold, room.q), room.row,
                               by_edge(call.key, chunk, g, call.d, room), n, scale, true, room.s);
            }
            if (call.attr_q)
                attribute_products(g).sddmm(
                    rows_of<A>(call.attr_q, chunk, g, call.attr_width, 1, room.attr_q), room.row,
                    attributes(chunk, room), n, scale, true, room.s);
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
    void channel_logits(const Chunk& chunk, const Group& g, const HeadParts<A>& q,
                        const Pointed<T>& keys, Room& room) const {
        const Array& gate = call.gate_by_channel ? call.gate : none;
        products<A, HG, 1, false>(
            chunk.edges(), A(1), false, room.s,
            [&](int64_t e, int v, bool real) FASTGT_INLINED {
                const int64_t edge = room.edge[e];
                const int h = g.head[v];
                const A* x = q.data + room.row[e] * q.stride + v * q.head;
                const T* y = keys.at(e) + keys.offset[v];
                const T* edge_key = call.key ? call.key.at<T>(edge, h) : nullptr;
                const T* edge_gate = gate ? gate.at<T>(edge, h) : nullptr;
                const bool scored = call.scores && real && v < g.count;
                T* scores = scored ? call.scores.at<T>(edge, h) : nullptr;
                const A factor = scores ? factor_at(edge, h) : A(1);
                V s{};
                each_vector<A>(call.d, [&](int64_t c, int n) FASTGT_INLINED {
                    V key = load_some(y + c, n);
                    if (edge_key) key += load_some(edge_key + c, n);
                    if (edge_gate) key *= load_some(edge_gate + c, n);
                    const V term = load(x + c) * key;
                    if (scores) store_some(scores + c, term * factor, n);
                    s += term;
                });
                return s;
            },
            [&](int64_t e) FASTGT_INLINED {
                for (int v = 0; v < g.count; v++) ask<0>(keys, e, v);
                const int64_t edge = room.edge[std::min(e + AHEAD, keys.reach - 1)];
                if (call.key) ask_edge(call.key, edge, g);
                if (gate) ask_edge(gate, edge, g);
            });
    }

    static constexpr Array none{};

    void ask_edge(const Array& x, int64_t edge, const Group& g) const {
        for (int v = 0; v < g.count; v++) {
            const char* line = (const char*)x.at<T>(edge, g.head[v]);
            for (int64_t i = 0; i < call.d * int64_t(sizeof(T)); i += 64)
                __builtin_prefetch(line + i);
        }
    }

    // What the weights make of rows that edges point at, times `factor`; `add`: to the sums.
    void weigh(const A* weights, const Chunk& chunk, const Group& g, const Array& x, int64_t width,
               const Pointed<T>& to, int fold, A factor, bool add, const HeadParts<A>& sum,
               int64_t heads_share, const Room& room) const {
        auto p = products_for<T>(x, g, heads_share, width);
        if (p.fold != fold) p = choose_products<T>(g.lanes, width, false);
        p.spmm(weights, room.ptr, chunk.count(), to, g.count, factor, add, sum);
    }

    // Whether no logit of a row is finite.
    bool is_dead(int64_t row, int head) const { return call.lse.at<A>(row)[head] == -INF<A>; }

    // The sums of a result to where they belong, 0 where a row has no weights.
    template <class S = T>
    void put(const Chunk& chunk, const Group& g, int64_t width, int fold, const HeadParts<A>& sum,
             bool clear, const Array& to) const {
        const bool there = in_place<S>(to, g, width, fold);
        if (there && !clear) return;
        each_sum(chunk, g, width, fold, sum, [&](int64_t r, int v, const A* from) {
            S* row = to.at<S>(chunk.begin + r, g.head[v]);
            if (clear && is_dead(chunk.begin + r, g.head[v]))
                zero(row, width);
            else if (!there)
                write_times(row, from, width, A(1));
        });
    }

    // ---- forward

    void forward_rows(const Chunk& chunk, const Group& g, Room& room) const {
        logits(chunk, g, room);
        with_lanes<A>(g.lanes, [&](auto lanes) {
            constexpr int HG = decltype(lanes)::value;
            VecInt<A> dead{};
            for (int64_t r = 0; r < chunk.count(); r++) {
                const int64_t from = room.ptr[r], n = room.ptr[r + 1] - from;
                A* const row = call.lse.at<A>(chunk.begin + r);
                A* const lse = g.adjacent ? row + g.head[0] : room.lse;
                dead |= softmax_row<A, HG>(room.s + from * HG, n, log_eps, lse);
                if (!g.adjacent)
                    for (int v = 0; v < g.count; v++) row[g.head[v]] = lse[v];
            }
            room.any_dead = !all_zero<A>(dead);
        });
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
        const HeadParts<A> sum = sums_for(call.o, chunk, g, call.dv, fold, room.sum);
        weigh(room.s, chunk, g, call.v, call.dv, by_column(call.v, chunk, g, call.dv, room), fold,
              A(1), false, sum, share, room);
        const Array& value = call.key_is_value ? call.key : call.value;
        if (value)
            weigh(room.s, chunk, g, value, call.dv, by_edge(value, chunk, g, call.dv, room), fold,
                  A(1), true, sum, 1, room);
        put(chunk, g, call.dv, fold, sum, room.any_dead, call.o);
        if (!call.attr_o) return;
        const HeadParts<A> of_attr =
            sums_for<A>(call.attr_o, chunk, g, call.attr_width, 1, room.sum);
        attribute_products(g).spmm(room.s, room.ptr, chunk.count(), attributes(chunk, room),
                                   g.count, A(1), false, of_attr);
        put<A>(chunk, g, call.attr_width, 1, of_attr, room.any_dead, call.attr_o);
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
        logits(chunk, g, room);
        weight_gradients(chunk, g, room);
        if (call.seed) keep(chunk, g, room);
        with_lanes<A>(g.lanes, [&](auto lanes) {
            constexpr int HG = decltype(lanes)::value;
            for (int64_t r = 0; r < chunk.count(); r++) {
                const int64_t from = room.ptr[r], at = from * HG;
                const A *lse = heads_of(call.lse, chunk.begin + r, g, room.lse),
                        *dlse = heads_of(call.dlse, chunk.begin + r, g, room.dlse);
                softmax_row_backward<A, HG>(room.s + at, room.dp + at, room.ptr[r + 1] - from,
                                            log_eps, lse, dlse,
                                            call.seed ? room.kept + at : nullptr);
            }
        });
        room.any_dead = any_dead(chunk, g, room);
        if (room.any_dead) dead_rows.store(true, std::memory_order_relaxed);
        const A *used = room.s, *ds = room.dp;
        if (call.dbias)
            for (int64_t e = 0; e < n; e++)
                for (int v = 0; v < g.count; v++)
                    store_one(call.dbias.at<T>(room.edge[e], g.head[v]), ds[e * g.lanes + v]);
        before_the_clamp(chunk, g, room);
        if (pairs && (call.dk || call.dv_)) {
            A* pair = pairs + (kept_at * rows.edges + chunk.from) * pair_size();
            with_lanes<A>(g.lanes, [&](auto lanes) {
                constexpr int HG = decltype(lanes)::value;
                for (int64_t e = 0; e < n; e++, pair += pair_size()) {
                    std::memcpy(pair, used + e * HG, HG * sizeof(A));
                    std::memcpy(pair + HG, ds + e * HG, HG * sizeof(A));
                }
            });
        }
        if (call.dvalue) spread(chunk, g, used, room, call.dv, call.dvalue);
        // the gradient of a key that is the value too takes what the value's would be
        if (call.key_is_value && call.dkey) packed(call.d_o, chunk, g, call.dv, 1, A(1), room.d_o);
        if (by_channel) {
            channel_gradients(chunk, g, room);
        } else {
            if (call.dq) {
                const int fold = keys_fold(g);
                const HeadParts<A> sum = sums_for(call.dq, chunk, g, call.d, fold, room.sum);
                weigh(ds, chunk, g, call.k, call.d, by_column(call.k, chunk, g, call.d, room), fold,
                      A(call.scale), false, sum, share, room);
                if (call.key)
                    weigh(ds, chunk, g, call.key, call.d, by_edge(call.key, chunk, g, call.d, room),
                          fold, A(call.scale), true, sum, 1, room);
                put(chunk, g, call.d, fold, sum, room.any_dead, call.dq);
            }
            if (call.dkey) key_gradients(chunk, g, ds, room);
        }
        if (call.dattr_q) {
            const HeadParts<A> sum =
                sums_for<A>(call.dattr_q, chunk, g, call.attr_width, 1, room.sum);
            attribute_products(g).spmm(ds, room.ptr, chunk.count(), attributes(chunk, room),
                                       g.count, A(call.scale), false, sum);
            put<A>(chunk, g, call.attr_width, 1, sum, room.any_dead && !call.dscores, call.dattr_q);
        }
        if (call.dattr) attribute_gradients(chunk, g, room);
    }

    // dp = do . (v + value) + dattr_o . attr, of each edge
    void weight_gradients(const Chunk& chunk, const Group& g, Room& room) const {
        const int64_t n = chunk.edges();
        const Array& value = call.key_is_value ? call.key : call.value;
        const auto p = products_for<T>(call.v, g, share, call.dv);
        p.sddmm(rows_of(call.d_o, chunk, g, call.dv, p.fold, room.d_o), room.row,
                by_column(call.v, chunk, g, call.dv, room), n, A(1), false, room.dp);
        if (value) {
            const auto on_edges = products_for<T>(value, g, 1, call.dv);
            on_edges.sddmm(rows_of(call.d_o, chunk, g, call.dv, on_edges.fold, room.d_o), room.row,
                           by_edge(value, chunk, g, call.dv, room), n, A(1), true, room.dp);
        }
        if (call.dattr_o)
            attribute_products(g).sddmm(
                rows_of<A>(call.dattr_o, chunk, g, call.attr_width, 1, room.dattr_o), room.row,
                attributes(chunk, room), n, A(1), true, room.dp);
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

    // The numbers that a row has for the heads of a group, null of None.
    const A* heads_of(const Array& x, int64_t row, const Group& g, A* buffer) const {
        if (!x) return nullptr;
        const A* from = x.at<A>(row);
        if (g.adjacent) return from + g.head[0];
        for (int v = 0; v < g.lanes; v++) buffer[v] = from[g.head[v]];
        return buffer;
    }

    bool any_dead(const Chunk& chunk, const Group& g, const Room& room) const {
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int v = 0; v < g.count && room.ptr[r] < room.ptr[r + 1]; v++)
                if (is_dead(chunk.begin + r, g.head[v])) return true;
        return false;
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
                if (room.any_dead && is_dead(chunk.begin + room.row[e], g.head[v]))
                    zero(out, width);
                else
                    write_times(out, d, width, used[e * g.lanes + v]);
            }
        }
    }

    // Of an edge's key, which may be the value too.
    void key_gradients(const Chunk& chunk, const Group& g, const A* ds, Room& room) const {
        packed(call.q, chunk, g, call.d, 1, A(call.scale), room.q);
        for (int64_t e = 0; e < chunk.edges(); e++) {
            const int64_t edge = room.edge[e];
            for (int v = 0; v < g.count; v++) {
                const A* q = vector_of(room, room.q, g, call.d, e, v);
                const bool dead = room.any_dead && is_dead(chunk.begin + room.row[e], g.head[v]);
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
        const HeadParts<A> q = packed(call.q, chunk, g, call.d, 1, A(call.scale), room.q);
        const HeadParts<A> sum = sums(g, call.d, 1, room.sum);
        std::fill_n(sum.data, chunk.count() * sum.stride, A(0));
        const auto keys = by_column(call.k, chunk, g, call.d, room);
        const bool factor = call.gate && !call.gate_by_channel;
        const Array& gate = call.gate_by_channel ? call.gate : none;
        const Array& dgate = call.gate_by_channel ? call.dgate : none;
        for (int64_t e = 0; e < chunk.edges(); e++) {
            const int64_t edge = room.edge[e];
            for (int v = 0; v < g.count; v++) ask<0>(keys, e, v);
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
                const bool dead = room.any_dead && is_dead(chunk.begin + room.row[e], h);
                const A* d_o = vector_of(room, room.d_o, g, call.d, e, v);
                const V used = splat(room.s[e * g.lanes + v]);
                V of_factor{};
                each_vector<A>(call.d, [&](int64_t c, int n) FASTGT_INLINED {
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
            end_block(sum, room.row[e], e, room);
        }
        if (!call.dq) return;
        const bool clear = room.any_dead && !call.dscores;
        each_sum(chunk, g, call.d, 1, sum, [&](int64_t r, int v, const A* from) {
            T* to = call.dq.at<T>(chunk.begin + r, g.head[v]);
            if (clear && is_dead(chunk.begin + r, g.head[v]))
                zero(to, call.d);
            else
                write_times(to, from, call.d, A(call.scale));
        });
    }

    // dattr += ds attr_q + used dattr_o, summed over heads in float (or double)
    void attribute_gradients(const Chunk& chunk, const Group& g, Room& room) const {
        const int64_t width = call.attr_width;
        if (call.attr_q) packed<A>(call.attr_q, chunk, g, width, 1, A(call.scale), room.attr_q);
        if (call.dattr_o) packed<A>(call.dattr_o, chunk, g, width, 1, A(1), room.dattr_o);
        for (int64_t e = 0; e < chunk.edges(); e++)
            for (int v = 0; v < g.count; v++) {
                if (room.any_dead && is_dead(chunk.begin + room.row[e], g.head[v])) continue;
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
        with_lanes<A>(g.lanes, [&](auto lanes) {
            constexpr int HG = decltype(lanes)::value;
            for (int64_t e = 0; e < n; e++) {
                const int64_t ahead = std::min(e + 2 * AHEAD, chunk.reach - 1);
                __builtin_prefetch(pair + room.slot[ahead] * pair_size());
                const A* from = pair + room.slot[e] * pair_size();
                std::memcpy(room.s + e * HG, from, HG * sizeof(A));
                std::memcpy(room.dp + e * HG, from + HG, HG * sizeof(A));
            }
        });
        if (call.dv_ && dead_rows)
            value_gradients_beside_dead_rows(chunk, g, room);
        else if (call.dv_)
            weigh_columns(room.s, chunk, g, call.d_o, call.dv, A(1), room.dv, wide_dv, call.dv_,
                          room);
        if (call.dk && by_channel)
            channel_columns(chunk, g, room);
        else if (call.dk)
            weigh_columns(room.dp, chunk, g, call.q, call.d, A(call.scale), room.dk, wide_d,
                          call.dk, room);
    }

    // The values' gradient, adding as spmm does, of the rows that have weights: it does not read
    // what stands upstream of the others, which may be NaN.
    void value_gradients_beside_dead_rows(const Chunk& chunk, const Group& g, Room& room) const {
        const HeadParts<A> sum = sums(g, call.dv, 1, room.sum);
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int v = 0; v < g.count; v++)
                each_vector<A>(call.dv, [&](int64_t c, int n) {
                    V total{};
                    for (int64_t e = room.ptr[r]; e < room.ptr[r + 1];) {
                        V some{};
                        const int64_t stop = std::min(room.ptr[r + 1], e + BLOCK);
                        for (; e < stop; e++) {
                            if (is_dead(room.other[e], g.head[v])) continue;
                            const T* d_o = call.d_o.at<T>(room.other[e], g.head[v]);
                            some += splat(room.s[e * g.lanes + v]) * load_some(d_o + c, n);
                        }
                        total += some;
                    }
                    store(sum.data + r * sum.stride + v * sum.head + c, total);
                });
        if (share > 1)
            add_to_key_heads(chunk, g, call.dv, 1, sum, A(1), room.dv, wide_dv);
        else
            each_sum(chunk, g, call.dv, 1, sum, [&](int64_t r, int v, const A* from) {
                write(call.dv_.at<T>(chunk.begin + r, g.head[v]), from, call.dv);
            });
    }

    // The gradient of a column: what the weights make of the rows `x` that its edges come from.
    void weigh_columns(const A* weights, const Chunk& chunk, const Group& g, const Array& x,
                       int64_t width, A factor, A* of_key_heads, int64_t wide, const Array& to,
                       Room& room) const {
        const int fold = products_for<T>(x, g, 1, width).fold;
        const HeadParts<A> sum = share == 1 ? sums_for(to, chunk, g, width, fold, room.sum)
                                          : sums(g, width, fold, room.sum);
        weigh(weights, chunk, g, x, width, pointed<T>(x, g, 1, width, room.other, chunk.reach),
              fold, factor, false, sum, 1, room);
        if (share == 1)
            put(chunk, g, width, fold, sum, false, to);
        else
            add_to_key_heads(chunk, g, width, fold, sum, A(1), of_key_heads, wide);
    }

    // Where a row has more than BLOCK edges, what these have added so far joins a total. Edge e has
    // been added to the sums of row r.
    void end_block(const HeadParts<A>& sum, int64_t r, int64_t e, const Room& room) const {
        const int64_t edges = room.ptr[r + 1] - room.ptr[r], done = e + 1 - room.ptr[r];
        const bool last = done == edges;
        if (edges <= BLOCK || (done % BLOCK && !last)) return;
        A* const some = sum.data + r * sum.stride;
        for (int64_t i = 0; i < sum.stride; i += W) {
            V x = load(some + i);
            if (done > BLOCK) x += load(room.total + i);
            store(last ? some + i : room.total + i, x);
            if (!last) store(some + i, V{});
        }
    }

    void channel_columns(const Chunk& chunk, const Group& g, Room& room) const {
        const auto queries = pointed<T>(call.q, g, 1, call.d, room.other, chunk.reach);
        const HeadParts<A> sum = sums(g, call.d, 1, room.sum);
        std::fill_n(sum.data, chunk.count() * sum.stride, A(0));
        const Array& gate = call.gate_by_channel ? call.gate : none;
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int64_t e = room.ptr[r]; e < room.ptr[r + 1]; e++) {
                const int64_t edge = room.edge[e];
                for (int v = 0; v < g.count; v++) ask<0>(queries, e, v);
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
                    each_vector<A>(call.d, [&](int64_t c, int n) FASTGT_INLINED {
                        V flow = rate;
                        if (dscores) flow += load_some(dscores + c, n) * times;
                        V x = load_some(q + c, n);
                        if (edge_gate) x *= load_some(edge_gate + c, n);
                        store(to + c, load(to + c) + flow * x);
                    });
                }
                end_block(sum, r, e, room);
            }
        const A scale = A(call.scale);
        if (share > 1) return add_to_key_heads(chunk, g, call.d, 1, sum, scale, room.dk, wide_d);
        each_sum(chunk, g, call.d, 1, sum, [&](int64_t r, int v, const A* from) {
            write_times(call.dk.at<T>(chunk.begin + r, g.head[v]), from, call.d, scale);
        });
    }

    // Sums of query heads to those of the key head that they share.
    void add_to_key_heads(const Chunk& chunk, const Group& g, int64_t width, int fold,
                          const HeadParts<A>& sum, A factor, A* of_key_heads, int64_t wide) const {
        each_sum(chunk, g, width, fold, sum, [&](int64_t r, int v, const A* from) {
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
