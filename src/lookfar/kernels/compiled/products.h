// Products of small matrices: what a strip of scores is made of.
#pragma once
#include "vectors.h"

constexpr Int ROWS = 6;     // rows of a tile, held in registers
constexpr Int DEPTH = 256;  // terms that are added up before the next tile, so that what they read stays near

// The rows of the right factor: evenly apart, or each where it lies.
struct Even {
    const float* first;
    Int step;
    const float* operator()(Int row) const { return first + row * step; }
    Even from(Int row, Int column) const { return {first + row * step + column, step}; }
};

struct Scattered {
    const float* const* rows;
    Int shift;
    const float* operator()(Int row) const { return rows[row] + shift; }
    Scattered from(Int row, Int column) const { return {rows + row, shift + column}; }
};

// The left factor: element (row, term) at first[row * row_step + term * term_step].
struct Left {
    const float* first;
    Int row_step, term_step;
    Left from(Int row, Int term) const { return {first + row * row_step + term * term_step, row_step, term_step}; }
};

template <Int M, Int N, class Right>
static void tile(Left left, Right right, Int terms, float* to, Int step, bool add) {
    Vector sums[M][N];
#pragma GCC unroll 8
    for (Int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (Int n = 0; n < N; ++n) sums[m][n] = add ? load(to + m * step + n * LANES) : Vector{};
    for (Int term = 0; term < terms; ++term) {
        const float* row = right(term);
        Vector seen[N];
#pragma GCC unroll 8
        for (Int n = 0; n < N; ++n) seen[n] = load(row + n * LANES);
#pragma GCC unroll 8
        for (Int m = 0; m < M; ++m) {
            float factor = left.first[m * left.row_step + term * left.term_step];
#pragma GCC unroll 8
            for (Int n = 0; n < N; ++n) sums[m][n] += factor * seen[n];
        }
    }
#pragma GCC unroll 8
    for (Int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (Int n = 0; n < N; ++n) store(to + m * step + n * LANES, sums[m][n]);
}

template <Int N, class Right>
static void tiles(Left left, Right right, Int rows, Int terms, float* to, Int step, bool add) {
    Int blocks = (rows + ROWS - 1) / ROWS, start = 0;
    for (Int block = 0; block < blocks; ++block) {
        Int stop = rows * (block + 1) / blocks;  // all about as high
        Left own = left.from(start, 0);
        float* place = to + start * step;
        switch (stop - start) {
            case 1: tile<1, N>(own, right, terms, place, step, add); break;
            case 2: tile<2, N>(own, right, terms, place, step, add); break;
            case 3: tile<3, N>(own, right, terms, place, step, add); break;
            case 4: tile<4, N>(own, right, terms, place, step, add); break;
            case 5: tile<5, N>(own, right, terms, place, step, add); break;
            case 6: tile<6, N>(own, right, terms, place, step, add); break;
        }
        start = stop;
    }
}

// to[rows, columns] = or += left[rows, terms] · right[terms, columns]; columns are a multiple of LANES.
template <class Right>
static void product(Left left, Right right, Int rows, Int terms, Int columns, float* to, Int step, bool add = false) {
    for (Int term = 0; term < terms || term == 0; term += DEPTH) {
        Int depth = terms - term < DEPTH ? terms - term : DEPTH;
        bool more = add || term > 0;
        Left own = left.from(0, term);
        Int column = 0;
        for (; column + PANEL <= columns; column += PANEL)
            tiles<VECTORS>(own, right.from(term, column), rows, depth, to + column, step, more);
        for (; column < columns; column += LANES)
            tiles<1>(own, right.from(term, column), rows, depth, to + column, step, more);
    }
}

template <Int M, Int N>
static void tile_of_sums(const float* const* left, const float* const* right, Int length, Vector* to, Int step) {
    Vector sums[M][N] = {};
    for (Int place = 0; place < length; place += LANES) {
        Vector seen[N];
#pragma GCC unroll 8
        for (Int n = 0; n < N; ++n) seen[n] = load(right[n] + place);
#pragma GCC unroll 8
        for (Int m = 0; m < M; ++m) {
            Vector own = load(left[m] + place);
#pragma GCC unroll 8
            for (Int n = 0; n < N; ++n) sums[m][n] += own * seen[n];
        }
    }
#pragma GCC unroll 8
    for (Int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (Int n = 0; n < N; ++n) to[m * step + n] += sums[m][n];
}

// to[rows, columns] += Σ over places of left[row][place] · right[column][place]; each sum stays spread over the lanes.
// The length is a multiple of LANES; what lies beyond the real places must be 0 on the left.
static void sums_of_products(
    const float* const* left, Int rows, const float* const* right, Int columns, Int length, Vector* to
) {
    constexpr Int N = VECTORS;
    for (Int row = 0; row < rows;) {
        Int high = rows - row >= 4 ? 4 : 1;
        for (Int column = 0; column < columns;) {
            Int wide = columns - column >= N ? N : 1;
            Vector* place = to + row * columns + column;
            if (high == 4 && wide == N) tile_of_sums<4, N>(left + row, right + column, length, place, columns);
            else if (high == 4) tile_of_sums<4, 1>(left + row, right + column, length, place, columns);
            else if (wide == N) tile_of_sums<1, N>(left + row, right + column, length, place, columns);
            else tile_of_sums<1, 1>(left + row, right + column, length, place, columns);
            column += wide;
        }
        row += high;
    }
}
