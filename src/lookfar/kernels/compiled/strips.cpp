// Attention for strips of queries against all keys that they see, forward and backward. See docs/kernels.md.
#include "cope.h"
#include "net.h"
#include "work.h"

namespace {

// What one thread holds.
struct Hand {
    const Work& work;
    const Request& call;
    Int maps;  // heads that are computed together
    Memory raw, weights, gradients, queries, towards, products, biases;
    std::unique_ptr<Net> net;
    Cope cope;

    Hand(const Work& work, Int columns) : work(work), call(work.call), maps(call.coupled() ? call.heads : 1) {
        queries = room(TALLEST * work.padded);
        if (call.embedding) products = room(2 * TALLEST * call.place_step);
        if (call.coupled()) net = std::make_unique<Net>(call, columns);
    }

    Int places() const { return call.place_step; }

    // Products of the queries with the embedding of every place, [rows, places].
    void embed(const Strip& strip) {
        product(Left{queries.get(), work.padded, 1}, Even{call.embedding, places()}, strip.rows, call.width, places(),
                products.get(), places());
    }

    // All that a method adds to a row of raw scores of one head; `copy` is the same row, unchanged.
    void add(const Row& row, Int each, float* scores, const float* copy) {
        if (call.embedding) cope.forward(call, row, products.get() + each * places(), scores, copy);
        add_bias(call, row, scores);
    }

    void give(const Strip& strip, Int head, const float* weights_, Int step, const float* divided) {
        Int map = work.value_map(strip.batch, head);
        float* to = call.output + work.flat(strip, head, 0) * work.value_padded;
        product(Left{weights_, step, 1}, Even{work.values.row(map, strip.base), work.value_padded}, strip.rows,
                std::min(strip.columns, call.keys - strip.base), work.value_padded, to, work.value_padded);
        for (Int each = 0; each < strip.rows; ++each)
            for (Int place = 0; place < work.value_padded; ++place) to[each * work.value_padded + place] *= divided[each];
    }
};

// Floats from one row of a strip to the next: zeros between them stand for what lies beyond.
Int step_of(const Strip& strip) { return strip.columns + 2 * MARGIN; }

struct Size {
    Int scores = 0, columns = 0;  // the most of a strip, margins included, and of a row

    explicit Size(const std::vector<Strip>& strips) {
        for (const Strip& each : strips) {
            scores = std::max(scores, each.rows * step_of(each));
            columns = std::max(columns, each.columns);
        }
    }
};

struct Forward : Hand {
    Forward(const Work& work, Size size) : Hand(work, size.columns) {
        weights = room(maps * size.scores);
        if (call.embedding) raw = room(size.columns);
    }

    void head(const Strip& strip, Int head) {
        Int step = step_of(strip);
        float divided[TALLEST];
        work.queries(strip, head, queries.get());
        work.scores(work.keys, work.key_map(strip.batch, head), queries.get(), work.padded, strip, 0, strip.columns,
                    weights.get(), step);
        if (call.embedding) embed(strip);
        for (Int each = 0; each < strip.rows; ++each) {
            Row row = work.row(strip, head, each);
            float* own = weights.get() + each * step;
            if (raw) std::memcpy(raw.get(), own, strip.columns * sizeof(float));
            add(row, each, own, raw.get());
            divided[each] = work.softmax(row, strip.columns, own);
        }
        give(strip, head, weights.get(), step, divided);
    }

