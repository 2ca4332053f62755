// What PyTorch does in many passes over memory on a CPU, in one: the parts of a dense decoder that are not matrix
// products, and a whole step of decoding. Matrix products are those of the BLAS that torch has loaded.
//
// N tokens · B rows · T positions · H heads · K key/value heads · G = H / K · D head size · I intermediate size.
// Everything is float32 and row-major; a stride counts floats. Every kernel has a twin in plain torch, its oracle.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

typedef float V16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t I16 __attribute__((vector_size(64), aligned(4)));
typedef void (*Sgemm)(const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*, const float*, const int*,
                      const float*, float*, const int*);

static Sgemm sgemm = nullptr;
constexpr int LANES = 16, QUERIES = 8;  // keys side by side; queries that share what was loaded

static inline V16 load(const float* x) { return *reinterpret_cast<const V16*>(x); }
static inline void store(float* x, V16 value) { *reinterpret_cast<V16*>(x) = value; }
static inline int whole(int count) { return (count + LANES - 1) / LANES * LANES; }

// e^x, x <= 88: Cephes' polynomial; relative error below 2e-7, and 0 below -87, for minus infinity too
static inline V16 exponential(V16 x) {
    V16 kept = x < -87.0f ? V16{} - 87.0f : x;
    V16 turns = kept * 1.44269504088896341f;
    I16 nearest = __builtin_convertvector(turns + (turns < 0.0f ? V16{} - 0.5f : V16{} + 0.5f), I16);
    V16 n = __builtin_convertvector(nearest, V16);
    V16 r = kept - n * 0.693359375f + n * 2.12194440e-4f;
    V16 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    I16 bits = (nearest + 127) << 23;
    V16 power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? V16{} : p * power;
}

static inline V16 sigmoid(V16 x) {
    V16 small = exponential(x < 0.0f ? x : -x), share = 1.0f / (1.0f + small);
    return x < 0.0f ? small * share : share;
}

// Every lane becomes the sum, or the largest, of all.
static inline V16 sum_of(V16 x) {
    x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x + __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}

static inline V16 larger(V16 x, V16 y) { return x > y ? x : y; }

