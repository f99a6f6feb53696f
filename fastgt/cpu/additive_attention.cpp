// additive_attention: the softmax of w . leaky(q_i + k_j + edge key), and its mean of values.
//
// As in attention.cpp, rows go in chunks and heads in groups. With t = q_i + k_j + ..., g its slope
// and ds the gradient of the logit, a backward needs of each channel ds g, summed over a row for dq
// and over a column for dk, and ds g t, summed over all edges for the weight's gradient. The row
// pass writes ds of each edge for the column pass, which makes t anew. Where D is 1, lanes are
// edges by heads, and the row pass writes ds g, so that columns read neither queries nor keys. What
// attributes add to t is made for BLOCK edges at a time, wherever t is made.
#include "philox.h"
#include "products.h"
#include "softmax_row.h"

namespace fastgt {
namespace {

struct AdditiveCall {
    int64_t dtype, threads, heads;
    int64_t d, dv, attr_width;
    WalkArrays rows, columns;
    Array slot;  // of the column walk: each edge's place in the row walk
    Array q, k, v, weight;
    double slope;
    Array key, attr, key_weight, bias;
    Array mask_rows, mask_cols;
    Array seed, numbers;  // by which dropout knows the edges; null: their own
    int64_t first_head;   // by which it knows head 0
    int64_t threshold;  // a weight is kept where its 24 random bits are not below it
    double growth;      // of the kept weights
    Array o, lse, weights;
    Array d_o, dlse;
    Array dq, dk, dv_, dweight, dkey, dattr, dkey_weight, dbias;
    Array work;  // null: the call only says how many bytes it needs