    void heads(const Strip& strip) {
        std::vector<float> divided(call.heads * strip.rows);
        Int step = step_of(strip), map_step = strip.rows * step;
        for (Int head = 0; head < call.heads; ++head) {
            work.queries(strip, head, queries.get());
            work.scores(work.keys, work.key_map(strip.batch, head), queries.get(), work.padded, strip, 0,
                        strip.columns, weights.get() + head * map_step, step);
        }
        for (Int each = 0; each < strip.rows; ++each) {
            float* own = weights.get() + each * step;
            Row row = work.row(strip, 0, each);
            net->read(row, own, map_step, strip.columns);
            net->forward(row, own, map_step);
            for (row.head = 0; row.head < call.heads; ++row.head) {
                float* scores = own + row.head * map_step;
                if (call.keeps_bias) add_bias(call, row, scores);
                divided[row.head * strip.rows + each] = work.softmax(row, strip.columns, scores);
            }
        }
        for (Int head = 0; head < call.heads; ++head)
            give(strip, head, weights.get() + head * map_step, step, divided.data() + head * strip.rows);
    }
};

struct Backward : Hand {
    Int part, step = 0;
    float deltas[TALLEST];

    Backward(const Work& work, Size size, Int part) : Hand(work, size.columns), part(part) {
        weights = room(maps * size.scores);
        gradients = room(maps * size.scores + 2 * MARGIN);
        towards = room(TALLEST * work.value_padded);
        if (call.coupled() || call.embedding) raw = room(maps * size.scores);
        if (call.coupled()) {
            biases = room(call.heads * (size.columns + 2 * MARGIN));
            std::fill(gradients.get(), gradients.get() + MARGIN, 0.0f);
            net->begin();
        }
    }

    Int slice(const Strip& strip, Int head) const { return (part * call.batch + strip.batch) * call.heads + head; }

    // Queries, gradients of the outputs, and what these and the outputs have in common, of a strip of one head.
    void take(const Strip& strip, Int head) {
        work.queries(strip, head, queries.get());
        for (Int each = 0; each < strip.rows; ++each) {
            Int flat = work.flat(strip, head, each), width = call.value_width;
            const float* gradient = call.gradient + flat * width;
            const float* output = call.output + flat * work.value_padded;
            float* own = towards.get() + each * work.value_padded;
            std::memcpy(own, gradient, width * sizeof(float));
            std::fill(own + width, own + work.value_padded, 0.0f);
            Vector common{};
            for (Int place = 0; place < work.value_padded; place += LANES)
                common += load(own + place) * load(output + place);
            deltas[each] = sum(common);
            if (call.sink)
                call.sink_gradient[flat] =
                    -std::exp(*work.sink(strip.batch, head, strip.query + each) - call.tops[flat]) * call.shares[flat] *
                    deltas[each];
        }
    }

    // Final scores to weights, and gradients of the weights to gradients of the final scores.
    void turn(const Row& row, Int start, Int columns, float* scores, float* gradient, Int each) {
        Work::hide(row, start, columns, scores);
        Int place = (row.batch * call.heads + row.head) * call.queries + row.query;
        float top = call.tops[place], share = call.shares[place], delta = deltas[each];
        for (Int key = 0; key < columns; key += LANES) {
            Vector weight = exponential(load(scores + key) - top) * share;
            store(scores + key, weight);
            store(gradient + key, weight * (load(gradient + key) - delta));
        }
    }

    void of_values(const Strip& strip, Int head, Int start, Int columns, const float* weights_) {
        float* to = call.value_gradient + (slice(strip, head) * call.keys + strip.base + start) * work.value_padded;
        product(Left{weights_, 1, step}, Even{towards.get(), work.value_padded},
                std::min(columns, call.keys - strip.base - start), strip.rows, work.value_padded, to,
                work.value_padded, true);
    }

    void of_queries_and_keys(const Strip& strip, Int head, Int start, Int columns, const float* gradient) {
        Int real = std::min(columns, call.keys - strip.base - start), map = work.key_map(strip.batch, head);
        float* to = call.query_gradient + work.flat(strip, head, 0) * work.padded;
        product(Left{gradient, step, 1}, Even{work.keys.row(map, strip.base + start), work.padded}, strip.rows, real,
                work.padded, to, work.padded, true);
        to = call.key_gradient + (slice(strip, head) * call.keys + strip.base + start) * work.padded;
        product(Left{gradient, 1, step}, Even{queries.get(), work.padded}, real, strip.rows, work.padded, to,
                work.padded, true);
    }

