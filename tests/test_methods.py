"""Each method against its paper: the numbers of the specification, and a second, plainer way to compute the same."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import lookfar
from lookfar import kernels
from lookfar.attention import reference
from lookfar.attention.scheme import build_scheme
from lookfar.errors import UserError
from lookfar.methods import kerple
from lookfar.methods.base import slopes
from lookfar.sight import Sight
from tolerance import assert_near


def method(expression, heads=4, head_width=8, **site):
    """The one method of a scheme, in float64."""
    torch.manual_seed(1)
    return build_scheme(expression, heads=heads, head_width=head_width, **site).double().methods[0]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module):
    with torch.no_grad():
        for place, parameter in enumerate(module.parameters()):
            parameter.add_(0.4 * noise(*parameter.shape, seed=100 + place))
    return module


def attend(queries, keys, values, scheme, sight=None):
    return kernels.attend(queries, keys, values, sight or Sight.causal(keys.shape[2]), scheme, "reference")


# ALiBi


def recursive_slopes(heads):
    """The authors' definition: of a power of two a series; else of the one below, and every other of the one above."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start ** (n + 1) for n in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return recursive_slopes(below) + recursive_slopes(2 * below)[0::2][: heads - below]


@pytest.mark.parametrize("heads", [*range(1, 33), 40, 64])
def test_slopes_follow_the_authors_recursion(heads):
    assert slopes(heads).tolist() == pytest.approx(recursive_slopes(heads), rel=1e-6)


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (6, [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]),
        (12, [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625, 0.70711, 0.35355, 0.17678, 0.08839]),
        (20, [2 ** (-n / 2) for n in range(1, 17)] + [0.8409, 0.5946, 0.42045, 0.2973]),
    ],
)
def test_slopes_have_the_published_values(heads, expected):
    assert slopes(heads).tolist() == pytest.approx(expected, rel=2e-5)


def test_alibi_falls_by_its_slope_at_every_step_and_is_even():
    bias = method("alibi").at(torch.tensor([0, 1, 2, 100, -3]))
    assert_near(bias, -torch.tensor([[0, 1, 2, 100, 3]]) * slopes(4).double()[:, None])
    assert_near(method("alibi").at(torch.tensor([2.5]).double()), -2.5 * slopes(4).double()[:, None])


def test_alibi_is_not_scaled_with_the_scores():
    scheme = build_scheme("alibi", heads=2, head_width=4).double()
    queries, keys, values = noise(3, 1, 2, 5, 4)
    scores = queries @ keys.mT / 2
    for head, query, key in itertools.product(range(2), range(5), range(5)):
        scores[0, head, query, key] -= slopes(2)[head].double() * (query - key) if key <= query else math.inf
    assert_near(attend(queries, keys, values, scheme), scores.softmax(-1) @ values)


@pytest.mark.parametrize(
    ("form", "ahead"),
    [("symmetric", [0.5, 1, 1.5]), ("offset", [0.25, 0.75, 1.25]), ("separate", [2**-1.5, 2 * 2**-1.5, 3 * 2**-1.5])],
)
def test_alibi_both_ways_has_the_published_forms(form, ahead):
    """In the first of eight heads, whose slope is ½; a slope of its own lies half a step on."""
    bias = method(f"alibi(form={form})", heads=8).at(torch.arange(-3, 4))[0]
    assert bias.tolist() == pytest.approx([-ahead[2], -ahead[1], -ahead[0], 0, -0.5, -1, -1.5])


def test_alibi_may_split_its_heads_between_before_and_after():
    bias = method("alibi(form=split)", heads=4).at(torch.arange(-2, 3))
    assert bias[:2].isfinite().tolist() == [[False, False, True, True, True]] * 2
    assert bias[2:].isfinite().tolist() == [[True, True, True, False, False]] * 2
    assert_near(-bias[:2, -1], 2 * slopes(2).double())
    assert_near(-bias[2:, 0], 2 * slopes(2).double())
    with pytest.raises(UserError, match="hides keys by its bias"):
        build_scheme("alibi(form=split) + dape_v2", heads=4)
    with pytest.raises(UserError, match="3 is odd"):
        build_scheme("alibi(form=split)", heads=3)


def test_alibi_may_learn_and_stretch_its_slopes():
    plain, learned, flat = method("alibi"), method("alibi(learned=true)"), method("alibi(factor=4)")
    distances = torch.arange(9)
    assert torch.allclose(learned.at(distances), plain.at(distances), rtol=1e-6)
    assert_near(flat.at(distances), plain.at(distances) / 4)
    learned.at(distances).sum().backward()
    assert (learned.start.grad != 0).all()
    assert not list(plain.parameters())


# T5

STARTS = [*range(16), 16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]


def test_t5_buckets_start_at_the_published_distances():
    buckets = method("t5").bucket(torch.arange(2000)).tolist()
    assert [buckets.index(bucket) for bucket in range(32)] == STARTS
    assert buckets == sorted(buckets) and buckets[-1] == 31
    assert method("t5").bucket(torch.tensor([-5, -1])).tolist() == [0, 0], "keys that lie ahead share bucket 0"


@pytest.mark.parametrize(("buckets", "farthest"), [(8, 20), (32, 128), (9, 50), (2, 2), (64, 1000)])
def test_t5_buckets_follow_the_formula(buckets, farthest):
    own, half = method(f"t5(buckets={buckets}, farthest={farthest})"), buckets // 2
    for distance in range(1, 1500):
        expected = distance
        if distance >= half:
            place = (buckets - half) * math.log(distance / half) / math.log(farthest / half)
            if abs(place - round(place)) < 1e-6:
                continue  # on the edge the type decides
            expected = min(buckets - 1, half + math.floor(place))
        assert own.bucket(torch.tensor([distance])).item() == expected, distance