    // the weight as a tensor of one row
    Array weight_row() const { return {weight.data, 0, weight.row}; }
};

constexpr int64_t CHUNK = 256;          // edges of a chunk, more where one row has more
constexpr int64_t ROW_BYTES = 1 << 14;  // of a chunk's row vectors
constexpr int64_t MOST_ROWS = 128;
constexpr int64_t SMALL_TASK = std::min<int64_t>(TASK, 1024);
constexpr int64_t MARGIN = 2 * AHEAD;   // indices beyond a chunk's that are read early
constexpr int64_t PARTIALS = 1 << 22;   // numbers that tasks' sums of weights' gradients have
constexpr int64_t FEWEST_TASKS = 8;     // of a backward, however large these sums are

// The active heads of a chunk that go together.
struct Group {
    int count;    // of them
    int lanes;    // a power of two, at least count
    int head[8];  // past `count` the last one again
    bool in_a_row;
    bool adjacent;  // in a row, and as many as there are lanes
};

Group make_group(const bool* mask, int64_t heads, int64_t first, int most) {
    Group g{0, 0, {}, true, true};
    int64_t active = 0;
    for (int64_t h = 0; h < heads && g.count < most; h++) {
        if (mask && !mask[h]) continue;
        if (active++ < first) continue;
        if (g.count && h != g.head[g.count - 1] + 1) g.in_a_row = false;
        g.head[g.count++] = int(h);
    }
    g.lanes = power_of_two(g.count);
    for (int v = g.count; v < 8; v++) g.head[v] = g.count ? g.head[g.count - 1] : 0;
    g.adjacent = g.in_a_row && g.lanes == g.count;
    return g;
}

template <class A> FASTGT_INLINE Vec<A> slope_at(Vec<A> t, Vec<A> slope) {
    return t > A(0) ? splat(A(1)) : slope;
}

// Functions that several forms call stay functions: written out in each, they would make the
// library large. Those outside the class are compiled once for A, whatever tensors hold.
#define FASTGT_APART __attribute__((noinline))

// x of `lanes` heads in all lanes, over and over; `lanes` is a power of two
template <class A> FASTGT_INLINE Vec<A> over_and_over(const A* x, int lanes) {
    const auto mask = typename LanesOf<A>::Int(lanes - 1);
    return __builtin_shuffle(load(x, lanes), lane_numbers<A>() & mask);
}

// the sum of each head's lanes, in all of them
template <class A> FASTGT_INLINE Vec<A> sum_of_heads(Vec<A> x, int lanes) {
    for (int step = lanes; step < WIDTH<A>; step *= 2)
        x += __builtin_shuffle(x, lane_numbers<A>() ^ typename LanesOf<A>::Int(step));
    return x;
}

// softmax_row of `count` rows, whose edges are those from ptr[r] on. lse [rows][lanes]. -> whether
// one that has edges has no weights
template <class A>
FASTGT_APART bool softmax_rows(A* s, const int64_t* ptr, int64_t count, int lanes, A* lse) {
    return with_lanes<A>(lanes, [&](auto constant) {
        constexpr int HG = decltype(constant)::value;
        VecInt<A> dead{};
        for (int64_t r = 0; r < count; r++)
            dead |= softmax_row<A, HG>(s + ptr[r] * HG, ptr[r + 1] - ptr[r], -INF<A>, lse + r * HG);
        return !all_zero<A>(dead);
    });
}

template <class A>
FASTGT_APART void softmax_rows_backward(A* s, A* dp, const int64_t* ptr, int64_t count, int lanes,
                                        const A* lse, const A* dlse, const A* kept) {
    with_lanes<A>(lanes, [&](auto constant) {
        constexpr int HG = decltype(constant)::value;
        for (int64_t r = 0; r < count; r++) {
            const int64_t at = ptr[r] * HG;
            softmax_row_backward<A, HG>(s + at, dp + at, ptr[r + 1] - ptr[r], -INF<A>, lse + r * HG,
                                        dlse ? dlse + r * HG : nullptr, kept ? kept + at : nullptr);
        }
    });
}

// Where D is 1: t of `count` lanes += q, s = w leaky(t), with heads over and over
template <class A>
FASTGT_APART void narrow_logits(A* t, A* s, int64_t count, Vec<A> q, Vec<A> w, Vec<A> slope) {
    each_vector<A>(count, [&](int64_t i, int n) FASTGT_INLINED {
        const Vec<A> x = load_some(t + i, n) + q;
        store_some(t + i, x, n);
        store_some(s + i, w * (x * slope_at<A>(x, slope)), n);
    });
}

// Where D is 1: ds becomes ds g; -> the sums over `count` lanes of that and of ds g t
template <class A>
FASTGT_APART void narrow_flow(const A* t, A* ds, int64_t count, Vec<A> slope, Vec<A>& of_q,
                              Vec<A>& of_w) {
    constexpr int W = WIDTH<A>;
    for (int64_t i = 0; i < count;) {
        Vec<A> some{}, weight_some{};
        for (const int64_t stop = std::min(count, i + BLOCK * W); i < stop; i += W) {
            const int n = int(std::min<int64_t>(W, count - i));
            const Vec<A> x = load_some(t + i, n);
            const Vec<A> d = load_some(ds + i, n) * slope_at<A>(x, slope);
            store_some(ds + i, d, n);
            some += d;
            weight_some += d * x;
        }
        of_q += some;
        of_w += weight_some;
    }
}

template <class A> FASTGT_APART Vec<A> sum_of_lanes(const A* x, int64_t count) {
    constexpr int W = WIDTH<A>;
    Vec<A> total{};
    for (int64_t i = 0; i < count;) {
        Vec<A> some{};
        for (const int64_t stop = std::min(count, i + BLOCK * W); i < stop; i += W)
            some += load_some(x + i, int(std::min<int64_t>(W, count - i)));
        total += some;
    }
    return total;
}

// c [M][N] = a b, or that is added to it: a's number (m, k) is at [m * a_row + k * a_k], the rows
// of b and c are `b_row` and `c_row` apart.
template <class A> struct Product {
    const A* a;
    int64_t a_row, a_k;
    const A* b;
    int64_t b_row;
    A* c;
    int64_t c_row;

    template <int M, int N>
    FASTGT_INLINED void tile(int64_t m, int64_t n, int lanes, int64_t from, int64_t to,
                             bool add) const {
        constexpr int W = WIDTH<A>;
        Vec<A> sum[M * N] = {};
        for (int64_t k = from; k < to; k++) {
            const A* y = b + k * b_row + n;
            const A* x = a + m * a_row + k * a_k;
            unrolled<N>([&](int j) FASTGT_INLINED {
                const Vec<A> right = lanes == W ? load(y + j * W) : load(y + j * W, lanes);
                unrolled<M>(
                    [&](int i) FASTGT_INLINED { sum[i * N + j] += splat(x[i * a_row]) * right; });
            });
        }
        unrolled<M>([&](int i) FASTGT_INLINED {
            unrolled<N>([&](int j) FASTGT_INLINED {
                A* to_c = c + (m + i) * c_row + n + j * W;
                Vec<A> x = sum[i * N + j];
                if (add) x += load_some(to_c, lanes);
                store_some(to_c, x, lanes);
            });
        });
    }

    template <int N> void columns(int64_t rows, int64_t n, int lanes, int64_t terms,
                                  bool add) const {
        for (int64_t from = 0; from < terms; from += BLOCK) {
            const int64_t to = std::min(terms, from + BLOCK);
            int64_t m = 0;
            for (; m + 4 <= rows; m += 4) tile<4, N>(m, n, lanes, from, to, add || from);
            for (; m < rows; m++) tile<1, N>(m, n, lanes, from, to, add || from);
        }
    }

    FASTGT_APART void run(int64_t rows, int64_t width, int64_t terms, bool add) const {
        constexpr int W = WIDTH<A>;
        int64_t n = 0;
        for (; n + 4 * W <= width; n += 4 * W) columns<4>(rows, n, W, terms, add);
        for (; n + W <= width; n += W) columns<1>(rows, n, W, terms, add);
        if (n < width) columns<1>(rows, n, int(width - n), terms, add);
    }
};

template <class T> class Additive {
    using A = Accumulator<T>;
    using V = Vec<A>;
    static constexpr int W = WIDTH<A>;

    const AdditiveCall& call;
    const AnyWalk rows, columns;
    const int most;          // heads of a group
    const int64_t groups;    // of heads
    const int64_t together;  // groups whose edges' weights are kept at once in a backward
    const bool backward;
    const bool on_edges;  // whether anything is read or written by an edge's number
    const bool narrow;    // D is 1
    const bool row_flow;  // whether rows sum ds g
    const int64_t part;   // how far apart the heads of what attributes add lie
    const int64_t line;   // how far apart the edges of that lie
    const int64_t wide_d, wide_dv, wide_c;
    const int64_t partial;  // numbers of a task's sums: of weight, then of key_weight
    int64_t longest_row, longest_column;
    mutable std::atomic<bool> dead_rows{false};  // whether a row that has edges has no weights
    uint8_t* kept_bits;
    A* pairs;  // [groups together][E][weight of each head, gradient of each logit]
    A* partials;
    char* rooms;
    int64_t room_bytes;

    // What a thread has to itself.
    struct Room {
        A *s, *dp, *kept, *t;                // [edges][lanes]
        A *fixed, *d_o, *sum;                // [rows][heads of a group][width]
        A *lse, *dlse;                       // [rows][lanes]
        A *w, *of_w;                         // [heads of a group][width]
        A *attr, *of_attr;                   // [BLOCK][C], [edges][C]
        A *key_w, *key_wt;                   // [C][line], [heads of a group][width][C]
        A *parts, *of_parts;                 // [BLOCK][line]
        bool any_dead;                       // whether a row of the chunk has no weights
        int32_t* row;                        // [edges]
        int64_t *ptr, *other, *edge, *slot;  // of the chunk: copies of its part of the walk
    };

    // Some rows whose heads are masked alike, or some columns.
    struct Chunk {
        int64_t begin, end;  // rows
        int64_t from, to;    // slots
        int64_t reach;       // slots of which there is a copy, from `from` on
        int64_t task;
        const bool* mask;

        int64_t count() const { return end - begin; }
        int64_t edges() const { return to - from; }
    };

   public:
    explicit Additive(const AdditiveCall& c)
        : call(c),
          rows(c.rows),
          columns(c.columns),
          most(GROUP<A>),
          groups((c.heads + GROUP<A> - 1) / GROUP<A>),
          together(c.dattr ? groups : 1),
          backward(c.d_o.data != nullptr),
          on_edges(c.bias || c.key || c.attr || c.seed || c.weights),
          narrow(c.d == 1),
          row_flow(c.dq || c.dweight || c.dkey || c.dattr || c.dkey_weight ||
                   (c.dk && c.d == 1)),
          part(c.d == 1 ? 1 : padded<A>(c.d)),
          line(padded<A>(GROUP<A> * part)),
          wide_d(padded<A>(c.d)),
          wide_dv(padded<A>(c.dv)),
          wide_c(padded<A>(c.attr_width)),
          partial(((c.dweight ? 1 : 0) + (c.dkey_weight ? c.attr_width : 0)) * c.heads * part),
          longest_row(longest(rows)),
          longest_column(backward ? longest(columns) : 0) {}

    // Places for everything in `work`, and how many bytes they take.
    int64_t lay_out(char* work) {
        char* place = work;
        kept_bits = take<uint8_t>(place, call.seed ? rows.edges * bytes_an_edge() : 0);
        pairs = take<A>(place, call.dk || call.dv_ ? together * rows.edges * pair_size() + W : 0);
        partials = take<A>(place, partial * row_tasks());
        rooms = place;
        room_for(place);
        room_bytes = (place - rooms + 4095) / 4096 * 4096;
        return rooms - work + call.threads * room_bytes;
    }

    void run_forward() {
        draw();
        expect(call.o, rows.segments, call.heads, call.dv);
        each_chunk(rows, call.mask_rows, row_tasks(), [&](const Chunk& chunk, Room& room) {
            blank_results(chunk, room);
            for (int64_t g = 0; g < groups; g++) {
                const Group group = make_group(chunk.mask, call.heads, g * most, most);
                if (group.count) forward_rows(chunk, group, room);
            }
        });
    }

    void run_backward() {
        draw();
        expect(call.dq, rows.segments, call.heads, call.d);
        expect(call.dk, columns.segments, call.heads, call.d);
        expect(call.dv_, columns.segments, call.heads, call.dv);
        expect(call.dkey, rows.edges, call.heads, call.d);
        if (pairs) expect_writes(pairs, together * rows.edges * pair_size() * int64_t(sizeof(A)));
        std::fill_n(partials, partial * row_tasks(), A(0));
        for (int64_t first = 0; first < groups; first += together) {
            const int64_t last = std::min(groups, first + together);
            each_chunk(rows, call.mask_rows, row_tasks(), [&](const Chunk& chunk, Room& room) {
                if (!first) blank_gradients(chunk, room);
                if (call.dattr) std::fill_n(room.of_attr, chunk.edges() * wide_c, A(0));
                for (int64_t g = first; g < last; g++) {
                    const Group group = make_group(chunk.mask, call.heads, g * most, most);
                    if (group.count) backward_rows(chunk, group, g - first, room);
                }
                if (call.dattr)
                    for (int64_t e = 0; e < chunk.edges(); e++)
                        write_times(call.dattr.at<T>(room.edge[e]), room.of_attr + e * wide_c,
                                    call.attr_width, A(1));
            });
            if (!call.dk && !call.dv_) continue;
            const int64_t tasks = count_tasks(columns, SMALL_TASK);
            each_chunk(columns, call.mask_cols, tasks, [&](const Chunk& chunk, Room& room) {
                if (!first) blank_columns(chunk);
                for (int64_t g = first; g < last; g++) {
                    const Group group = make_group(chunk.mask, call.heads, g * most, most);
                    if (group.count) backward_columns(chunk, group, g - first, room);
                }
            });
        }
        add_partials();
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

    int64_t pair_size() const { return 2 * power_of_two(int(std::min<int64_t>(call.heads, most))); }

    // The same for every number of threads: each task has sums of its own.
    int64_t row_tasks() const {
        const int64_t tasks = count_tasks(rows, SMALL_TASK);
        return partial ? std::min(tasks, std::max(FEWEST_TASKS, PARTIALS / partial)) : tasks;
    }

    int64_t row_limit() const {
        const int64_t bytes = most * std::max(wide_d, wide_dv) * int64_t(sizeof(A));
        return std::min(MOST_ROWS, std::max<int64_t>(1, ROW_BYTES / bytes));
    }

    Room room_for(char*& place) const {
        Room room{};
        const int64_t n = row_limit() * most;
        const int64_t edges = std::max({CHUNK, longest_row, longest_column});
        room.s = take<A>(place, edges * most + W);
        if (narrow) room.t = take<A>(place, edges * most + W);
        room.row = take<int32_t>(place, edges);
        room.ptr = take<int64_t>(place, MOST_ROWS + 1);
        room.other = take<int64_t>(place, edges + MARGIN);
        room.edge = take<int64_t>(place, edges + MARGIN);
        room.fixed = take<A>(place, n * wide_d);
        room.sum = take<A>(place, n * std::max(wide_d, wide_dv));
        room.lse = take<A>(place, n + W);
        room.w = take<A>(place, most * wide_d);
        if (call.seed) room.kept = take<A>(place, edges * most + W);
        if (call.attr) {
            room.attr = take<A>(place, BLOCK * wide_c);
            room.key_w = take<A>(place, call.attr_width * line);
            room.parts = take<A>(place, BLOCK * line);
        }
        if (!backward) return room;
        room.slot = take<int64_t>(place, edges + MARGIN);
        room.dp = take<A>(place, edges * most + W);
        room.d_o = take<A>(place, n * wide_dv);
        room.dlse = take<A>(place, n + W);
        room.of_w = take<A>(place, most * wide_d);
        if (call.dattr) room.of_attr = take<A>(place, edges * wide_c);
        if (call.dattr) room.key_wt = take<A>(place, most * part * wide_c);
        if (call.dattr || call.dkey_weight) room.of_parts = take<A>(place, BLOCK * line);
        return room;
    }

    template <class F>
    void each_chunk(const AnyWalk& walk, const Array& masks, int64_t tasks, const F& f) const {
        const int64_t limit = row_limit();
        each_task(call.threads, tasks, [&](int64_t task, int64_t thread) {
            const int64_t end = first_segment(walk, task + 1, tasks);
            char* place = rooms + thread * room_bytes;
            Room room = room_for(place);
            for (int64_t r = first_segment(walk, task, tasks); r < end;) {
                Chunk chunk{r, r + 1, walk.ptr[r], 0, 0, task, nullptr};
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
        });
    }

    FASTGT_APART void copy_walk(const AnyWalk& walk, Chunk& chunk, Room& room) const {
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

    static void blank(const Array& x, int64_t begin, int64_t end, int64_t h, int64_t width) {
        if (!x) return;
        for (int64_t r = begin; r < end; r++)
            std::memset((void*)x.at<T>(r, h), 0, width * sizeof(T));
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
            for (int64_t r = chunk.begin; r < chunk.end; r++) call.lse.at<A>(r)[h] = -INF<A>;
            blank_edges(call.weights, chunk, room, h, 1);
        });
    }

    void blank_gradients(const Chunk& chunk, const Room& room) const {
        each_masked(chunk, [&](int64_t h) {
            blank(call.dq, chunk.begin, chunk.end, h, call.d);
            blank_edges(call.dbias, chunk, room, h, 1);
            blank_edges(call.dkey, chunk, room, h, call.d);
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
    FASTGT_APART void keep(const Chunk& chunk, const Group& g, Room& room) const {
        const int64_t blocks = bytes_an_edge();
        const int64_t first = g.head[0] / 4, last = g.head[g.count - 1] / 4;
        const VecInt<A> bit = (lane_numbers<A>() * 0 + 1) << lane_numbers<A>();
        for (int64_t e = 0; e < chunk.edges(); e++) {
            const uint8_t* bits = kept_bits + room.edge[e] * blocks;
            A* to = room.kept + e * g.lanes;
            if (g.adjacent) {
                uint32_t word = 0;
                for (int64_t b = first; b <= last; b++) word |= bits[b] << 4 * (b - first);
                const VecInt<A> kept = (typename LanesOf<A>::Int(word >> g.head[0] % 4) & bit) != 0;
                store(to, where_set<A>(kept, splat(A(call.growth))), g.lanes);
            } else {
                for (int v = 0; v < g.lanes; v++)
                    to[v] = bits[g.head[v] / 4] >> (g.head[v] % 4) & 1 ? A(call.growth) : A(0);
            }
        }
    }

    // ---- pieces of all passes

    template <class S> static void write_times(S* to, const A* from, int64_t width, A factor) {
        each_vector<A>(width,
                       [&](int64_t c, int n) { store_some(to + c, load(from + c) * factor, n); });
    }

    // The heads of a group of some rows of `x`, as products read them.
    FASTGT_APART HeadParts<A> packed(const Array& x, int64_t begin, int64_t count, const Group& g,
                                     int64_t width, int fold, A* to) const {
        const int64_t head = fold > 1 ? W : padded<A>(width), size = g.lanes / fold * head;
        for (int64_t r = 0; r < count; r++)
            for (int v = 0; v < g.lanes; v++) {
                const T* from = x.at<T>(begin + r, g.head[v]);
                A* to_v = to + r * size + v / fold * head + v % fold * width;
                const A times = v < g.count ? A(1) : A(0);
                if (fold > 1)
                    each_vector<A>(width, [&](int64_t c, int n) {
                        store_some(to_v + c, load_some(from + c, n) * times, n);
                    });
                else  // whole vectors: products read the rest, which is 0
                    each_vector<A>(width, [&](int64_t c, int n) {
                        store(to_v + c, load_some(from + c, n) * times);
                    });
            }
        return {to, size, head};
    }

    // Whether products read and write the heads of `x` where they lie.
    static bool in_place(const Array& x, const Group& g, int64_t width, int fold) {
        return std::is_same_v<T, A> && g.adjacent && (fold == 1 || x.head == width);
    }

    HeadParts<A> rows_of(const Array& x, const Chunk& chunk, const Group& g, int64_t width,
                         int fold, A* buffer) const {
        if (!in_place(x, g, width, fold) || (fold == 1 && width % W))
            return packed(x, chunk.begin, chunk.count(), g, width, fold, buffer);
        return {(A*)x.at<T>(chunk.begin, g.head[0]), x.row, fold > 1 ? W : x.head};
    }

    HeadParts<A> sums(const Group& g, int64_t width, int fold, A* to) const {
        const int64_t head = fold > 1 ? W : padded<A>(width), size = g.lanes / fold * head;
        return {to, size, head};
    }

    // where number c of head v stands in the heads of a row
    static int64_t place_of(const HeadParts<A>& x, int v, int fold, int64_t width) {
        return fold > 1 ? v / fold * W + v % fold * width : v * x.head;
    }

    Pointed<T> pointed(const Array& x, const Chunk& chunk, const Group& g, int64_t width,
                       const Room& room) const {
        Pointed<T> p{(const T*)x.data, x.row, {}, width, room.other, chunk.reach};
        for (int v = 0; v < 8; v++) p.offset[v] = g.head[v] * x.head;
        return p;
    }

    // How many heads share a vector of D channels; 0: in the general form, of any type and width.
    int fold_of(const Group& g) const {
        if (sizeof(T) != 4 || call.attr) return 0;
        if (call.d == W) return 1;
        const bool close = g.adjacent && call.q.head == call.d && call.k.head == call.d &&
                           (!call.key || call.key.head == call.d);
        if (close && g.lanes >= 2 && call.d * 2 == W) return 2;
        return close && g.lanes >= 4 && W >= 8 && call.d * 4 == W ? 4 : 0;
    }

    // f(lanes, heads of a vector) as constants, where there are some
    template <class F> void with_form(const Group& g, int fold, const F& f) const {
        if constexpr (sizeof(T) == 4)
            with_lanes<A>(g.lanes, [&](auto lanes) {
                constexpr int HG = decltype(lanes)::value;
                if (fold == 1) f(lanes, std::integral_constant<int, 1>());
                if constexpr (HG >= 2)
                    if (fold == 2) f(lanes, std::integral_constant<int, 2>());
                if constexpr (HG >= 4 && W >= 8)
                    if (fold == 4) f(lanes, std::integral_constant<int, 4>());
            });
    }

    // Whether a row has no weights.
    bool is_dead(int64_t row, int64_t head) const { return call.lse.at<A>(row)[head] == -INF<A>; }

    bool any_dead(const Chunk& chunk, const Group& g, const Room& room) const {
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int v = 0; v < g.count && room.ptr[r] < room.ptr[r + 1]; v++)
                if (is_dead(chunk.begin + r, g.head[v])) return true;
        return false;
    }

    // The numbers that rows have for the heads of a group, null of None.
    const A* heads_of(const Array& x, const Chunk& chunk, const Group& g, A* buffer) const {
        if (!x) return nullptr;
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int v = 0; v < g.lanes; v++)
                buffer[r * g.lanes + v] = x.at<A>(chunk.begin + r)[g.head[v]];
        return buffer;
    }

    // ---- attributes

    // The weights of a group's heads, in the order of products; what is beside them is 0.
    FASTGT_APART void pack_key_weights(const Group& g, Room& room) const {
        std::fill_n(room.key_w, call.attr_width * line, A(0));
        if (room.key_wt) std::fill_n(room.key_wt, g.count * part * wide_c, A(0));
        for (int64_t c = 0; c < call.attr_width; c++)
            for (int v = 0; v < g.count; v++) {
                const T* from = call.key_weight.at<T>(c, g.head[v]);
                for (int64_t i = 0; i < call.d; i++) {
                    const A x = load_one(from + i);
                    room.key_w[c * line + v * part + i] = x;
                    if (room.key_wt) room.key_wt[(v * part + i) * wide_c + c] = x;
                }
            }
    }

    // f(from, to) for BLOCK edges of a chunk at a time, or for all at once. What attributes add to
    // the t of these edges is in room.parts.
    template <class F>
    void each_block(const Chunk& chunk, const Group& g, Room& room, const F& f) const {
        const int64_t n = chunk.edges();
        if (!call.attr) {
            if (n) f(0, n);
            return;
        }
        if (n) pack_key_weights(g, room);
        for (int64_t from = 0; from < n; from += BLOCK) {
            const int64_t to = std::min(n, from + BLOCK);
            make_parts(chunk, g, from, to, room);
            f(from, to);
        }
    }

    // room.parts = attributes times their weights, of some edges
    FASTGT_APART void make_parts(const Chunk& chunk, const Group& g, int64_t from, int64_t to,
                                 Room& room) const {
        for (int64_t e = from; e < to; e++) {
            const int64_t next = room.edge[std::min(e + AHEAD, chunk.reach - 1)];
            __builtin_prefetch(call.attr.at<T>(next));
            const T* x = call.attr.at<T>(room.edge[e]);
            A* row = room.attr + (e - from) * wide_c;
            each_vector<A>(call.attr_width,
                           [&](int64_t c, int k) { store(row + c, load_some(x + c, k)); });
        }
        const Product<A> product{room.attr, wide_c, 1, room.key_w, line, room.parts, line};
        product.run(to - from, g.lanes * part, call.attr_width, false);
    }

    // From room.of_parts, the gradient of what attributes added, to those of the factors.
    FASTGT_APART void attribute_gradients(const Chunk& chunk, const Group& g, int64_t from,
                                          int64_t to, Room& room) const {
        const int64_t n = to - from;
        if (call.dattr)
            Product<A>{room.of_parts, line, 1, room.key_wt, wide_c, room.of_attr + from * wide_c,
                       wide_c}
                .run(n, call.attr_width, g.count * part, true);
        if (!call.dkey_weight) return;
        A* sums_of_task = partials + chunk.task * partial + (call.dweight ? call.heads * part : 0);
        for (int v = 0; v < g.count; v += g.in_a_row ? g.count : 1)
            Product<A>{room.attr, 1, wide_c, room.of_parts + v * part, line,
                       sums_of_task + g.head[v] * part, call.heads * part}
                .run(call.attr_width, (g.in_a_row ? g.count : 1) * part, n, true);
    }

    // ---- logits

    FASTGT_APART void logits(const Chunk& chunk, const Group& g, Room& room) const {
        if (narrow) {
            gather(chunk, g, room);
            each_block(chunk, g, room,
                       [&](int64_t from, int64_t to) { add_edges(g, from, to, room); });
            const V w = head_lanes(call.weight_row(), 0, g), slope = splat(A(call.slope));
            for (int64_t r = 0; r < chunk.count(); r++) {
                const int64_t at = room.ptr[r] * g.lanes;
                narrow_logits<A>(room.t + at, room.s + at, room.ptr[r + 1] * g.lanes - at,
                                 head_lanes(call.q, chunk.begin + r, g), w, slope);
            }
        } else {
            const int fold = fold_of(g);
            const Operands x = operands(call.q, call.k, chunk, g, fold, room);
            if (fold)
                with_form(g, fold, [&](auto lanes, auto heads) {
                    constexpr int HG = decltype(lanes)::value, F = decltype(heads)::value;
                    call.key ? logits_of<HG, F, true>(chunk, x, room)
                             : logits_of<HG, F, false>(chunk, x, room);
                });
            else
                each_block(chunk, g, room,
                           [&](int64_t from, int64_t to) { any_logits(g, from, to, x, room); });
        }
        if (!call.bias) return;
        for (int64_t e = 0; e < chunk.edges(); e++)
            for (int v = 0; v < g.count; v++)
                room.s[e * g.lanes + v] += load_one(call.bias.at<T>(room.edge[e], g.head[v]));
    }

    // What t is made of: what rows have, and what edges point at; and the weight.
    struct Operands {
        HeadParts<A> fixed;
        Pointed<T> other;
        Pointed<T> key;
        HeadParts<A> w;
        int fold;
    };

    Operands operands(const Array& own, const Array& others, const Chunk& chunk, const Group& g,
                      int fold, Room& room) const {
        fold = std::max(1, fold);
        Pointed<T> key{};
        if (call.key) {
            key = pointed(call.key, chunk, g, call.d, room);
            key.index = room.edge;
        }
        return {rows_of(own, chunk, g, call.d, fold, room.fixed),
                pointed(others, chunk, g, call.d, room), key,
                packed(call.weight_row(), 0, 1, g, call.d, fold, room.w), fold};
    }

    // s = w . leaky(t) of a chunk's edges
    template <int HG, int F, bool KEY>
    void logits_of(const Chunk& chunk, const Operands& x, Room& room) const {
        const V slope = splat(A(call.slope));
        products<A, HG, F, true>(
            chunk.edges(), A(1), false, room.s,
            [&](int64_t e, int v, bool) FASTGT_INLINED {
                V t = load(x.fixed.data + room.row[e] * x.fixed.stride + v * x.fixed.head) +
                      load(x.other.at(e) + x.other.offset[v * F]);
                if constexpr (KEY) t += load(x.key.at(e) + x.key.offset[v * F]);
                return load(x.w.data + v * x.w.head) * (t * slope_at<A>(t, slope));
            },
            [&](int64_t e) FASTGT_INLINED {
                unrolled<HG / F>([&](int v) FASTGT_INLINED {
                    ask<1>(x.other, e, v * F);
                    if constexpr (KEY) ask<1>(x.key, e, v * F);
                });
            });
    }

    // The same in any type and width, with what attributes add, of some edges. A head of an edge
    // counts as an edge of one head.
    FASTGT_APART void any_logits(const Group& g, int64_t from, int64_t to, const Operands& x,
                                 Room& room) const {
        const V slope = splat(A(call.slope));
        const int shift = __builtin_ctz(unsigned(g.lanes)), last = g.lanes - 1;
        products<A, 1, 1, false>(
            (to - from) << shift, A(1), false, room.s + (from << shift),
            [&](int64_t i, int, bool) FASTGT_INLINED {
                const int64_t e = from + (i >> shift);
                const int v = int(i) & last;
                const A* own = x.fixed.data + room.row[e] * x.fixed.stride + v * x.fixed.head;
                const T* y = x.other.at(e) + x.other.offset[v];
                const T* key = call.key ? x.key.at(e) + x.key.offset[v] : nullptr;
                const A* added =
                    call.attr ? room.parts + (e - from) * line + v * part : nullptr;
                const A* factor = x.w.data + v * x.w.head;
                V s{};
                each_vector<A>(call.d, [&](int64_t c, int n) FASTGT_INLINED {
                    V t = load(own + c) + load_some(y + c, n);
                    if (key) t += load_some(key + c, n);
                    if (added) t += load(added + c);
                    s += load(factor + c) * (t * slope_at<A>(t, slope));
                });
                return s;
            },
            [&](int64_t i) FASTGT_INLINED {
                const int64_t e = from + (i >> shift);
                ask<0>(x.other, e, int(i) & last);
                if (call.key) ask<0>(x.key, e, int(i) & last);
            });
    }

    // room.t = the keys that edges point at, [., H, 1]
    FASTGT_APART void gather(const Chunk& chunk, const Group& g, Room& room) const {
        const bool straight = std::is_same_v<T, A> && g.adjacent && call.k.head == 1;
        for (int64_t e = 0; e < chunk.edges(); e++) {
            const int64_t next = room.other[std::min(e + 2 * AHEAD, chunk.reach - 1)];
            __builtin_prefetch(call.k.at<T>(next, g.head[0]));
            A* to = room.t + e * g.lanes;
            if (straight)
                store(to, load((const A*)call.k.at<T>(room.other[e], g.head[0]), g.lanes), g.lanes);
            else
                for (int v = 0; v < g.lanes; v++)
                    to[v] = load_one(call.k.at<T>(room.other[e], g.head[v]));
        }
    }

    // to room.t what edges have besides
    void add_edges(const Group& g, int64_t from, int64_t to, Room& room) const {
        for (int64_t e = from; e < to; e++)
            for (int v = 0; v < g.count; v++) {
                A& t = room.t[e * g.lanes + v];
                if (call.key) t += load_one(call.key.at<T>(room.edge[e], g.head[v]));
                if (call.attr) t += room.parts[(e - from) * line + v];
            }
    }

    // The numbers of a group's heads, over and over.
    V head_lanes(const Array& x, int64_t row, const Group& g) const {
        A numbers[8] = {};
        for (int v = 0; v < g.count; v++) numbers[v] = load_one(x.at<T>(row, g.head[v]));
        return over_and_over<A>(numbers, g.lanes);
    }

    // ---- sums of values

    Products<T> value_products(const Array& x, const Group& g) const {
        return choose_products<T>(g.lanes, call.dv, g.adjacent && x.head == call.dv);
    }

    // to = the sums over rows of weights times what edges point at
    FASTGT_APART void weigh(const A* weights, const Chunk& chunk, const Group& g, const Array& x,
               const Array& to, bool clear, Room& room) const {
        const auto p = value_products(x, g);
        const bool there = in_place(to, g, call.dv, p.fold);
        HeadParts<A> sum = sums(g, call.dv, p.fold, room.sum);
        if (there) sum = {(A*)to.at<T>(chunk.begin, g.head[0]), to.row, p.fold > 1 ? W : to.head};
        p.spmm(weights, room.ptr, chunk.count(), pointed(x, chunk, g, call.dv, room), g.count, A(1),
               false, sum);
        if (there && !clear) return;
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int v = 0; v < g.count; v++) {
                T* row = to.at<T>(chunk.begin + r, g.head[v]);
                if (clear && is_dead(chunk.begin + r, g.head[v]))
                    std::memset((void*)row, 0, call.dv * sizeof(T));
                else if (!there)
                    write_times(row,
                                sum.data + r * sum.stride + place_of(sum, v, p.fold, call.dv),
                                call.dv, A(1));
            }
    }

    // The values' gradient, adding as spmm does, of the rows that have weights: it does not read
    // what stands upstream of the others, which may be NaN.
    FASTGT_APART void value_gradients_beside_dead_rows(const Chunk& chunk, const Group& g,
                                                       Room& room) const {
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
                    store_some(call.dv_.at<T>(chunk.begin + r, g.head[v]) + c, total, n);
                });
    }

