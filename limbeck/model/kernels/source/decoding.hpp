#pragma once

#include "products.hpp"
#include "rows.hpp"

struct Layer {
    // no qkv_bias, norms of heads or norms of outputs where they are null
    const float *attention_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_norm, *ffn_norm, *gate_up, *down, *down_norm;
    const float *cos, *sin;  // [positions, D]
    float *keys, *values;    // [B, K, T / LANES, D, LANES] and [B, K, T, D]
    int64_t window;
    float scale, eps;
};

struct Step {
    int64_t layers, rows, hidden, heads, kv_heads, width, intermediate, room, threads;
    int64_t gelu, from_one;  // whether GELU gates in place of SiLU, and whether norms multiply with 1 + weight
    const float *embed, *norm;
    // of each row: what it says, where that lands, whose copy of the prompt it reads, and how long that is
    const int64_t *tokens, *positions, *lenders, *shared;
    float *x, *normed, *qkv, *mixed, *gate_up, *inner;
    float eps, embed_scale;
};

// Sums that do not wait for one another, as many as registers and the latency of an addition ask for.
constexpr int chains(int group, int vectors) {
    int count = group * vectors <= 4 ? 4 : group * vectors < 8 ? 2 : 1;
    while (count > 1 && count * group * vectors + vectors + 1 > REGISTERS) count /= 2;
    return count;
}

