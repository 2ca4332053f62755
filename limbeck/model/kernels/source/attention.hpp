#pragma once

#include <vector>

#include "vectors.hpp"

constexpr int QUERIES = 8;  // queries that share the keys and values which were loaded

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
        V sum[QUERIES] = {};
        for (int d = 0; d < width; d++) {
            V column = load(columns + static_cast<size_t>(d) * room + j);
            for (int q = 0; q < QUERIES; q++) sum[q] += rows[q][d] * column;
        }
        for (int q = 0; q < count; q++) store(out + static_cast<size_t>(q) * room + j, sum[q] * scale);
    }
}

// out[q] = sum over j of weights[q][j] x row j, one vector of the rows at a time
template <int VECTORS>
static void along(const float* weights, int room, const float* rows, int padded, int low, int high, float* out) {
    V sum[QUERIES][VECTORS] = {};
    for (int j = low; j < high; j++) {
        V row[VECTORS];
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
    constexpr int TOGETHER = abreast(QUERIES);
    int n = 0;
    for (; n + TOGETHER <= vectors; n += TOGETHER) along<TOGETHER>(weights, room, rows + n * LANES, padded, low, high, out + n * LANES);
    for (; n < vectors; n++) along<1>(weights, room, rows + n * LANES, padded, low, high, out + n * LANES);
}

// row j of `rows` += sum over q of weights[q][j] x from[q]
static void spread(int vectors, const float* weights, int room, const float* from, int padded, int low, int high, float* rows) {
    for (int n = 0; n < vectors; n++) {
        V mine[QUERIES];
        for (int q = 0; q < QUERIES; q++) mine[q] = load(from + q * padded + n * LANES);
        for (int j = low; j < high; j++) {
            float* row = rows + static_cast<size_t>(j) * padded + n * LANES;
            V sum = load(row);
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
            V along = {};
            for (int j = block.low; j < end; j += LANES) along += load(p + j) * load(ds + j);
            V delta = sum_of(along);
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

}  // extern "C"
