// Which numbers dropout keeps: a function of seed and counters, as in fastgt/philox.py.
#pragma once

#include <cstdint>

namespace fastgt {

constexpr int PHILOX = 64;  // counters whose words are drawn side by side

// Counters of four words each, and after `philox` what became of them.
struct Words {
    uint32_t word[4][PHILOX];

    void count(int i, uint64_t number, uint32_t block) {
        word[0][i] = uint32_t(number), word[1][i] = uint32_t(number >> 32);
        word[2][i] = block, word[3][i] = 0;
    }
};

// Philox-4x32-10
inline void philox(uint64_t seed, Words& words) {
    auto& [c0, c1, c2, c3] = words.word;
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
}

// bits[i], its bit h: whether the edge `number(i)` keeps head 4 block + h.
template <class F>
void draw_heads(uint64_t seed, const F& number, uint32_t block, uint32_t threshold,
                uint8_t bits[PHILOX]) {
    Words words;
    for (int i = 0; i < PHILOX; i++) words.count(i, uint64_t(number(i)), block);
    philox(seed, words);
    const auto& [c0, c1, c2, c3] = words.word;
    for (int i = 0; i < PHILOX; i++)
        bits[i] = uint8_t((c0[i] >> 8 >= threshold) | (c1[i] >> 8 >= threshold) << 1 |
                          (c2[i] >> 8 >= threshold) << 2 | (c3[i] >> 8 >= threshold) << 3);
}

// bits[i], its bit h: whether the edge `number(i)` keeps head first + h.
template <class F>
void draw_some_heads(uint64_t seed, const F& number, int64_t first, uint32_t threshold,
                     uint8_t bits[PHILOX]) {
    const uint32_t block = uint32_t(first / 4);
    const int begin = int(first % 4);
    draw_heads(seed, number, block, threshold, bits);
    if (!begin) return;
    uint8_t rest[PHILOX];
    draw_heads(seed, number, block + 1, threshold, rest);
    for (int i = 0; i < PHILOX; i++)
        bits[i] = uint8_t((bits[i] >> begin | rest[i] << (4 - begin)) & 15);
}

}  // namespace fastgt
