// row_dropout: y = x times 0 or 1 / (1 - p), as Philox says for the row's number and the channel.
#include "call.h"
#include "philox.h"

namespace fastgt {
namespace {

struct RowDropoutCall {
    int64_t dtype, threads, rows, width;
    Array x, y;           // contiguous
    Array seed, numbers;  // of rows; null: their own
    int64_t threshold;    // a channel is kept where its 24 random bits are not below it
    double growth;        // of the kept channels
};

constexpr int64_t STEP = 1 << 11;  // counters of a task, for 4 channels each

template <class T> void drop(const RowDropoutCall& call) {
    using A = Accumulator<T>;
    const int64_t blocks = (call.width + 3) / 4, counters = call.rows * blocks;
    const uint64_t seed = *(const uint64_t*)call.seed.data;
    const int64_t* numbers = (const int64_t*)call.numbers.data;
    const uint32_t threshold = uint32_t(call.threshold);
    const A growth = A(call.growth);
    expect_writes(call.y.data, call.rows * call.width * int64_t(sizeof(T)));
    each_task(call.threads, (counters + STEP - 1) / STEP, [&](int64_t task, int64_t) {
        const int64_t end = std::min(counters, (task + 1) * STEP);
        for (int64_t at = task * STEP; at < end; at += PHILOX) {
            Words words;
            int channels[PHILOX];
            int64_t row = at / blocks, block = at % blocks;
            const int64_t from = row * call.width + 4 * block;
            for (int i = 0; i < PHILOX; i++) {
                const bool there = at + i < end;
                const int64_t number = there && numbers ? numbers[row] : row;
                words.count(i, uint64_t(number), uint32_t(block));
                channels[i] = there ? int(std::min<int64_t>(4, call.width - 4 * block)) : 0;
                if (++block == blocks) block = 0, row++;
            }
            philox(seed, words);
            A drawn[4][PHILOX], factor[4 * PHILOX + 4];
            for (int w = 0; w < 4; w++)
                for (int i = 0; i < PHILOX; i++)
                    drawn[w][i] = words.word[w][i] >> 8 >= threshold ? growth : A(0);
            int64_t count = 0;
            for (int i = 0; i < PHILOX; i++) {
                // the next counter's channels come in place of those beyond the row
                for (int w = 0; w < 4; w++) factor[count + w] = drawn[w][i];
                count += channels[i];
            }
            const T* x = call.x.at<T>(0) + from;
            T* y = call.y.at<T>(0) + from;
            each_vector<A>(count, [&](int64_t c, int n) FASTGT_INLINED {
                store_some(y + c, load_some(x + c, n) * load_some(factor + c, n), n);
            });
        }
    });
}

}  // namespace
}  // namespace fastgt

using namespace fastgt;

FASTGT_EXPORT int64_t row_dropout_size() { return sizeof(RowDropoutCall); }

FASTGT_EXPORT void row_dropout_fwd(const RowDropoutCall* call) {
    with_type(call->dtype, [&](auto t) { drop<decltype(t)>(*call); });
}
