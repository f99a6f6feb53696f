// Edges grouped by one of their ends: a counting sort, which keeps their order within a group.
#include "call.h"

namespace fastgt {
namespace {

struct GraphCall {
    int64_t edges, groups;
    int64_t wide_ends, wide;  // whether ends, and results, have 64 bits
    void *key, *other;        // [edges], the end that edges are grouped by and the other one
    void* number;             // [edges] like the results; null for None
    void *ptr, *ends, *order, *numbers;  // [groups + 1], [edges] each; numbers null for None
};

template <class E, class I> void group(const GraphCall& call) {
    const E *key = (const E*)call.key, *other = (const E*)call.other;
    const I* number = (const I*)call.number;
    I *ptr = (I*)call.ptr, *ends = (I*)call.ends, *order = (I*)call.order;
    I* numbers = (I*)call.numbers;
    std::fill_n(ptr, call.groups + 1, I(0));
    for (int64_t i = 0; i < call.edges; i++) ptr[key[i] + 1]++;
    for (int64_t g = 0; g < call.groups; g++) ptr[g + 1] += ptr[g];
    for (int64_t i = 0; i < call.edges; i++) {
        const I place = ptr[key[i]]++;
        ends[place] = I(other[i]);
        order[place] = I(i);
        if (number) numbers[place] = number[i];
    }
    // each group now begins where the one before it began
    std::copy_backward(ptr, ptr + call.groups, ptr + call.groups + 1);
    ptr[0] = 0;
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t graph_size() { return sizeof(GraphCall); }

FASTGT_EXPORT void graph_group(const GraphCall* call) {
    if (call->wide)
        call->wide_ends ? group<int64_t, int64_t>(*call) : group<int32_t, int64_t>(*call);
    else
        call->wide_ends ? group<int64_t, int32_t>(*call) : group<int32_t, int32_t>(*call);
}
