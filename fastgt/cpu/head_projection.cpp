// head_projection: active heads that do not stand one after another, copied together and back.
//
// The products are PyTorch's: there is nothing to gain on them.
#include "call.h"

namespace fastgt {
namespace {

struct HeadProjectionCall {
    int64_t threads, nodes, heads, active, bytes;  // of a number
    int64_t width;
    const int64_t* order;  // the active heads, then those that are masked
    Array wide;            // [N, H, D]
    Array together;        // [N, active, D]
};

constexpr int64_t NODES = 256;  // of a task

// f(wide, together): the places of a node's active head; or of a masked one, which has no second
template <class F> void each_head(const HeadProjectionCall& call, int64_t heads, const F& f) {
    auto at = [&](const Array& x, int64_t n, int64_t h) {
        return (char*)x.data + (n * x.row + h * x.head) * call.bytes;
    };
    each_task(call.threads, (call.nodes + NODES - 1) / NODES, [&](int64_t t, int64_t) {
        for (int64_t n = t * NODES; n < std::min((t + 1) * NODES, call.nodes); n++)
            for (int64_t i = 0; i < heads; i++)
                f(at(call.wide, n, call.order[i]),
                  i < call.active ? at(call.together, n, i) : nullptr);
    });
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t head_projection_size() { return sizeof(HeadProjectionCall); }

FASTGT_EXPORT void head_projection_take(const HeadProjectionCall* call) {
    const int64_t size = call->width * call->bytes;
    each_head(*call, call->active, [=](char* wide, char* together) {
        std::memcpy(together, wide, size);
    });
}

// masked heads get zeros
FASTGT_EXPORT void head_projection_put(const HeadProjectionCall* call) {
    const int64_t size = call->width * call->bytes;
    each_head(*call, call->heads, [=](char* wide, char* together) {
        if (together)
            std::memcpy(wide, together, size);
        else
            std::memset(wide, 0, size);
    });
}
