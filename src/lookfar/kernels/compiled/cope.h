// Contextual positions of one row: gates are summed from the row's own key backwards until the last place is reached.
#pragma once
#include <vector>
#include "bias.h"

struct Cope {
    std::vector<float> gates, parts, slopes;  // of the keys before the last place, the row's own first
    std::vector<Int> below;                   // whole places, beyond which a key stands by its part
    Int reached = 0;                         // how many those are

    // scores[key - base] += the product with the embedding of the key's place, which `products` holds for whole places.
    void forward(const Request& call, const Row& row, const float* products, float* scores, const float* raw) {
        Int seen = row.to - row.from, last = call.places - 1;
        gates.resize(up(seen, LANES));
        parts.resize(up(seen, LANES));
        below.resize(up(seen, LANES));
        slopes.resize(up(seen, LANES));
        double total = 0;
        Int count = 0;
        for (bool open = true; count < seen && open; ) {
            Vector block{};
            Int wide = seen - count < LANES ? seen - count : LANES;
            for (Int lane = 0; lane < wide; ++lane) block[lane] = raw[row.to - 1 - count - lane - row.base];
            Vector small = exponential(-larger(block, -block));  // of -|score|
            Vector gate = choose(block >= Vector{}, 1.0f / (1.0f + small), small / (1.0f + small));
            for (Int lane = 0; lane < wide && open; ++lane) {
                total += gate[lane];
                open = total <= double(last);
                if (!open) break;
                gates[count] = gate[lane];
                below[count] = Int(total);
                parts[count] = float(total - double(below[count]));
                ++count;
            }
        }
        reached = count;
        for (Int each = 0; each < count; ++each) {
            Int place = below[each];
            float part = parts[each], slope = part > 0 ? products[place + 1] - products[place] : 0;
            slopes[each] = slope;
            scores[row.to - 1 - each - row.base] += products[place] + part * slope;
        }
        float beyond = products[last];
        Int stop = row.to - count, key = row.from;
        for (; key + LANES <= stop; key += LANES)
            store(scores + key - row.base, load(scores + key - row.base) + beyond);
        for (; key < stop; ++key) scores[key - row.base] += beyond;
    }

    // Adds to the gradient of the raw scores what comes through the gates, and to that of the products.
    void backward(const Request& call, const Row& row, float* gradient, float* products) {
        Int last = call.places - 1, stop = row.to - reached, key = row.from;
        Vector many{};
        float beyond = 0, through = 0;
        for (; key + LANES <= stop; key += LANES) many += load(gradient + key - row.base);
        for (; key < stop; ++key) beyond += gradient[key - row.base];
        products[last] += beyond + sum(many);
        for (Int each = reached - 1; each >= 0; --each) {  // from the farthest key to the row's own
            float& own = gradient[row.to - 1 - each - row.base];
            Int place = below[each];
            float part = parts[each], gate = gates[each];
            products[place] += own * (1 - part);
            if (part > 0) products[place + 1] += own * part;
            through += own * slopes[each];
            own += through * gate * (1 - gate);
        }
    }
};
