// Which weights dropout keeps: a function of seed, edge and head, as in fastgt/philox.py.
#pragma once

#include <cstdint>

namespace fastgt {

constexpr int PHILOX = 64;  // edges whose numbers are drawn side by side

// bits[i], its bit h: whether edge `first + i` keeps head 4 block + h. Philox-4x32-10.
inline void philox(uint64_t seed, int64_t first, uint32_t block, uint32_t threshold,
                   uint8_t bits[PHILOX]) {
    uint32_t c0[PHILOX], c1[PHILOX], c2[PHILOX], c3[PHILOX];
    for (int i = 0; i < PHILOX; i++) {
        c0[i] = uint32_t(first + i), c1[i] = uint32_t(uint64_t(first + i) >> 32);
        c2[i] = block, c3[i] = 0;
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        for (int i = 0; i < PHILOX; i++) {
            const uint64_t a = uint64_t(0xD2511F53u) * c0[i], b = uint64_t(0xCD9E8D57u) * c2[i];
            const uint32_t x = uint32_t(b >> 32) ^ c1[i] ^ k0, y = uint32_t(a >> 32) ^ c3[i] ^ k1;
            c0[i] = x, c1[i] = uint32_t(b), c2[i] = y, c3[i] = uint32_t(a);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < PHILOX; i++)
        bits[i] = uint8_t((c0[i] >> 8 >= threshold) | (c1[i] >> 8 >= threshold) << 1 |
                          (c2[i] >> 8 >= threshold) << 2 | (c3[i] >> 8 >= threshold) << 3);
}

}  // namespace fastgt
