"""How near is near enough: one tolerance for each type, and the comparisons that use it."""

import torch

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def unit(dtype):
    """The distance from 1 to the next number of a type."""
    return torch.finfo(dtype).eps


def error(actual, true):
    """The largest error in proportion to the largest true value; infinite where something is not finite."""
    actual, true = actual.detach().double(), true.detach().double()
    assert actual.shape == true.shape, f"shape {tuple(actual.shape)} is not {tuple(true.shape)}"
    if not actual.isfinite().all():
        return float("inf")
    return ((actual - true).abs().max() / true.abs().max().clamp(min=1e-30)).item()


def assert_near(actual, expected, what=""):
    """The same up to rounding, in proportion to the largest value, or to 1 where all values are smaller."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    scale = max(expected.detach().abs().max().item(), 1e-30)
    found = error(actual, expected)
    assert found <= TOLERANCE[expected.dtype] * max(1, 1 / scale), f"{what}: off by {found:.3g} of {scale:.3g}"


def assert_as_good(actual, definition, true, dtype, what=""):
    """In the mean of some draws, no further off than twice the definition in `dtype` and one rounding unit."""
    largest = max(sum(each.detach().abs().max().item() for each in true), 1e-30)

    def mean(found):
        return sum(error(one, each) * each.abs().max().item() for one, each in zip(found, true, strict=True)) / largest

    found, allowed = mean(actual), 2 * mean(definition) + unit(dtype)
    assert found <= allowed, f"{what}: off by {found:.3g}, more than {allowed:.3g}"
