"""``holdfast inspect``: what a file holds, without reading a tensor of it or running anything in it."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from holdfast.checkpoint import contents
from holdfast.checkpoint.inspect import describe
from holdfast.checkpoint.model_tensors import Module, models_in, module_tree
from holdfast.cli import show
from holdfast.cli.show import Cell, Column, Page

_MOST_ROWS = 200


def run(arguments: argparse.Namespace) -> int:
    """Describe one file."""
    with contents.opened(arguments.file) as opened:
        account = describe(opened, tensors=arguments.tensors)
        trees = {key: module_tree(tensors) for key, tensors in models_in(opened.value).items()}
    if arguments.json:
        show.as_json(account)
    else:
        _print(Page(), account, trees)
    return 0


def _print(page: Page, account: dict[str, Any], trees: dict[str, Module]) -> None:
    _head(page, account)
    for model in account["models"]:
        _model(page, model, trees[model["key"]])
    _values(page, "hyperparameters", account["hyper_parameters"])
    _values(page, "hyperparameters of the data", account["datamodule_hyper_parameters"])
    _training(page, account)
    _values(page, "metadata", account["metadata"])
    if account["environment"]:
        _title(page, "environment")
        told = [f"{show.escape(name)} {show.value(one)}" for name, one in account["environment"].items()]
        page.table([Column("", fold=True)], [(", ".join(told),)], header=False)
    _parts(page, account)
    if "tensors" in account:
        _tensors(page, account["tensors"])
    _warnings(page, account)


def _title(page: Page, text: str, more: str = "") -> None:
    page.line()
    page.line(Cell(text, "bold"), f"  {more}" if more else "")


def _head(page: Page, account: dict[str, Any]) -> None:
    maker = account["maker"]
    if account["lightning_version"] is not None and maker == "PyTorch Lightning":
        maker += f" {show.value(account['lightning_version'])}"
    form = "" if maker == account["format"] else f", {account['format']}"
    page.line(
        Cell(show.escape(account["path"]), "bold"), f"  {show.size(account['size_bytes'])}  {maker}{form}"
    )
    facts = [f"{name} {account[name]}" for name in ("step", "epoch") if account[name] is not None]
    if account["saved_at"]:
        facts.append(f"saved {show.age(time.time() - account['saved_at'])} ago")
    if account["kind"] == "weights":
        facts.append("weights only")
    elif account["kind"] is not None:
        facts.append("resumes exactly" if account["exact"] else "resumes, not exactly")
    if facts:
        page.line(f"  {'  '.join(facts)}")
    metrics = [f"{show.escape(name)} {_metric(value)}" for name, value in account["metrics"].items()]
    if metrics:
        page.line(f"  {'  '.join(metrics)}")


def _metric(value: Any) -> str:
    return show.number(value) if isinstance(value, float) else show.value(value)


# -- the model -----------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    name: str
    values: int
    size_bytes: int
    tensors: str


def _model(page: Page, model: dict[str, Any], tree: Module) -> None:
    dtypes = ", ".join(show.escape(name) for name, count in model["dtypes"].items() if count) or "no numbers"
    tensors = show.plural(model["tensors"], "tensor")
    about = (
        f"{show.plural(model['values'], 'number')} in {tensors}, {show.size(model['size_bytes'])}, {dtypes}"
    )
    _title(page, show.escape(model["key"]) or "tensors", about)
    dtype = max(model["dtypes"], key=model["dtypes"].get, default="")
    rows = list(_rows(tree, 0, dtype))
    shown = [
        (f"{row.name}", f"{row.values:,}", show.size(row.size_bytes), row.tensors)
        for row in rows[:_MOST_ROWS]
    ]
    columns = [Column("module"), Column("numbers", right=True), Column("size", right=True)]
    page.table([*columns, Column("tensors", fold=True)], shown)
    if len(rows) > _MOST_ROWS:
        page.line(Cell(f"  ... {len(rows) - _MOST_ROWS:,} more modules: --json has them all", "dim"))


def _rows(module: Module, depth: int, dtype: str) -> Iterator[_Row]:
    """A row for each module; neighbours that are built alike share one."""
    if module.tensors and not module.name:
        own = [tensor for name, tensor in module.tensors.items() if name not in module.ties]
        numbers, size_bytes = sum(one.numel for one in own), sum(one.size_bytes for one in own)
        yield _Row(".", numbers, size_bytes, _own(module, dtype))
    children = list(module.children.items())
    if all(name.isdecimal() and len(name) < 10 for name, _ in children):
        children.sort(key=lambda child: int(child[0]))
    at = 0
    while at < len(children):
        name, child = children[at]
        alike = 1
        while at + alike < len(children) and _alike(child, children[at + alike][1]):
            alike += 1
        label, values, size_bytes = show.escape(name), child.values, child.size_bytes
        if alike > 1:
            label = f"{label} .. {show.escape(children[at + alike - 1][0])}"
            values = sum(one.values for _, one in children[at : at + alike])
            size_bytes = sum(one.size_bytes for _, one in children[at : at + alike])
        only = _only_child(child)
        while only is not None:  # a chain of modules that hold nothing but the next one
            label, child = f"{label}.{show.escape(only[0])}", only[1]
            only = _only_child(child)
        note = (
            f"{alike} alike, each: " if alike > 1 and child.tensors else f"{alike} alike" if alike > 1 else ""
        )
        yield _Row("  " * depth + label, values, size_bytes, note + _own(child, dtype))
        yield from _rows(child, depth + 1, dtype) if child.name else ()
        at += alike


def _only_child(module: Module) -> tuple[str, Module] | None:
    return next(iter(module.children.items())) if len(module.children) == 1 and not module.tensors else None


def _alike(a: Module, b: Module) -> bool:
    return a.values == b.values and a.shape() == b.shape()


def _own(module: Module, dtype: str) -> str:
    """A module's own tensors: ``weight 64 x 64, bias 64``; a dtype is told where it is not the usual one."""
    told = []
    for name, tensor in module.tensors.items():
        if name in module.ties:
            told.append(f"{show.escape(name)} = {show.escape(module.ties[name])}")
            continue
        kind = "" if tensor.dtype == dtype else f" {show.escape(tensor.dtype)}"
        layout = "" if tensor.layout == "strided" else f" {show.escape(tensor.layout)}"
        told.append(f"{show.escape(name)} {show.shape(tensor.shape)}{kind}{layout}")
    return ", ".join(told)


