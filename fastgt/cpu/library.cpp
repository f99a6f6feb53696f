// What the loader asks before any kernel runs.
#include "call.h"

#ifndef FASTGT_VERSION
#define FASTGT_VERSION "unknown"
#endif

namespace fastgt {
ParallelFor parallel_for = nullptr;
}

FASTGT_EXPORT const char* fastgt_version() { return FASTGT_VERSION; }

FASTGT_EXPORT int64_t fastgt_vector_bytes() { return fastgt::BYTES; }

FASTGT_EXPORT void fastgt_use_threads(fastgt::ParallelFor from_torch) {
    fastgt::parallel_for = from_torch;
}
