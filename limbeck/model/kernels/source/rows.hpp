#pragma once

#include "vectors.hpp"

// RMSNorm, multiplied with the weight or, FROM_ONE, with 1 + weight
template <bool FROM_ONE = false>
static inline float normalize(const float* __restrict x, const float* weight, float eps, int width, float* __restrict y) {
    float square = 0;
    for (int i = 0; i < width; i++) square += x[i] * x[i];
    float scale = 1.0f / std::sqrt(square / width + eps);
    for (int i = 0; i < width; i++) y[i] = x[i] * scale * (FROM_ONE ? 1.0f + weight[i] : weight[i]);
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
        V mine = load(grad + i, count), x = load(gate_up + i, count), s = sigmoid(x);
        store(dgate_up + width + i, mine * x * s, count);
        store(dgate_up + i, mine * load(gate_up + width + i, count) * s * (1.0f + x * (1.0f - s)), count);
    });
}

static inline void swiglu_row(const float* gate_up, int width, float* y) {
    by_lanes(width, [&](int i, int count) {
        V gate = load(gate_up + i, count);
        store(y + i, gate * sigmoid(gate) * load(gate_up + width + i, count), count);
    });
}

// GELU in its tanh form: x / 2 (1 + tanh(z)) = x sigmoid(2 z)
static inline void geglu_row(const float* gate_up, int width, float* y) {
    by_lanes(width, [&](int i, int count) {
        V gate = load(gate_up + i, count);
        V z = 0.7978845608028654f * (gate + 0.044715f * gate * gate * gate);
        store(y + i, gate * sigmoid(2.0f * z) * load(gate_up + width + i, count), count);
    });
}

extern "C" {

void norm_forward(const float* x, const float* weight, float eps, int64_t rows, int width, float* y, float* scale, int threads) {
#pragma omp parallel for num_threads(crew(threads, rows * width))
    for (int64_t n = 0; n < rows; n++) scale[n] = normalize(x + n * width, weight, eps, width, y + n * width);
}

// dx [rows, width]; dweight [threads, width], one a thread, zero at first
void norm_backward(const float* grad, const float* x, const float* weight, const float* scale, int64_t rows, int width, float* dx, float* dweight,
                   int threads) {
#pragma omp parallel for schedule(static, 1) num_threads(crew(threads, rows * width))
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
#pragma omp parallel for num_threads(crew(threads, 2 * rows * width))
    for (int64_t n = 0; n < rows; n++) swiglu_row(gate_up + n * 2 * width, width, y + n * width);
}

void swiglu_backward(const float* grad, const float* gate_up, int64_t rows, int width, float* dgate_up, int threads) {
#pragma omp parallel for num_threads(crew(threads, 2 * rows * width))
    for (int64_t n = 0; n < rows; n++) swiglu_row_backward(grad + n * width, gate_up + n * 2 * width, width, dgate_up + n * 2 * width);
}

// y [N, heads, D] from x, whose rows lie `stride` apart; cos and sin [N, D]
void rotate(const float* x, int64_t stride, const float* cos, const float* sin, float sense, int64_t rows, int heads, int width, float* y,
            int threads) {
#pragma omp parallel for num_threads(crew(threads, rows * heads * width))
    for (int64_t n = 0; n < rows; n++)
        for (int head = 0; head < heads; head++)
            turn(x + n * stride + head * width, cos + n * width, sin + n * width, sense, width, y + (n * heads + head) * width);
}

}  // extern "C"
