// Edges of some rows, all or as many as were asked for, and their nodes in a numbering of their own.
#include <cstring>

#include "call.h"

namespace fastgt {
namespace {

struct GraphSampleCall {
    int64_t rows, edges, num_nodes;
    int64_t fanout, replace;  // edges of a row, negative for all; whether one may be there twice
    int64_t drawing;          // how many rows draw
    int64_t wide;             // whether the graph's indices, and `source`, have 64 bits
    void *row_ptr, *col, *edge;  // of the graph
    void* nodes;                 // [rows] of 64 bits, as are all below but `source` and `place`
    void* ptr;                   // [rows + 1]
    void* draws;                 // [fanout, drawing] of double, from 0 to below 1
    void *source, *number;       // [edges], the node and the number of each edge
    void* total;                 // [1], how many rows draw, or how many nodes there are
    void *seen, *place;          // [num_nodes], bytes and indices
    void* found;                 // [rows + edges, or num_nodes], nodes by their new numbers
};

bool draws(const GraphSampleCall& call, int64_t degree) {
    if (call.fanout <= 0) return false;
    return call.replace ? degree > 0 : degree > call.fanout;
}

// Where the edges of each row begin in the sample.
template <class I> void measure(const GraphSampleCall& call) {
    const I* row_ptr = (const I*)call.row_ptr;
    const int64_t* nodes = (const int64_t*)call.nodes;
    int64_t *ptr = (int64_t*)call.ptr, drawing = 0;
    ptr[0] = 0;
    for (int64_t i = 0; i < call.rows; i++) {
        const int64_t degree = row_ptr[nodes[i] + 1] - row_ptr[nodes[i]];
        const bool drawn = draws(call, degree);
        const bool all = call.fanout < 0 || (!drawn && call.fanout > 0);
        ptr[i + 1] = ptr[i] + (all ? degree : call.fanout);
        drawing += drawn;
    }
    *(int64_t*)call.total = drawing;
}

// Floyd's numbers, as fastgt/graph_sample.py draws them from the same random ones.
template <class I> void draw(const GraphSampleCall& call) {
    const I *row_ptr = (const I*)call.row_ptr, *col = (const I*)call.col;
    const I* edge = (const I*)call.edge;
    const int64_t *nodes = (const int64_t*)call.nodes, *ptr = (const int64_t*)call.ptr;
    const double* random = (const double*)call.draws;
    I* source = (I*)call.source;
    int64_t* number = (int64_t*)call.number;
    for (int64_t i = 0; i < call.rows; i++) {
        const int64_t begin = row_ptr[nodes[i]], degree = row_ptr[nodes[i] + 1] - begin;
        int64_t* slot = number + ptr[i];
        const int64_t count = ptr[i + 1] - ptr[i];
        if (!draws(call, degree)) {
            for (int64_t k = 0; k < count; k++) slot[k] = begin + k;
        } else {
            for (int64_t k = 0; k < count; k++) {
                const int64_t last = call.replace ? degree - 1 : degree - count + k;
                const double place = random[k * call.drawing] * double(last + 1);
                const int64_t pick = begin + std::min(int64_t(place), last);
                const bool again = !call.replace && std::find(slot, slot + k, pick) != slot + k;
                slot[k] = again ? begin + last : pick;
            }
            random++;
        }
        for (int64_t e = ptr[i]; e < ptr[i + 1]; e++) {
            source[e] = col[number[e]];
            number[e] = int64_t(edge[number[e]]);
        }
    }
}

// The nodes, then those at the edges that are not among them, in order; edges have new numbers.
template <class I> void renumber(const GraphSampleCall& call) {
    const int64_t* nodes = (const int64_t*)call.nodes;
    int64_t* found = (int64_t*)call.found;
    I *source = (I*)call.source, *place = (I*)call.place;
    uint8_t* seen = (uint8_t*)call.seen;
    std::fill_n(seen, call.num_nodes, uint8_t(0));  // there may be none
    for (int64_t e = 0; e < call.edges; e++) seen[source[e]] = 1;
    int64_t count = 0;
    for (; count < call.rows; count++) {
        found[count] = nodes[count];
        seen[nodes[count]] = 0;
        place[nodes[count]] = I(count);
    }
    for (int64_t v = 0; v < call.num_nodes;) {
        uint64_t eight = 1;
        if (v + 8 <= call.num_nodes) std::memcpy(&eight, seen + v, 8);
        const int64_t end = eight ? std::min(v + 8, call.num_nodes) : v;
        for (int64_t w = v; w < end; w++)
            if (seen[w]) {
                place[w] = I(count);
                found[count++] = w;
            }
        v += 8;
    }
    for (int64_t e = 0; e < call.edges; e++) source[e] = place[source[e]];
    *(int64_t*)call.total = count;
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t graph_sample_size() { return sizeof(GraphSampleCall); }

FASTGT_EXPORT void graph_sample_measure(const GraphSampleCall* call) {
    call->wide ? measure<int64_t>(*call) : measure<int32_t>(*call);
}

FASTGT_EXPORT void graph_sample_draw(const GraphSampleCall* call) {
    call->wide ? draw<int64_t>(*call) : draw<int32_t>(*call);
}

FASTGT_EXPORT void graph_sample_renumber(const GraphSampleCall* call) {
    call->wide ? renumber<int64_t>(*call) : renumber<int32_t>(*call);
}
