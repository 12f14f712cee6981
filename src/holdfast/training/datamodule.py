"""`LightningDataModule`: the data of a run in one place."""

from __future__ import annotations

import inspect
import os
from typing import IO, TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import Self

from holdfast.training.class_only import class_only_method
from holdfast.training.combined import as_one_loader
from holdfast.training.hooks import CheckpointHooks, DataHooks
from holdfast.training.hparams import HyperparametersMixin
from holdfast.utilities.combined_loader import CombinedLoader, length_of
from holdfast.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


class LightningDataModule(DataHooks, CheckpointHooks, HyperparametersMixin):
    """Says where the loaders come from: override ``setup`` and the ``*_dataloader`` methods."""

    name: str | None = None
    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE = "datamodule_hparams_type"

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Trainer | None = None
        self.prepare_data_per_node = True
        self.allow_zero_length_dataloader_with_multiple_devices = False

    def __str__(self) -> str:
        """A line for each kind of loader: rows and batches. It makes the loaders to ask them."""
        lines = [type(self).__name__]
        for kind in ("train", "val", "test", "predict"):
            if is_overridden(f"{kind}_dataloader", self):
                lines.append(f"  {kind:<8} {self._described(f'{kind}_dataloader')}")
        return "\n".join(lines)

    def _described(self, hook: str) -> str:
        try:
            loaders = as_one_loader(getattr(self, hook)(), "sequential")
        except Exception as error:  # often setup has not run yet, and printing must not raise
            return f"not ready: {type(error).__name__}: {error}"
        several = loaders.flattened if isinstance(loaders, CombinedLoader) else [loaders]
        return "; ".join(_size_of(loader) for loader in several)

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be in a checkpoint for this datamodule."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""

    def on_exception(self, exception: BaseException) -> None:
        """Called when an exception ends the run."""

    @classmethod
    def from_datasets(
        cls,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        predict_dataset: Any = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> LightningDataModule:
        """Make a datamodule from datasets; training is shuffled unless the dataset is iterable.

        Args:
            train_dataset: Dataset, or list or dict of them, to train on.
            val_dataset: Likewise for validation.
            test_dataset: Likewise for the test.
            predict_dataset: Likewise for prediction.
            batch_size: Rows in a batch.
            num_workers: Loader processes.
            datamodule_kwargs: Arguments of the class's ``__init__``, which gets ``batch_size`` and
                ``num_workers`` too if it takes them.
        """
        parameters = inspect.signature(cls.__init__).parameters
        variadic = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name, value in (("batch_size", batch_size), ("num_workers", num_workers)):
            if variadic or name in parameters:
                datamodule_kwargs[name] = value
        made = cls(**datamodule_kwargs)

        def loader(dataset: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
            shuffle = shuffle and not isinstance(dataset, IterableDataset)
            return DataLoader(
                dataset,
                batch_size=batch_size,
                shuffle=shuffle,
                num_workers=num_workers,
                pin_memory=torch.cuda.is_available(),
                persistent_workers=num_workers > 0,
            )

        def loaders(datasets: Any, shuffle: bool) -> Any:
            if isinstance(datasets, dict):
                return {name: loader(dataset, shuffle) for name, dataset in datasets.items()}
            if isinstance(datasets, (list, tuple)):
                return [loader(dataset, shuffle) for dataset in datasets]
            return loader(datasets, shuffle)

        for method, datasets, shuffle in (
            ("train_dataloader", train_dataset, True),
            ("val_dataloader", val_dataset, False),
            ("test_dataloader", test_dataset, False),
            ("predict_dataloader", predict_dataset, False),
        ):
            if datasets is not None:
                setattr(made, method, lambda datasets=datasets, shuffle=shuffle: loaders(datasets, shuffle))
        return made

    @class_only_method
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the datamodule a checkpoint was saved with; see `LightningModule.load_from_checkpoint`."""
        from holdfast.training.loading import build_from_checkpoint

        built: Self = build_from_checkpoint(cls, checkpoint_path, map_location, hparams_file, None, kwargs)
        return built


def _size_of(loader: Any) -> str:
    batches = length_of(loader)
    rows = length_of(getattr(loader, "dataset", None))
    said = "unknown length" if batches is None else f"{batches} batches"
    return said if rows is None else f"{rows} rows in {said}"
