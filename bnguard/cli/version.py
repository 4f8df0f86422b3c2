"""``bnguard --version``: the versions of bnguard and torch, and whether they know each other."""

from __future__ import annotations

import argparse

from bnguard import __version__


class ShowVersion(argparse.Action):
    """Prints the versions, and ends the process."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Does so."""
        print(f"bnguard {__version__}, {_torch_text()}")
        parser.exit()


def _torch_text() -> str:
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return "torch is not installed"
    from bnguard.layers.kinds import are_torch_layers_known

    how = "known" if are_torch_layers_known() else "not known: they are compared after each forward, which is slower"
    return f"torch {torch.__version__} (its normalisation layers are {how})"
