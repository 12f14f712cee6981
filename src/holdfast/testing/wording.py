"""What is said of two runs that part: how they differ, what usually makes it, where the run was stopped."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.testing.events import Event, Parting, Reasons, Tale
from holdfast.testing.fingerprints import Leaf, difference

_SHOWN = 3
_STOPPED_BY = {"exception": "by an exception", "sigterm": "by SIGTERM", "sigkill": "by SIGKILL"}

_STATE = (
    "a plain attribute of the module or of a callback, which has to become a buffer, or be saved by "
    "on_save_checkpoint, state_dict and the like"
)
_STEP = (
    "the same batch and the same random numbers gave another step, so training_step, a hook or a callback "
    f"uses something that is not in the checkpoint: {_STATE}; random numbers from elsewhere than torch, "
    "NumPy and Python; or an operation that is not deterministic, which Trainer(deterministic=True) finds."
)
_CONTENTS = (
    "the dataset or its collate function draws random numbers from where no checkpoint reaches, or depends "
    "on what was loaded before. Draw from the global generator of torch, NumPy or Python: each batch has a "
    "seed of its own there, whichever process loads it."
)
_CAUSES = {
    "rows": "the order comes from something that is not in the checkpoint. holdfast restores the generators, "
    "torch's samplers, and what a sampler of your own gives in state_dict and takes in load_state_dict: give "
    "it these two, or make the order depend on nothing but set_epoch(epoch) and torch's global generator.",
    "batch": "the loader does not give the same batches again. One with state_dict and load_state_dict is "
    "put back to its state; any other iterable is read again from the epoch's start, and has to give the "
    "same rows, made into the same batches, each time.",
    "generator": "something drew random numbers in one of the runs only: code that runs at every start and "
    "not in the middle of a run, or a hook that depends on the time or on an attribute that is not saved.",
    "logged value": f"it was computed from something that is not in the checkpoint: {_STATE}; or log a "
    "TorchMetrics object. A value that measures time cannot be equal: name it in ignore=.",
    "parameter": _STEP,
    "buffer": _STEP,
    "metric": "something besides the steps updates or resets the metric.",
    "value of an optimizer": "the optimizer keeps something that is not in its state_dict, or a hook changes "
    "it from something that is not in the checkpoint.",
    "value of a scheduler": "the scheduler keeps something that its state_dict and load_state_dict do not "
    "bring back.",
    "value of a callback": "the callback's state_dict and load_state_dict do not bring everything back.",
    "final checkpoint": "what on_save_checkpoint or state_dict puts into the checkpoint is not all taken "
    "back by on_load_checkpoint or load_state_dict.",
}
ANOTHER_COURSE = (
    "what decides when to validate, to stop early or to end an epoch depends on something that is not in the "
    f"checkpoint: the time, or {_STATE}."
)
ANOTHER_ROW = "a logger is given values or steps that depend on something that is not in the checkpoint."
NOT_REPEATABLE = (
    "Nothing was stopped yet. Seed the script, and look for what depends on the time, on the process, on the "
    "order of a set, or on what was there before; operations that are not deterministic are found by "
    "Trainer(deterministic=True)."
)

# Where the plural is not made with an "s" behind it.
_COUNTED = {
    "batch": ("part of the batch", "parts of the batch"),
    "rows": ("batch's rows", "batch's rows"),
    "value of an optimizer": ("value of an optimizer", "values of optimizers"),
    "value of a scheduler": ("value of a scheduler", "values of schedulers"),
    "value of a callback": ("value of a callback", "values of callbacks"),
    "final checkpoint": ("value of the final checkpoint", "values of the final checkpoint"),
}


def parting(whole: Event, stopped: Event, found: dict[str, list[str]], where: str) -> Parting:
    """Tell of an event that differs.

    Args:
        whole: The event of the run that never stopped.
        stopped: That of the stopped one.
        found: Category -> the names of what differs, in order; the first category is told of.
        where: The event in words.
    """
    first, names = next(iter(found.items()))
    mine, theirs = whole.values.get(first, {}), stopped.values.get(first, {})
    lines = [_line(first, name, mine.get(name), theirs.get(name)) for name in names[:_SHOWN]]
    if len(names) > _SHOWN:
        lines.append(f"and {len(names) - _SHOWN} more like that")
    cause = _CAUSES[first]
    if first == "batch" and whole.values.get("rows"):
        cause = _CONTENTS
    elif first == "logged value" and ("parameter" in found or "buffer" in found):
        cause = _STEP
    also = tuple(_counted(category, len(found[category])) for category in list(found)[1:])
    return Parting(where, tuple(lines), cause, also)


def _line(category: str, name: str, whole: Leaf | None, stopped: Leaf | None) -> str:
    if category == "generator" and whole is not None and stopped is not None:
        return f"the generator of {name} is not in the same state"
    return difference(name if category in ("rows", "batch") else f"{category} {name}", whole, stopped)


def _counted(category: str, count: int) -> str:
    one, many = _COUNTED.get(category, (category, f"{category}s"))
    return f"{count} {one if count == 1 else many}"


def message(found: Parting, lives: Sequence[Tale], whole: Tale, stops: int) -> str:
    """The whole message of an assertion that failed.

    Args:
        found: Where the runs part.
        lives: The lives of the stopped run so far; the last one parted.
        whole: The run that never stopped.
        stops: How many stops were planned.
    """
    tale, number = lives[-1], lives[-1].life.number
    headline = "The stopped run is not the run that never stopped. They part"
    if number == 0:
        headline = "The script does not do the same when it is run twice. The two runs part"
    said = f"{headline} at {found.where}:" + "".join(f"\n  {line}" for line in found.what)
    if found.also:
        said += f"\nThere, too: {', '.join(found.also)}."
    stopped = lives[-2].stopped if number > 0 else None
    if stopped is not None:
        said += (
            f"\nThe run was stopped {_STOPPED_BY[tale.life.by]} in {stopped.where} (stop {number} of {stops})"
        )
        went_on = [start for start in tale.starts if start.fit == tale.life.goes_on]
        said += "".join(f", and went on from {one.resumed_from} at {one.position}" for one in went_on) + "."
    said += f"\nThe usual cause: {found.cause}" if number else f"\n{NOT_REPEATABLE}"
    tales = (*whole.messages, *tale.messages)
    reasons = [reason for one in tales if isinstance(one, Reasons) for reason in one.reasons]
    if reasons:
        said += "\nThe run itself says what cannot be exact in it:"
        said += "".join(f"\n  {reason}" for reason in dict.fromkeys(reasons))
    return said
