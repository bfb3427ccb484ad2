// Attention for strips of queries against all keys that they see, forward and backward. See docs/kernels.md.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "cope.h"
#include "net.h"

namespace {

constexpr Int NUMBERS = 1 << 17;  // floats of a strip of scores: it stays in a core's own cache
constexpr Int TALLEST = 60;       // queries of a strip
constexpr Int CHUNK = 1024;       // keys of a strip at a time, backward, where rows need not be whole

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<float, Free>;

Memory room(Int count) {
    auto* found = static_cast<float*>(std::aligned_alloc(64, up(count * 4 + 4, 64)));
    if (!found) throw std::bad_alloc();
#ifdef LOOKFAR_POISON  // a test's: what is read before it is written is no number
    std::fill(found, found + count, std::numeric_limits<float>::quiet_NaN());
#endif
    return Memory(found);
}

// Runs task(0) … task(threads - 1), as many at a time as can be started, and throws what the first of them threw.
template <class Task>
void on_threads(Int threads, Task task) {
    std::exception_ptr failure;
    std::mutex telling;
    auto guarded = [&](Int thread) {
        try {
            task(thread);
        } catch (...) {
            std::lock_guard<std::mutex> alone(telling);
            if (!failure) failure = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    others.reserve(threads);
    Int started = 1;
    try {
        for (; started < threads; ++started) others.emplace_back(guarded, started);
    } catch (const std::system_error&) {  // no more threads: the rest is done here
    }
    guarded(0);
    for (; started < threads; ++started) guarded(started);
    for (auto& each : others) each.join();
    if (failure) std::rethrow_exception(failure);
}

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
    const Call& call;
    Packed keys, values;
    Int padded, value_padded;

    Work(const Call& call, bool backward)
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

// What one thread holds.
struct Hand {
    const Work& work;
    const Call& call;
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

void forward(const Call& call) {
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

void backward(const Call& call) {
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
Int tried(void (*function)(const Call&), const Call* call) {
    try {
        function(*call);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

}  // namespace

extern "C" Int lookfar_lanes() { return LANES; }

extern "C" Int lookfar_call_size() { return sizeof(Call); }

extern "C" Int lookfar_forward(const Call* call) { return tried(forward, call); }

extern "C" Int lookfar_backward(const Call* call) { return tried(backward, call); }
