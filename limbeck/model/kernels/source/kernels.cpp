// What PyTorch does in many passes over memory on a CPU, in one: the parts of a dense decoder that are not matrix
// products, a whole step of decoding, and products of few rows; larger ones are the BLAS's that torch has loaded.
//
// N tokens · B rows · T positions · H heads · K key/value heads · G = H / K · D head size · I intermediate size.
// Everything is float32 and row-major; a stride counts floats. Every kernel has a twin in plain torch, its oracle.

#include "attention.hpp"
#include "decoding.hpp"
#include "experts.hpp"
#include "products.hpp"
#include "rows.hpp"
#include "sampling.hpp"

extern "C" {

int lanes() { return LANES; }

void use_sgemm(void* function) { sgemm = reinterpret_cast<Sgemm>(function); }

// [SIZES, ROWS], see products.hpp
void use_ways(const int8_t* table) {
    for (int i = 0; i < SIZES * ROWS; i++) ways[i / ROWS][i % ROWS] = static_cast<Way>(table[i]);
}

// y [rows, columns] = x [rows, inner] weight^T; `way` is negative for the fastest one that is known
void linear(int way, const float* x, const float* weight, int rows, int columns, int inner, float* y, int threads) {
    if (way < 0) product(rows, columns, inner, x, weight, y, false, threads);
    else product(static_cast<Way>(way), rows, columns, inner, x, weight, y, false, threads);
}

}  // extern "C"
