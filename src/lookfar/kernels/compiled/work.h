// How a call is laid out and divided: packed keys and values, strips of queries, and what all strips do alike.
#pragma once
#include <atomic>

#include "bias.h"
#include "products.h"
#include "threads.h"

constexpr Int NUMBERS = 1 << 17;  // floats of a strip of scores: it stays in a core's own cache
constexpr Int TALLEST = 60;       // queries of a strip
constexpr Int CHUNK = 1024;       // keys of a strip at a time, backward, where rows need not be whole

// Rows [count, padded] and panels of columns [panel][width][PANEL], for every batch and head.
struct Packed {
    Int count, width, padded, panels;
    Memory rows, columns;

    Packed(Int maps, Int count, Int width, bool as_rows, bool as_columns)
        : count(count), width(width), padded(up(width, LANES)), panels(up(count, PANEL) / PANEL) {
        if (as_rows) rows = room(maps * count * padded);
        if (as_columns) columns = room(maps * panels * width * PANEL);
    }

    void fill(Int map, const float* from, Int step) {
        if (rows)
            for (Int token = 0; token < count; ++token) {
                float* to = row(map, token);
                std::memcpy(to, from + token * step, width * sizeof(float));
                std::fill(to + width, to + padded, 0.0f);
            }
        if (columns)
            for (Int panel_ = 0; panel_ < panels; ++panel_) {
                float* to = panel(map, panel_);
                for (Int place = 0; place < PANEL; ++place) {
                    Int token = panel_ * PANEL + place;
                    for (Int each = 0; each < width; ++each)
                        to[each * PANEL + place] = token < count ? from[token * step + each] : 0.0f;
                }
            }
    }

    float* row(Int map, Int token) const { return rows.get() + (map * count + token) * padded; }
    float* panel(Int map, Int each) const { return columns.get() + (map * panels + each) * width * PANEL; }
};

// Some queries of a line, and the keys from `base` on that one of them sees.
struct Strip {
    Int batch, query, rows, base, columns;
};

struct Work {
    const Request& call;
    Packed keys, values;
    Int padded, value_padded;

    Work(const Request& call, bool backward)
        : call(call),
          keys(call.batch * call.key_heads, call.keys, call.width, backward, true),
          values(call.batch * call.value_heads, call.keys, call.value_width, !backward, backward),
          padded(keys.padded), value_padded(values.padded) {
        std::atomic<Int> next{0};
        Int of_keys = call.batch * call.key_heads, all_ = of_keys + call.batch * call.value_heads;
        on_threads(std::min(call.threads, all_), [&](Int) {
            for (Int each; (each = next++) < all_;) {
                if (each < of_keys) {
                    Int batch = each / call.key_heads, head = each % call.key_heads;
                    keys.fill(each, call.key + batch * call.key_steps[0] + head * call.key_steps[1],
                              call.key_steps[2]);
                } else {
                    Int own = each - of_keys, batch = own / call.value_heads, head = own % call.value_heads;
                    values.fill(own, call.value + batch * call.value_steps[0] + head * call.value_steps[1],
                                call.value_steps[2]);
                }
            }
        });
    }

    Int key_map(Int batch, Int head) const { return batch * call.key_heads + call.key_head[head]; }
    Int value_map(Int batch, Int head) const { return batch * call.value_heads + call.value_head[head]; }

    Int first_key(Int batch, Int query) const { return call.start[batch * call.start_step + query]; }

    Row row(const Strip& strip, Int head, Int each) const {
        Int query = strip.query + each, place = call.first + query;
        return {strip.batch, head, query, place, strip.base, first_key(strip.batch, query), place + 1};
    }

    Strip strip(Int batch, Int query, Int rows) const {
        Int from = call.keys, to = call.first + query + rows;
        for (Int each = 0; each < rows; ++each) from = std::min(from, first_key(batch, query + each));
        Int base = from / PANEL * PANEL;
        return {batch, query, rows, base, up(to - base, PANEL)};
    }

    // Strips of at most TALLEST queries and, where that leaves ROWS of them, `numbers` scores.
    std::vector<Strip> strips(Int numbers) const {
        std::vector<Strip> found;
        for (Int batch = 0; batch < call.batch; ++batch)
            for (Int query = 0; query < call.queries; query += found.back().rows) {
                Int rows = std::min(TALLEST, call.queries - query);
                while (rows > ROWS && rows * strip(batch, query, rows).columns > numbers) rows -= ROWS;
                found.push_back(strip(batch, query, std::max(rows, std::min(ROWS, call.queries - query))));
            }
        return found;
    }

    // Scaled queries of a strip, [rows, padded].
    void queries(const Strip& strip, Int head, float* to) const {
        for (Int each = 0; each < strip.rows; ++each) {
            const float* from = call.query + strip.batch * call.query_steps[0] + head * call.query_steps[1] +
                                (strip.query + each) * call.query_steps[2];
            for (Int place = 0; place < padded; ++place)
                to[each * padded + place] = place < call.width ? from[place] * call.scale : 0.0f;
        }
    }

    void scores(const Packed& from, Int map, const float* left, Int step, const Strip& strip, Int start, Int columns,
                float* to, Int to_step) const {
        for (Int column = 0; column < columns; column += PANEL)
            product(Left{left, step, 1}, Even{from.panel(map, (strip.base + start + column) / PANEL), PANEL},
                    strip.rows, from.width, PANEL, to + column, to_step);
    }

    // Hides what a row does not see; columns are counted from `start` past the base.
    static void hide(const Row& row, Int start, Int columns, float* scores) {
        Int from = std::min(std::max(row.from - row.base - start, Int(0)), columns);
        Int to = std::min(std::max(row.to - row.base - start, Int(0)), columns);
        std::fill(scores, scores + from, HIDDEN);
        std::fill(scores + to, scores + columns, HIDDEN);
    }

    const float* sink(Int batch, Int head, Int query) const {
        return call.sink + batch * call.sink_steps[0] + head * call.sink_steps[1] + query * call.sink_steps[2];
    }

    Int flat(const Strip& strip, Int head, Int each) const {
        return (strip.batch * call.heads + head) * call.queries + strip.query + each;
    }

    // Weights, not yet divided by their sum, in place of the final scores; gives what to multiply them by.
    float softmax(const Row& row, Int columns, float* scores) const {
        hide(row, 0, columns, scores);
        Vector most = all(HIDDEN);
        for (Int key = 0; key < columns; key += LANES) most = larger(most, load(scores + key));
        float top = largest(most), sunk = call.sink ? *sink(row.batch, row.head, row.query) : HIDDEN;
        if (sunk > top) top = sunk;
        Vector total{};
        for (Int key = 0; key < columns; key += LANES) {
            Vector weight = exponential(load(scores + key) - top);
            store(scores + key, weight);
            total += weight;
        }
        float whole = sum(total) + (sunk == HIDDEN ? 0.0f : std::exp(sunk - top));
        Int place = (row.batch * call.heads + row.head) * call.queries + row.query;
        call.tops[place] = top;
        return call.shares[place] = 1 / whole;
    }
};