    // ---- forward

    void forward_rows(const Chunk& chunk, const Group& g, Room& room) const {
        logits(chunk, g, room);
        room.any_dead = softmax_rows<A>(room.s, room.ptr, chunk.count(), g.lanes, room.lse);
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int v = 0; v < g.count; v++)
                call.lse.at<A>(chunk.begin + r)[g.head[v]] = room.lse[r * g.lanes + v];
        if (call.weights)
            for (int64_t e = 0; e < chunk.edges(); e++)
                for (int v = 0; v < g.count; v++)
                    store_one(call.weights.at<T>(room.edge[e], g.head[v]),
                              room.s[e * g.lanes + v]);
        if (call.seed) {
            keep(chunk, g, room);
            for (int64_t i = 0; i < chunk.edges() * g.lanes; i++) room.s[i] *= room.kept[i];
        }
        weigh(room.s, chunk, g, call.v, call.o, room.any_dead, room);
    }

    // ---- backward

    void backward_rows(const Chunk& chunk, const Group& g, int64_t kept_at, Room& room) const {
        const int64_t n = chunk.edges();
        logits(chunk, g, room);
        const auto p = value_products(call.v, g);
        p.sddmm(rows_of(call.d_o, chunk, g, call.dv, p.fold, room.d_o), room.row,
                pointed(call.v, chunk, g, call.dv, room), n, A(1), false, room.dp);
        if (call.seed) keep(chunk, g, room);
        softmax_rows_backward<A>(room.s, room.dp, room.ptr, chunk.count(), g.lanes,
                                 heads_of(call.lse, chunk, g, room.lse),
                                 heads_of(call.dlse, chunk, g, room.dlse),
                                 call.seed ? room.kept : nullptr);
        room.any_dead = any_dead(chunk, g, room);
        if (room.any_dead) dead_rows.store(true, std::memory_order_relaxed);
        if (call.dbias)
            for (int64_t e = 0; e < n; e++)
                for (int v = 0; v < g.count; v++)
                    store_one(call.dbias.at<T>(room.edge[e], g.head[v]), room.dp[e * g.lanes + v]);
        if (row_flow) row_gradients(chunk, g, room);
        if (!call.dk && !call.dv_) return;
        A* pair = pairs + (kept_at * rows.edges + chunk.from) * pair_size();
        for (int64_t e = 0; e < n; e++, pair += pair_size()) {
            store(pair, load(room.s + e * g.lanes, g.lanes), g.lanes);
            store(pair + g.lanes, load(room.dp + e * g.lanes, g.lanes), g.lanes);
        }
    }

