"""The three views of what was logged: callbacks', the loggers' and the progress bar's; and their state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from holdfast.training import metric_objects
from holdfast.training.results import Entry, Results, as_tensor

if TYPE_CHECKING:
    from holdfast.training.metric_exchange import MetricExchange
    from holdfast.training.trainer import Trainer


class CallbackMetrics(dict[str, Tensor]):
    """What callbacks see of the metrics; what they assign is kept, like a value that was logged."""

    def __init__(self, store: MetricStore, values: dict[str, Tensor]) -> None:
        super().__init__(values)
        self._store = store

    def __setitem__(self, name: str, value: Any) -> None:
        self._store.take({name: as_tensor(value)})
        super().__setitem__(name, self._store.callback[name])

    def update(self, *values: Any, **named: Any) -> None:
        """As a dict's, through `__setitem__`."""
        for name, value in dict(*values, **named).items():
            self[name] = value

    def __reduce__(self) -> Any:
        # A copy is a plain dict: it holds the values of a moment.
        return dict, (dict(self),)


class MetricStore:
    """The three views of everything logged so far, as `Trainer` shows them."""

    def __init__(self) -> None:
        self.callback: dict[str, Tensor] = {}
        self.logged: dict[str, Tensor] = {}
        self.bar: dict[str, Tensor] = {}
        self._published: dict[str, int] = {}
        self.train = Results(training=True)
        self.evaluation: Results | None = None
        self.exchange: MetricExchange | None = None
        """How the ranks of the job tell each other of what they log; None with one process."""
        self._come_again = False

    def connect(self, trainer: Trainer) -> None:
        """Reduce what is logged over the trainer's processes from now on, where there are several."""
        self.exchange = None
        if trainer.world_size > 1 and not trainer.barebones:
            import torch.distributed as dist

            from holdfast.training.metric_exchange import MetricExchange

            # A strategy of the user's own may have other means, and then it is for them to reduce.
            self.exchange = MetricExchange(trainer) if dist.is_initialized() else None
        self.train.ranks_agree = self.exchange is not None

    def begin(self) -> None:
        """Forget the values of the request before this one; the names' versions go on counting."""
        self.forget()
        self.train.entries.clear()
        self.train.epoch_ended = False

    def forget(self) -> None:
        """Empty the three views."""
        for view in (self.callback, self.logged, self.bar):
            view.clear()

    def callback_metrics(self) -> CallbackMetrics:
        """Published values, and on top of them what the running loop has logged since."""
        live = dict(self.callback)
        live.update(self.train.callback_metrics())
        if self.evaluation is not None:
            live.update(self.evaluation.callback_metrics())
        return CallbackMetrics(self, live)

    def versions(self) -> dict[str, int]:
        """For each name in `callback_metrics`, a number that changes whenever its value is a new one."""
        live = dict(self._published)
        for entry in self.train.entries.values():
            if entry.on_step:
                for name in {entry.step_name(), entry.name}:
                    live[name] = live.get(name, 0) + entry.updates
        return live

    def logged_metrics(self) -> dict[str, Tensor]:
        """What the loggers got last, and on top of it what they would get of this step."""
        return {**self.logged, **self._live(lambda entry: entry.logger)}

    def bar_metrics(self) -> dict[str, float]:
        """Values for the progress bar, as numbers; reading them waits for the device."""
        live = {**self.bar, **self._live(lambda entry: entry.bar)}
        return {name: value.item() for name, value in live.items()}

    def _live(self, wanted: Callable[[Entry], bool]) -> dict[str, Tensor]:
        values = self.train.step_metrics(wanted)
        if self.train.epoch_ended:
            values.update(self.train.epoch_metrics(wanted))
        if self.evaluation is not None:
            values.update(self.evaluation.step_metrics(wanted))
            if self.evaluation.epoch_ended:
                values.update(self.evaluation.epoch_metrics(wanted))
        return values

    def take(self, values: dict[str, Tensor]) -> None:
        """Show callbacks what one of them measured itself, such as learning rates."""
        self.callback.update(values)
        for name in values:
            self._published[name] = self._published.get(name, 0) + 1

    def end(self, results: Results, *, more: Callable[[], bool]) -> None:
        """An epoch's batches are through: its values are there for the hooks at its end.

        Ranks: all. Blocks: with several processes until all are here.

        Args:
            results: What the epoch has logged.
            more: Asked with several processes: whether hooks of this rank may log more for it.

        Raises:
            ConfigError: the ranks have logged different things with ``sync_dist=True``.
        """
        results.epoch_ended = True
        if self.exchange is not None:
            results.ranks_agree = True
            self._come_again = self.exchange.at_epoch_end(results, more=more())

    def end_hooks(self, results: Results) -> None:
        """The hooks at the epoch's end are through: what they have logged is there too. Ranks: all."""
        if self._come_again and self.exchange is not None:
            self._come_again = False
            self.exchange.at_epoch_end(results, again=True)

    def step(self, results: Results, wanted: Callable[[Entry], bool]) -> dict[str, Tensor]:
        """The latest values of steps that are about to be logged. Ranks: all.

        Blocks: until all are here, where any of them was logged with ``sync_dist=True``.
        """
        if self.exchange is not None:
            self.exchange.at_step(results, wanted)
        return results.step_metrics(wanted)

    def publish(self, results: Results) -> dict[str, Tensor]:
        """Take a loop's epoch values into the views; returns those that go to the loggers."""
        results.epoch_ended = True
        self.end_hooks(results)
        self.take(results.callback_metrics())
        return self._show(results)

    def show(self, results: Results) -> None:
        """Likewise, but nothing counts as new by it: what is monitored is not there to be ranked yet."""
        results.epoch_ended = True
        self.end_hooks(results)
        self.callback.update(results.callback_metrics())
        self._show(results)

    def show_start(self) -> None:
        """What was logged when training started is there to see from then on, not from the epoch's end."""
        started = Results(training=True)
        started.entries = {key: one for key, one in self.train.entries.items() if one.fx == "on_train_start"}
        if self.exchange is not None:
            self.end(started, more=bool)
        self.show(started)

    def _show(self, results: Results) -> dict[str, Tensor]:
        self.bar.update(results.step_metrics(lambda entry: entry.bar))
        self.logged.update(results.step_metrics(lambda entry: entry.logger))
        self.bar.update(results.epoch_metrics(lambda entry: entry.bar))
        to_log = results.epoch_metrics(lambda entry: entry.logger)
        self.logged.update(to_log)
        return to_log

    def end_epoch(self) -> None:
        """Begin to accumulate anew; the count of what was logged goes on, also in a run that resumes here."""
        for entry in self.train.entries.values():
            if entry.on_step:
                for name in {entry.step_name(), entry.name}:
                    self._published[name] = self._published.get(name, 0) + entry.updates
            entry.updates = 0
        self.train.reset()

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Everything above, and the TorchMetrics objects in the module, for a checkpoint."""
        objects = metric_objects.found_in(module)
        return {
            "callback": dict(self.callback),
            "logged": dict(self.logged),
            "bar": dict(self.bar),
            "versions": dict(self._published),
            "train": self.train.state_dict({id(metric): path for path, metric in objects.items()}),
            "train_ended": self.train.epoch_ended,
            **metric_objects.capture(module, objects),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device, module: nn.Module) -> None:
        """Put the views, the accumulators and the TorchMetrics objects back."""
        objects = metric_objects.restore(module, state, device)
        for name in ("callback", "logged", "bar"):
            values = {key: value.to(device) for key, value in state[name].items()}
            getattr(self, name).clear()
            getattr(self, name).update(values)
        self._published = dict(state["versions"])
        self.train.load_state_dict(state["train"], device, objects)
        self.train.epoch_ended = state["train_ended"]
