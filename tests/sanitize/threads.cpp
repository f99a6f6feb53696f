// A parallel_for on plain threads, whose begin and end ThreadSanitizer sees. It does not see those
// of OpenMP's threads, which PyTorch runs, and takes what they hand over for races.
#include <cstdint>
#include <thread>
#include <vector>

typedef void (*Body)(int64_t begin, int64_t end, void* context);

extern "C" int32_t plain_threads(int64_t begin, int64_t end, int64_t, Body body, void* context) {
    std::vector<std::thread> threads;
    for (int64_t t = begin; t < end; t++) threads.emplace_back(body, t, t + 1, context);
    for (std::thread& thread : threads) thread.join();
    return 0;
}