    // dq, and the gradients of weights and of what stands on edges. Where D is 1, room.dp becomes
    // ds g.
    void row_gradients(const Chunk& chunk, const Group& g, Room& room) const {
        std::fill_n(room.of_w, most * wide_d, A(0));
        if (narrow) {
            const V w = head_lanes(call.weight_row(), 0, g), slope = splat(A(call.slope));
            V of_weight{};
            for (int64_t r = 0; r < chunk.count(); r++) {
                const int64_t at = room.ptr[r] * g.lanes, end = room.ptr[r + 1] * g.lanes;
                V of_q{};
                narrow_flow<A>(room.t + at, room.dp + at, end - at, slope, of_q, of_weight);
                if (call.dq) put_narrow(call.dq, chunk, r, g, w, of_q, room);
            }
            store(room.of_w, sum_of_heads<A>(of_weight, g.lanes), g.lanes);
            edge_gradients(chunk, g, room);
            add_weight_gradients(chunk, g, HeadParts<A>{room.of_w, 0, 1}, 1);
            return;
        }
        const int fold = fold_of(g);
        const Operands x = operands(call.q, call.k, chunk, g, fold, room);
        const auto sum = sums(g, call.d, x.fold, room.sum);
        std::fill_n(sum.data, chunk.count() * sum.stride, A(0));
        flow_of(chunk, g, fold, x, sum, true, room);
        put(chunk, g, x, sum, room.any_dead, call.dq, room);
        add_weight_gradients(chunk, g, HeadParts<A>{room.of_w, 0, x.w.head}, x.fold);
    }

