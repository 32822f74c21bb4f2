"""What a program runs under, asked before a site is there: values that are given, and plates."""

from __future__ import annotations

from typing import Any

from numpyro.primitives import apply_stack


class _Question(dict[str, Any]):
    """A message that ``numpyro.handlers.trace`` passes over, as it does those without a name."""

    def __contains__(self, key: object) -> bool:
        return key != "name" and super().__contains__(key)


def substituted(name: str) -> Any:
    """The value that ``numpyro.handlers.substitute`` would give to the sample site ``name``, or ``None``.

    :class:`~numpyro.infer.Predictive` and :func:`~numpyro.infer.log_likelihood` hand on draws by that handler, but what
    a strategy makes of a site, a deterministic one, is not theirs to set.
    """
    return _ask("mutable", name)["value"]  # which that handler answers, and no other reads


def num_plate_axes() -> int:
    """How many axes, counted from the right, the plates around take up."""
    frames = _ask("deterministic", "")["cond_indep_stack"]
    return max((-frame.dim for frame in frames), default=0)


def _ask(kind: str, name: str) -> Any:
    question = _Question(
        type=kind,
        name=name,
        fn=lambda: None,
        args=(),
        kwargs={},
        value=None,
        cond_indep_stack=[],
        infer={},
    )
    return apply_stack(question)