# -- the rest ------------------------------------------------------------------------------------------------


def _values(page: Page, title: str, values: Any) -> None:
    if not values:
        return
    _title(page, title)
    pairs = values.items() if isinstance(values, dict) else [("", values)]
    page.table(
        [Column("name"), Column("value", fold=True)],
        [(show.escape(name), show.value(one, 300)) for name, one in pairs],
        header=False,
    )


def _training(page: Page, account: dict[str, Any]) -> None:
    rows: list[tuple[str, str]] = []
    for optimizer in account["optimizers"]:
        size = f"state of {show.plural(optimizer['tensors'], 'tensor')}, {show.size(optimizer['size_bytes'])}"
        rows.append(("optimizer", f"{show.escape(optimizer['class'] or '')}  {size}".strip()))
        for index, group in enumerate(optimizer["groups"]):
            options = group["options"] if isinstance(group["options"], dict) else {}
            told = [f"{show.escape(k)} {show.value(v)}" for k, v in options.items() if not _unset(v)]
            rows.append(
                (f"  group {index}", f"{show.plural(group['parameters'], 'parameter')}: {', '.join(told)}")
            )
    for scheduler in account["schedulers"]:
        state = scheduler["state"] if isinstance(scheduler["state"], dict) else {}
        told = [
            f"{show.escape(k)} {show.value(v)}"
            for k, v in state.items()
            if k in ("last_epoch", "_last_lr") or not (_unset(v) or str(k).startswith("_"))
        ]
        rows.append(("scheduler", f"{show.escape(scheduler['class'] or '')}  {', '.join(told)}".strip()))
    names = [re.sub(r"\{.*", "", key, flags=re.DOTALL) for key in account["callbacks"]]
    if names:
        rows.append(("callbacks", ", ".join(map(show.escape, names))))
    position = account["position"]
    if isinstance(position, dict) and position:
        keys = ("epoch", "batch", "stage", "total_batches", "samples", "validations")
        rows.append(("position", ", ".join(f"{k} {show.value(position[k])}" for k in keys if k in position)))
    if rows:
        _title(page, "training")
        page.table([Column("what"), Column("state", fold=True)], rows, header=False)


def _unset(value: Any) -> bool:
    return value is None or value is False or value in ([], {})


def _parts(page: Page, account: dict[str, Any]) -> None:
    if not account["parts"] or any(model["key"] == "" for model in account["models"]):
        return
    _title(page, "what takes the room")
    large = [part for part in account["parts"] if part["size_bytes"]]
    rows = [
        (show.escape(part["key"]), show.plural(part["tensors"], "tensor"), show.size(part["size_bytes"]))
        for part in sorted(large, key=lambda part: -part["size_bytes"])[:20]
    ]
    rest = account["size_bytes"] - sum(part["size_bytes"] for part in large)
    rows.append(("(all else)", "", show.size(max(0, rest))))
    page.table([Column("key"), Column("tensors", right=True), Column("size", right=True)], rows, header=False)
    small = [show.escape(part["key"]) for part in account["parts"] if not part["size_bytes"]]
    if small:
        keys = ", ".join(small[:40]) + (" ..." if len(small) > 40 else "")
        page.table([Column(""), Column("", fold=True)], [("no tensors in", keys)], header=False)


def _tensors(page: Page, tensors: list[dict[str, Any]]) -> None:
    _title(page, "every tensor", show.plural(len(tensors), "tensor"))
    rows = []
    for one in tensors:
        same = f"= {show.escape(one['same_as'])}" if one["same_as"] else ""
        odd = [one["layout"]] if one["layout"] != "strided" else []
        odd += [one["device"]] if one["device"] != "cpu" else []
        notes = "  ".join([*map(show.escape, odd), same]).strip()
        size = "" if same else show.size(one["size_bytes"])
        rows.append(
            (show.escape(one["name"]), show.escape(one["dtype"]), show.shape(one["shape"]), size, notes)
        )
    columns = [Column("name", fold=True), Column("dtype"), Column("shape"), Column("size", right=True)]
    page.table([*columns, Column("", fold=True)], rows)


def _warnings(page: Page, account: dict[str, Any]) -> None:
    if account["omissions"]:
        _title(page, "not in the file", "what could not be stored when it was saved")
        rows = [(show.escape(one["path"]), show.escape(one["reason"])) for one in account["omissions"]]
        page.table([Column("path", fold=True), Column("reason", fold=True)], rows, header=False)
    if account["refused_names"]:
        page.line()
        names = ", ".join(map(show.escape, account["refused_names"][:20]))
        page.line(
            Cell("unsafe", "bold red"),
            f"  it names {names}: holdfast's own files never do. Loading refuses it.",
        )
    elif account["inert_classes"]:
        _title(page, "classes that it names", "none is imported; holdfast loads each as an inert object")
        for name in account["inert_classes"][:40]:
            page.line(f"  {show.escape(name)}")
        if len(account["inert_classes"]) > 40:
            page.line(Cell(f"  ... {len(account['inert_classes']) - 40:,} more", "dim"))