    // The sums of ds g, in the form that fits.
    FASTGT_APART void flow_of(const Chunk& chunk, const Group& g, int fold, const Operands& x,
                              const HeadParts<A>& sum, bool of_rows, Room& room) const {
        if (fold)
            return with_form(g, fold, [&](auto lanes, auto heads) {
                constexpr int HG = decltype(lanes)::value, F = decltype(heads)::value;
                call.key ? flow<HG, F, true>(chunk, g, x, sum, of_rows, room)
                         : flow<HG, F, false>(chunk, g, x, sum, of_rows, room);
            });
        each_block(chunk, g, room, [&](int64_t from, int64_t to) {
            any_flow(g, from, to, x, sum, of_rows, room);
            if (of_rows && room.of_parts) attribute_gradients(chunk, g, from, to, room);
        });
    }

    // to = w times the sums; 0 where nothing was summed, whatever the weights are
    FASTGT_APART void put(const Chunk& chunk, const Group& g, const Operands& x,
                          const HeadParts<A>& sum, bool clear, const Array& to,
                          const Room& room) const {
        if (!to) return;
        for (int64_t r = 0; r < chunk.count(); r++)
            for (int v = 0; v < g.count; v++) {
                T* row = to.at<T>(chunk.begin + r, g.head[v]);
                if (room.ptr[r] == room.ptr[r + 1] ||
                    (clear && is_dead(chunk.begin + r, g.head[v]))) {
                    std::memset((void*)row, 0, call.d * sizeof(T));
                    continue;
                }
                const int64_t at = place_of(sum, v, x.fold, call.d);
                const A *total = sum.data + r * sum.stride + at, *w = x.w.data + at;
                each_vector<A>(call.d, [&](int64_t c, int n) FASTGT_INLINED {
                    store_some(row + c, load_some(total + c, n) * load_some(w + c, n), n);
                });
            }
    }

