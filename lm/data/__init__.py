"""Where tokens come from: tokenizers, corpora, chunks, LightningDataModules."""

from typing import Any

__all__ = [
    "ArithmeticData",
    "ChatData",
    "ClassData",
    "LinesData",
    "PairData",
    "ReverseData",
    "SourceTargetData",
    "TextData",
]


def __getattr__(name: str) -> Any:
    """Import a LightningDataModule when it is asked for: `lm prepare` and its workers need neither them nor torch."""
    from importlib import import_module

    modules = {
        "ArithmeticData": "arithmetic",
        "ChatData": "chat",
        "ClassData": "classes",
        "LinesData": "lines",
        "PairData": "pairs",
        "ReverseData": "tasks",
        "SourceTargetData": "source_target",
        "TextData": "text",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lm.data.{modules[name]}"), name)
