// Rows of a stream go, one after another, to the rank that owns most of what they read.
#include "call.h"

namespace fastgt {
namespace {

struct PartitionCall {
    int64_t rows, first;    // of this chunk: how many, and the number of the first
    int64_t parts, claims;  // whether a row's rank gets the columns that nobody owns yet
    int64_t wide;           // whether `row_ptr` and `col` have 64 bits
    int64_t row_cost;       // edges that a row costs as much as, beside its own
    double capacity;        // cost of a rank at which it attracts no more
    void *row_ptr, *col;    // [rows + 1], from any number on; the columns of the edges from there on
    void *row_part, *col_part;  // int32, of the whole graph, -1 where nobody owns it yet
    void *cost, *members;       // [parts] of 64 bits, as are all below: what ranks have so far
    void *count, *touched;      // [parts] each: zeros, and memory to work in
    void *by_cost, *by_rows;   // [2 * parts] each, memory to work in
};

constexpr int64_t AHEAD = 16;  // edges for which owners are asked for before they are needed

// The rank that has least, under changes of one rank at a time.
template <class Less> struct Least {
    int64_t* node;  // the children of i are 2 i and 2 i + 1, the leaves begin at `parts`
    int64_t parts;
    Less less;

    Least(void* memory, int64_t parts, Less less)
        : node((int64_t*)memory), parts(parts), less(less) {
        for (int64_t p = 0; p < parts; p++) node[parts + p] = p;
        for (int64_t i = parts - 1; i > 0; i--) renew(i);
    }
    void renew(int64_t i) {
        node[i] = less(node[2 * i], node[2 * i + 1]) ? node[2 * i] : node[2 * i + 1];
    }
    void changed(int64_t p) {
        for (int64_t i = (parts + p) / 2; i > 0; i /= 2) renew(i);
    }
    int64_t find() const { return node[1]; }
};

template <class I> void stream(const PartitionCall& call) {
    const I *row_ptr = (const I*)call.row_ptr, *col = (const I*)call.col;
    int32_t *row_part = (int32_t*)call.row_part, *col_part = (int32_t*)call.col_part;
    int64_t *cost = (int64_t*)call.cost, *members = (int64_t*)call.members;
    int64_t *count = (int64_t*)call.count, *touched = (int64_t*)call.touched;
    const auto less_cost = [=](int64_t p, int64_t q) {
        if (cost[p] != cost[q]) return cost[p] < cost[q];
        return members[p] != members[q] ? members[p] < members[q] : p < q;
    };
    const auto fewer_rows = [=](int64_t p, int64_t q) {
        if (members[p] != members[q]) return members[p] < members[q];
        return cost[p] != cost[q] ? cost[p] < cost[q] : p < q;
    };
    Least by_cost(call.by_cost, call.parts, less_cost);
    Least by_rows(call.by_rows, call.parts, fewer_rows);
    const int64_t end = row_ptr[call.rows] - row_ptr[0];
    for (int64_t r = 0; r < call.rows; r++) {
        const int64_t from = row_ptr[r] - row_ptr[0], to = row_ptr[r + 1] - row_ptr[0];
        int64_t distinct = 0;
        for (int64_t e = from; e < to; e++) {
            if (e + AHEAD < end) __builtin_prefetch(col_part + col[e + AHEAD]);
            const int32_t owner = col_part[col[e]];
            if (owner >= 0 && count[owner]++ == 0) touched[distinct++] = owner;
        }
        // of ranks that own nothing of it, the first of these is the best
        int64_t best = from == to && !call.row_cost ? by_rows.find() : by_cost.find();
        const auto score = [&](int64_t p) {
            return double(count[p]) * (1.0 - double(cost[p]) / call.capacity);
        };
        double most = score(best);
        for (int64_t t = 0; t < distinct; t++) {
            const int64_t p = touched[t];
            const double own = score(p);
            if (own > most || (own == most && less_cost(p, best))) best = p, most = own;
        }
        for (int64_t t = 0; t < distinct; t++) count[touched[t]] = 0;
        row_part[call.first + r] = int32_t(best);
        if (call.claims)
            for (int64_t e = from; e < to; e++)
                if (col_part[col[e]] < 0) col_part[col[e]] = int32_t(best);
        cost[best] += to - from + call.row_cost;
        members[best]++;
        by_cost.changed(best);
        by_rows.changed(best);
    }
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t partition_size() { return sizeof(PartitionCall); }

FASTGT_EXPORT void partition_stream(const PartitionCall* call) {
    call->wide ? stream<int64_t>(*call) : stream<int32_t>(*call);
}
