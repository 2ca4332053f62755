#pragma once

#include <vector>

#include "vectors.hpp"

typedef void (*Sgemm)(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*, const float*, const int*,
                      const float*, float*, const int*);

static Sgemm sgemm = nullptr;  // of the BLAS that torch has loaded

constexpr int LINE = 16;  // numbers of a line of the processor's cache

// Of COUNT rows of w, `inner` numbers each, the line with number `i`: it will be read soon.
template <int COUNT>
static inline __attribute__((always_inline)) void prefetch(const float* w, int inner, int i) {
    if (i % LINE == 0)
        for (int n = 0; n < COUNT; n++) __builtin_prefetch(w + static_cast<int64_t>(n) * inner + i);
}

// WEIGHTS columns of y from as many rows of w and ROWS rows of x: sums over whole vectors, the last few numbers padded.
// The rows of w behind these come from memory in the meantime.
template <int WEIGHTS, int ROWS>
static inline void tile(const float* w, const float* x, int inner, int64_t stride, float* y, bool add) {
    const float* ahead = w + static_cast<int64_t>(WEIGHTS) * inner;
    V sum[WEIGHTS][ROWS] = {};
    by_lanes(inner, [&](int i, int count) {
        V weight[WEIGHTS];
        for (int n = 0; n < WEIGHTS; n++) weight[n] = load(w + static_cast<int64_t>(n) * inner + i, count);
        prefetch<WEIGHTS>(ahead, inner, i);
        for (int m = 0; m < ROWS; m++) {
            V row = load(x + static_cast<int64_t>(m) * inner + i, count);
            for (int n = 0; n < WEIGHTS; n++) sum[n][m] += weight[n] * row;
        }
    });
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < WEIGHTS; n++) y[m * stride + n] = sum_of(sum[n][m])[0] + (add ? y[m * stride + n] : 0.0f);
}

// How many columns a tile of so many rows may have: its sums, its weights and one row stay in registers.
constexpr int columns_of(int rows) {
    int columns = 4;
    while (columns > 1 && rows * columns + columns + 1 > REGISTERS) columns--;
    return columns;
}

template <int ROWS>
static void tiles(int columns, int inner, const float* x, const float* w, int64_t stride, float* y, bool add) {
    constexpr int WEIGHTS = columns_of(ROWS);
    int n = 0;
    for (; n + WEIGHTS <= columns; n += WEIGHTS) tile<WEIGHTS, ROWS>(w + static_cast<int64_t>(n) * inner, x, inner, stride, y + n, add);
    for (; n < columns; n++) tile<1, ROWS>(w + static_cast<int64_t>(n) * inner, x, inner, stride, y + n, add);
}

// Three ways to multiply. BLAS packs its operands first, which pays from many rows on. DOTS reads a weight once, where
// nn.Linear keeps it, and sums along it: for few rows. STRIPS turns the rows over once, so that they lie side by side
// in vectors, and meets every number of a weight with all of them; both its sides must be whole vectors.
enum Way : int8_t { BLAS, DOTS, STRIPS };
constexpr int FEW = REGISTERS > 16 ? 8 : 4;  // rows of one tile
constexpr int VECTORS = REGISTERS > 16 ? 4 : 2, ABREAST = VECTORS * LANES;  // rows of one strip
constexpr int COLUMNS = 48, SPAN = 128;  // columns of one task; numbers of one sum

// Which way is fastest on this machine, by the numbers of a weight and by rows: kernels/choice.py measures it.
constexpr int SIZES = 4, ROWS = 8;
constexpr int64_t LARGEST[SIZES] = {1 << 14, 1 << 17, 1 << 20, INT64_MAX};
static Way ways[SIZES][ROWS];

static Way way_of(int64_t rows, int64_t numbers) {
    int size = 0, many = 0;
    while (numbers > LARGEST[size]) size++;
    while (many < ROWS && rows > 1 << many) many++;
    return many < ROWS ? ways[size][many] : BLAS;
}

static void (*const by_rows[])(int, int, const float*, const float*, int64_t, float*, bool) = {
    nullptr, tiles<1>, tiles<2>, tiles<3>, tiles<4>, tiles<5>, tiles<6>, tiles<7>, tiles<8>};

// y[j][i] = x[i][j], a square, of which the first `down` rows of x and the first `across` of y are there
static inline void turn_over(const float* x, int64_t x_stride, int down, float* y, int64_t y_stride, int across, bool add = false) {
    V square[LANES];
    for (int i = 0; i < LANES; i++) square[i] = i < down ? load(x + i * x_stride) : V{};
    transpose(square);
    for (int j = 0; j < LANES; j++)
        if (j < across) store(y + j * y_stride, add ? load(y + j * y_stride) + square[j] : square[j]);
}

// y [WEIGHTS, ABREAST] = so many rows of w against VECTORS x LANES rows of x, which lie turned over, [inner, ABREAST];
// summed in spans, whose sums are summed: one long sum would lose digits that BLAS keeps
template <int WEIGHTS, int VECTORS>
static inline void meet_rows(const float* w, const float* x, int inner, float* y) {
    const float* ahead = w + static_cast<int64_t>(WEIGHTS) * inner;
    for (int begin = 0; begin < inner; begin += SPAN) {
        const int end = std::min(begin + SPAN, inner);
        V sum[WEIGHTS][VECTORS] = {};
        for (int i = begin; i < end; i++) {
            V rows[VECTORS];
            for (int m = 0; m < VECTORS; m++) rows[m] = load(x + static_cast<int64_t>(i) * ABREAST + m * LANES);
            for (int n = 0; n < WEIGHTS; n++)
                for (int m = 0; m < VECTORS; m++) sum[n][m] += w[static_cast<int64_t>(n) * inner + i] * rows[m];
            prefetch<WEIGHTS>(ahead, inner, i);
        }
        for (int n = 0; n < WEIGHTS; n++)
            for (int m = 0; m < VECTORS; m++) {
                float* place = y + n * ABREAST + m * LANES;
                store(place, begin ? load(place) + sum[n][m] : sum[n][m]);
            }
    }
}

