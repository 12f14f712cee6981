"""Plans that once failed, in short: what of each is not the default. They are run with every test run."""

from __future__ import annotations

from typing import Any

FAILED: list[dict[str, Any]] = [
    # An optimizer keeps values in float32 for weights of half precision; torch casts them when it loads.
    {"optimizer": "nadam", "precision": "16-true", "places": [0.16, 0.5, 0.5]},
    {"optimizer": "asgd", "precision": "bf16-true"},
    # A loader of torchdata drew a number more from the run's generator after a resume.
    {"data": "torchdata"},
    {"data": "torchdata iterable", "saves": ["default"]},
    {"data": "torchdata iterable", "saves": ["max_topk", "last"], "places": [0.42, 0.5, 0.5]},
    # A run whose time is up logs its last step, which one with more time to go does not.
    {
        "val": "one",
        "val_interval": "never",
        "sanity": 2,
        "log_every": 2,
        "max_time": "00:09:00:00",
        "min_steps": 3,
        "kinds": ["time", "error", "error"],
        "hooks": ["on_validation_start", None, None],
    },
    {"log_every": 3, "max_time": "00:09:00:00", "kinds": ["time", "error", "error"]},
    # Workers asked the samplers of several loaders in another order than a run without workers does.
    {"data": "max_size_cycle", "shuffle": True, "other_workers": [2]},
    {"data": "min_size", "shuffle": True, "own_generator": True, "other_workers": [2]},
    {"data": "max_size_cycle", "shuffle": True, "own_generator": True, "other_workers": [2]},
    {"limit_train": 2, "shuffle": True, "own_generator": True, "other_workers": [2], "epochs": 3},
    {"data": "max_size_cycle", "sampler": "lazy", "other_workers": [2], "places": [0.3, 0.5, 0.5]},
    # Workers had asked the sampler for its last row, behind which it draws, when the resumed run saved again.
    {
        "shuffle": True,
        "own_generator": True,
        "other_workers": [2],
        "val": "one",
        "val_interval": 0.5,
        "saves": ["max_topk", "epoch2", "step2"],
        "stops": 2,
    },
    # A run that ended for lack of time had saved `last`, which the files of the whole run learn of later.
    {
        "val": "one",
        "val_interval": 0.5,
        "accumulate": 2,
        "timer": True,
        "saves": ["step3_last", "epoch2"],
        "max_time": "00:09:00:00",
        "kinds": ["time", "error", "error"],
        "places": [0.01, 0.5, 0.5],
    },
    # What a loader says of itself once its persistent workers have ended.
    {
        "data": "torchdata iterable",
        "workers": 1,
        "persistent": True,
        "saves": ["default"],
        "hooks": ["on_train_end", None, None],
    },
    # The workers of a loader that was given again had been ended with the loader before it.
    {"data": "torchdata iterable", "workers": 1, "persistent": True, "reload": 1},
    {"data": "torchdata", "workers": 2, "persistent": True, "reload": 1, "shuffle": True, "epochs": 3},
    # One save for two callbacks, which give it the same name in different directories, was the first one's alone.
    {
        "val": "one",
        "saves": ["default", "val_topk"],
        "max_time": "00:09:00:00",
        "stops": 2,
        "kinds": ["error", "time", "error"],
    },
    {
        "monitor": "step",
        "log_every": 2,
        "max_time": "00:09:00:00",
        "min_steps": 3,
        "kinds": ["time", "error", "error"],
        "places": [0.0, 0.5, 0.5],
    },
    # An end between two saves of one moment left a full checkpoint that told of weights which were not there.
    {
        "limit_train": 2,
        "epochs": 1,
        "accumulate": 2,
        "saves": ["weights", "step2"],
        "places": [0.68, 0.5, 0.5],
    },
    # More time for a run that had come to max_steps as well: its epoch had still to end.
    {
        "metrics": True,
        "manual": "closures",
        "max_time": "00:09:00:00",
        "max_steps": 7,
        "kinds": ["time", "error", "error"],
        "places": [0.83, 0.5, 0.5],
    },
    {
        "rows": 17,
        "manual": "toggled",
        "timer": True,
        "state_callback": True,
        "max_steps": 5,
        "kinds": ["time", "error", "error"],
    },
    # More time for a run whose cut epoch had displaced the best of before.
    {
        "average": "ema",
        "finetuning": 0,
        "saves": ["weights", "step2"],
        "max_time": "00:09:00:00",
        "kinds": ["time", "error", "error"],
        "hooks": ["committed", None, None],
        "places": [0.46, 0.5, 0.5],
    },
    # What was saved because training ended kept the end that came after more time from being saved.
    {
        "overfit": 0.5,
        "timer": True,
        "saves": ["step3_last", "epoch2"],
        "max_time": "00:09:00:00",
        "kinds": ["time", "error", "error"],
        "places": [0.04, 0.5, 0.5],
    },
    # An exception before a save in the background was told to be durable: what it leaves is no run's file.
    {
        "batch_size": 2,
        "val": "one",
        "val_interval": "always",
        "saves": ["weights", "step2"],
        "io": "async",
        "places": [0.48, 0.5, 0.5],
    },
    # A life that ended for lack of time saved its end as `last`, in place of one that is exact.
    {
        "data": "iterable",
        "val": "one",
        "val_interval": 2,
        "saves": ["max_topk", "last"],
        "max_time": "00:09:00:00",
        "stops": 3,
        "kinds": ["error", "error", "time"],
        "places": [0.5, 0.5, 0.69],
    },
]
