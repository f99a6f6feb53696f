// Whether arrays of a file are those of a graph. Nothing is read beyond them, whatever they hold.
#include "call.h"

namespace fastgt {
namespace {

struct GraphFileCall {
    int64_t rows, cols, edges;
    int64_t wide;                // whether indices have 64 bits
    void *row_ptr, *col, *edge;  // [rows + 1], [edges] each
    void* ptr;                   // [cols + 1]; null where the file has no column walk
    void *row, *slot, *number;   // [edges] each, of the column walk
    void *seen, *sound;          // [edges] bytes to work in; [1] byte, the answer
};

template <class I> bool are_boundaries(const I* ptr, int64_t size, int64_t total) {
    bool sound = ptr[0] == 0 && ptr[size] == total;
    for (int64_t i = 0; i < size; i++) sound &= ptr[i] <= ptr[i + 1];
    return sound;
}

template <class I> bool are_rows(const GraphFileCall& call) {
    const I *col = (const I*)call.col, *edge = (const I*)call.edge;
    if (!are_boundaries((const I*)call.row_ptr, call.rows, call.edges)) return false;
    bool sound = true;
    for (int64_t t = 0; t < call.edges; t++) sound &= col[t] >= 0 && col[t] < call.cols;
    uint8_t* seen = (uint8_t*)call.seen;
    std::fill_n(seen, call.edges, uint8_t(0));
    for (int64_t t = 0; t < call.edges; t++) {
        if (edge[t] < 0 || edge[t] >= call.edges || seen[edge[t]]) return false;
        seen[edge[t]] = 1;
    }
    return sound;
}

// The column walk has every slot of the rows once, with the edge that stands there.
template <class I> bool are_columns(const GraphFileCall& call) {
    const I *row_ptr = (const I*)call.row_ptr, *col = (const I*)call.col;
    const I *edge = (const I*)call.edge, *ptr = (const I*)call.ptr, *row = (const I*)call.row;
    const I *slot = (const I*)call.slot, *number = (const I*)call.number;
    if (!are_boundaries(ptr, call.cols, call.edges)) return false;
    uint8_t* seen = (uint8_t*)call.seen;
    std::fill_n(seen, call.edges, uint8_t(0));
    for (int64_t j = 0; j < call.cols; j++)
        for (int64_t s = ptr[j]; s < ptr[j + 1]; s++) {
            const int64_t t = slot[s], i = row[s];
            if (t < 0 || t >= call.edges || seen[t] || i < 0 || i >= call.rows) return false;
            if (t < row_ptr[i] || t >= row_ptr[i + 1] || col[t] != j || number[s] != edge[t])
                return false;
            seen[t] = 1;
        }
    return true;
}

template <class I> bool is_sound(const GraphFileCall& call) {
    return are_rows<I>(call) && (!call.ptr || are_columns<I>(call));
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t graph_file_size() { return sizeof(GraphFileCall); }

FASTGT_EXPORT void graph_file_check(const GraphFileCall* call) {
    *(bool*)call->sound = call->wide ? is_sound<int64_t>(*call) : is_sound<int32_t>(*call);
}
