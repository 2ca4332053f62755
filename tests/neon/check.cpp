// Every kernel once, on numbers that are the same wherever this is compiled; what comes out is printed, a number a line.
// tests/test_neon.py runs it for another processor and here, where the kernels are tested against torch, and compares.

#include "../../limbeck/model/kernels/source/kernels.cpp"

#include <cstdio>

static uint64_t state = 1;

static std::vector<float> numbers(size_t count) {
    std::vector<float> found(count);
    for (float& x : found) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        x = static_cast<float>(static_cast<int32_t>(state >> 33) - (1 << 30)) / (1 << 29);
    }
    return found;
}

static void print(const char* name, const std::vector<float>& found) {
    for (float x : found) std::printf("%s %.9g\n", name, x);
}

// BLAS's sgemm, column-major, plainly
static void product_of(const char* ta, const char* tb, const int* m, const int* n, const int* k, const float* alpha, const float* a, const int* lda,
                       const float* b, const int* ldb, const float* beta, float* c, const int* ldc) {
    for (int i = 0; i < *m; i++)
        for (int j = 0; j < *n; j++) {
            double sum = 0;
            for (int l = 0; l < *k; l++) sum += double(*ta == 'T' ? a[l + i * *lda] : a[i + l * *lda]) * (*tb == 'T' ? b[j + l * *ldb] : b[l + j * *ldb]);
            float& y = c[i + j * *ldc];
            y = *alpha * sum + (*beta == 0 ? 0.0f : *beta * y);
        }
}

static void rows(int count, int width) {
    auto x = numbers(count * width), weight = numbers(width), grad = numbers(count * width), y = x, dx = x, scale = numbers(count);
    std::vector<float> dweight(width);
    norm_forward(x.data(), weight.data(), 1e-5f, count, width, y.data(), scale.data(), 1);
    norm_backward(grad.data(), x.data(), weight.data(), scale.data(), count, width, dx.data(), dweight.data(), 1);
    print("norm", y), print("norm dx", dx), print("norm dweight", dweight);
    auto both = numbers(2 * count * width), dboth = both;
    swiglu_forward(both.data(), count, width, y.data(), 1);
    swiglu_backward(grad.data(), both.data(), count, width, dboth.data(), 1);
    print("swiglu", y), print("swiglu dx", dboth);
    auto cos = numbers(count * width), sin = numbers(count * width);
    if (width % 2 == 0) rotate(x.data(), width, cos.data(), sin.data(), 1.0f, count, 1, width, y.data(), 1), print("rotate", y);
}

static void products(int rows, int columns, int inner) {
    auto x = numbers(rows * inner), weight = numbers(columns * inner), y = numbers(rows * columns);
    for (int way = 0; way < 3; way++) linear(way, x.data(), weight.data(), rows, columns, inner, y.data(), 1), print("product", y);
}

static void sequences(int heads, int kv_heads, int width, int window) {
    const int32_t trunk[] = {0, 5}, length[] = {5, 40}, first[] = {0, 2, 2}, branch[] = {45, 52}, branch_length[] = {7, 19};
    const int tokens = 71;
    Trees trees = {2, trunk, length, first, branch, branch_length};
    auto q = numbers(tokens * heads * width), k = numbers(tokens * kv_heads * width), v = numbers(tokens * kv_heads * width), grad = q, out = q, dq = q, dk = k, dv = v;
    std::vector<float> lse(tokens * heads);
    Heads h = {q.data(), k.data(), v.data(), heads * width, kv_heads * width, kv_heads * width, heads, kv_heads, width, window, 1.0f / std::sqrt(float(width))};
    attention_forward(&trees, &h, out.data(), lse.data(), 1);
    attention_backward(&trees, &h, grad.data(), lse.data(), dq.data(), dk.data(), dv.data(), 1);
    print("attention", out), print("attention dq", dq), print("attention dk", dk), print("attention dv", dv);
}

