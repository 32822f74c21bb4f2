"""What training came to, on disk: the diffusion, its parameters, the history, and the state to go on from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pp_diffusion.archives import pack_tree, read_whole, unpack_tree, write_whole
from pp_diffusion.diffusion import Diffusion
from pp_diffusion.saving import (
    pack_covariates,
    pack_diffusion,
    unpack_covariates,
    unpack_diffusion,
    versions,
)
from pp_diffusion.training.update import FitState, SavedState, leaves_of
from pp_diffusion.training.validation import Validation

FORMAT, FORMAT_VERSION = "pp_diffusion fit", 2


def write_fit(
    path: str | os.PathLike[str],
    diffusion: Diffusion,
    params: Any,
    state: FitState | SavedState,
    losses: np.ndarray,
    validation: Validation | None,
    notes: dict[str, Any],
) -> None:
    """One file, whole or not at all.

    :param notes: what JSON can say.
    """
    arrays: dict[str, np.ndarray] = {"losses": losses}
    covariates = diffusion.covariates_in(params)
    leaves = state.leaves if isinstance(state, SavedState) else leaves_of(state).leaves
    arrays |= {f"state.{i:05}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    if validation is not None:
        arrays |= {f"validation.{name}": value for name, value in vars(validation).items()}
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "diffusion": pack_diffusion(diffusion, arrays),
        "params": pack_tree(
            {site: value for site, value in params.items() if value is not covariates}, "params", arrays
        ),
        "covariates": pack_covariates(covariates, arrays),
        "validation": validation is not None,
        "notes": notes,
    }
    write_whole(Path(path), header, arrays)


def read_fit(path: str | os.PathLike[str], network: Any) -> dict[str, Any]:
    """What :func:`write_fit` wrote, by the names of its arguments; the notes by theirs.

    :raises ValueError: if the file is damaged or foreign, or needs ``network``.
    """
    header, arrays = read_whole(Path(path), FORMAT, FORMAT_VERSION, "fit.save")
    try:
        validation = {k.removeprefix("validation."): a for k, a in arrays.items() if k.startswith("validation.")}
        diffusion = unpack_diffusion(header["diffusion"], arrays, network)
        covariates = unpack_covariates(header.get("covariates"), arrays)
        params = unpack_tree(header["params"], arrays)
        if covariates is not None:
            params[diffusion.covariates_site] = covariates
        leaves = tuple(a for name, a in sorted(arrays.items()) if name.startswith("state."))
        return header["notes"] | {
            "diffusion": diffusion,
            "params": params,
            "state": SavedState(leaves, covariates),
            "losses": arrays["losses"],
            "validation": Validation(**validation) if header["validation"] else None,
        }
    except ValueError:
        raise
    except Exception as error:  # whatever a header's wrong words lead to
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
