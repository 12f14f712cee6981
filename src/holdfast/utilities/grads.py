"""How large gradients are."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def grad_norm(
    module: nn.Module, norm_type: float | int | str, group_separator: str = "/"
) -> dict[str, Tensor]:
    """Return the norm of each parameter's gradient, and of all of them together, by name.

    ``self.log_dict(grad_norm(self, norm_type=2))`` in ``on_before_optimizer_step`` logs them.

    Args:
        module: Whose gradients; parameters without one are left out.
        norm_type: The p of the norm; "inf" for the largest absolute value.
        group_separator: What stands between the group of names and the parameter's.

    Raises:
        ValueError: ``norm_type`` is not positive.
    """
    import torch

    p = float(norm_type)
    if p <= 0:
        raise ValueError(f"grad_norm(norm_type={norm_type!r}): expected a positive number or 'inf'.")
    norms = {
        f"grad_{p}_norm{group_separator}{name}": torch.linalg.vector_norm(parameter.grad, p)
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if norms:
        norms[f"grad_{p}_norm_total"] = torch.linalg.vector_norm(torch.stack(list(norms.values())), p)
    return norms


__all__ = ["grad_norm"]
