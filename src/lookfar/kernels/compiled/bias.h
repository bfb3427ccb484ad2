// Biases of one row: numbers that lie along diagonals, and straight pieces of a number that does.
#pragma once
#include "request.h"

// A row of one head: keys from `base` on, of which `from` to `to` (excluded) are seen; its own key is at `place`.
struct Row {
    Int batch, head, query, place, base, from, to;
};

template <class Piece>
static void pieces_of(const Request& call, const Row& row, Piece piece) {
    Int count = call.pieces;
    const int32_t* cuts = call.cuts + (row.batch * call.rate_step + row.query) * (count - 1);
    for (Int each = 0; each < count; ++each) {
        Int near = each == 0 ? 0 : cuts[each - 1], far = each == count - 1 ? call.keys : cuts[each];
        Int from = row.place - far + 1, to = row.place - near + 1;
        if (from < row.from) from = row.from;
        if (to > row.to) to = row.to;
        if (from < to) piece(row.head * count + each, from, to);
    }
}

// to[key - base] += the bias of every key that is seen; others may get anything finite.
static void add_bias(const Request& call, const Row& row, float* to) {
    Int shift = call.keys - 1 - row.place;
    if (call.table) {
        const float* numbers = call.table + row.head * call.span + shift;
        for (Int key = row.from / LANES * LANES; key < row.to; key += LANES)
            store(to + key - row.base, load(to + key - row.base) + load(numbers + key));
    }
    if (call.slope) {
        const float* rise = call.rise + shift;
        float rate = call.rate[row.batch * call.rate_step + row.query];
        pieces_of(call, row, [&](Int piece, Int from, Int to_) {
            float slope = call.slope[piece] * rate, offset = call.offset[piece];
            Int key = from;
            for (; key + LANES <= to_; key += LANES)
                store(to + key - row.base, load(to + key - row.base) + load(rise + key) * slope + offset);
            for (; key < to_; ++key) to[key - row.base] += rise[key] * slope + offset;
        });
    }
}

// Adds the row's part to the gradients of table and pieces; `slice` is the [b, h] slice of this thread.
static void bias_backward(const Request& call, const Row& row, const float* gradient, Int slice) {
    Int shift = call.keys - 1 - row.place;
    if (call.table) {
        float* numbers = call.table_gradient + slice * call.span + shift;
        for (Int key = row.from / LANES * LANES; key < row.to; key += LANES)
            store(numbers + key, load(numbers + key) + load(gradient + key - row.base));
    }
    if (call.slope) {
        const float* rise = call.rise + shift;
        double* rises = call.rise_gradient + slice * call.span + shift;
        float rate = call.rate[row.batch * call.rate_step + row.query];
        double of_rate = 0;
        pieces_of(call, row, [&](Int piece, Int from, Int to) {
            float slope = call.slope[piece], moved = slope * rate;
            Vector many{}, risen{};
            double one = 0, high = 0;
            Int key = from;
            for (; key + LANES <= to; key += LANES) {
                Vector each = load(gradient + key - row.base);
                many += each;
                risen += each * load(rise + key);
                add(rises + key, each * moved);
            }
            for (; key < to; ++key) {
                float each = gradient[key - row.base];
                one += each;
                high += double(each) * rise[key];
                rises[key] += double(each) * moved;
            }
            one += sum(many);
            high += sum(risen);
            Int own = slice * call.pieces + piece - row.head * call.pieces;
            call.slope_gradient[own] += high * rate;
            call.offset_gradient[own] += one;
            of_rate += high * slope;
        });
        call.rate_gradient[(row.batch * call.heads + row.head) * call.queries + row.query] += float(of_rate);
    }
}
