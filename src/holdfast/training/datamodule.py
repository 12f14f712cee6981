"""`LightningDataModule`: the data of a run in one place."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import Self

from holdfast.training.hooks import CheckpointHooks, DataHooks
from holdfast.training.hparams import HyperparametersMixin
from holdfast.training.module import class_only_method

if TYPE_CHECKING:
    from holdfast.training.trainer import Trainer


class LightningDataModule(DataHooks, CheckpointHooks, HyperparametersMixin):
    """Says where the loaders come from: override ``setup`` and the ``*_dataloader`` methods."""

    name: str | None = None
    CHECKPOINT_HYPER_PARAMS_KEY = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME = "datamodule_hparams_name"

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Trainer | None = None

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
            train_dataset: Dataset, or list of them, to train on.
            val_dataset: Likewise for validation.
            test_dataset: Likewise for the test.
            predict_dataset: Likewise for prediction.
            batch_size: Rows in a batch.
            num_workers: Loader processes.
            datamodule_kwargs: Arguments of the class's ``__init__``.
        """
        made = cls(**datamodule_kwargs)

        def loader(dataset: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
            shuffle = shuffle and not isinstance(dataset, IterableDataset)
            return DataLoader(
                dataset,
                batch_size=batch_size,
                shuffle=shuffle,
                num_workers=num_workers,
                persistent_workers=num_workers > 0,
            )

        def loaders(datasets: Any, shuffle: bool) -> Any:
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
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build the datamodule a checkpoint was saved with; see `LightningModule.load_from_checkpoint`."""
        from holdfast.training.state import build_from_checkpoint

        built: Self = build_from_checkpoint(cls, checkpoint_path, map_location, hparams_file, None, kwargs)
        return built
