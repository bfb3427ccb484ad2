// A net over the score maps of all heads: two convolutions along the keys of one row, a leaky rectifier between them.
#pragma once
#include <algorithm>
#include <vector>

#include "bias.h"
#include "products.h"

constexpr Int COLUMNS = 512;  // keys at a time
constexpr Int MARGIN = 16;    // zeros around a row, at least the reach of the taps and a vector

struct Net {
    const Request& call;
    Int reach, channels, span;
    std::vector<float> seen, change, kept, first_flipped, second_flipped;  // seen: [channels, span], rows with margins
    std::vector<const float*> rows, left, right;
    std::vector<Vector> first_sums, second_sums;
    std::vector<double> first_biases, second_biases;

    Net(const Request& call, Int columns)
        : call(call), reach(call.taps / 2), channels(call.heads * call.inputs),
          span(columns + 2 * PANEL + 2 * MARGIN) {
        seen.assign(channels * span, 0);
        change.assign(std::max(channels, call.hidden) * wide(), 0);
        kept.assign(2 * call.hidden * wide(), 0);
        first_flipped.resize(channels * call.hidden * call.taps);
        second_flipped.resize(call.heads * call.hidden * call.taps);
        Int taps = call.taps;
        for (Int out = 0; out < call.hidden; ++out)
            for (Int in = 0; in < channels; ++in)
                for (Int tap = 0; tap < taps; ++tap)
                    first_flipped[(in * call.hidden + out) * taps + tap] =
                        call.first_weight[(out * channels + in) * taps + taps - 1 - tap];
        for (Int out = 0; out < call.heads; ++out)
            for (Int in = 0; in < call.hidden; ++in)
                for (Int tap = 0; tap < taps; ++tap)
                    second_flipped[(in * call.heads + out) * taps + tap] =
                        call.second_weight[(out * call.hidden + in) * taps + taps - 1 - tap];
    }

    static Int wide() { return COLUMNS + 2 * MARGIN + PANEL; }

    // Room for the sums of weight gradients, which `finish` writes.
    void begin() {
        first_sums.assign(call.hidden * channels * call.taps, Vector{});
        second_sums.assign(call.heads * call.hidden * call.taps, Vector{});
        first_biases.assign(call.hidden, 0);
        second_biases.assign(call.heads, 0);
    }

    void finish(Int part) {
        Int first = call.hidden * channels * call.taps, second = call.heads * call.hidden * call.taps;
        for (Int each = 0; each < first; ++each) call.first_weight_gradient[part * first + each] = sum(first_sums[each]);
        for (Int each = 0; each < second; ++each)
            call.second_weight_gradient[part * second + each] = sum(second_sums[each]);
        for (Int each = 0; each < call.hidden; ++each)
            call.first_bias_gradient[part * call.hidden + each] = float(first_biases[each]);
        for (Int each = 0; each < call.heads; ++each)
            call.second_bias_gradient[part * call.heads + each] = float(second_biases[each]);
    }

    // Columns of a channel of the row, counted from the row's base.
    float* channel(Int each) { return seen.data() + each * span + MARGIN; }

    // Fills the channels of a row: `scores` has the raw scores of head 0 at its base, those of the next `step` further.
    void read(const Row& row, const float* scores, Int step, Int columns) {
        for (Int head = 0; head < call.heads; ++head) {
            place(row, scores + head * step, channel(head), columns);
            if (call.inputs == 1) continue;
            float* bias = channel(call.heads + head);
            std::memset(bias, 0, columns * sizeof(float));
            Row own = row;
            own.head = head;
            add_bias(call, own, bias);
            outside(row, bias, columns);
        }
    }

    // What the net adds to the scores of every head: to[head * step + key - base].
    void forward(const Row& row, float* to, Int step) {
        for (Int start = row.from; start < row.to; start += COLUMNS) {
            Int stop = std::min(start + COLUMNS, row.to), count = up(stop - start, LANES);
            hide(row, start, count);
            taps_of(kept.data() + MARGIN, call.hidden, 0);
            product(Left{call.second_weight, call.hidden * call.taps, 1}, Scattered{rows.data(), 0}, call.heads,
                    call.hidden * call.taps, count, change.data(), wide());
            for (Int head = 0; head < call.heads; ++head)
                for (Int key = start; key < stop; ++key)
                    to[head * step + key - row.base] += change[head * wide() + key - start] + call.second_bias[head];
        }
    }

