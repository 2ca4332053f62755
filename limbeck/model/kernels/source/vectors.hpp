// Vectors of float32, as wide as one register of the processor that is compiled for, in the vector extensions that GCC
// and Clang share. AVX-512: 16 numbers and 32 registers; AVX2 with FMA: 8 and 16; NEON: 4 and 32; SSE2, the floor: 4 and 16.
// LANES is how many numbers lie side by side; REGISTERS bounds the tiles of sums that a loop keeps.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float V __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t I __attribute__((vector_size(4 * LANES), aligned(4)));

// Lanes of x and y by their numbers; those of y begin at LANES. GCC has Clang's builtin since its release 12 only.
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, I{__VA_ARGS__})
#endif

typedef std::make_integer_sequence<int, LANES> Lanes;

static inline V load(const float* x) { return *reinterpret_cast<const V*>(x); }
static inline void store(float* x, V value) { *reinterpret_cast<V*>(x) = value; }
static inline int whole(int count) { return (count + LANES - 1) / LANES * LANES; }

static inline V load(const float* x, int count) {
    if (count == LANES) return load(x);
    V value = {};
    std::memcpy(&value, x, count * sizeof(float));
    return value;
}

static inline void store(float* x, V value, int count) {
    if (count == LANES) return store(x, value);
    std::memcpy(x, &value, count * sizeof(float));
}

// `function` of where each LANES of `width` numbers begin, and how many there are: the last may be fewer
template <typename Function>
static inline void by_lanes(int width, Function function) {
    int i = 0;
    for (; i + LANES <= width; i += LANES) function(i, LANES);
    if (i < width) function(i, width - i);
}

// Threads for so many multiplications or reads: for little work none is woken, as torch does it.
static inline int crew(int threads, int64_t work) { return work < 1 << 15 ? 1 : threads; }

// How many vectors side by side, four at most, `rows` rows may each be multiplied with in one tile: a sum for every
// pair, the vectors, and the number that multiplies them stay in registers.
constexpr int abreast(int rows) {
    int vectors = 4;
    while (vectors > 1 && rows * vectors + vectors + 1 > REGISTERS) vectors /= 2;
    return vectors;
}

// e^x, x <= 88: Cephes' polynomial; relative error below 2e-7, and 0 below -87, for minus infinity too
static inline V exponential(V x) {
    V kept = x < -87.0f ? V{} - 87.0f : x;
    V turns = kept * 1.44269504088896341f;
    I nearest = __builtin_convertvector(turns + (turns < 0.0f ? V{} - 0.5f : V{} + 0.5f), I);
    V n = __builtin_convertvector(nearest, V);
    V r = kept - n * 0.693359375f + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    I bits = (nearest + 127) << 23;
    V power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? V{} : p * power;
}

static inline V sigmoid(V x) {
    V small = exponential(x < 0.0f ? x : -x), share = 1.0f / (1.0f + small);
    return x < 0.0f ? small * share : share;
}

static inline V larger(V x, V y) { return x > y ? x : y; }

// Each lane changes places with the one whose number differs in the bit STRIDE.
template <int STRIDE, int... L>
static inline V exchanged(V x, std::integer_sequence<int, L...>) {
    return SHUFFLE(x, x, (L ^ STRIDE)...);
}

// Every lane becomes the sum, or the largest, of all.
template <int STRIDE = LANES / 2>
static inline V sum_of(V x) {
    x += exchanged<STRIDE>(x, Lanes());
    if constexpr (STRIDE > 1) x = sum_of<STRIDE / 2>(x);
    return x;
}

template <int STRIDE = LANES / 2>
static inline V most_of(V x) {
    x = larger(x, exchanged<STRIDE>(x, Lanes()));
    if constexpr (STRIDE > 1) x = most_of<STRIDE / 2>(x);
    return x;
}

template <int... L>
static inline I lanes_of(std::integer_sequence<int, L...>) {
    return I{L...};
}

// x[j ..] where from <= j < to, elsewhere minus infinity
static inline V between(const float* x, int j, int from, int to) {
    const I lane = lanes_of(Lanes());
    I inside = (lane + j >= from) & (lane + j < to);
    return inside ? load(x + j) : V{} - INFINITY;
}

// x[j] for from <= j < to becomes its share of the sum of e^x, zero elsewhere from `low` to `end`, which are whole
// vectors; returns the logarithm of that sum.
static inline float soften(float* x, int low, int end, int from, int to) {
    V most = V{} - INFINITY, sum = {};
    for (int j = low; j < end; j += LANES) {
        V here = between(x, j, from, to);
        store(x + j, here);
        most = larger(most, here);
    }
    most = most_of(most);
    for (int j = low; j < end; j += LANES) {
        V e = exponential(load(x + j) - most);
        store(x + j, e);
        sum += e;
    }
    sum = sum_of(sum);
    V share = 1.0f / sum;
    for (int j = low; j < end; j += LANES) store(x + j, load(x + j) * share);
    return most[0] + std::log(sum[0]);
}

// Of rows x and y that are STRIDE apart in a square: the lanes that stay below the diagonal's bit STRIDE, and those above.
template <int STRIDE, int... L>
static inline void swap_lanes(V& x, V& y, std::integer_sequence<int, L...>) {
    V low = SHUFFLE(x, y, (L & STRIDE ? L - STRIDE + LANES : L)...);
    y = SHUFFLE(x, y, (L & STRIDE ? L + LANES : L + STRIDE)...);
    x = low;
}

// A square of LANES rows, turned over by swapping ever larger blocks (Eklundh 1972).
template <int STRIDE = 1>
static inline void transpose(V (&square)[LANES]) {
    for (int i = 0; i < LANES; i++)
        if (!(i & STRIDE)) swap_lanes<STRIDE>(square[i], square[i + STRIDE], Lanes());
    if constexpr (STRIDE < LANES / 2) transpose<STRIDE * 2>(square);
}
