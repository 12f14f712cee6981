"""In what the command of a resumed run differs from the one that saved its checkpoint, one line for each."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from holdfast.training import command
from holdfast.training.command import same
from holdfast.training.progress import BATCH, VALIDATED

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer

_WIDTH = 60
_MOST_OF_A_KIND = 4
_MISSING = object()

_IS_GONE_ON_WITH = " (the checkpoint's is gone on with)"

# The trainer's settings, in the order in which they are listed.
_SETTINGS = (
    "device",
    "precision",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_val_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "reload_dataloaders_every_n_epochs",
)
_DATA = {"train": "training", "val": "validation"}
_ENVIRONMENT = {
    "cpu_capability": "CPU capability",
    "deterministic": "deterministic algorithms",
    "float32_matmul_precision": "float32 matmul precision",
    "gpus": "GPU",
}


def differences(trainer: Trainer, resumed: dict[str, Any]) -> list[str]:
    """Lines ``what: then -> now (what it means)``; empty for the same command on the same machine.

    A limit that was raised, such as ``max_epochs``, is no difference, nor is the number of workers of
    map-style data. Of a file that holds fewer facts, these are compared.

    Args:
        trainer: Of the run that goes on; its loaders are in place.
        resumed: The "holdfast" part of the checkpoint, with what `state.restore_training` added to it.
    """
    loop = trainer.fit_loop
    assert loop is not None
    then, now = resumed.get("command") or {}, {**loop.command, **command.of_data(trainer)}
    if not then and isinstance((resumed.get("data") or {}).get("batch_size"), int):
        then = {"train": [{"batch_size": resumed["data"]["batch_size"]}]}
    saved = {**resumed.get("hyper_parameters", {}), **then.get("hyper_parameters", {})}
    afresh = resumed.get("afresh", ())
    mid_epoch = trainer.progress.stage in (BATCH, VALIDATED)
    return [
        *_of_hyperparameters(saved, now["hyper_parameters"], saved.get("unknown", ())),
        *_of_optimizers(then, now, "" if "optimizer_states" in afresh else _IS_GONE_ON_WITH),
        *_of_schedulers(then, now, "" if "lr_schedulers" in afresh else _IS_GONE_ON_WITH),
        *_of_settings(then, now),
        *_of_data(then, now, mid_epoch),
        *_of_environment(resumed.get("environment") or {}, command.environment(trainer.strategy.root_device)),
    ]


# -- each kind -----------------------------------------------------------------------------------------------


def _of_hyperparameters(then: dict[str, Any], now: dict[str, Any], unknown: Collection[str]) -> Iterator[str]:
    for owner, of in (("module", ""), ("datamodule", "of the datamodule, ")):
        # Where one of the two keeps none, nothing is known of them.
        if owner in then and owner in now:
            for path, old, new in _changed(then[owner], now[owner]):
                if path not in unknown:
                    yield _line(f"hyperparameter {of}{path}", old, new)


def _changed(then: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The innermost named values that differ, each with its path."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(key for key in now if key not in then)]:
            old, new = then.get(key, _MISSING), now.get(key, _MISSING)
            yield from _changed(old, new, f"{path}.{key}" if path else str(key))
    elif then is _MISSING or now is _MISSING or not same(then, now):
        yield path, then, now


def _of_optimizers(then: dict[str, Any], now: dict[str, Any], means: str) -> Iterator[str]:
    several = len(now["optimizers"]) > 1
    for index, (old, new) in enumerate(zip(then.get("optimizers", []), now["optimizers"], strict=False)):
        if old["class"] != new["class"]:
            yield _line(f"optimizer {index}", old["class"], new["class"], means)
            continue
        name = f"optimizer {index} ({new['class']})" if several else new["class"]
        lines: dict[str, list[str]] = {}
        for number, (before, after) in enumerate(zip(old["groups"], new["groups"], strict=False)):
            for option in after:
                if option in before and not same(before[option], after[option]):
                    what = f"{'learning rate' if option == 'lr' else option} of {name}, group {number}"
                    lines.setdefault(option, []).append(_line(what, before[option], after[option], means))
        for of_one_kind in lines.values():
            yield from of_one_kind[:_MOST_OF_A_KIND]
            if len(of_one_kind) > _MOST_OF_A_KIND:
                yield f"... and the same of {len(of_one_kind) - _MOST_OF_A_KIND} more groups"


def _of_schedulers(then: dict[str, Any], now: dict[str, Any], means: str) -> Iterator[str]:
    for index, (old, new) in enumerate(zip(then.get("schedulers", []), now["schedulers"], strict=False)):
        if old["class"] != new["class"]:
            yield _line(f"LR scheduler {index}", old["class"], new["class"], means)
            continue
        for option in new:
            if option in old and not same(old[option], new[option]):
                own = option in ("interval", "frequency", "monitor")
                what = f"{option} of {new['class']}"
                yield _line(what, old[option], new[option], "" if own else means)


def _of_settings(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name in _SETTINGS:
        if name in then and not same(then[name], now[name]):
            yield _line(name, then[name], now[name])


def _of_data(then: dict[str, Any], now: dict[str, Any], mid_epoch: bool) -> Iterator[str]:
    found: dict[str, list[str]] = {kind: [] for kind in _DATA}
    for kind, name in _DATA.items():
        old, new = then.get(kind) or [], now.get(kind) or []
        if old and new and len(old) != len(new):
            found[kind].append(_line(f"{name} loaders", len(old), len(new)))
            continue
        for index, (before, after) in enumerate(zip(old, new, strict=False)):
            title = f"the {name} data" if len(new) == 1 else f"{name} loader {index}"
            alone = mid_epoch and kind == "train" and len(new) == 1
            found[kind] += _of_loader(title, before, after, under_way=alone)
    yield from found["train"]
    # Otherwise that says it all.
    batches = then.get("batches"), now.get("batches")
    if not found["train"] and None not in batches and batches[0] != batches[1]:
        yield _line("batches in a training epoch", *batches)
    yield from found["val"]


def _of_loader(title: str, old: dict[str, Any], new: dict[str, Any], *, under_way: bool) -> Iterator[str]:
    def differs(what: str) -> bool:
        return None not in (old.get(what), new[what]) and old[what] != new[what]

    if differs("rows"):
        shuffled = under_way and new["sampler"] != "SequentialSampler"
        means = " (the rest of the epoch comes in another order)" if shuffled else ""
        yield _line(f"rows in {title}", old["rows"], new["rows"], means)
    if differs("batch_size"):
        means = " (the epoch goes on at the same row)" if under_way and new["sampler"] else ""
        yield _line(f"batch size of {title}", old["batch_size"], new["batch_size"], means)
    if differs("sampler"):
        yield _line(f"sampler of {title}", old["sampler"], new["sampler"])
    if differs("split") and not differs("rows"):
        yield f"rows of {title}: not the same ones (was the split drawn with another seed?)"
    if differs("workers"):
        means = " (each worker of an iterable dataset reads and draws for itself)"
        yield _line(f"workers of {title}", old["workers"], new["workers"], means)


def _of_environment(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name, new in now.items():
        old = then.get(name, new)
        if name == "python":
            old, new = (".".join(version.split(".")[:2]) for version in (old, new))
        elif name == "gpus":
            # What is there, but not computed on, does not matter; older files list all that were there.
            old, new = (gpus[0] if gpus else None for gpus in (old, new))
            old = new if None in (old, new) else old
        if old != new:
            yield _line(_ENVIRONMENT.get(name, name), old, new, " (bits may differ)")


# -- words ---------------------------------------------------------------------------------------------------


def _line(what: str, then: Any, now: Any, means: str = "") -> str:
    old, new = _shown(then), _shown(now)
    return f"{what}: {old} -> {'another ' if old == new else ''}{new}{means}"


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "not given"
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}" if value.numel() > 1 else f"tensor({value.item()})"
    text = value if isinstance(value, str) and value else repr(value)
    text = " ".join(text.split()) or text
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
