"""A layer without any position encoding that counts: it returns 1/t at position t, the first token being position 1.

All keys are alike, so attention is even over the t tokens seen; values mark the first token, so the mean is 1/t. A
feed-forward net can turn 1/t into any function of t. Kazemnejad et al., 2023, arXiv 2305.19466, theorem 1.
"""

import torch

import lookfar

FIRST, WORD = 0, 1  # coordinates of the stream: is it the first token; anything else


def counting_layer(kernel: str | None = None) -> lookfar.Attention:
    """Attention of one head over a stream of width 2; what it counts is written into the first coordinate."""
    layer = lookfar.Attention(2, 1, scheme="nope", kernel=kernel).double().requires_grad_(False)
    queries, keys, values = layer.project.weight.split(layer.sizes)
    queries.zero_()
    keys.zero_()  # all scores are 0
    values.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))  # read FIRST, forget WORD
    layer.output.weight.copy_(torch.eye(2))
    return layer


def stream(length: int, *, first: bool = True) -> torch.Tensor:
    """A sequence of random words, the first of which is marked unless `first` is False."""
    x = torch.zeros(1, length, 2, dtype=torch.float64)
    x[..., WORD] = torch.randn(length)
    x[0, 0, FIRST] = float(first)
    return x


if __name__ == "__main__":
    counted = counting_layer()(stream(8))[0, :, FIRST]
    print("with a first token:    1 /", ", 1 / ".join(f"{1 / each:.0f}" for each in counted.tolist()))
    print("without a first token:", counting_layer()(stream(8, first=False))[0, :, FIRST].tolist())