    void add_weight_gradients(const Chunk& chunk, const Group& g, const HeadParts<A>& of_w,
                              int fold) const {
        if (!call.dweight) return;
        A* to = partials + chunk.task * partial;
        for (int v = 0; v < g.count; v++) {
            const A* from = of_w.data + place_of(of_w, v, fold, call.d);
            for (int64_t c = 0; c < call.d; c++) to[g.head[v] * part + c] += from[c];
        }
    }

    // The sum of row r += ds g. For rows, room.of_w += ds g t, and the gradients of keys on edges.
    template <int HG, int F, bool KEY>
    void flow(const Chunk& chunk, const Group& g, const Operands& x, const HeadParts<A>& sum,
              bool of_rows, const Room& room) const {
        constexpr int VECTORS = HG / F;
        const V slope = splat(A(call.slope));
        const bool keys = KEY && of_rows && call.dkey;
        for (int64_t r = 0; r < chunk.count(); r++) {
            const int64_t to = room.ptr[r + 1];
            V own[VECTORS], total[VECTORS] = {}, weight_total[VECTORS] = {};
            unrolled<VECTORS>([&](int v) FASTGT_INLINED {
                own[v] = load(x.fixed.data + r * x.fixed.stride + v * x.fixed.head);
            });
            for (int64_t e = room.ptr[r]; e < to;) {
                V some[VECTORS] = {}, weight_some[VECTORS] = {};
                for (const int64_t stop = std::min(to, e + BLOCK); e < stop; e++) {
                    unrolled<VECTORS>([&](int v) FASTGT_INLINED {
                        ask<1>(x.other, e, v * F);
                        if constexpr (KEY) ask<1>(x.key, e, v * F);
                    });
                    const T* y = x.other.at(e);
                    unrolled<VECTORS>([&](int v) FASTGT_INLINED {
                        V t = own[v] + load(y + x.other.offset[v * F]);
                        if constexpr (KEY) t += load(x.key.at(e) + x.key.offset[v * F]);
                        const V c = weights_of<A, F>(room.dp + e * HG, v) * slope_at<A>(t, slope);
                        some[v] += c;
                        weight_some[v] += c * t;
                        if constexpr (KEY)
                            if (keys && v * F < g.count)
                                store(call.dkey.at<T>(room.edge[e], g.head[v * F]),
                                      c * load(x.w.data + v * x.w.head));
                    });
                }
                unrolled<VECTORS>([&](int v) FASTGT_INLINED {
                    total[v] += some[v];
                    weight_total[v] += weight_some[v];
                });
            }
            unrolled<VECTORS>([&](int v) FASTGT_INLINED {
                store(sum.data + r * sum.stride + v * sum.head, total[v]);
                A* of_w = room.of_w + v * sum.head;
                if (of_rows) store(of_w, load(of_w) + weight_total[v]);
            });
        }
    }