static void mixture(int64_t tokens, int64_t hidden, int64_t width) {
    std::vector<int64_t> order, ends;
    for (int e = 0; e < 4; e++) {
        for (int64_t i = 0; i < 2 * tokens; i++)
            if ((i * 7 + i / 3) % 4 == e) order.push_back(i);
        ends.push_back(order.size());
    }
    auto x = numbers(tokens * hidden), gate_up = numbers(8 * width * hidden), down = numbers(4 * width * hidden), weights = numbers(2 * tokens);
    auto y = x, dx = x, dgate_up = gate_up, ddown = down, dweights = weights, grad = numbers(tokens * hidden);
    std::vector<float> both(2 * tokens * 2 * width);
    Experts e = {tokens, 4, 2, hidden, width, 1, x.data(), gate_up.data(), down.data(), weights.data(), order.data(), ends.data(), both.data()};
    experts_forward(&e, y.data());
    experts_backward(&e, grad.data(), dx.data(), dgate_up.data(), ddown.data(), dweights.data());
    print("mixture", y), print("mixture dx", dx), print("mixture dgate_up", dgate_up), print("mixture ddown", ddown), print("mixture dweights", dweights);
}

static void steps(int64_t heads, int64_t kv_heads, int64_t width, int64_t window, bool gemma = false) {
    const int64_t rows = 3, hidden = 24, intermediate = 20, room = 64, both = (heads + 2 * kv_heads) * width;
    auto embed = numbers(11 * hidden), norm = numbers(hidden), ffn_norm = numbers(hidden), qkv = numbers(both * hidden), out = numbers(hidden * heads * width);
    auto gate_up = numbers(2 * intermediate * hidden), down = numbers(hidden * intermediate), cos = numbers(room * width), sin = numbers(room * width);
    for (auto* weight : {&qkv, &out, &gate_up, &down})
        for (float& number : *weight) number *= 0.1f;
    std::vector<float> keys(rows * kv_heads * room * width), values(keys.size()), states(rows * hidden);
    const float* after = gemma ? norm.data() : nullptr;
    Layer layer = {norm.data(), qkv.data(), nullptr, nullptr, nullptr, out.data(), after, ffn_norm.data(), gate_up.data(), down.data(), after, cos.data(), sin.data(),
                   keys.data(), values.data(), window, 0.3f, 1e-5f};
    std::vector<float> x(rows * hidden), normed(rows * hidden), asked(rows * both), mixed(rows * heads * width), wide(rows * 2 * intermediate), inner(rows * intermediate);
    for (int64_t i = 0; i < 40; i++) {  // from the 20th on the rows read what they share from the first
        const int64_t tokens[] = {i % 11, i < 20 ? i % 11 : (i + 1) % 11, i < 20 ? i % 11 : (i + 5) % 11}, positions[] = {i, i, i};
        const int64_t lenders[] = {0, 0, 0}, shared[] = {i < 20 ? 0 : 20, i < 20 ? 0 : 20, i < 20 ? 0 : 20};
        Step step = {1, rows, hidden, heads, kv_heads, width, intermediate, room, 1, gemma, gemma, embed.data(), norm.data(), tokens, positions, lenders, shared,
                     x.data(), normed.data(), asked.data(), mixed.data(), wide.data(), inner.data(), 1e-5f, gemma ? 4.9f : 1.0f};
        decode(&step, &layer, states.data());
        print("step", states);
    }
}

int main() {
    use_sgemm(reinterpret_cast<void*>(product_of));
    std::printf("lanes %d\n", lanes());
    for (int width : {1, 6, 7, 33, 64, 80}) rows(5, width);
    for (int count : {1, 3, 8, 33, 70}) products(count, 48, 64), products(count, 50, 33);
    for (int width : {1, 5, 16, 64, 80}) sequences(4, 2, width, 0), sequences(2, 2, width, 7);
    mixture(1, 12, 10), mixture(30, 32, 24);
    for (int8_t way = 0; way < 3; way++) {
        std::vector<int8_t> table(SIZES * ROWS, way);
        use_ways(table.data());
        steps(4, 2, 16, 0), steps(8, 1, 6, 0), steps(3, 3, 80, 9), steps(4, 2, 16, 9, true);
    }
    auto logits = numbers(4 * 101);
    std::vector<double> uniform = {0.0, 0.25, 0.5, 0.999};
    std::vector<int64_t> tokens(4);
    std::vector<float> logprobs(4);
    sample(logits.data(), uniform.data(), 4, 101, 0.7f, tokens.data(), logprobs.data(), 1);
    print("sample", logprobs);
    for (int64_t token : tokens) std::printf("token %d\n", static_cast<int>(token));
}