// scores [GROUP, room] of so many queries against STRIPS blocks of keys from position `begin` on
template <int GROUP, int STRIPS>
static inline void meet(const float* q, const float* keys, int width, int room, int begin, float scale, float* scores) {
    constexpr int CHAINS = chains(GROUP, STRIPS);
    V sum[CHAINS][GROUP][STRIPS] = {};
    const float* blocks = keys + static_cast<size_t>(begin) * width;
    auto add = [&](int c, int d) {
        V column[STRIPS];
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
    V sum[CHAINS][GROUP][VECTORS] = {};
    int j = low;
    for (; j + CHAINS <= high; j += CHAINS)
        for (int c = 0; c < CHAINS; c++)
            for (int n = 0; n < VECTORS; n++) {
                V value = load(values + static_cast<size_t>(j + c) * width + d + n * LANES);
                for (int g = 0; g < GROUP; g++) sum[c][g][n] += scores[g * room + j + c] * value;
            }
    for (; j < high; j++)
        for (int n = 0; n < VECTORS; n++)
            for (int g = 0; g < GROUP; g++) sum[0][g][n] += scores[g * room + j] * load(values + static_cast<size_t>(j) * width + d + n * LANES);
    for (int g = 0; g < GROUP; g++)
        for (int n = 0; n < VECTORS; n++) {
            float* place = out + g * width + d + n * LANES;
            store(place, load(place) + sum[0][g][n] + (CHAINS == 2 ? sum[CHAINS - 1][g][n] : V{}));
        }
}

struct Stretch {  // positions [low, high) of one head's keys [T / LANES, D, LANES] and values [T, D]
    const float *keys, *values;
    int low, high;
};

template <int GROUP>
static void score(const float* q, const Stretch& part, int width, int room, float scale, float* scores) {
    constexpr int STRIPS = GROUP == 1 && REGISTERS > 16 ? 8 : abreast(GROUP);
    int j = part.low / LANES * LANES, end = part.low < part.high ? whole(part.high) : j;
    for (; j + STRIPS * LANES <= end; j += STRIPS * LANES) meet<GROUP, STRIPS>(q, part.keys, width, room, j, scale, scores);
    if (STRIPS > 4)
        for (; j + 4 * LANES <= end; j += 4 * LANES) meet<GROUP, 4>(q, part.keys, width, room, j, scale, scores);
    if (STRIPS > 2)
        for (; j + 2 * LANES <= end; j += 2 * LANES) meet<GROUP, 2>(q, part.keys, width, room, j, scale, scores);
    for (; j < end; j += LANES) meet<GROUP, 1>(q, part.keys, width, room, j, scale, scores);
}

template <int GROUP>
static void weigh(const float* scores, const Stretch& part, int width, int room, float* out) {
    constexpr int VECTORS = abreast(GROUP);
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
template <bool FROM_ONE>
static void settle_row(const Step& s, const Layer& layer, int64_t b, float* normed, float* turned) {
    const int width = s.width, heads = s.heads, kv_heads = s.kv_heads, both = heads + 2 * kv_heads;
    float* row = s.qkv + b * both * width;
    const int64_t position = s.positions[b];
    if (layer.qkv_bias)
        for (int i = 0; i < both * width; i++) row[i] += layer.qkv_bias[i];
    for (int h = 0; h < heads + kv_heads; h++) {
        float* x = row + h * width;
        const float* weight = h < heads ? layer.q_norm : layer.k_norm;
        if (weight) normalize<FROM_ONE>(x, weight, layer.eps, width, normed);
        turn(weight ? normed : x, layer.cos + position * width, layer.sin + position * width, 1.0f, width, turned);
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
    int64_t longest = 0;
    for (int64_t b = 0; b < s.rows; b++) longest = std::max(longest, s.positions[b]);
#pragma omp parallel num_threads(crew(s.threads, s.rows * s.heads * s.width * longest / 4))
    {
        std::vector<float> scores(static_cast<size_t>(QUERIES) * group * s.room), q(QUERIES * group * s.width), spare(2 * s.width);
#pragma omp for
        for (int64_t b = 0; b < s.rows; b++) (s.from_one ? settle_row<true> : settle_row<false>)(s, layer, b, spare.data(), spare.data() + s.width);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < static_cast<int64_t>(runs.size()) * s.kv_heads; i++) attend_run(s, layer, runs[i / s.kv_heads], i % s.kv_heads, scores, q);
    }
}

extern "C" {

// `out` [B, C]: the normed states from which the next tokens are drawn
void decode(const Step* step, const Layer* layers, float* out) {
    const Step& s = *step;
    const int rows = s.rows, hidden = s.hidden, inner = s.intermediate, asked = s.heads * s.width;
    const std::vector<Run> alone = runs_of(s, true), together = runs_of(s, false);
    const auto normed = s.from_one ? normalize<true> : normalize<false>;
    auto norm = [&](const float* x, const float* weight, float eps, float* y) {
#pragma omp parallel for num_threads(crew(s.threads, rows * hidden))
        for (int b = 0; b < rows; b++) normed(x + static_cast<int64_t>(b) * hidden, weight, eps, hidden, y + static_cast<int64_t>(b) * hidden);
    };
    // x += y w^T, or the norm of that product, which goes by way of `out`
    auto add = [&](int width, const float* y, const float* w, const float* weight, float eps) {
        if (!weight) return product(rows, hidden, width, y, w, s.x, true, s.threads);
        product(rows, hidden, width, y, w, out, false, s.threads);
        norm(out, weight, eps, s.normed);
        for (int64_t i = 0; i < static_cast<int64_t>(rows) * hidden; i++) s.x[i] += s.normed[i];
    };
    for (int b = 0; b < rows; b++)
        for (int i = 0; i < hidden; i++) s.x[static_cast<int64_t>(b) * hidden + i] = s.embed[s.tokens[b] * hidden + i] * s.embed_scale;
    for (int64_t l = 0; l < s.layers; l++) {
        const Layer& layer = layers[l];
        norm(s.x, layer.attention_norm, layer.eps, s.normed);
        product(rows, (s.heads + 2 * s.kv_heads) * s.width, hidden, s.normed, layer.qkv, s.qkv, false, s.threads);
        attend_cached(s, layer, layer.window ? alone : together);
        add(asked, s.mixed, layer.out, layer.out_norm, layer.eps);
        norm(s.x, layer.ffn_norm, layer.eps, s.normed);
        product(rows, 2 * inner, hidden, s.normed, layer.gate_up, s.gate_up, false, s.threads);
#pragma omp parallel for num_threads(crew(s.threads, 4 * rows * inner))
        for (int b = 0; b < rows; b++) (s.gelu ? geglu_row : swiglu_row)(s.gate_up + static_cast<int64_t>(b) * 2 * inner, inner, s.inner + static_cast<int64_t>(b) * inner);
        add(inner, s.inner, layer.down, layer.down_norm, layer.eps);
    }
    norm(s.x, s.norm, s.eps, out);
}

}  // extern "C"
