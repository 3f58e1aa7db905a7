"""The batch norms of a network that keep running statistics, and why others are none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import SurgeryError, meant
from ..nn import Norm

__all__ = ["Where", "batch_norms", "titled", "unwrapped"]

Where = str | Sequence[str] | Callable[[str, nn.Module], bool] | None
"""Some norms of a network: the path of a norm or of a module that holds norms, several of these, or
a function of path and norm; None for all."""


def batch_norms(
    model: nn.Module, where: Where = None
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The batch norms with running statistics by path, and others by path with the reason.

    A norm that stands at several places is one norm, and has the path of its first place.

    Args:
        model: any network.
        where: those to look at.

    Raises:
        SurgeryError: ``where`` names what has no norm.
    """
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if _may_remember(module):
            places.setdefault(module, []).append(path)
    if where is not None:
        chosen = _chosen(model, places, where)
        places = {norm: paths for norm, paths in places.items() if norm in chosen}
    norms: dict[str, Any] = {}
    left: list[tuple[str, str]] = []
    for norm, paths in places.items():
        problem = _problem(norm)
        if problem is None:
            norms[paths[0]] = norm
        else:
            left.append((titled(paths[0], norm), problem))
    return norms, left


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside of DistributedDataParallel, DataParallel and torch.compile.

    There its paths are those that its author knows, and calling it talks to no other process.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def titled(path: str, norm: nn.Module) -> str:
    """What to call a norm: its path, or its class if it is the whole network."""
    return path or type(norm).__name__


def _may_remember(module: nn.Module) -> bool:
    if isinstance(module, Norm):
        return module.spec.averages_batch
    kind = nn.modules.batchnorm._BatchNorm
    return isinstance(module, kind) or isinstance(getattr(module, "running_mean", None), Tensor)


def _problem(norm: Any) -> str | None:
    """Why there is nothing to care for, or None."""
    if isinstance(norm, nn.modules.instancenorm._InstanceNorm):
        return "every sample has statistics of its own"
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm | Norm):
        kind = getattr(norm, "original_name", type(norm).__name__)  # TorchScript's word for a class
        return f"it is a {kind}, which is no batch norm of torch's or evenkeel's"
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        return "it has not seen an input yet; run the network once"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics, and uses those of each batch"
    return None


def _chosen(model: nn.Module, places: dict[nn.Module, list[str]], where: Where) -> set[nn.Module]:
    """The norms that ``where`` means."""
    if callable(where):
        return {norm for norm, paths in places.items() if where(paths[0], norm)}
    found: set[nn.Module] = set()
    for word in [where] if isinstance(where, str) else where or ():
        inside = {
            norm
            for norm, paths in places.items()
            if any(path == word or path.startswith(f"{word}.") for path in paths)
        }
        if not inside:
            every = [path for path, _ in model.named_modules(remove_duplicate=False)]
            what = "has no batch norm in it" if word in every else "is no module of it"
            raise SurgeryError(
                f"where='{word}': in {type(model).__name__}, '{word}' {what}"
                f"{meant(word, [p for p in every if p != word])}; give the path of a norm or of a "
                "module that holds norms, as named_modules() says it"
            )
        found |= inside
    return found