static inline V16 most_of(V16 x) {
    x = larger(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = larger(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return larger(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
}

// x[j ..] where from <= j < to, elsewhere minus infinity
static inline V16 between(const float* x, int j, int from, int to) {
    const I16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    I16 inside = (lane + j >= from) & (lane + j < to);
    return inside ? load(x + j) : V16{} - INFINITY;
}

// `function` of where each sixteen of `width` numbers begin, and how many there are: the last may be fewer
template <typename Function>
static inline void by_lanes(int width, Function function) {
    int i = 0;
    for (; i + LANES <= width; i += LANES) function(i, LANES);
    if (i < width) function(i, width - i);
}

static inline V16 load(const float* x, int count) {
    if (count == LANES) return load(x);
    V16 value = {};
    std::memcpy(&value, x, count * sizeof(float));
    return value;
}

static inline void store(float* x, V16 value, int count) {
    if (count == LANES) return store(x, value);
    std::memcpy(x, &value, count * sizeof(float));
}

// x[j] for from <= j < to becomes its share of the sum of e^x, zero elsewhere from `low` to `end`, which are whole
// vectors; returns the logarithm of that sum.
static inline float soften(float* x, int low, int end, int from, int to) {
    V16 most = V16{} - INFINITY, sum = {};
    for (int j = low; j < end; j += LANES) {
        V16 here = between(x, j, from, to);
        store(x + j, here);
        most = larger(most, here);
    }
    most = most_of(most);
    for (int j = low; j < end; j += LANES) {
        V16 e = exponential(load(x + j) - most);
        store(x + j, e);
        sum += e;
    }
    sum = sum_of(sum);
    V16 share = 1.0f / sum;
    for (int j = low; j < end; j += LANES) store(x + j, load(x + j) * share);
    return most[0] + std::log(sum[0]);
}

// WEIGHTS columns of y from as many rows of w and ROWS rows of x: sums over whole vectors, the last few numbers padded.
template <int WEIGHTS, int ROWS>
static inline void tile(const float* w, const float* x, int inner, int64_t stride, float* y, bool add) {
    V16 sum[WEIGHTS][ROWS] = {};
    by_lanes(inner, [&](int i, int count) {
        V16 weight[WEIGHTS];
        for (int n = 0; n < WEIGHTS; n++) weight[n] = load(w + static_cast<int64_t>(n) * inner + i, count);
        for (int m = 0; m < ROWS; m++) {
            V16 row = load(x + static_cast<int64_t>(m) * inner + i, count);
            for (int n = 0; n < WEIGHTS; n++) sum[n][m] += weight[n] * row;
        }
    });
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < WEIGHTS; n++) y[m * stride + n] = sum_of(sum[n][m])[0] + (add ? y[m * stride + n] : 0.0f);
}

template <int ROWS>
static void tiles(int columns, int inner, const float* x, const float* w, int64_t stride, float* y, bool add) {
    constexpr int WEIGHTS = ROWS <= 5 ? 4 : 3;  // sums that fit the registers
    int n = 0;
    for (; n + WEIGHTS <= columns; n += WEIGHTS) tile<WEIGHTS, ROWS>(w + static_cast<int64_t>(n) * inner, x, inner, stride, y + n, add);
    for (; n < columns; n++) tile<1, ROWS>(w + static_cast<int64_t>(n) * inner, x, inner, stride, y + n, add);
}

// Up to so many rows, what counts is to read a large weight once: MKL reaches half of that. More rows lie side by
// side in vectors, turned on their side once, and meet weights where nn.Linear keeps them: nothing of those is
// packed, as BLAS does, for every product anew. From so many rows on BLAS's packing pays.
constexpr int FEW = 8, MANY = 128, LARGE = 1 << 17;
constexpr int ABREAST = 4 * LANES, COLUMNS = 48, SPAN = 128;  // rows of one piece; columns of one task; numbers of one sum
static void (*const by_rows[])(int, int, const float*, const float*, int64_t, float*, bool) = {
    nullptr, tiles<1>, tiles<2>, tiles<3>, tiles<4>, tiles<5>, tiles<6>, tiles<7>, tiles<8>};

// y[j][i] = x[i][j], sixteen by sixteen, of which the first `down` rows of x and the first `across` of y are there
static inline void turn_over(const float* x, int64_t x_stride, int down, float* y, int64_t y_stride, int across, bool add = false) {
    V16 r[LANES];
    for (int i = 0; i < LANES; i++) r[i] = i < down ? load(x + i * x_stride) : V16{};
    V16 t[LANES];
    for (int i = 0; i < LANES; i += 2) {
        t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
        t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = i; j < i + 2; j++) {
            r[j] = __builtin_shufflevector(t[j], t[j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            r[j + 2] = __builtin_shufflevector(t[j], t[j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    for (int i = 0; i < LANES; i += 8)
        for (int j = i; j < i + 4; j++) {
            t[j] = __builtin_shufflevector(r[j], r[j + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
            t[j + 4] = __builtin_shufflevector(r[j], r[j + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
        }
    for (int j = 0; j < LANES; j++) {
        V16 column = j < 8 ? __builtin_shufflevector(t[j], t[j + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
                           : __builtin_shufflevector(t[j - 8], t[j], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        if (j < across) store(y + j * y_stride, add ? load(y + j * y_stride) + column : column);
    }
}

// y [WEIGHTS, ABREAST] = so many rows of w against VECTORS x 16 rows of x, which lie turned over, [inner, ABREAST];
// summed in spans, whose sums are summed: one long sum would lose digits that BLAS keeps
template <int WEIGHTS, int VECTORS>
static inline void meet_rows(const float* w, const float* ahead, const float* x, int inner, float* y) {
    for (int begin = 0; begin < inner; begin += SPAN) {
        const int end = std::min(begin + SPAN, inner);
        V16 sum[WEIGHTS][VECTORS] = {};
        for (int i = begin; i < end; i++) {
            V16 rows[VECTORS];
            for (int m = 0; m < VECTORS; m++) rows[m] = load(x + static_cast<int64_t>(i) * ABREAST + m * LANES);
            for (int n = 0; n < WEIGHTS; n++)
                for (int m = 0; m < VECTORS; m++) sum[n][m] += w[static_cast<int64_t>(n) * inner + i] * rows[m];
            if (i % LANES == 0)
                for (int n = 0; n < WEIGHTS; n++) __builtin_prefetch(ahead + static_cast<int64_t>(n) * inner + i);
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
    constexpr int WEIGHTS = VECTORS == 4 ? 6 : VECTORS == 3 ? 8 : 12;  // sums that fit the registers
    int n = 0;
    for (; n + WEIGHTS <= columns; n += WEIGHTS) {
        const float* here = w + static_cast<int64_t>(n) * inner;
        meet_rows<WEIGHTS, VECTORS>(here, here + static_cast<int64_t>(WEIGHTS) * inner, x, inner, y + n * ABREAST);
    }
    for (; n < columns; n++) meet_rows<1, VECTORS>(w + static_cast<int64_t>(n) * inner, w, x, inner, y + n * ABREAST);
}

static void (*const by_vectors[])(const float*, int, const float*, int, float*) = {
    nullptr, meet_columns<1>, meet_columns<2>, meet_columns<3>, meet_columns<4>};

static void product_abreast(int rows, int columns, int inner, const float* x, const float* w, float* y, bool add, int threads) {
    static thread_local std::vector<float> turned;
    const int pieces = (rows + ABREAST - 1) / ABREAST;
    turned.resize(static_cast<size_t>(pieces) * inner * ABREAST + LANES * LANES);
    float* all = turned.data();
    for (int m = 0; m < rows; m += LANES)
        for (int i = 0; i < inner; i += LANES) {
            float* place = all + (static_cast<int64_t>(m / ABREAST) * inner + i) * ABREAST + m % ABREAST;
            turn_over(x + static_cast<int64_t>(m) * inner + i, inner, std::min(LANES, rows - m), place, ABREAST, std::min(LANES, inner - i));
        }
#pragma omp parallel for num_threads(threads) if (threads > 1)
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

// y = x w^T (+ y), with w [columns, inner] as nn.Linear keeps it
static void product(int rows, int columns, int inner, const float* x, const float* w, float* y, bool add, int threads = 1) {
    const bool small = static_cast<int64_t>(columns) * inner < LARGE, even = columns % LANES == 0 && inner % LANES == 0;
    if (rows > FEW && rows <= MANY && even) return product_abreast(rows, columns, inner, x, w, y, add, threads);
    if (rows > 2 * FEW || small) {
        const float one = 1.0f, kept = add ? 1.0f : 0.0f;
        return sgemm("T", "N", &columns, &rows, &inner, &one, w, &inner, x, &inner, &kept, y, &columns);  // BLAS counts columns first
    }
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int n = 0; n < columns; n += COLUMNS)
        for (int64_t m = 0; m < rows; m += FEW)
            by_rows[std::min<int64_t>(FEW, rows - m)](
                std::min(COLUMNS, columns - n), inner, x + m * inner, w + static_cast<int64_t>(n) * inner, columns, y + m * columns + n, add);
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

static inline float normalize(const float* __restrict x, const float* weight, float eps, int width, float* __restrict y) {
    float square = 0;
    for (int i = 0; i < width; i++) square += x[i] * x[i];
    float scale = 1.0f / std::sqrt(square / width + eps);
    for (int i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
    return scale;
}

// rotary positions, or with sense -1 the way back; `sin` bears rotate-half's sign
static inline void turn(const float* __restrict x, const float* cos, const float* sin, float sense, int width, float* __restrict y) {
    int half = width / 2;
    for (int i = 0; i < half; i++) {
        float low = x[i], high = x[i + half];
        y[i] = low * cos[i] + sense * high * sin[i];
        y[i + half] = high * cos[i + half] + sense * low * sin[i + half];
    }
}

static inline void swiglu_row_backward(const float* grad, const float* gate_up, int width, float* dgate_up) {
    by_lanes(width, [&](int i, int count) {
        V16 mine = load(grad + i, count), x = load(gate_up + i, count), s = sigmoid(x);
        store(dgate_up + width + i, mine * x * s, count);
        store(dgate_up + i, mine * load(gate_up + width + i, count) * s * (1.0f + x * (1.0f - s)), count);
    });
}

static inline void swiglu_row(const float* gate_up, int width, float* y) {
    by_lanes(width, [&](int i, int count) {
        V16 gate = load(gate_up + i, count);
        store(y + i, gate * sigmoid(gate) * load(gate_up + width + i, count), count);
    });
}

// ---------------------------------------------------------------- attention over whole sequences

// A tree of sequences: `trunk` begins it, every branch goes on from the trunk's end, and sees it and itself.
struct Trees {
    int count;
    const int32_t *trunk, *trunk_length, *first_branch, *branch, *branch_length;
};

struct Heads {
    const float *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;
    int heads, kv_heads, width, window;
    float scale;
};

// Keys and values of one head, copied from where they lie: as rows and as columns, padded to whole vectors.
struct Keys {
    int width, vectors, room;
    std::vector<float> k, v, kt, vt, dk, dv;

    Keys(int width, int longest, bool backward) : width(width), vectors(whole(width) / LANES), room(whole(longest) + LANES) {
        size_t rows = static_cast<size_t>(room) * vectors * LANES, columns = static_cast<size_t>(width) * room;
        v.resize(rows), kt.resize(columns);
        if (backward) k.resize(rows), vt.resize(columns), dk.resize(rows), dv.resize(rows);
    }

    void take(const Heads& h, int head, int64_t token, int place, int length) {
        int padded = vectors * LANES;
        for (int j = 0; j < length; j++) {
            const float *kj = h.k + (token + j) * h.k_stride + head * width, *vj = h.v + (token + j) * h.v_stride + head * width;
            std::memcpy(&v[static_cast<size_t>(place + j) * padded], vj, width * sizeof(float));
            for (int d = 0; d < width; d++) kt[static_cast<size_t>(d) * room + place + j] = kj[d];
            if (k.empty()) continue;
            std::memcpy(&k[static_cast<size_t>(place + j) * padded], kj, width * sizeof(float));
            for (int d = 0; d < width; d++) vt[static_cast<size_t>(d) * room + place + j] = vj[d];
        }
        if (!dk.empty()) {
            std::fill_n(&dk[static_cast<size_t>(place) * padded], static_cast<size_t>(length) * padded, 0.0f);
            std::fill_n(&dv[static_cast<size_t>(place) * padded], static_cast<size_t>(length) * padded, 0.0f);
        }
    }
};

// out[q][j] = scale x <rows[q], column j of `columns`>, for j from `low` in whole vectors until `high`
static void against(const float* const* rows, int count, const float* columns, int room, int width, int low, int high, float scale, float* out) {
    for (int j = low; j < high; j += LANES) {
        V16 sum[QUERIES] = {};
        for (int d = 0; d < width; d++) {
            V16 column = load(columns + static_cast<size_t>(d) * room + j);
            for (int q = 0; q < QUERIES; q++) sum[q] += rows[q][d] * column;
        }
        for (int q = 0; q < count; q++) store(out + static_cast<size_t>(q) * room + j, sum[q] * scale);
    }
}

// out[q] = sum over j of weights[q][j] x row j, one vector of the rows at a time
template <int VECTORS>
static void along(const float* weights, int room, const float* rows, int padded, int low, int high, float* out) {
    V16 sum[QUERIES][VECTORS] = {};
    for (int j = low; j < high; j++) {
        V16 row[VECTORS];
        for (int n = 0; n < VECTORS; n++) row[n] = load(rows + static_cast<size_t>(j) * padded + n * LANES);
        for (int q = 0; q < QUERIES; q++) {
            float weight = weights[static_cast<size_t>(q) * room + j];
            for (int n = 0; n < VECTORS; n++) sum[q][n] += weight * row[n];
        }
    }
    for (int q = 0; q < QUERIES; q++)
        for (int n = 0; n < VECTORS; n++) store(out + q * padded + n * LANES, sum[q][n]);
}

static void along(int vectors, const float* weights, int room, const float* rows, int padded, int low, int high, float* out) {
    for (int n = 0; n < vectors;) {
        bool two = n + 2 <= vectors;
        (two ? along<2> : along<1>)(weights, room, rows + n * LANES, padded, low, high, out + n * LANES);
        n += two ? 2 : 1;
    }
}

// row j of `rows` += sum over q of weights[q][j] x from[q]
static void spread(int vectors, const float* weights, int room, const float* from, int padded, int low, int high, float* rows) {
    for (int n = 0; n < vectors; n++) {
        V16 mine[QUERIES];
        for (int q = 0; q < QUERIES; q++) mine[q] = load(from + q * padded + n * LANES);
        for (int j = low; j < high; j++) {
            float* row = rows + static_cast<size_t>(j) * padded + n * LANES;
            V16 sum = load(row);
            for (int q = 0; q < QUERIES; q++) sum += weights[static_cast<size_t>(q) * room + j] * mine[q];
            store(row, sum);
        }
    }
}

// Up to QUERIES neighbouring queries of one head: who they are and what they may look at.
struct Block {
    int64_t token;  // the first query's
    int place, count, low, high;  // its position in the tree's path; keys [low, high) in whole vectors from below
    int from[QUERIES];

    Block(int64_t token, int place, int count, int window) : token(token), place(place), count(count) {
        for (int q = 0; q < count; q++) from[q] = window ? std::max(0, place + q - window + 1) : 0;
        low = from[0] / LANES * LANES;
        high = place + count;
    }
};

// Probabilities of a block into `p`; where `lse` is not known yet it is found, and kept.
static void softmax(const Block& block, float* p, int room, float* lse, int64_t lse_stride, bool known) {
    int end = whole(block.high);
    for (int q = 0; q < QUERIES; q++) {
        float* row = p + static_cast<size_t>(q) * room;
        if (q >= block.count) {
            std::fill(row + block.low, row + end, 0.0f);
            continue;
        }
        int from = block.from[q], to = block.place + q + 1;
        if (!known) {
            lse[q * lse_stride] = soften(row, block.low, end, from, to);
            continue;
        }
        for (int j = block.low; j < end; j += LANES) store(row + j, exponential(between(row, j, from, to) - lse[q * lse_stride]));
    }
}

struct Scratch {
    std::vector<float> p, ds, q, grad, out;
    Scratch(int room, int padded, bool backward) : p(static_cast<size_t>(QUERIES) * room), q(QUERIES * padded), out(QUERIES * padded) {
        if (backward) ds.resize(p.size()), grad.resize(q.size());
    }
};

static void rows_of(const float* x, int64_t stride, int count, int width, int padded, float* into, const float** rows) {
    for (int q = 0; q < QUERIES; q++) {
        float* row = into + q * padded;
        if (q < count) std::memcpy(row, x + q * stride, width * sizeof(float));
        else std::fill_n(row, padded, 0.0f);
        rows[q] = row;
    }
}

static void attend_forward(const Heads& h, Keys& keys, Scratch& s, int head, int64_t token, int place, int length, float* out, float* lse) {
    int padded = keys.vectors * LANES;
    const float* rows[QUERIES];
    for (int i = 0; i < length; i += QUERIES) {
        Block block(token + i, place + i, std::min(QUERIES, length - i), h.window);
        rows_of(h.q + block.token * h.q_stride + head * h.width, h.q_stride, block.count, h.width, padded, s.q.data(), rows);
        against(rows, block.count, keys.kt.data(), keys.room, h.width, block.low, block.high, h.scale, s.p.data());
        softmax(block, s.p.data(), keys.room, lse + block.token * h.heads + head, h.heads, false);
        along(keys.vectors, s.p.data(), keys.room, keys.v.data(), padded, block.low, block.high, s.out.data());
        for (int q = 0; q < block.count; q++)
            std::memcpy(out + ((block.token + q) * h.heads + head) * h.width, &s.out[q * padded], h.width * sizeof(float));
    }
}

static void attend_backward(
    const Heads& h, Keys& keys, Scratch& s, int head, int64_t token, int place, int length, const float* grad, float* lse, float* dq) {
    int padded = keys.vectors * LANES, room = keys.room;
    const float *rows[QUERIES], *grads[QUERIES];
    for (int i = 0; i < length; i += QUERIES) {
        Block block(token + i, place + i, std::min(QUERIES, length - i), h.window);
        int64_t across = static_cast<int64_t>(h.heads) * h.width, begin = block.token * across + head * h.width;
        rows_of(h.q + block.token * h.q_stride + head * h.width, h.q_stride, block.count, h.width, padded, s.q.data(), rows);
        rows_of(grad + begin, across, block.count, h.width, padded, s.grad.data(), grads);
        against(rows, block.count, keys.kt.data(), room, h.width, block.low, block.high, h.scale, s.p.data());
        softmax(block, s.p.data(), room, lse + block.token * h.heads + head, h.heads, true);
        against(grads, block.count, keys.vt.data(), room, h.width, block.low, block.high, 1.0f, s.ds.data());
        int end = whole(block.high);
        for (int q = 0; q < QUERIES; q++) {
            float *p = &s.p[static_cast<size_t>(q) * room], *ds = &s.ds[static_cast<size_t>(q) * room];
            if (q >= block.count) {
                std::fill(ds + block.low, ds + end, 0.0f);
                continue;
            }
            V16 along = {};
            for (int j = block.low; j < end; j += LANES) along += load(p + j) * load(ds + j);
            V16 delta = sum_of(along);
            for (int j = block.low; j < end; j += LANES) store(ds + j, load(p + j) * (load(ds + j) - delta) * h.scale);
        }
        along(keys.vectors, s.ds.data(), room, keys.k.data(), padded, block.low, block.high, s.out.data());
        for (int q = 0; q < block.count; q++) std::memcpy(dq + begin + q * across, &s.out[q * padded], h.width * sizeof(float));
        spread(keys.vectors, s.p.data(), room, s.grad.data(), padded, block.low, block.high, keys.dv.data());
        spread(keys.vectors, s.ds.data(), room, s.q.data(), padded, block.low, block.high, keys.dk.data());
    }
}

// The trunk of a tree, then its branches: each one's first token, its place on the path, its length, and whether it is the trunk.
template <typename Visit>
static void walk(const Trees& trees, int t, Visit visit) {
    visit(static_cast<int64_t>(trees.trunk[t]), 0, trees.trunk_length[t], true);
    for (int b = trees.first_branch[t]; b < trees.first_branch[t + 1]; b++)
        visit(static_cast<int64_t>(trees.branch[b]), trees.trunk_length[t], trees.branch_length[b], false);
}

static int longest_path(const Trees& trees) {
    int longest = 0;
    for (int t = 0; t < trees.count; t++) {
        longest = std::max(longest, trees.trunk_length[t]);
        for (int b = trees.first_branch[t]; b < trees.first_branch[t + 1]; b++)
            longest = std::max(longest, trees.trunk_length[t] + trees.branch_length[b]);
    }
    return longest;
}

extern "C" {

void use_sgemm(void* function) { sgemm = reinterpret_cast<Sgemm>(function); }

// out [N, H, D], lse [N, H]
void attention_forward(const Trees* trees, const Heads* h, float* out, float* lse, int threads) {
    int group = h->heads / h->kv_heads, width = h->width, longest = longest_path(*trees);
#pragma omp parallel num_threads(threads)
    {
        Keys keys(width, longest, false);
        Scratch scratch(keys.room, keys.vectors * LANES, false);
#pragma omp for collapse(2) schedule(dynamic)
        for (int t = 0; t < trees->count; t++)
            for (int head = 0; head < h->kv_heads; head++)
                walk(*trees, t, [&](int64_t token, int place, int length, bool) {
                    keys.take(*h, head, token, place, length);
                    for (int g = 0; g < group; g++) attend_forward(*h, keys, scratch, head * group + g, token, place, length, out, lse);
                });
    }
}

// dq [N, H, D], dk and dv [N, K, D]
void attention_backward(const Trees* trees, const Heads* h, const float* grad, float* lse, float* dq, float* dk, float* dv, int threads) {
    int group = h->heads / h->kv_heads, width = h->width, longest = longest_path(*trees);
#pragma omp parallel num_threads(threads)
    {
        Keys keys(width, longest, true);
        int padded = keys.vectors * LANES;
        Scratch scratch(keys.room, padded, true);
        auto give = [&](int head, int64_t token, int place, int length) {
            for (int j = 0; j < length; j++) {
                int64_t to = ((token + j) * h->kv_heads + head) * width;
                std::memcpy(dk + to, &keys.dk[static_cast<size_t>(place + j) * padded], width * sizeof(float));
                std::memcpy(dv + to, &keys.dv[static_cast<size_t>(place + j) * padded], width * sizeof(float));
            }
        };
#pragma omp for collapse(2) schedule(dynamic)
        for (int t = 0; t < trees->count; t++)
            for (int head = 0; head < h->kv_heads; head++) {
                walk(*trees, t, [&](int64_t token, int place, int length, bool root) {
                    keys.take(*h, head, token, place, length);
                    for (int g = 0; g < group; g++)
                        attend_backward(*h, keys, scratch, head * group + g, token, place, length, grad, lse, dq);
                    if (!root) give(head, token, place, length);
                });
                give(head, trees->trunk[t], 0, trees->trunk_length[t]);  // once every branch has added to it
            }
    }
}

// ---------------------------------------------------------------- row by row

void norm_forward(const float* x, const float* weight, float eps, int64_t rows, int width, float* y, float* scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; n++) scale[n] = normalize(x + n * width, weight, eps, width, y + n * width);
}

// dx [rows, width]; dweight [threads, width], one a thread, zero at first
void norm_backward(const float* grad, const float* x, const float* weight, const float* scale, int64_t rows, int width, float* dx, float* dweight,
                   int threads) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int t = 0; t < threads; t++) {
        float* mine = dweight + static_cast<int64_t>(t) * width;
        for (int64_t n = rows * t / threads; n < rows * (t + 1) / threads; n++) {
            const float *g = grad + n * width, *xn = x + n * width;
            float along = 0, s = scale[n];
            for (int i = 0; i < width; i++) {
                along += g[i] * weight[i] * xn[i];
                mine[i] += g[i] * xn[i] * s;
            }
            along *= s * s / width;
            for (int i = 0; i < width; i++) dx[n * width + i] = s * (g[i] * weight[i] - xn[i] * along);
        }
    }
}

void swiglu_forward(const float* gate_up, int64_t rows, int width, float* y, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; n++) swiglu_row(gate_up + n * 2 * width, width, y + n * width);
}

void swiglu_backward(const float* grad, const float* gate_up, int64_t rows, int width, float* dgate_up, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; n++) swiglu_row_backward(grad + n * width, gate_up + n * 2 * width, width, dgate_up + n * 2 * width);
}

// y [N, heads, D] from x, whose rows lie `stride` apart; cos and sin [N, D]
void rotate(const float* x, int64_t stride, const float* cos, const float* sin, float sense, int64_t rows, int heads, int width, float* y,
            int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < rows; n++)
        for (int head = 0; head < heads; head++)
            turn(x + n * stride + head * width, cos + n * width, sin + n * width, sense, width, y + (n * heads + head) * width);
}

}  // extern "C"

// ---------------------------------------------------------------- a mixture of experts

// E experts; row m of M = N x K, sorted by expert, is choice `order[m]` of N x K, and those of expert e end at `ends[e]`.
struct Experts {
    int64_t tokens, count, top_k, hidden, width, threads;
    const float *x, *gate_up, *down, *weights;  // [N, C], [E, 2I, C], [E, C, I], [N, K]
    const int64_t *order, *ends;
    float* both;  // [M, 2I]: kept from forward to backward
};

struct Rows {  // those of one expert
    int64_t begin, end;
    int count;
    Rows(const Experts& e, int64_t expert) : begin(expert ? e.ends[expert - 1] : 0), end(e.ends[expert]), count(end - begin) {}
};

static void gather(const Experts& e, const Rows& rows, const float* from, std::vector<float>& into) {
    into.resize(static_cast<size_t>(rows.count) * e.hidden);
    for (int i = 0; i < rows.count; i++)
        std::memcpy(&into[static_cast<size_t>(i) * e.hidden], from + e.order[rows.begin + i] / e.top_k * e.hidden, e.hidden * sizeof(float));
}

static void weighted(const Experts& e, const Rows& rows, std::vector<float>& inner) {
    inner.resize(static_cast<size_t>(rows.count) * e.width);
    for (int i = 0; i < rows.count; i++) {
        float* row = &inner[static_cast<size_t>(i) * e.width];
        float weight = e.weights[e.order[rows.begin + i]];
        swiglu_row(e.both + (rows.begin + i) * 2 * e.width, e.width, row);
        for (int j = 0; j < e.width; j++) row[j] *= weight;
    }
}

// Rows [M, C] back to their tokens, summed over each token's K.
static void settle(const Experts& e, const std::vector<float>& rows, float* y) {
    std::vector<int64_t> back(e.tokens * e.top_k);
    for (int64_t m = 0; m < e.tokens * e.top_k; m++) back[e.order[m]] = m;
#pragma omp parallel for num_threads(e.threads)
    for (int64_t n = 0; n < e.tokens; n++) {
        float* mine = y + n * e.hidden;
        std::memcpy(mine, &rows[back[n * e.top_k] * e.hidden], e.hidden * sizeof(float));
        for (int64_t k = 1; k < e.top_k; k++) {
            const float* row = &rows[back[n * e.top_k + k] * e.hidden];
            for (int64_t i = 0; i < e.hidden; i++) mine[i] += row[i];
        }
    }
}

extern "C" {

void experts_forward(const Experts* experts, float* y) {
    const Experts& e = *experts;
    std::vector<float> out(static_cast<size_t>(e.tokens) * e.top_k * e.hidden);
#pragma omp parallel num_threads(e.threads)
    {
        std::vector<float> x, inner;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < e.count; i++) {
            Rows rows(e, i);
            if (!rows.count) continue;
            gather(e, rows, e.x, x);
            product(rows.count, 2 * e.width, e.hidden, x.data(), e.gate_up + i * 2 * e.width * e.hidden, e.both + rows.begin * 2 * e.width, false);
            weighted(e, rows, inner);
            product(rows.count, e.hidden, e.width, inner.data(), e.down + i * e.hidden * e.width, &out[rows.begin * e.hidden], false);
        }
    }
    settle(e, out, y);
}

// gradients of x [N, C], gate_up, down and weights [N, K]
void experts_backward(const Experts* experts, const float* grad, float* dx, float* dgate_up, float* ddown, float* dweights) {
    const Experts& e = *experts;
    std::vector<float> by_x(static_cast<size_t>(e.tokens) * e.top_k * e.hidden);
#pragma omp parallel num_threads(e.threads)
    {
        std::vector<float> x, g, inner, by_inner, by_both;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < e.count; i++) {
            Rows rows(e, i);
            const int64_t size = e.hidden * e.width;
            const float *gate_up = e.gate_up + i * 2 * size, *down = e.down + i * size;
            if (!rows.count) {
                std::fill_n(dgate_up + i * 2 * size, 2 * size, 0.0f), std::fill_n(ddown + i * size, size, 0.0f);
                continue;
            }
            gather(e, rows, e.x, x), gather(e, rows, grad, g), weighted(e, rows, inner);
            by_inner.resize(static_cast<size_t>(rows.count) * e.width), by_both.resize(2 * by_inner.size());
            product_across(e.hidden, e.width, rows.count, g.data(), inner.data(), ddown + i * size);
            product_plain(rows.count, e.width, e.hidden, g.data(), down, by_inner.data());
            for (int r = 0; r < rows.count; r++) {
                float *mine = &by_inner[static_cast<size_t>(r) * e.width], *said = &inner[static_cast<size_t>(r) * e.width], along = 0;
                int64_t choice = e.order[rows.begin + r];
                const float* both = e.both + (rows.begin + r) * 2 * e.width;
                swiglu_row(both, e.width, said);
                for (int64_t j = 0; j < e.width; j++) along += mine[j] * said[j];
                dweights[choice] = along;
                for (int64_t j = 0; j < e.width; j++) mine[j] *= e.weights[choice];
                swiglu_row_backward(mine, both, e.width, &by_both[static_cast<size_t>(r) * 2 * e.width]);
            }
            product_across(2 * e.width, e.hidden, rows.count, by_both.data(), x.data(), dgate_up + i * 2 * size);
            product_plain(rows.count, e.hidden, 2 * e.width, by_both.data(), gate_up, &by_x[rows.begin * e.hidden]);
        }
    }
    settle(e, by_x, dx);
}

}  // extern "C"

// ---------------------------------------------------------------- a step of decoding

struct Layer {
    const float *attention_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *ffn_norm, *gate_up, *down;
    float *keys, *values;  // [B, K, T / 16, D, 16] and [B, K, T, D]
    int64_t window;
    float scale, eps;
};

struct Step {
    int64_t layers, rows, hidden, heads, kv_heads, width, intermediate, room, threads;
    const float *embed, *norm, *cos, *sin;  // cos and sin [positions, D]
    // of each row: what it says, where that lands, whose copy of the prompt it reads, and how long that is
    const int64_t *tokens, *positions, *lenders, *shared;
    float *x, *normed, *qkv, *mixed, *gate_up, *inner;
    float eps;
};

// scores [GROUP, room] of so many queries against STRIPS blocks of keys from position `begin` on
template <int GROUP, int STRIPS>
static inline void meet(const float* q, const float* keys, int width, int room, int begin, float scale, float* scores) {
    constexpr int CHAINS = GROUP * STRIPS <= 4 ? 4 : GROUP * STRIPS < 8 ? 2 : 1;  // sums that do not wait for one another
    V16 sum[CHAINS][GROUP][STRIPS] = {};
    const float* blocks = keys + static_cast<size_t>(begin) * width;
    auto add = [&](int c, int d) {
        V16 column[STRIPS];
        for (int n = 0; n < STRIPS; n++) column[n] = load(blocks + (static_cast<size_t>(n) * width + d) * LANES);
        for (int g = 0; g < GROUP; g++)
            for (int n = 0; n < STRIPS; n++) sum[c][g][n] += q[g * width + d] * column[n];
    };
    int d = 0;
    for (; d + CHAINS <= width; d += CHAINS)
        for (int c = 0; c < CHAINS; c++) add(c, d + c);
    for (; d < width; d++) add(0, d);
    for (int g = 0; g < GROUP; g++)
        for (int n = 0; n < STRIPS; n++) {
            for (int c = 1; c < CHAINS; c++) sum[0][g][n] += sum[c][g][n];
            store(scores + g * room + begin + n * LANES, sum[0][g][n] * scale);
        }
}

// out [GROUP, width] from `d` on, VECTORS at a time, + values of positions [low, high) weighed with scores
template <int GROUP, int VECTORS>
static inline void blend(const float* scores, const float* values, int low, int high, int width, int room, int d, float* out) {
    constexpr int CHAINS = GROUP * VECTORS <= 6 ? 2 : 1;  // sums that do not wait for one another
    V16 sum[CHAINS][GROUP][VECTORS] = {};
    int j = low;
    for (; j + CHAINS <= high; j += CHAINS)
        for (int c = 0; c < CHAINS; c++)
            for (int n = 0; n < VECTORS; n++) {
                V16 value = load(values + static_cast<size_t>(j + c) * width + d + n * LANES);
                for (int g = 0; g < GROUP; g++) sum[c][g][n] += scores[g * room + j + c] * value;
            }
    for (; j < high; j++)
        for (int n = 0; n < VECTORS; n++)
            for (int g = 0; g < GROUP; g++) sum[0][g][n] += scores[g * room + j] * load(values + static_cast<size_t>(j) * width + d + n * LANES);
    for (int g = 0; g < GROUP; g++)
        for (int n = 0; n < VECTORS; n++) {
            float* place = out + g * width + d + n * LANES;
            store(place, load(place) + sum[0][g][n] + (CHAINS == 2 ? sum[CHAINS - 1][g][n] : V16{}));
        }
}

struct Stretch {  // positions [low, high) of one head's keys [T / 16, D, 16] and values [T, D]
    const float *keys, *values;
    int low, high;
};

template <int GROUP>
static void score(const float* q, const Stretch& part, int width, int room, float scale, float* scores) {
    constexpr int STRIPS = GROUP == 1 ? 8 : GROUP == 8 ? 2 : 4;
    int j = part.low / LANES * LANES, end = part.low < part.high ? whole(part.high) : j;
    for (; j + STRIPS * LANES <= end; j += STRIPS * LANES) meet<GROUP, STRIPS>(q, part.keys, width, room, j, scale, scores);
    if (STRIPS > 4)
        for (; j + 4 * LANES <= end; j += 4 * LANES) meet<GROUP, 4>(q, part.keys, width, room, j, scale, scores);
    for (; j + 2 * LANES <= end; j += 2 * LANES) meet<GROUP, 2>(q, part.keys, width, room, j, scale, scores);
    for (; j < end; j += LANES) meet<GROUP, 1>(q, part.keys, width, room, j, scale, scores);
}

template <int GROUP>
static void weigh(const float* scores, const Stretch& part, int width, int room, float* out) {
    constexpr int VECTORS = GROUP == 8 ? 2 : 4;
    int d = 0;
    for (; d + VECTORS * LANES <= width; d += VECTORS * LANES) blend<GROUP, VECTORS>(scores, part.values, part.low, part.high, width, room, d, out);
    for (; d + LANES <= width; d += LANES) blend<GROUP, 1>(scores, part.values, part.low, part.high, width, room, d, out);
    for (int j = part.low; j < part.high && d < width; j++)
        for (int g = 0; g < GROUP; g++)
            for (int i = d; i < width; i++) out[g * width + i] += scores[g * room + j] * part.values[static_cast<size_t>(j) * width + i];
}

// function<GROUP>(first, of as many queries as fit) until all `count` are done
template <typename Function>
static void by_groups(int count, Function function) {
    int i = 0;
    for (; i + 8 <= count; i += 8) function(std::integral_constant<int, 8>(), i);
    for (; i + 4 <= count; i += 4) function(std::integral_constant<int, 4>(), i);
    for (; i + 3 <= count; i += 3) function(std::integral_constant<int, 3>(), i);
    for (; i < count; i++) function(std::integral_constant<int, 1>(), i);
}

// What a row asks, says and remembers at its new position: queries are rotated where they lie, key and value kept.
static void settle_row(const Step& s, const Layer& layer, int64_t b, float* normed, float* turned) {
    const int width = s.width, heads = s.heads, kv_heads = s.kv_heads, both = heads + 2 * kv_heads;
    float* row = s.qkv + b * both * width;
    const int64_t position = s.positions[b];
    if (layer.qkv_bias)
        for (int i = 0; i < both * width; i++) row[i] += layer.qkv_bias[i];
    for (int h = 0; h < heads + kv_heads; h++) {
        float* x = row + h * width;
        const float* weight = h < heads ? layer.q_norm : layer.k_norm;
        if (weight) normalize(x, weight, layer.eps, width, normed);
        turn(weight ? normed : x, s.cos + position * width, s.sin + position * width, 1.0f, width, turned);
        if (h < heads) {
            std::memcpy(x, turned, width * sizeof(float));
            continue;
        }
        const size_t head = (static_cast<size_t>(b) * kv_heads + h - heads) * s.room * width;
        float* block = layer.keys + head + position / LANES * LANES * width + position % LANES;
        for (int d = 0; d < width; d++) block[d * LANES] = turned[d];
        std::memcpy(layer.values + head + position * width, x + kv_heads * width, width * sizeof(float));
    }
}

struct Run {  // neighbouring rows that read one copy of what they share
    int64_t first, count;
};

// One key head of a run: what is shared meets all its queries at once (Hydragen, arXiv 2402.05099), then each row its own.
static void attend_run(const Step& s, const Layer& layer, const Run& run, int k, std::vector<float>& scores, std::vector<float>& q) {
    const int width = s.width, group = s.heads / s.kv_heads, room = s.room, queries = run.count * group;
    const int64_t position = s.positions[run.first];
    const int low = layer.window ? std::max<int64_t>(0, position - layer.window + 1) : 0;
    const int cut = std::max<int>(low, s.shared[run.first] / LANES * LANES);
    auto head = [&](int64_t row) { return (static_cast<size_t>(row) * s.kv_heads + k) * room * width; };
    const size_t lent = head(s.lenders[run.first]);
    const Stretch common = {layer.keys + lent, layer.values + lent, low, cut};
    auto own = [&](int r) {
        const size_t mine = head(run.first + r);
        return Stretch{layer.keys + mine, layer.values + mine, cut, static_cast<int>(s.positions[run.first + r]) + 1};
    };
    for (int r = 0; r < run.count; r++)
        std::memcpy(&q[r * group * width], s.qkv + (run.first + r) * (s.heads + 2 * s.kv_heads) * width + k * group * width, group * width * sizeof(float));
    by_groups(queries, [&](auto some, int i) { score<some()>(&q[i * width], common, width, room, layer.scale, &scores[i * room]); });
    for (int r = 0; r < run.count; r++)
        by_groups(group, [&](auto some, int g) {
            const int i = r * group + g;
            score<some()>(&q[i * width], own(r), width, room, layer.scale, &scores[i * room]);
        });
    for (int i = 0; i < queries; i++) {
        const int high = own(i / group).high, from = low < cut ? low : cut;
        soften(&scores[i * room], from / LANES * LANES, whole(high), from, high);
    }
    std::fill_n(q.begin(), queries * width, 0.0f);  // the queries are spent: what is mixed takes their place
    by_groups(queries, [&](auto some, int i) { weigh<some()>(&scores[i * room], common, width, room, &q[i * width]); });
    for (int r = 0; r < run.count; r++) {
        by_groups(group, [&](auto some, int g) { weigh<some()>(&scores[(r * group + g) * room], own(r), width, room, &q[(r * group + g) * width]); });
        std::memcpy(s.mixed + ((run.first + r) * s.heads + k * group) * width, &q[r * group * width], group * width * sizeof(float));
    }
}

static std::vector<Run> runs_of(const Step& s, bool windows) {
    std::vector<Run> runs;
    for (int64_t b = 0; b < s.rows; b++) {
        const bool same = b && s.lenders[b] == s.lenders[b - 1] && s.shared[b] == s.shared[b - 1] && runs.back().count < QUERIES;
        if (same && !windows) runs.back().count++;
        else runs.push_back({b, 1});
    }
    return runs;
}

static void attend_cached(const Step& s, const Layer& layer, const std::vector<Run>& runs) {
    const int group = s.heads / s.kv_heads;
#pragma omp parallel num_threads(s.threads)
    {
        std::vector<float> scores(static_cast<size_t>(QUERIES) * group * s.room), q(QUERIES * group * s.width), spare(2 * s.width);
#pragma omp for
        for (int64_t b = 0; b < s.rows; b++) settle_row(s, layer, b, spare.data(), spare.data() + s.width);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < static_cast<int64_t>(runs.size()) * s.kv_heads; i++) attend_run(s, layer, runs[i / s.kv_heads], i % s.kv_heads, scores, q);
    }
}

extern "C" {

// `out` [B, C]: the normed states from which the next tokens are drawn
void decode(const Step* step, const Layer* layers, float* out) {
    const Step& s = *step;
    int rows = s.rows, hidden = s.hidden, inner = s.intermediate, asked = s.heads * s.width;
    const std::vector<Run> alone = runs_of(s, true), together = runs_of(s, false);
    auto norm = [&](const float* weight, float eps, float* y) {
#pragma omp parallel for num_threads(s.threads) if (rows * hidden > 1 << 14)
        for (int b = 0; b < rows; b++) normalize(s.x + static_cast<int64_t>(b) * hidden, weight, eps, hidden, y + static_cast<int64_t>(b) * hidden);
    };
    for (int b = 0; b < rows; b++) std::memcpy(s.x + static_cast<int64_t>(b) * hidden, s.embed + s.tokens[b] * hidden, hidden * sizeof(float));
    for (int64_t l = 0; l < s.layers; l++) {
        const Layer& layer = layers[l];
        norm(layer.attention_norm, layer.eps, s.normed);
        product(rows, (s.heads + 2 * s.kv_heads) * s.width, hidden, s.normed, layer.qkv, s.qkv, false, s.threads);
        attend_cached(s, layer, layer.window ? alone : together);
        product(rows, hidden, asked, s.mixed, layer.out, s.x, true, s.threads);
        norm(layer.ffn_norm, layer.eps, s.normed);
        product(rows, 2 * inner, hidden, s.normed, layer.gate_up, s.gate_up, false, s.threads);
#pragma omp parallel for num_threads(s.threads) if (rows * inner > 1 << 13)
        for (int b = 0; b < rows; b++) swiglu_row(s.gate_up + static_cast<int64_t>(b) * 2 * inner, inner, s.inner + static_cast<int64_t>(b) * inner);
        product(rows, hidden, inner, s.inner, layer.down, s.x, true, s.threads);
    }
    norm(s.norm, s.eps, out);
}

// ---------------------------------------------------------------- the next token

void linear(const float* x, const float* weight, int rows, int columns, int inner, float* y, int threads) {
    product(rows, columns, inner, x, weight, y, false, threads);
}

// Of each row of logits [B, V]: the first token at which the cumulative softmax passes the uniform number, and its
// log-probability. Sums in float64.
void sample(const float* logits, const double* uniform, int64_t rows, int64_t count, float temperature, int64_t* tokens, float* logprobs, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> weights(count);
#pragma omp for
        for (int64_t b = 0; b < rows; b++) {
            const float* x = logits + b * count;
            float over = 1.0f / temperature, most = *std::max_element(x, x + count);
            by_lanes(count, [&](int i, int some) { store(&weights[i], exponential((load(x + i, some) - most) * over), some); });
            double total = 0, sum = 0;
            for (int64_t i = 0; i < count; i++) total += weights[i];
            double threshold = uniform[b] * total;
            int64_t chosen = 0;
            for (; chosen < count - 1; chosen++) {
                sum += weights[chosen];
                if (sum > threshold) break;
            }
            tokens[b] = chosen;
            logprobs[b] = (x[chosen] - most) * over - static_cast<float>(std::log(total));
        }
    }
}

}  // extern "C"
