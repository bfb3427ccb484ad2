// Vectors of floats as wide as the processor's, and what is done to one at a time.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using Int = int64_t;

#if defined(__AVX512F__)
constexpr Int LANES = 16, VECTORS = 4;  // VECTORS: side by side in a product; six rows of them fill the registers
#elif defined(__AVX__)
constexpr Int LANES = 8, VECTORS = 2;
#else
constexpr Int LANES = 4, VECTORS = 4;
#endif
constexpr Int PANEL = LANES * VECTORS;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

constexpr float HIDDEN = -std::numeric_limits<float>::infinity();

static inline Int up(Int count, Int step) { return (count + step - 1) / step * step; }

static inline Vector load(const float* from) {
    Vector found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

static inline void store(float* to, Vector values) { std::memcpy(to, &values, sizeof values); }

typedef double Doubles __attribute__((vector_size(LANES * 8)));

// to[lane] += values[lane], where many small numbers that nearly cancel are added up.
static inline void add(double* to, Vector values) {
    Doubles found;
    std::memcpy(&found, to, sizeof found);
    found += __builtin_convertvector(values, Doubles);
    std::memcpy(to, &found, sizeof found);
}

static inline Vector all(float value) { return Vector{} + value; }

static inline Vector choose(Integers test, Vector yes, Vector no) {
    return (Vector)((test & (Integers)yes) | (~test & (Integers)no));
}

static inline Vector larger(Vector a, Vector b) { return choose(a > b, a, b); }

static inline float sum(Vector values) {
    float total = 0;
    for (Int lane = 0; lane < LANES; ++lane) total += values[lane];
    return total;
}

static inline float largest(Vector values) {
    float found = values[0];
    for (Int lane = 1; lane < LANES; ++lane) found = values[lane] > found ? values[lane] : found;
    return found;
}

// e^x for x of at most 88; 0 below -87.
// x = n ln 2 + r with a whole n and |r| at most ln 2 / 2; ln 2 is taken off in two parts, the first of few bits.
static inline Vector exponential(Vector x) {
    const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    Integers vanishes = x < all(-87.0f), wrong = x != x;
    Vector given = x;
    x = choose(vanishes, all(0.0f), x);
    Vector shifted = x * 1.44269504f + magic;
    Vector whole = shifted - magic;
    Vector r = x - whole * 0.693359375f;
    r = r - whole * -2.12194440e-4f;
    Vector power = all(1.0f / 5040);  // the series of e^r; the first term left out is at most 6e-9
    power = power * r + 1.0f / 720;
    power = power * r + 1.0f / 120;
    power = power * r + 1.0f / 24;
    power = power * r + 1.0f / 6;
    power = power * r + 0.5f;
    power = power * r + 1.0f;
    power = power * r + 1.0f;
    Integers exponent = ((Integers)shifted - (Integers)magic) << 23;
    return choose(wrong, given, choose(vanishes, Vector{}, (Vector)((Integers)power + exponent)));
}
