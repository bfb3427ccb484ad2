// What is asked for: the fields are those of `Request` in __init__.py, in their order.
#pragma once
#include "vectors.h"

struct Request {
    Int batch, heads, queries, keys;  // heads: of scores
    Int first;                        // the place of the first query among the keys
    Int width, value_width, key_heads, value_heads, threads;
    // inputs: rows are contiguous; steps to the next batch, head and token
    const float *query, *key, *value;
    Int query_steps[3], key_steps[3], value_steps[3];
    const int32_t *key_head, *value_head;  // of each score head
    const int32_t* start;                  // [#b, q] the first key that each query sees; the last is its own
    Int start_step;
    float scale;
    const float* sink;  // or null
    Int sink_steps[3];
    // a bias by distance, [h, span]: the number of distance d at place keys - 1 - d, zeros after distance 0
    const float* table;
    Int span;
    // a bias of straight pieces: slope[h, piece] · rise[distance] · rate[b, q] + offset[h, piece]
    const float *slope, *offset, *rise, *rate;  // rise as a table of one head
    const int32_t* cuts;                        // [#b, q, pieces - 1] the distance at which each next piece begins
    Int pieces, rate_step;
    // contextual positions: embedding [e, places], already divided by the scale
    const float* embedding;
    Int places, place_step;  // of which the first so many count; whole vectors
    // a net over heads: taps along the keys, channels are scores and, with two inputs, biases
    const float *first_weight, *first_bias, *second_weight, *second_bias;
    Int hidden, taps, inputs, keeps_bias;
    float leak;
    // results: rows are as wide as `padded` of them
    float *output, *tops, *shares;  // [b, h, q, v]; [b, h, q] the largest score, and 1 / Σ e^(score - largest)
    // backward; each of `parts` slices is filled by one thread
    const float* gradient;  // [b, h, q, v], contiguous
    float *query_gradient, *key_gradient, *value_gradient, *sink_gradient;
    float* table_gradient;
    double *slope_gradient, *offset_gradient, *rise_gradient;  // many terms that nearly cancel
    float *rate_gradient, *embedding_gradient;
    float *first_weight_gradient, *first_bias_gradient, *second_weight_gradient, *second_bias_gradient;
    Int parts;

    bool coupled() const { return first_weight != nullptr; }
    bool biased() const { return table != nullptr || slope != nullptr; }
};