    // The same in any type and width, with what attributes add, of some edges.
    FASTGT_APART void any_flow(const Group& g, int64_t first, int64_t last, const Operands& x,
                               const HeadParts<A>& sum, bool of_rows, const Room& room) const {
        const V slope = splat(A(call.slope));
        const bool keys = of_rows && call.dkey, parts = of_rows && room.of_parts;
        for (int64_t r = room.row[first]; r <= room.row[last - 1]; r++) {
            const int64_t from = std::max(first, room.ptr[r]), to = std::min(last, room.ptr[r + 1]);
            for (int v = 0; v < g.count; v++) {
                const int h = g.head[v];
                auto channels = [&](auto count, int64_t c, int lanes) FASTGT_INLINED {
                    constexpr int N = decltype(count)::value;
                    V own[N], factor[N], total[N] = {}, weight_total[N] = {};
                    unrolled<N>([&](int i) FASTGT_INLINED {
                        own[i] = load(x.fixed.data + r * x.fixed.stride + v * x.fixed.head + c +
                                      i * W);
                        factor[i] = load(x.w.data + v * x.w.head + c + i * W);
                    });
                    for (int64_t e = from; e < to;) {
                        V some[N] = {}, weight_some[N] = {};
                        for (const int64_t stop = std::min(to, e + BLOCK); e < stop; e++) {
                            const int64_t ahead = std::min(e + AHEAD, x.other.reach - 1);
                            const T* y = x.other.at(e) + x.other.offset[v] + c;
                            const T* next = x.other.at(ahead) + x.other.offset[v] + c;
                            const T* key =
                                call.key ? x.key.at(e) + x.key.offset[v] + c : nullptr;
                            if (key) __builtin_prefetch(x.key.at(ahead) + x.key.offset[v] + c);
                            const int64_t at = (e - first) * line + v * part + c;
                            const V ds = splat(room.dp[e * g.lanes + v]);
                            unrolled<N>([&](int i) FASTGT_INLINED {
                                if (i * W * sizeof(T) % 64 == 0) __builtin_prefetch(next + i * W);
                                V t = own[i] + load_some(y + i * W, lanes);
                                if (key) t += load_some(key + i * W, lanes);
                                if (call.attr) t += load(room.parts + at + i * W);
                                const V d = ds * slope_at<A>(t, slope);
                                some[i] += d;
                                weight_some[i] += d * t;
                                if (keys)
                                    store_some(call.dkey.at<T>(room.edge[e], h) + c + i * W,
                                               d * factor[i], lanes);
                                if (parts) store(room.of_parts + at + i * W, d * factor[i]);
                            });
                        }
                        unrolled<N>([&](int i) FASTGT_INLINED {
                            total[i] += some[i];
                            weight_total[i] += weight_some[i];
                        });
                    }
                    unrolled<N>([&](int i) FASTGT_INLINED {
                        A* out = sum.data + r * sum.stride + v * sum.head + c + i * W;
                        store(out, load(out) + total[i]);
                        if (!of_rows) return;
                        A* of_w = room.of_w + v * x.w.head + c + i * W;
                        store(of_w, load(of_w) + weight_total[i]);
                    });
                };
                const std::integral_constant<int, 2> two;
                const std::integral_constant<int, 1> one;
                int64_t c = 0;
                for (; c + 2 * W <= call.d; c += 2 * W) channels(two, c, W);
                for (; c < call.d; c += W) channels(one, c, int(std::min<int64_t>(W, call.d - c)));
            }
        }
    }

