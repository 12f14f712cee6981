"""Which weights of a checkpoint are meant, where it holds those that train and an average of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.errors import CheckpointIncompatible, ConfigError
from holdfast.utilities.rank_zero import rank_zero_warn

AVERAGED, RAW = "averaged", "raw"

_STATISTICS = "running_mean"
"""The last part of the key of a BatchNorm's first statistic."""


def check_choice(which: Any) -> None:
    """Refuse what is no choice.

    Raises:
        ConfigError: it is neither "averaged" nor "raw" nor None.
    """
    if which not in (None, AVERAGED, RAW):
        raise ConfigError(
            f"load_from_checkpoint(which_weights={which!r}): expected 'averaged', 'raw', or None for what "
            "the checkpoint has under state_dict."
        )


def chosen_weights(payload: Mapping[str, Any], which: str | None, source: str) -> Any:
    """The weights in a checkpoint of holdfast or Lightning that are asked for.

    Args:
        payload: The checkpoint.
        which: "averaged", "raw" for those that train, or None for what is under ``state_dict``: with
            WeightAveraging the average, with StochasticWeightAveraging the average once training has ended.
        source: The file's name, for messages.

    Raises:
        CheckpointIncompatible: it does not hold them; the message says what it holds.
    """
    check_choice(which)
    if which is None:
        return payload["state_dict"]
    return _averaged(payload, source) if which == AVERAGED else _raw(payload, source)


def say_if_averaged(payload: Mapping[str, Any], source: str) -> None:
    """Warn if training is about to go on from an average: the callback that knows better is not there."""
    trained = payload.get("current_model_state", (_stochastic(payload) or {}).get("current_model_state"))
    if _state_dict_is_average(payload) and payload["state_dict"] is not trained:
        rank_zero_warn(
            f"{source} has averaged weights under state_dict, and this trainer has no callback that takes "
            "those that trained out of it: training goes on from the average. Give the trainer the callback "
            "that the run was started with."
        )


def _averaged(payload: Mapping[str, Any], source: str) -> Any:
    if _state_dict_is_average(payload):
        return payload["state_dict"]
    stochastic = _stochastic(payload)
    if stochastic is not None and stochastic["n_averaged"]:
        weights = stochastic["average_model_state"]
        if any(key.rpartition(".")[2] == _STATISTICS for key in weights):
            rank_zero_warn(
                f"The statistics of BatchNorm in {source} are not those of the averaged weights. "
                "torch.optim.swa_utils.update_bn computes them."
            )
        return weights
    if stochastic is not None or "averaging_state" in payload:
        held = "It was saved before the first update of the average and holds the weights that train alone."
    else:
        held = "It holds the weights that train; no callback that averages had a part in it."
    raise CheckpointIncompatible(
        f"{source} holds no averaged weights. {held} Leave which_weights='averaged' out to load them."
    )


def _raw(payload: Mapping[str, Any], source: str) -> Any:
    stochastic = _stochastic(payload) or {}
    for trained in (payload.get("current_model_state"), stochastic.get("current_model_state")):
        if trained is not None and not _is_lightnings_copy(payload, trained):
            return trained
    if not _state_dict_is_average(payload) and not _is_lightnings_end(payload, stochastic):
        return payload["state_dict"]
    raise CheckpointIncompatible(
        f"{source} holds averaged weights only, and not those that trained: a file of weights only has no "
        "place for both, and Lightning's callbacks drop them when training ends. Load a full checkpoint of "
        "the run, or leave which_weights='raw' out for the average."
    )


def _state_dict_is_average(payload: Mapping[str, Any]) -> bool:
    own = payload.get("holdfast")
    if isinstance(own, Mapping) and own.get("weights") == AVERAGED:
        return True
    # Lightning's WeightAveraging, and what holdfast wrote before it said so.
    averaging = payload.get("averaging_state")
    return isinstance(averaging, Mapping) and bool(torch.as_tensor(averaging.get("n_averaged", 0)) > 0)


def _stochastic(payload: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The state of StochasticWeightAveraging or of a subclass of it, which has another key."""
    callbacks = payload.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if isinstance(state, Mapping) and {"n_averaged", "average_model_state"} <= state.keys():
            return state
    return None


def _is_lightnings_end(payload: Mapping[str, Any], stochastic: Mapping[str, Any]) -> bool:
    """Whether Lightning's StochasticWeightAveraging had put the average into the model: nothing says so."""
    weights, average = payload["state_dict"], stochastic.get("average_model_state")
    if not isinstance(average, Mapping) or stochastic["n_averaged"] < 2:
        return False  # after one update the two are the same
    if any(key.rpartition(".")[2] == _STATISTICS for key in weights):
        # It computes the statistics in an epoch more, at the end of which it takes a step from the average.
        return bool(payload["epoch"] > stochastic.get("latest_update_epoch", payload["epoch"]))
    return _same(weights, average)


def _is_lightnings_copy(payload: Mapping[str, Any], trained: Mapping[str, Any]) -> bool:
    """Whether Lightning's WeightAveraging had put the average into the model, and saved that twice."""
    own, averaging = payload.get("holdfast"), payload.get("averaging_state")
    if isinstance(own, Mapping) and own.get("weights") == AVERAGED:
        return False
    count = averaging.get("n_averaged", 0) if isinstance(averaging, Mapping) else 0
    return bool(torch.as_tensor(count) > 1) and _same(payload["state_dict"], trained)


def _same(weights: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return all(
        torch.equal(one, others[key].to(one.device))
        for key, one in weights.items()
        if isinstance(one, Tensor) and isinstance(others.get(key), Tensor)
    )
