"""OmegaConf's containers in foreign files: read off the inert stubs, importing nothing on the file's word."""

from __future__ import annotations

from typing import Any

from holdfast.checkpoint import exact
from holdfast.checkpoint.pickle_scan import PickleError, charge

_MAX_DEPTH = 100
CONTAINERS = ("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig")


def settled(stub: Any) -> Any:
    """The container that a stub stands for: OmegaConf's own where the program has imported it, else plain.

    Interpolations stay as they were written (``${lr}``), missing values are ``"???"``.
    """
    return exact.restore(_plain(stub, 0), {"type": "omegaconf"})


def _plain(node: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise PickleError(f"a configuration is nested more than {_MAX_DEPTH} levels deep")
    charge(16)  # one that is named in two places is there twice
    state = getattr(node, "state", None)
    if not isinstance(state, dict):
        return node
    if "_content" in state:
        content = state["_content"]
        if isinstance(content, dict):
            return {key: _plain(member, depth + 1) for key, member in content.items()}
        if isinstance(content, list):
            return [_plain(member, depth + 1) for member in content]
        return content  # an interpolation or a missing value in the place of a container
    return _plain(state["_val"], depth + 1) if "_val" in state else node