    // to = w times the sum of a row's lanes
    void put_narrow(const Array& to, const Chunk& chunk, int64_t r, const Group& g, V w, V total,
                    const Room& room) const {
        const bool none = room.ptr[r] == room.ptr[r + 1];
        const V x = none ? V{} : sum_of_heads<A>(total, g.lanes) * w;
        for (int v = 0; v < g.count; v++) store_one(to.at<T>(chunk.begin + r, g.head[v]), x[v]);
    }

    // Where D is 1: of what stands on edges, w ds g.
    void edge_gradients(const Chunk& chunk, const Group& g, Room& room) const {
        if (!call.dkey && !room.of_parts) return;
        A w[8];
        for (int v = 0; v < g.count; v++) w[v] = load_one(call.weight_row().at<T>(0, g.head[v]));
        each_block(chunk, g, room, [&](int64_t from, int64_t to) {
            for (int64_t e = from; e < to; e++)
                for (int v = 0; v < g.count; v++) {
                    const A d = w[v] * room.dp[e * g.lanes + v];
                    if (call.dkey) store_one(call.dkey.at<T>(room.edge[e], g.head[v]), d);
                    if (room.of_parts) room.of_parts[(e - from) * line + v] = d;
                }
            if (room.of_parts) attribute_gradients(chunk, g, from, to, room);
        });
    }

    void backward_columns(const Chunk& chunk, const Group& g, int64_t kept_at, Room& room) const {
        const int64_t n = chunk.edges();
        const A* pair = pairs + kept_at * rows.edges * pair_size();
        for (int64_t e = 0; e < n; e++) {
            const int64_t ahead = std::min(e + 2 * AHEAD, chunk.reach - 1);
            __builtin_prefetch(pair + room.slot[ahead] * pair_size());
            const A* from = pair + room.slot[e] * pair_size();
            store(room.s + e * g.lanes, load(from, g.lanes), g.lanes);
            store(room.dp + e * g.lanes, load(from + g.lanes, g.lanes), g.lanes);
        }
        if (call.dv_ && dead_rows)
            value_gradients_beside_dead_rows(chunk, g, room);
        else if (call.dv_)
            weigh(room.s, chunk, g, call.d_o, call.dv_, false, room);
        if (call.dk) key_gradients(chunk, g, room);
    }

    void key_gradients(const Chunk& chunk, const Group& g, Room& room) const {
        if (narrow) {
            const V w = head_lanes(call.weight_row(), 0, g);
            for (int64_t r = 0; r < chunk.count(); r++) {
                const int64_t at = room.ptr[r] * g.lanes, end = room.ptr[r + 1] * g.lanes;
                const V total = sum_of_lanes<A>(room.dp + at, end - at);
                put_narrow(call.dk, chunk, r, g, w, total, room);
            }
            return;
        }
        const int fold = fold_of(g);
        const Operands x = operands(call.k, call.q, chunk, g, fold, room);
        const auto sum = sums(g, call.d, x.fold, room.sum);
        std::fill_n(sum.data, chunk.count() * sum.stride, A(0));
        flow_of(chunk, g, fold, x, sum, false, room);
        put(chunk, g, x, sum, false, call.dk, room);
    }

    // The gradients of the weights: the tasks' sums, in the order of the tasks.
    void add_partials() const {
        if (!partial) return;
        const int64_t step = 1024, tasks = row_tasks();
        each_task(call.threads, (partial + step - 1) / step, [&](int64_t block, int64_t) {
            const int64_t end = std::min(partial, (block + 1) * step);
            for (int64_t i = block * step; i < end; i++) {
                A total = 0;
                for (int64_t t = 0; t < tasks;) {
                    A some = 0;
                    for (const int64_t stop = std::min(tasks, t + BLOCK); t < stop; t++)
                        some += partials[t * partial + i];
                    total += some;
                }
                const int64_t line_of = i / (call.heads * part), c = i % part;
                if (c < call.d) put_weight(line_of, i / part % call.heads, c, total);
            }
        });
    }

    void put_weight(int64_t row, int64_t head, int64_t c, A x) const {
        if (!call.dweight)
            store_one(call.dkey_weight.at<T>(row, head) + c, x);
        else if (row)
            store_one(call.dkey_weight.at<T>(row - 1, head) + c, x);
        else
            store_one(call.dweight.at<T>(head) + c, x);
    }
};

template <class F> int64_t with_additive(const AdditiveCall& call, const F& f) {
    int64_t bytes = 0;
    with_type(call.dtype, [&](auto t) {
        Additive<decltype(t)> additive(call);
        bytes = additive.lay_out((char*)call.work.data);
        if (call.work) f(additive);
    });
    return bytes;
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t additive_attention_size() { return sizeof(AdditiveCall); }

FASTGT_EXPORT int64_t additive_attention_fwd(const AdditiveCall* call) {
    return with_additive(*call, [](auto& additive) { additive.run_forward(); });
}

FASTGT_EXPORT int64_t additive_attention_bwd(const AdditiveCall* call) {
    return with_additive(*call, [](auto& additive) { additive.run_backward(); });
}