def test_t5_reads_its_table_by_bucket():
    own = method("t5", heads=3)
    assert_near(own.at(torch.tensor([0, 5, 20, 5000])), own.table[[0, 5, 17, 31]].T)
    assert own.table.shape == (32, 3)


def test_t5_has_the_scale_of_its_convention():
    sight = Sight.causal(7)
    scaled, original, multiplied = (
        build_scheme(f"t5(scale={scale})", heads=2, head_width=16) for scale in ("scaled", "original", "multiplied")
    )
    assert (scaled.scale, original.scale, multiplied.scale) == (0.25, 1.0, 0.25)
    for scheme in (original, multiplied):
        scheme.load_state_dict(scaled.state_dict())
    assert_near(original.bias(sight), scaled.bias(sight))
    assert_near(multiplied.bias(sight), 4 * scaled.bias(sight))


def test_t5_refuses_fractional_distances():
    with pytest.raises(UserError, match="t5 needs whole positions"):
        method("t5").at(torch.tensor([1.5]).double())


# Kerple


def test_kerple_is_the_logarithmic_kernel():
    own = shaken(method("kerple"))
    amplitude, rate = (0.01 + (1 + each.exp()).log() for each in (own.amplitude, own.rate))
    for distance in (0, 1, 7, 300):
        expected = -amplitude * (1 + rate * distance).log()
        assert_near(own.at(torch.tensor([distance]))[:, 0], expected)
        assert_near(own.at(torch.tensor([-distance]))[:, 0], expected)
    assert not own.at(torch.tensor([0])).any()


def test_kerple_starts_uniform_in_the_published_ranges():
    torch.manual_seed(0)
    own = build_scheme("kerple", heads=4000, head_width=2).biases[0]
    amplitude, rate = (kerple.FLOOR + F.softplus(each) for each in (own.amplitude, own.rate))
    for value, top in ((amplitude, 2.0), (rate, 1.0)):
        assert value.min() >= 0.01 and value.max() <= top
        shares = torch.histc(value, 10, 0, top) / 4000
        assert (shares - 0.1).abs().max() < 0.025


def test_kerple_falls_whatever_its_parameters_become():
    own = method("kerple")
    for value in (-1000.0, -5.0, 0.0, 40.0):
        torch.nn.init.constant_(own.amplitude, value)
        torch.nn.init.constant_(own.rate, value)
        bias = own.at(torch.arange(100))
        assert bias.isfinite().all() and (bias.diff(dim=1) < 0).all()


def test_kerple_has_two_parameters_for_each_head():
    assert sum(each.numel() for each in method("kerple", heads=12).parameters()) == 24


def test_kerple_has_a_finite_gradient_at_distance_nought():
    own = method("kerple")
    own.at(torch.arange(3)).sum().backward()
    assert own.amplitude.grad.isfinite().all() and own.rate.grad.isfinite().all()


def test_kerple_has_a_power_kernel():
    own = shaken(method("kerple(kernel=power)"))
    amplitude, power = 0.01 + (1 + own.amplitude.exp()).log(), 0.01 + 1.99 / (1 + (-own.rate).exp())
    for distance in (1, 7, 300):
        assert_near(own.at(torch.tensor([-distance, distance])), (-amplitude * distance**power)[:, None].expand(-1, 2))
    own.at(torch.arange(3)).sum().backward()
    assert not own.at(torch.tensor([0])).any() and own.rate.grad.isfinite().all()


# FIRE


@torch.no_grad()
def test_fire_divides_by_how_far_a_query_could_look():
    own = shaken(method("fire(threshold=10)", heads=3))
    queries, keys = torch.tensor([[2, 30]]), torch.tensor([[0, 2, 29]])
    bias, limit = own.between(queries, keys), abs(own.stretch.item() * 10)
    for row, query in enumerate((2, 30)):
        for column, key in enumerate((0, 2, 29)):
            rate, reach = own.rate.item(), max(limit, query)
            part = math.log(abs(rate * (query - key)) + 1) / (math.log(abs(rate * reach) + 1) + 1e-6)
            hidden = F.relu(own.first.weight[:, 0] * part + own.first.bias)
            assert_near(bias[0, :, row, column], own.second.weight @ hidden + own.second.bias)


def test_fire_starts_at_the_published_numbers():
    own = method("fire", context=300)
    assert (own.rate.item(), own.stretch.item(), own.threshold) == (pytest.approx(0.1), 1.0, 300.0)
    assert own.first.weight.shape == (32, 1)


# Sinusoidal and learned


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoidal_adds_sines_then_cosines(width):
    own = method("sinusoidal", width=width)
    half = math.ceil(width / 2)
    encoded = own.encode(torch.zeros(1, 3, width).double(), torch.tensor([[0, 1, 900]]))
    for place, position in enumerate((0, 1, 900)):
        angles = [position * 10000 ** (-n / half) for n in range(half)]
        expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        assert (encoded[0, place] / own.scale).tolist() == pytest.approx(expected[:width], abs=1e-9)


def test_sinusoidal_may_be_interleaved_and_unscaled():
    halves, printed = (
        method(f"sinusoidal(scaled=false, layout={each})", width=8) for each in ("halves", "interleaved")
    )
    zero, places = torch.zeros(1, 5, 8).double(), torch.arange(5)[None]
    order = torch.arange(8).view(2, 4).T.flatten()
    assert_near(printed.encode(zero, places), halves.encode(zero, places)[..., order])
    assert halves.scale == 1


def test_sinusoidal_is_as_large_as_a_fresh_embedding():
    encoded = method("sinusoidal", width=64, embedding_scale=0.125).encode(
        torch.zeros(1, 500, 64).double(), torch.arange(500)[None]
    )
    assert encoded.square().mean().sqrt().item() == pytest.approx(0.125, rel=1e-6)