    // The gradient of scaled queries to that of queries.
    void scale(const Strip& strip, Int head) {
        float* to = call.query_gradient + work.flat(strip, head, 0) * work.padded;
        for (Int each = 0; each < strip.rows * work.padded; ++each) to[each] *= call.scale;
    }

    void head(const Strip& strip, Int head) {
        take(strip, head);
        Int chunk = call.embedding ? strip.columns : CHUNK;
        step = std::min(chunk, strip.columns) + 2 * MARGIN;
        float *place_products = products.get(), *of_products = place_products + TALLEST * places();
        if (call.embedding) {
            embed(strip);
            std::memset(of_products, 0, strip.rows * places() * sizeof(float));
        }
        for (Int start = 0; start < strip.columns; start += chunk) {
            Int columns = std::min(chunk, strip.columns - start);
            work.scores(work.keys, work.key_map(strip.batch, head), queries.get(), work.padded, strip, start, columns,
                        weights.get(), step);
            work.scores(work.values, work.value_map(strip.batch, head), towards.get(), work.value_padded, strip, start,
                        columns, gradients.get(), step);
            for (Int each = 0; each < strip.rows; ++each) {
                Row row = work.row(strip, head, each), part_ = row;
                float *own = weights.get() + each * step, *gradient = gradients.get() + each * step;
                part_.base = strip.base + start;
                part_.from = std::max(row.from, part_.base);
                part_.to = std::min(row.to, part_.base + columns);
                if (raw) std::memcpy(raw.get(), own, columns * sizeof(float));
                add(part_, each, own, raw.get());
                turn(row, start, columns, own, gradient, each);
                bias_backward(call, part_, gradient, slice(strip, head));
                if (call.embedding) cope.backward(call, row, gradient, of_products + each * places());
            }
            of_values(strip, head, start, columns, weights.get());
            of_queries_and_keys(strip, head, start, columns, gradients.get());
        }
        if (call.embedding) {
            float* to = call.query_gradient + work.flat(strip, head, 0) * work.padded;
            for (Int each = 0; each < strip.rows; ++each)
                for (Int place = 0; place < call.width; ++place) {
                    const float *own = of_products + each * places(), *numbers = call.embedding + place * places();
                    Vector total{};
                    for (Int lane = 0; lane < places(); lane += LANES) total += load(own + lane) * load(numbers + lane);
                    to[each * work.padded + place] += sum(total);
                }
            product(Left{queries.get(), 1, work.padded}, Even{of_products, places()}, call.width, strip.rows, places(),
                    call.embedding_gradient + slice(strip, head) * call.width * places(), places(), true);
        }
        scale(strip, head);
    }