    // `gradient`, [heads, step] with margins of zeros, is that of the final scores. Adds what comes through the net.
    void backward(
        const Row& row, const float* gradient, Int step, float* scores, float* biases, Int bias_step
    ) {
        Int taps = call.taps, hidden = call.hidden;
        float* back = kept.data() + hidden * wide();  // the gradient of the hidden maps
        for (Int start = row.from; start < row.to; start += COLUMNS) {
            Int stop = std::min(start + COLUMNS, row.to), count = up(stop - start, LANES);
            hide(row, start, count);
            Int around = up(count + 2 * reach, LANES);
            rows_of(gradient + start - row.base - reach, step, call.heads);
            product(Left{second_flipped.data(), call.heads * taps, 1}, Scattered{rows.data(), 0}, hidden,
                    call.heads * taps, around, back + MARGIN - reach, wide());
            for (Int each = 0; each < hidden; ++each) {
                float* own = back + each * wide() + MARGIN;
                const float* active = kept.data() + each * wide() + MARGIN;
                for (Int key = -reach; key < around - reach; key += LANES) {
                    Vector slope = choose(load(active + key) > Vector{}, all(1.0f), all(call.leak));
                    store(own + key, load(own + key) * slope);
                }
                zero(own, -reach, row.from - start);
                zero(own, row.to - start, around - reach);
            }
            left.resize(std::max(hidden, call.heads));
            right.resize(std::max(channels, hidden) * taps);
            for (Int head = 0; head < call.heads; ++head) {
                copied(gradient + head * step + start - row.base, stop - start, count, change.data() + head * wide());
                left[head] = change.data() + head * wide();
                Vector total{};
                for (Int key = 0; key < count; key += LANES) total += load(left[head] + key);
                second_biases[head] += sum(total);
            }
            for (Int each = 0; each < hidden; ++each)
                for (Int tap = 0; tap < taps; ++tap)
                    right[each * taps + tap] = kept.data() + each * wide() + MARGIN + tap - reach;
            sums_of_products(left.data(), call.heads, right.data(), hidden * taps, count, second_sums.data());
            taps_of(back + MARGIN, hidden, 0);
            product(Left{first_flipped.data(), hidden * taps, 1}, Scattered{rows.data(), 0}, channels, hidden * taps,
                    count, change.data(), wide());
            for (Int each = 0; each < channels; ++each) {
                Int head = each % call.heads;
                float* to = each < call.heads ? scores + head * step : biases + head * bias_step;
                for (Int key = start; key < stop; ++key)
                    to[key - row.base] += change[each * wide() + key - start];
            }
            for (Int each = 0; each < hidden; ++each) {
                copied(back + each * wide() + MARGIN, stop - start, count, change.data() + each * wide());
                left[each] = change.data() + each * wide();
                Vector total{};
                for (Int key = 0; key < count; key += LANES) total += load(left[each] + key);
                first_biases[each] += sum(total);
            }
            for (Int each = 0; each < channels; ++each)
                for (Int tap = 0; tap < taps; ++tap)
                    right[each * taps + tap] = channel(each) + start - row.base + tap - reach;
            sums_of_products(left.data(), hidden, right.data(), channels * taps, count, first_sums.data());
        }
    }

   private:
    // The hidden maps of keys start - reach … start + count + reach, at MARGIN - reach …; 0 where nothing is seen.
    void hide(const Row& row, Int start, Int count) {
        Int around = up(count + 2 * reach, LANES), taps = call.taps;
        rows.resize(std::max(channels, call.hidden) * taps);
        for (Int each = 0; each < channels; ++each)
            for (Int tap = 0; tap < taps; ++tap)
                rows[each * taps + tap] = channel(each) + start - row.base - reach + tap - reach;
        float* to = kept.data() + MARGIN - reach;
        product(Left{call.first_weight, channels * taps, 1}, Scattered{rows.data(), 0}, call.hidden, channels * taps,
                around, to, wide());
        for (Int each = 0; each < call.hidden; ++each) {
            float* own = kept.data() + each * wide() + MARGIN;
            for (Int key = -reach; key < around - reach; key += LANES) {
                Vector value = load(own + key) + call.first_bias[each];
                store(own + key, choose(value > Vector{}, value, value * call.leak));
            }
            zero(own, -reach, row.from - start);
            zero(own, row.to - start, around - reach);
        }
    }

    void rows_of(const float* first, Int step, Int count) {
        for (Int each = 0; each < count; ++each)
            for (Int tap = 0; tap < call.taps; ++tap)
                rows[each * call.taps + tap] = first + each * step + tap - reach;
    }

    void taps_of(const float* first, Int count, Int shift) { rows_of(first + shift, wide(), count); }

    static void zero(float* row, Int from, Int to) {
        for (Int key = from; key < to; ++key) row[key] = 0;
    }

    static void copied(const float* from, Int count, Int padded, float* to) {
        std::memcpy(to, from, count * sizeof(float));
        zero(to, count, padded);
    }

    static void place(const Row& row, const float* from, float* to, Int columns) {
        std::memcpy(to, from, columns * sizeof(float));
        outside(row, to, columns);
    }

    static void outside(const Row& row, float* to, Int columns) {
        zero(to, 0, row.from - row.base);
        zero(to, row.to - row.base, columns + MARGIN);
    }
};
