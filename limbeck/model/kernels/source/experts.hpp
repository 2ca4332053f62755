#pragma once

#include "products.hpp"
#include "rows.hpp"

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
