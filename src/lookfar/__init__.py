"""lookfar: decoder-only transformers that look further than they were trained to. Train short, test long.

    import lookfar

    config = lookfar.ModelConfig(vocabulary=256, width=128, layers=4, heads=4, context=128, scheme="alibi")
    model = lookfar.Decoder(config)
    logits = model(tokens)  # [b t] -> [b t vocabulary]

Names are imported when they are first used, so that `lookfar --help` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lookfar.attention.scheme import Scheme, build_scheme
    from lookfar.batch import Batch
    from lookfar.config import ModelConfig, Run
    from lookfar.errors import UserError
    from lookfar.model.attention import Attention, attend
    from lookfar.model.decoder import Decoder
    from lookfar.model.generate import Sampling, generate
    from lookfar.plugins import names
    from lookfar.sight import Rows, Sight
    from lookfar.training.checkpoint import load

_HOMES = {
    "Attention": "model.attention",
    "Batch": "batch",
    "Decoder": "model.decoder",
    "ModelConfig": "config",
    "Rows": "sight",
    "Run": "config",
    "Sampling": "model.generate",
    "Scheme": "attention.scheme",
    "Sight": "sight",
    "UserError": "errors",
    "attend": "model.attention",
    "build_scheme": "attention.scheme",
    "generate": "model.generate",
    "load": "training.checkpoint",
    "names": "plugins",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]  # the names above, from their one list


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'lookfar' has no attribute {name!r}")
    return getattr(import_module(f"lookfar.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