// COLUMNS columns of y, or fewer, for up to ABREAST rows
template <int VECTORS>
static void meet_columns(const float* w, int columns, const float* x, int inner, float* y) {
    constexpr int WEIGHTS = VECTORS == 1 ? 12 : VECTORS == 2 ? (REGISTERS > 16 ? 12 : 6) : VECTORS == 3 ? 8 : 6;  // sums that fit the registers
    int n = 0;
    for (; n + WEIGHTS <= columns; n += WEIGHTS) {
        meet_rows<WEIGHTS, VECTORS>(w + static_cast<int64_t>(n) * inner, x, inner, y + n * ABREAST);
    }
    for (; n < columns; n++) meet_rows<1, VECTORS>(w + static_cast<int64_t>(n) * inner, x, inner, y + n * ABREAST);
}

static void (*const by_vectors[])(const float*, int, const float*, int, float*) = {
    nullptr, meet_columns<1>, meet_columns<2>, meet_columns<std::min(3, VECTORS)>, meet_columns<VECTORS>};

static void product_strips(int rows, int columns, int inner, const float* x, const float* w, float* y, bool add, int threads) {
    static thread_local std::vector<float> turned;
    const int pieces = (rows + ABREAST - 1) / ABREAST;
    turned.resize(static_cast<size_t>(pieces) * inner * ABREAST + LANES * LANES);
    float* all = turned.data();
    for (int m = 0; m < rows; m += LANES)
        for (int i = 0; i < inner; i += LANES) {
            float* place = all + (static_cast<int64_t>(m / ABREAST) * inner + i) * ABREAST + m % ABREAST;
            turn_over(x + static_cast<int64_t>(m) * inner + i, inner, std::min(LANES, rows - m), place, ABREAST, std::min(LANES, inner - i));
        }
#pragma omp parallel for num_threads(crew(threads, static_cast<int64_t>(rows) * columns * inner / 8))
    for (int n = 0; n < columns; n += COLUMNS) {
        alignas(64) float said[COLUMNS * ABREAST];
        const int here = std::min(COLUMNS, columns - n);
        for (int piece = 0; piece < pieces; piece++) {
            const int first = piece * ABREAST, some = std::min(ABREAST, rows - first);
            by_vectors[(some + LANES - 1) / LANES](w + static_cast<int64_t>(n) * inner, here, all + static_cast<int64_t>(first) * inner, inner, said);
            for (int m = 0; m < some; m += LANES)
                for (int j = 0; j < here; j += LANES)
                    turn_over(said + j * ABREAST + m, ABREAST, std::min(LANES, here - j), y + static_cast<int64_t>(first + m) * columns + n + j, columns, std::min(LANES, some - m), add);
        }
    }
}

// y = x w^T (+ y), with w [columns, inner]; BLAS counts columns first
static void product_blas(int rows, int columns, int inner, const float* x, const float* w, float* y, bool add) {
    const float one = 1.0f, kept = add ? 1.0f : 0.0f;
    sgemm("T", "N", &columns, &rows, &inner, &one, w, &inner, x, &inner, &kept, y, &columns);
}

static void product_dots(int rows, int columns, int inner, const float* x, const float* w, float* y, bool add, int threads) {
#pragma omp parallel for num_threads(crew(threads, static_cast<int64_t>(rows) * columns * inner / 8))
    for (int n = 0; n < columns; n += COLUMNS)
        for (int64_t m = 0; m < rows; m += FEW)
            by_rows[std::min<int64_t>(FEW, rows - m)](
                std::min(COLUMNS, columns - n), inner, x + m * inner, w + static_cast<int64_t>(n) * inner, columns, y + m * columns + n, add);
}

// y = x w^T (+ y), with w [columns, inner] as nn.Linear keeps it
static void product(Way way, int rows, int columns, int inner, const float* x, const float* w, float* y, bool add, int threads) {
    const bool even = columns % LANES == 0 && inner % LANES == 0;
    if (way == STRIPS && even) return product_strips(rows, columns, inner, x, w, y, add, threads);
    if (way == DOTS) return product_dots(rows, columns, inner, x, w, y, add, threads);
    product_blas(rows, columns, inner, x, w, y, add);
}

static void product(int rows, int columns, int inner, const float* x, const float* w, float* y, bool add, int threads = 1) {
    product(way_of(rows, static_cast<int64_t>(columns) * inner), rows, columns, inner, x, w, y, add, threads);
}

// y = a b, with b [inner, columns]
static void product_plain(int rows, int columns, int inner, const float* a, const float* b, float* y) {
    const float one = 1.0f, none = 0.0f;
    sgemm("N", "N", &columns, &rows, &inner, &one, b, &columns, a, &inner, &none, y, &columns);
}

// y [across, columns] = a^T b, with a [rows, across] and b [rows, columns]
static void product_across(int across, int columns, int rows, const float* a, const float* b, float* y) {
    const float one = 1.0f, none = 0.0f;
    sgemm("N", "T", &columns, &across, &rows, &one, b, &columns, a, &across, &none, y, &columns);
}