    void heads(const Strip& strip) {
        step = step_of(strip);
        Int map_step = strip.rows * step;
        float* first = gradients.get() + MARGIN;
        for (Int head = 0; head < call.heads; ++head) {
            work.queries(strip, head, queries.get());
            work.scores(work.keys, work.key_map(strip.batch, head), queries.get(), work.padded, strip, 0,
                        strip.columns, raw.get() + head * map_step, step);
        }
        for (Int each = 0; each < strip.rows; ++each) {  // final scores of every head
            Row row = work.row(strip, 0, each);
            net->read(row, raw.get() + each * step, map_step, strip.columns);
            for (Int head = 0; head < call.heads; ++head)
                std::memcpy(weights.get() + head * map_step + each * step, raw.get() + head * map_step + each * step,
                            strip.columns * sizeof(float));
            net->forward(row, weights.get() + each * step, map_step);
            for (row.head = 0; call.keeps_bias && row.head < call.heads; ++row.head)
                add_bias(call, row, weights.get() + row.head * map_step + each * step);
        }
        for (Int head = 0; head < call.heads; ++head) {  // to weights, and their gradients to those of the scores
            take(strip, head);
            float *own = weights.get() + head * map_step, *gradient = first + head * map_step;
            work.scores(work.values, work.value_map(strip.batch, head), towards.get(), work.value_padded, strip, 0,
                        strip.columns, gradient, step);
            for (Int each = 0; each < strip.rows; ++each) {
                turn(work.row(strip, head, each), 0, strip.columns, own + each * step, gradient + each * step, each);
                std::fill(gradient + each * step + strip.columns, gradient + (each + 1) * step, 0.0f);
            }
            of_values(strip, head, 0, strip.columns, own);
        }
        float* raws = weights.get();  // from here on: gradients of the raw scores
        for (Int each = 0; each < strip.rows; ++each) {
            Row row = work.row(strip, 0, each);
            const float* gradient = first + each * step;
            for (Int head = 0; head < call.heads; ++head) {
                std::memcpy(raws + head * map_step + each * step, gradient + head * map_step,
                            strip.columns * sizeof(float));
                float* bias = biases.get() + head * step;
                if (call.keeps_bias) std::memcpy(bias, gradient + head * map_step, strip.columns * sizeof(float));
                else std::memset(bias, 0, strip.columns * sizeof(float));
            }
            net->read(row, raw.get() + each * step, map_step, strip.columns);
            net->backward(row, gradient, map_step, raws + each * step, biases.get(), step);
            for (row.head = 0; call.biased() && row.head < call.heads; ++row.head)
                bias_backward(call, row, biases.get() + row.head * step, slice(strip, row.head));
        }
        for (Int head = 0; head < call.heads; ++head) {
            work.queries(strip, head, queries.get());
            of_queries_and_keys(strip, head, 0, strip.columns, raws + head * map_step);
            scale(strip, head);
        }
    }
};

void forward(const Request& call) {
    Work work(call, false);
    Int maps = call.coupled() ? 1 : call.heads;
    std::vector<Strip> strips = work.strips(call.coupled() ? 2 * NUMBERS / call.heads : NUMBERS);
    std::atomic<Int> next{0};
    Int count = Int(strips.size());
    on_threads(std::min(call.threads, count * maps), [&](Int) {
        Forward hand(work, Size(strips));
        for (Int each; (each = next++) < count * maps;) {  // the longest first
            const Strip& strip = strips[count - 1 - each % count];
            call.coupled() ? hand.heads(strip) : hand.head(strip, each / count);
        }
    });
}

void backward(const Request& call) {
    Work work(call, true);
    if (call.coupled()) {  // strips by turns, so that what a thread adds up does not depend on its speed
        std::vector<Strip> strips = work.strips(2 * NUMBERS / call.heads);
        on_threads(call.parts, [&](Int part) {
            Backward hand(work, Size(strips), part);
            for (Int each = part; each < Int(strips.size()); each += call.parts) hand.heads(strips[each]);
            hand.net->finish(part);
        });
        return;
    }
    std::vector<Strip> strips = work.strips(call.embedding ? NUMBERS / 2 : std::numeric_limits<Int>::max());
    Size size(strips);
    if (!call.embedding) size.scores = std::min(size.scores, TALLEST * (CHUNK + 2 * MARGIN));
    std::atomic<Int> next{0};
    Int tasks = call.batch * call.heads;
    on_threads(std::min(call.threads, tasks), [&](Int) {
        Backward hand(work, size, 0);
        for (Int task; (task = next++) < tasks;)
            for (const Strip& strip : strips)
                if (strip.batch == task / call.heads) hand.head(strip, task % call.heads);
    });
}

// 0, or 1 where there is not enough memory.
Int tried(void (*function)(const Request&), const Request* call) {
    try {
        function(*call);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" Int lookfar_lanes() { return LANES; }

extern "C" Int lookfar_request_size() { return sizeof(Request); }

extern "C" Int lookfar_forward(const Request* call) { return tried(forward, call); }

extern "C" Int lookfar_backward(const Request* call) { return tried(backward, call); }
