#pragma once

#include <vector>

#include "vectors.hpp"

extern "C" {

// Of each row of logits [B, V]: the first token at which the cumulative softmax passes the uniform number, and its
// log-probability. Sums in float64.
void sample(const float* logits, const double* uniform, int64_t rows, int64_t count, float temperature, int64_t* tokens, float* logprobs, int threads) {
#pragma omp parallel num_threads(crew(threads, rows * count))
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