def test_learned_adds_the_row_of_each_position():
    own = method("learned", width=6, context=9)
    x, positions = noise(2, 3, 6), torch.tensor([[0, 8, 3], [1, 1, 1]])
    assert_near(own.encode(x, positions), x + own.table[positions])
    assert own.table.shape == (9, 6)


def test_learned_starts_as_large_as_a_fresh_embedding():
    table = method("learned", width=64, context=500, embedding_scale=0.125).table
    assert table.std().item() == pytest.approx(0.125, rel=0.02)


@pytest.mark.parametrize("position", [9, 4000, -1])
def test_learned_refuses_a_position_outside_its_table(position):
    own = method("learned", width=6, context=9)
    with pytest.raises(UserError, match=f"Position {position} lies outside the learned table of 9 positions"):
        own.encode(noise(1, 2, 6), torch.tensor([[3, position]]))


def test_learned_refuses_fractional_positions():
    with pytest.raises(UserError, match="learned needs whole positions"):
        method("learned", width=6, context=9).encode(noise(1, 1, 6), torch.tensor([[0.5]]))


# RoPE


def turned(x, positions, base, pair):
    """RoPE as a product of complex numbers; `pair` says which features make one."""
    width = x.shape[-1]
    number = torch.complex(x[..., pair[0]], x[..., pair[1]])
    angles = positions[:, None, :, None] * base ** (-2 * torch.arange(width // 2).double() / width)
    number = number * torch.polar(torch.ones_like(angles), angles)
    out = torch.empty_like(x)
    out[..., pair[0]], out[..., pair[1]] = number.real, number.imag
    return out


@pytest.mark.parametrize("base", [10000, 50.5])
def test_rope_multiplies_complex_numbers(base):
    x, positions = noise(2, 3, 5, 8), torch.tensor([[0, 1, 2, 3, 700], [5, 5, 0, -2, 1]])
    halves, neighbours = (list(range(4)), list(range(4, 8))), ([0, 2, 4, 6], [1, 3, 5, 7])
    for layout, pair in (("halves", halves), ("interleaved", neighbours)):
        own = method(f"rope(base={base}, layout={layout})")
        expected = turned(x, positions.double(), base, pair)
        assert_near(own.queries(x, positions), expected, layout)
        assert_near(own.keys(x, positions), expected, layout)


def test_rope_layouts_are_the_same_up_to_a_permutation():
    x, positions = noise(2, 3, 5, 8), torch.arange(5)[None]
    order = torch.arange(8).view(2, 4).T.flatten()  # 0 4 1 5 …
    halves = method("rope").queries(x, positions)
    interleaved = method("rope(layout=interleaved)").queries(x[..., order], positions)
    assert_near(interleaved, halves[..., order])


def test_rope_scores_depend_on_the_distance_alone():
    own, query, key = method("rope"), noise(1, 1, 1, 8), noise(1, 1, 1, 8, seed=1)

    def score(i, j):
        return (own.queries(query, torch.tensor([[i]])) * own.keys(key, torch.tensor([[j]]))).sum()

    for shift in (1, 50, 4000, 0.25):
        assert_near(score(7 + shift, 3 + shift), score(7.0, 3.0), str(shift))
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rope_keeps_every_norm_and_leaves_position_nought_alone():
    own, x = method("rope"), noise(2, 3, 4, 8)
    positions = torch.tensor([[0, 13, 5000, 2]])
    assert_near(own.queries(x, positions).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(own.queries(x, positions)[:, :, 0], x[:, :, 0])


def test_rope_refuses_an_odd_head_width():
    with pytest.raises(UserError, match=r"head_width \(7\) must be even"):
        method("rope", head_width=7)


def frequencies(expression, head_width=8, context=64):
    """What each pair of features turns by at position 1, read off two turned queries."""
    own, half = method(expression, head_width=head_width, context=context), head_width // 2
    one = torch.cat([torch.ones(half), torch.zeros(half)]).double().expand(1, 1, 1, -1)
    turned = own.queries(one, torch.tensor([[1]]))[0, 0, 0]
    size = torch.complex(turned[:half], turned[half:])
    return size.angle(), size.abs()


PLAIN = 10000.0 ** (-torch.arange(4).double() / 4)


def test_rope_scalings_leave_a_model_as_it_is_at_factor_one():
    for scaling in ("pi", "ntk", "dynamic", "yarn", "llama3"):
        angles, size = frequencies(f"rope(scaling={scaling})")
        assert_near(angles, PLAIN, scaling)
        assert_near(size, torch.ones(4).double(), scaling)


def test_dynamic_ntk_is_ntk_with_the_factor_of_the_length():
    own, x = method("rope(scaling=dynamic, factor=2, original=8)", context=8), noise(2, 1, 20, 8)
    positions = torch.stack([torch.arange(20), torch.cat([torch.zeros(14, dtype=torch.long), torch.arange(6)])])
    turned = own.queries(x, positions)
    stretched = method(f"rope(scaling=ntk, factor={2 * 20 / 8 - 1})")
    assert_near(turned[:1], stretched.queries(x[:1], positions[:1]))
    assert_near(turned[1:], method("rope").queries(x[1:], positions[1:]), "a line within the original length is plain")


def test_dynamic_ntk_refuses_what_it_would_make_wrong():
    scheme = build_scheme("rope(scaling=dynamic, factor=2)", heads=2, head_width=8, context=8)
    several = torch.tensor([[0] * 6 + [1] * 6])
    for sight in (
        Sight.causal(12, queries=1),
        Sight.slots(10, 2),
        Sight.causal(12, positions=torch.arange(12)[None], documents=several),
    ):
        given = [torch.zeros(1, 2, count, 8) for count in (sight.queries, sight.keys, sight.keys)]
        with pytest.raises(UserError, match="takes whole sequences only"):
            lookfar.attend(*given, scheme=scheme, sight=sight)
    padded = torch.tensor([[-1] * 3 + [0] * 9])
    assert scheme.refusal(Sight.causal(12, positions=torch.arange(12)[None], documents=padded)) is None


def test_rope_scalings_have_the_published_frequencies():
    assert_near(frequencies("rope(scaling=pi, factor=4)")[0], PLAIN / 4)
    assert_near(
        frequencies("rope(scaling=ntk, factor=4)")[0], (10000 * 4 ** (8 / 6)) ** (-torch.arange(4).double() / 4)
    )
    angles, size = frequencies("rope(scaling=yarn, factor=4, original=4096)", head_width=8)
    low = math.floor(4 * math.log(4096 / (32 * 2 * math.pi)) / math.log(10000))
    high = math.ceil(4 * math.log(4096 / (2 * math.pi)) / math.log(10000))
    ramp = ((torch.arange(4).double() - low) / (high - low)).clamp(0, 1)
    assert ramp.tolist() == [0, 0, 0.5, 1], "a wave of each sort"
    assert_near(angles, PLAIN * (1 - ramp) + PLAIN / 4 * ramp)
    assert_near(size, torch.full((4,), 0.1 * math.log(4) + 1, dtype=torch.float64))
    expected = []
    for frequency in PLAIN.tolist():  # as printed in transformers, low_freq_factor 1 and high_freq_factor 4
        wave = 2 * math.pi / frequency
        smooth = (1000 / wave - 1) / 3
        blend = (1 - smooth) * frequency / 8 + smooth * frequency
        expected.append(frequency / 8 if wave > 1000 else frequency if wave < 250 else blend)
    assert expected[0] == 1 and PLAIN[2] / 8 < expected[2] < PLAIN[2] and expected[3] == PLAIN[3] / 8
    assert_near(
        frequencies("rope(scaling=llama3, factor=8, original=1000)")[0], torch.tensor(expected, dtype=torch.float64)
    )


def test_rope_may_turn_a_part_of_the_features_or_of_the_frequencies():
    x, places = noise(1, 1, 5, 8), torch.arange(5)[None]
    part = method("rope(fraction=0.5)").queries(x, places)
    assert torch.equal(part[..., 4:], x[..., 4:])
    assert_near(part[..., :4], method("rope", head_width=4).queries(x[..., :4], places))
    still = method("rope(p=0.5)").queries(x, places)
    assert torch.equal(still[..., [2, 3, 6, 7]], x[..., [2, 3, 6, 7]])
    assert_near(still[..., [0, 1, 4, 5]], method("rope").queries(x, places)[..., [0, 1, 4, 5]])


def test_a_factor_needs_a_scaling():
    with pytest.raises(UserError, match=r"rope\(factor=2.0\) needs a scaling"):
        method("rope(factor=2)")


# Log n


def test_log_n_is_one_at_the_trained_length_and_grows_with_it():
    x = torch.ones(1, 4, 3, 8).double()
    places = torch.tensor([[0, 63, 4095]])
    for expression, first in (("log_n", 0.0), ("log_n(clip=true)", 1.0), ("log_n(learned=true)", 0.0)):
        own = method(expression, context=64)
        assert own.queries(x, places)[0, :, :, 0].tolist() == [pytest.approx([first, 1.0, 2.0], abs=1e-6)] * 4
        assert torch.equal(own.keys(x, places), x)
    assert sum(each.numel() for each in method("log_n(learned=true)").parameters()) == 4


# CoPE, Transformer-XL and DAPE V1: maps of a row


@torch.no_grad()
@pytest.mark.parametrize("documents", [None, (0, 1, 0, 0, -1, 1, 0)])
def test_cope_counts_positions_by_gates_from_the_query_back(documents):
    scheme = shaken(build_scheme("cope(positions=3)", heads=2, head_width=4).double())
    queries, keys, values = noise(3, 1, 2, 7, 4)
    places, numbers = torch.arange(7)[None], None if documents is None else torch.tensor([documents])
    sight = Sight.causal(7, positions=places if documents else None, documents=numbers)
    outputs = attend(queries, keys, values, scheme, sight)
    for head, row in itertools.product(range(2), range(7)):
        seen = sight.visible()[0, 0, row].nonzero()[:, 0].tolist()
        query, scores, counted = queries[0, head, row], [], 0.0
        for key in reversed(seen):
            score = (query @ keys[0, head, key]).item() / 2
            counted += 1 / (1 + math.exp(-score))
            place = min(counted, 2.0)
            low, high = (query @ scheme.maps[0].embedding[:, round_(place)] for round_ in (math.floor, math.ceil))
            scores.insert(0, score + low + (place - math.floor(place)) * (high - low))
        weights = torch.tensor(scores).double().softmax(-1)
        assert_near(outputs[0, head, row], weights @ values[0, head, seen], f"head {head}, row {row}")


@torch.no_grad()
def test_transformer_xl_meets_projected_sinusoids_of_the_distance():
    scheme = shaken(build_scheme("transformer_xl", heads=2, head_width=4, width=6).double())
    own, (queries, keys, values) = scheme.maps[0], noise(3, 1, 2, 7, 4)
    outputs = attend(queries, keys, values, scheme)
    weight = own.project.weight.unflatten(0, (2, 4))
    waves = 10000.0 ** (-torch.arange(3).double() / 3)
    for head, row in itertools.product(range(2), range(7)):
        scores = []
        for key in range(row + 1):
            sinusoid = torch.cat([((row - key) * waves).sin(), ((row - key) * waves).cos()])
            query = queries[0, head, row]
            content = (query + own.content[head]) @ keys[0, head, key]
            scores.append((content + (query + own.place[head]) @ (weight[head] @ sinusoid)) / 2)
        assert_near(outputs[0, head, row], torch.stack(scores).softmax(-1) @ values[0, head, : row + 1])


def test_dape_v1_is_dape_v2_with_a_kernel_of_one():
    pointwise = shaken(build_scheme("kerple + dape_v2(kernel=1)", heads=3, head_width=4).double())
    net = build_scheme("kerple + dape_v1", heads=3, head_width=4).double()
    net.load_state_dict(
        {name: value.reshape(net.state_dict()[name].shape) for name, value in pointwise.state_dict().items()}
    )
    queries, keys, values = noise(3, 2, 3, 9, 4)
    assert_near(attend(queries, keys, values, net), attend(queries, keys, values, pointwise))


def test_dape_v1_has_the_published_number_of_parameters():
    def count(expression):
        return sum(each.numel() for each in build_scheme(expression, heads=12, head_width=2).maps[0].parameters())

    assert (count("alibi + dape_v1"), count("dape_v1")) == (1196, 812)


@torch.no_grad()
def test_the_second_equation_of_dape_v1_reads_the_bias_and_does_not_add_it():
    queries, keys, values = noise(3, 1, 2, 5, 4)
    for equation in (2, 3):
        scheme = shaken(build_scheme(f"alibi + dape_v1(equation={equation})", heads=2, head_width=4).double())
        own, bias = scheme.maps[0], scheme.bias(Sight.causal(5))
        scores = queries @ keys.mT / 2
        both = torch.cat([scores, bias], 1).movedim(1, -1)
        change = F.leaky_relu(both @ own.first.weight.T + own.first.bias, 0.01) @ own.second.weight.T + own.second.bias
        scores = scores + change.movedim(-1, 1) + (bias if equation == 3 else 0)
        weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf).softmax(-1)
        assert_near(attend(queries, keys, values, scheme), weights @ values)


# DAPE V2


def test_dape_v2_has_the_published_number_of_parameters():
    def count(expression):
        return sum(each.numel() for each in build_scheme(expression, heads=12, head_width=2).maps[0].parameters())

    assert count("alibi + dape_v2") == 3500
    assert count("alibi + dape_v2(hidden=10)") == 1102
    assert count("dape_v2") == 3500 - 12 * 32 * 3, "without a bias half of the first convolution's inputs are gone"


def convolve(rows, weight, bias):
    """A 1×k convolution along the last axis by loops; rows [channel, key]."""
    out, channels, _, size = weight.shape
    keys, reach = rows.shape[1], size // 2
    result = torch.zeros(out, keys, dtype=rows.dtype)
    for to, key in itertools.product(range(out), range(keys)):
        result[to, key] = bias[to]
        for source, tap in itertools.product(range(channels), range(size)):
            if 0 <= key + tap - reach < keys:
                result[to, key] += weight[to, source, 0, tap] * rows[source, key + tap - reach]
    return result


def corrected(row, own):
    """DAPE V2 on one compact row of scores and biases, [channel, key], hidden map zero outside."""
    hidden = F.leaky_relu(convolve(row, own.first.weight, own.first.bias), 0.01)
    return convolve(hidden, own.second.weight, own.second.bias)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("bias", ["", "alibi + "])
@pytest.mark.parametrize("documents", [None, (0, 1, 0, 0, -1, 1, 0)])
@pytest.mark.parametrize("window", [None, 3])
def test_dape_v2_convolves_compact_rows(kernel, bias, documents, window):
    tokens, heads = 7, 2
    scheme = shaken(build_scheme(f"{bias}dape_v2(kernel={kernel}, hidden=3)", heads=heads, head_width=4).double())
    queries, keys, values = noise(3, 1, heads, tokens, 4)
    numbers = None if documents is None else torch.tensor([documents])
    places = torch.arange(tokens)[None]
    sight = Sight.causal(tokens, positions=places if documents else None, documents=numbers, window=window)
    outputs = attend(queries, keys, values, scheme, sight)
    table = None if not bias else scheme.biases[0].between(places, places)[0]
    for query in range(tokens):
        seen = sight.visible()[0, 0, query].nonzero()[:, 0]
        row = torch.einsum("he,hke->hk", queries[0, :, query], keys[0][:, seen]) / 2
        channels = row if table is None else torch.cat([row, table[:, query, seen]])
        row = row + corrected(channels, scheme.maps[0]) + (0 if table is None else table[:, query, seen])
        assert_near(torch.einsum("hk,hkv->hv", row.softmax(-1), values[0][:, seen]), outputs[0, :, query], str(query))


def published(scheme, queries, keys, values):
    """The authors' code: convolutions with zero padding over the whole lower triangle, then the causal mask."""
    own, tokens = scheme.maps[0], queries.shape[2]
    places = torch.arange(tokens)[None]
    scores = queries @ keys.mT * queries.shape[-1] ** -0.5
    bias = scheme.biases[0].between(places, places)
    both = torch.cat([scores, bias.expand_as(scores)], dim=1).tril()
    hidden = F.leaky_relu(F.conv2d(both, own.first.weight, own.first.bias, padding=(0, own.reach)))
    change = F.conv2d(hidden, own.second.weight, own.second.bias, padding=(0, own.reach))
    ahead = torch.ones(tokens, tokens).triu(1).bool()
    return (scores + bias + change).masked_fill(ahead, -torch.inf).softmax(-1) @ values


@torch.no_grad()
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_the_paper_repair_is_the_published_form_on_all_rows_but_the_last_few(kernel):
    scheme = build_scheme(f"kerple + dape_v2(kernel={kernel}, repair=paper)", heads=3, head_width=4).double()
    queries, keys, values = noise(3, 2, 3, 11, 4)
    ours, theirs = attend(queries, keys, values, shaken(scheme)), published(scheme, queries, keys, values)
    last = kernel // 2
    assert_near(ours[:, :, :-last], theirs[:, :, :-last])
    for row in range(1, last + 1):
        assert (ours[:, :, -row] - theirs[:, :, -row]).abs().max() > 1e-4
    longer = torch.cat([noise(2, 3, last, 4, seed=5), noise(2, 3, last, 4, seed=6)], 1).split(3, dim=1)
    grown = [torch.cat([each, more], 2) for each, more in zip((queries, keys), longer, strict=True)]
    theirs = published(scheme, *grown, torch.cat([values, longer[0]], 2))
    assert_near(ours, theirs[:, :, :-last], "the last rows are those of a longer sequence")


@torch.no_grad()
def test_the_two_repairs_differ_and_agree_for_pointwise_maps():
    queries, keys, values = noise(3, 1, 3, 9, 4)
    for kernel, same in ((1, True), (3, False)):
        outputs = []
        for repair in ("hidden", "paper"):
            torch.manual_seed(0)
            scheme = build_scheme(f"alibi + dape_v2(kernel={kernel}, repair={repair})", heads=3, head_width=4).double()
            outputs.append(attend(queries, keys, values, scheme))
        assert torch.allclose(*outputs, rtol=0, atol=1e-10) == same


def test_the_paper_repair_refuses_what_it_cannot_do():
    scheme = build_scheme("alibi + dape_v2(repair=paper)", heads=2, head_width=4).double()
    given, documents = noise(1, 2, 6, 4), torch.tensor([[0, 0, 0, 1, 1, 1]])
    for sight in (Sight.causal(6, window=3), Sight.causal(6, positions=torch.arange(6)[None], documents=documents)):
        with pytest.raises(UserError, match="exact for plain causal sight only; repair=hidden takes any"):
            attend(given, given, given, scheme, sight)
    assert attend(given, given, given, scheme, Sight.causal(6, window=6)).isfinite().all()


# StableMask


@pytest.mark.parametrize(
    ("gamma", "fractions"),
    [
        (0.5, {1: 0.607, 2: 0.319, 4: 0.079, 8: 0.006, 16: 0.0001, 64: 0}),
        (0.25, {1: 0.779, 2: 0.578, 4: 0.294, 8: 0.071, 16: 0.005}),
        (0.0625, {1: 0.939, 2: 0.879, 4: 0.763, 8: 0.556, 16: 0.275, 64: 0.005}),
        (0.00390625, {1: 0.996, 2: 0.991, 8: 0.964, 64: 0.721, 256: 0.189, 511: 0.0003}),
        (0, {1: 0.998, 2: 0.996, 16: 0.969, 64: 0.875, 256: 0.5, 511: 0.002}),
    ],
)
def test_stable_mask_takes_the_published_share_of_equal_scores(gamma, fractions):
    sink = method(f"stable_mask(gamma={gamma}, columns=512)").score(torch.arange(512)[None])[0, 0].exp()
    for row, fraction in fractions.items():
        last_digit = 1e-4 if fraction < 0.001 else 1e-3
        assert (sink[row - 1] / (row + sink[row - 1])).item() == pytest.approx(fraction, abs=last_digit), row
    assert sink[511] == 0, "no column is ahead of the last row"


def literal(queries, keys, values, gamma, columns, bias=0):
    """softmax(A ⊙ C + P) ⊙ C, with pseudo scores in the upper triangle and zero columns up to N."""
    tokens = queries.shape[2]
    scores = queries @ keys.mT * queries.shape[-1] ** -0.5 + bias  # b h q k
    scores = F.pad(scores, (0, columns - tokens))
    causal = torch.ones(tokens, columns).tril()
    pseudo = -torch.arange(columns).double() * gamma[:, None, None] * (1 - causal)  # h q N
    weights = (scores * causal + pseudo).softmax(-1) * causal
    return weights[..., :tokens] @ values


@pytest.mark.parametrize("columns", [9, 20])
@pytest.mark.parametrize("bias", ["", "alibi + "])
def test_stable_mask_with_columns_is_the_published_form(columns, bias):
    queries, keys, values = noise(3, 2, 3, 9, 4)
    for gamma in ("slopes", 0.5, 0):
        scheme = build_scheme(f"{bias}stable_mask(gamma={gamma}, columns={columns})", heads=3, head_width=4).double()
        decay = slopes(3).double() if gamma == "slopes" else torch.full((3,), gamma).double()
        added = scheme.bias(Sight.causal(9)) if bias else 0
        outputs = attend(queries, keys, values, scheme)
        assert_near(outputs, literal(queries, keys, values, decay, columns, added), f"gamma={gamma}")


def test_stable_mask_has_the_gradients_of_the_published_form():
    scheme = build_scheme("stable_mask(columns=9)", heads=3, head_width=4).double()
    given = [noise(2, 3, 9, 4, seed=seed).requires_grad_() for seed in range(3)]
    towards = noise(2, 3, 9, 4, seed=4)
    ours = torch.autograd.grad(attend(*given, scheme), given, towards)
    theirs = torch.autograd.grad(literal(*given, slopes(3).double(), 9), given, towards)
    for own, published in zip(ours, theirs, strict=True):
        assert_near(own, published)


def test_stable_mask_with_the_current_length_breaks_the_row_law_and_its_default_keeps_it():
    queries, keys, values = noise(3, 1, 3, 9, 4)

    def grown(length, columns):
        scheme = build_scheme(f"stable_mask(gamma=0.5, columns={columns})", heads=3, head_width=4).double()
        return attend(queries[:, :, :length], keys[:, :, :length], values[:, :, :length], scheme)

    assert (grown(5, 5) - grown(9, 9)[:, :, :5]).abs().max() > 1e-2
    assert_near(grown(5, "infinite"), grown(9, "infinite")[:, :, :5])
    assert_near(grown(5, 9), grown(9, 9)[:, :, :5])


def test_stable_mask_without_end_is_the_limit_of_many_columns():
    places = torch.arange(40)[None]
    endless = method("stable_mask").score(places)
    assert_near(method("stable_mask(columns=20000)").score(places), endless)
    shares = [
        method(f"stable_mask(gamma=0.5, columns={n})").score(torch.tensor([[0]])).exp()[0, 0, 0] for n in (2, 8, 64)
    ]
    assert [round((share / (1 + share)).item(), 3) for share in shares] == [0.378, 0.599, 0.607]
    far = {"infinite": 0.064, 512: 0.0003}
    for columns, fraction in far.items():
        mass = method(f"stable_mask(gamma=0.00390625, columns={columns})").score(torch.tensor([[510]])).exp()[0, 0, 0]
        share = (mass / (511 + mass)).item()
        assert share == pytest.approx(fraction, abs=5e-4 if columns == "infinite" else 5e-5)


def test_stable_mask_is_continuous_where_its_decay_vanishes():
    places = torch.arange(30)[None]
    flat = method("stable_mask(gamma=0, columns=30)").score(places)
    assert_near(flat[0, 0].exp(), 29.0 - torch.arange(30).double())
    assert (method("stable_mask(gamma=1e-9, columns=30)").score(places) - flat)[..., :-1].abs().max() < 1e-6


def test_stable_mask_that_decays_at_once_is_plain_attention():
    given = noise(1, 2, 6, 4)
    schemes = [build_scheme(each, heads=2, head_width=4).double() for each in ("stable_mask(gamma=200)", "nope")]
    assert_near(*(attend(given, given, given, scheme) for scheme in schemes))


def test_the_last_row_and_those_beyond_the_columns_are_plain_attention():
    given = [noise(1, 2, 9, 4, seed=seed).requires_grad_() for seed in range(3)]
    limited, plain = (build_scheme(each, heads=2, head_width=4).double() for each in ("stable_mask(columns=5)", "nope"))
    outputs = attend(*given, limited)
    assert_near(outputs[:, :, 4:], attend(*given, plain)[:, :, 4:])
    assert (outputs - attend(*given, plain))[:, :, :4].abs().amax((0, 1, 3)).min() > 1e-4
    for gradient in torch.autograd.grad(outputs.sum(), given):
        assert gradient.isfinite().all()


def test_the_mass_of_a_row_is_less_than_one_and_grows_with_position():
    scheme = build_scheme("stable_mask", heads=4, head_width=4).double()
    zero, ones = torch.zeros(1, 4, 200, 4).double(), torch.ones(1, 4, 200, 4).double()
    mass = attend(zero, zero, ones, scheme)[0, :, :, 0]
    assert (mass < 1 + 1e-12).all() and (mass[:, :8] < 1).all() and (mass.diff(dim=1) >= -1e-12).all()


# Learned sink


def test_a_fixed_sink_of_nought_is_the_softmax_off_by_one():
    queries, keys, values = noise(3, 1, 2, 6, 4)
    exponentials = (queries @ keys.mT / 2).exp().tril()
    expected = exponentials / (1 + exponentials.sum(-1, keepdim=True)) @ values
    for expression in ("learned_sink(value=0, learned=false)", "learned_sink"):
        scheme = build_scheme(expression, heads=2, head_width=4).double()
        assert_near(attend(queries, keys, values, scheme), expected)
    scheme = build_scheme("learned_sink(value=1.5)", heads=2, head_width=4).double()
    expected = exponentials / (math.exp(1.5) + exponentials.sum(-1, keepdim=True)) @ values
    assert_near(attend(queries, keys, values, scheme), expected)


# Merges: gates and differences


@pytest.mark.parametrize("per", ["feature", "head"])
def test_a_gate_multiplies_what_a_head_gives(per):
    scheme = build_scheme(f"gate(per={per})", heads=3, head_width=4).double()
    outputs, x = noise(2, 3, 5, 4), noise(2, 5, 12, seed=1)
    gates = (1 / (1 + (-x @ scheme.merges[0].project.weight.T).exp())).unflatten(-1, (3, -1))  # b q h v or 1
    assert_near(scheme.merge(outputs, x), outputs * gates.transpose(1, 2))


def test_a_merge_that_reads_the_input_asks_for_it():
    with pytest.raises(UserError, match="Gate reads the input of the layer; pass inputs=x"):
        build_scheme("gate", heads=3, head_width=4).merge(torch.zeros(1, 3, 2, 4))


@torch.no_grad()
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_differential_v2_weighs_two_maps_of_one_group(heads, groups):
    scheme = build_scheme("differential_v2", heads=heads, groups=groups, head_width=4).double()
    assert (scheme.heads.score_heads, scheme.heads.key_heads, scheme.heads.value_width) == (2 * heads, groups, 4)
    queries, keys, values = noise(2, 2 * heads, 7, 4), noise(2, groups, 7, 4, seed=1), noise(2, groups, 7, 4, seed=2)
    x, ahead = noise(2, 7, 4 * heads, seed=3), torch.ones(7, 7).triu(1).bool()
    ours = scheme.merge(attend(queries, keys, values, scheme), x)
    balance = torch.sigmoid(x @ scheme.merges[0].balance.weight.T)
    for head in range(heads):
        group = head // (heads // groups)
        first, second = (
            (queries[:, each] @ keys[:, group].mT / 2).masked_fill(ahead, -torch.inf).softmax(-1) @ values[:, group]
            for each in (head, head + heads)
        )
        assert_near(ours[:, head], first - balance[:, :, head, None] * second, f"head {head}")


# Differential


def test_differential_starts_each_layer_at_the_published_balance():
    starts = [method("differential", layer=layer).start for layer in range(12)]
    published = [0.2, 0.3555, 0.4707, 0.5561, 0.6193, 0.6661, 0.7008, 0.7265, 0.7456, 0.7597, 0.7701, 0.7779]
    assert [round(start, 4) for start in starts] == published


def test_differential_adds_four_vectors_and_one_norm():
    own = method("differential", head_width=16)
    assert sum(each.numel() for each in own.parameters()) == 4 * 16 + 2 * 16
    torch.manual_seed(0)
    vectors = build_scheme("differential", heads=2, head_width=5000).merges[0].vectors
    assert vectors.std().item() == pytest.approx(0.1, rel=0.02) and abs(vectors.mean().item()) < 0.003


def test_differential_keeps_the_parameters_of_projections_equal():
    heads = build_scheme("differential", heads=8, groups=4, head_width=6).heads
    assert (heads.score_heads, heads.key_heads, heads.value_heads) == (8, 4, 2)
    assert (heads.head_width, heads.value_width, heads.heads, heads.maps) == (6, 12, 4, 2)


@torch.no_grad()
@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 4), (8, 2), (12, 4)])
def test_differential_subtracts_two_maps_of_one_group(heads, groups):
    """The authors' flash form: q1 with k1 and q2 with k2 of key head ⌊i / repeats⌋, both with its value."""
    scheme = shaken(build_scheme("rope + differential", heads=heads, groups=groups, head_width=4, layer=2).double())
    own, pairs, key_pairs = scheme.merges[0], heads // 2, groups // 2
    queries, keys, values = noise(2, heads, 7, 4), noise(2, groups, 7, 4, seed=1), noise(2, key_pairs, 7, 8, seed=2)
    places = torch.arange(7)[None]
    queries, keys = scheme.queries(queries, places), scheme.keys(keys, places)
    ours = scheme.merge(attend(queries, keys, values, scheme))
    ahead = torch.ones(7, 7).triu(1).bool()
    q1, k1, q2, k2 = own.vectors
    balance = math.exp(q1 @ k1) - math.exp(q2 @ k2) + 0.8 - 0.6 * math.exp(-0.3 * 2)
    assert ours.shape == (2, pairs, 7, 8)
    for head in range(pairs):
        group = head // (pairs // key_pairs)
        maps = [
            (queries[:, head + half * pairs] @ keys[:, group + half * key_pairs].mT / 2)
            .masked_fill(ahead, -torch.inf)
            .softmax(-1)
            for half in (0, 1)
        ]
        out = (maps[0] - balance * maps[1]) @ values[:, group]
        out = out * (out.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * own.weight
        assert_near(ours[:, head], (1 - own.start) * out, f"head {head}")


@torch.no_grad()
def test_differential_may_share_a_bias_between_its_maps():
    own = build_scheme("alibi + stable_mask + differential", heads=8, head_width=4).double()
    shared = build_scheme("alibi + stable_mask + differential(share_bias=true)", heads=8, head_width=4).double()
    sight = Sight.causal(5)
    assert_near(own.bias(sight)[0, :, 4, 0], -4 * slopes(8).double())
    assert_near(shared.bias(sight)[0, :, 4, 0], -4 * slopes(4).double().repeat(2))
    assert_near(shared.sink(sight.query_positions)[:, :4], shared.sink(sight.query_positions)[:, 4:])
    assert own.sink(sight.query_positions).shape[1] == 8


# All methods: what feeds scores stays exact


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
@pytest.mark.parametrize("name", lookfar.names("methods"))
def test_a_cast_to_half_precision_leaves_methods_as_they_are(name, cast):
    model = torch.nn.ModuleList([build_scheme(f"{name} + alibi", heads=4, head_width=6), torch.nn.Linear(2, 2)])
    before = {key: value.clone() for key, value in [*model[0].named_parameters(), *model[0].named_buffers()]}
    getattr(model, cast)()
    after = dict([*model[0].named_parameters(), *model[0].named_buffers()])
    assert before.keys() == after.keys() and before
    for key, value in before.items():
        assert after[key].dtype == torch.float32 and torch.equal(after[key], value), key
    assert model[1].weight.dtype.itemsize == 2, "a layer follows the cast"
    double = model.double()[0]
    assert all(each.dtype == torch.float64 for each in [*double.parameters(), *double.buffers()])
    restored = [*double.float().parameters(), *double.buffers()]
    assert all(each.dtype == torch.float32 for each in restored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", lookfar.names("methods"))
def test_outputs_have_the_type_of_the_inputs(name, dtype):
    scheme = build_scheme(name, heads=4, head_width=6, context=16)
    counts = scheme.heads
    queries = torch.randn(1, counts.score_heads, 5, counts.head_width, dtype=dtype)
    keys = torch.randn(1, counts.key_heads, 5, counts.head_width, dtype=dtype)
    values = torch.randn(1, counts.value_heads, 5, counts.value_width, dtype=dtype)
    outputs = lookfar.attend(
        queries, keys, values, scheme=scheme, kernel="reference", inputs=torch.ones(1, 5, 24, dtype=dtype)
    )
    assert outputs.dtype == dtype and outputs.isfinite().all()
    for encoding in scheme.inputs:
        assert encoding.encode(torch.zeros(1, 5, 24, dtype=dtype), torch.arange(5)[None]).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [256, 257, 2048, 2049, 65504])
def test_positions_are_exact_in_half_precision(position, dtype):
    """The bias of neighbours differs by one step, wherever they are and whatever the type of queries."""
    scheme = build_scheme("alibi", heads=2, head_width=4).to(dtype)
    zero, values = torch.zeros(1, 2, 4, 4, dtype=dtype), torch.eye(4, dtype=dtype).expand(1, 2, 4, 4)
    sight = Sight.causal(4, positions=torch.arange(position - 3, position + 1)[None])
    weights = reference.attend(zero, zero, values, sight, scheme)[0, :, -1]
    expected = (-slopes(2)[:, None] * torch.tensor([3, 2, 1, 0])).softmax(-1)
    assert_near(weights, expected.to(dtype))
    rope = build_scheme("rope", heads=2, head_width=4).to(dtype).encodings[0]
    one = torch.ones(1, 1, 1, 4, dtype=dtype)
    angles = position * torch.tensor([1, 0.01]).double()
    cosines = (angles.cos() - angles.sin()).to(dtype)
    assert_near(rope.queries(one, torch.tensor([[position]]))[0, 0, 0, :2], cosines)
