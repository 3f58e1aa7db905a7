"""Doing what can be done safely: nothing that the network computes in inference may change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from ..errors import SurgeryError, first_line
from ..surgery.batch_norms import unwrapped
from ..surgery.comparing import Difference, apart, magnitude
from ..surgery.examples import call, cloned, tensors_in
from ..surgery.graph import copied
from .findings import Findings
from .observe import observe, undisturbed
from .rules.statistics import is_subnormal
from .rules.structure import redundant_biases
from .verb import check

__all__ = ["BUDGET", "Fixed", "fix"]

M = TypeVar("M", bound=nn.Module)

BUDGET: Final = 1e-5
"""The largest difference of an output that a fix may make, relative to the largest output."""


@dataclass(frozen=True)
class Fixed:
    """What was done, and the proof.

    Attributes:
        biases: each layer that lost its bias, and the norm whose running mean took it.
        flushed: each norm with subnormal variances that are zero now, and how many.
        difference: the largest of an output in inference, relative to the largest output.
        budget: what was allowed.
    """

    biases: tuple[tuple[str, str], ...]
    flushed: tuple[tuple[str, int], ...]
    difference: float
    budget: float = BUDGET

    def __str__(self) -> str:
        lines = [f"{len(self.biases)} biases dropped, {len(self.flushed)} norms cleaned"]
        lines += [
            f"  {layer}: bias moved into {norm}; build it bias=False" for layer, norm in self.biases
        ]
        lines += [
            f"  {norm}: {count} subnormal variances set to zero" for norm, count in self.flushed
        ]
        lines.append(
            f"  largest relative output difference {self.difference:.1e} (budget {self.budget:.0e})"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def fix(
    model: M, example: Any, ignore: Iterable[str] = (), *, origin: Any = None
) -> tuple[M, Fixed]:
    """A copy of the network with the findings fixed whose fix changes no output in inference.

    ::

        bias before a norm:      running_mean -= bias, and the bias is gone
        subnormal variance:      running_var = 0

    After each single fix the copy runs the example in eval mode; a difference above the budget
    undoes everything. In training the norm subtracts the batch's mean, which had the bias in it.
    Tell the optimizer of the new network: it still has the old one's biases.

    Args:
        model: the network; it stays as it is.
        example: as in `check`.
        ignore: codes whose findings are left; what the source silences is left too.
        origin: as in `check`.

    Returns:
        the copy, of the same class, and a report.

    Raises:
        SurgeryError: the network cannot be copied or run, or an output changed.
    """
    findings = check(model, example, ignore=ignore, origin=origin)
    own = copied(model)
    inner = unwrapped(own)
    with undisturbed(inner):
        before = _outputs(own, example)
        worst = Difference(0.0, 1.0, "nothing")
        biases, flushed = [], []
        for layer, norm in _biases(model, example, findings):
            _absorb(inner, layer, norm)
            biases.append((layer, norm))
            worst = _proved(worst, before, own, example, f"the bias of {layer}")
        for finding in findings.of("EK304"):
            if finding.fixable:
                flushed.append((finding.path, _flush(inner.get_submodule(finding.path))))
                worst = _proved(worst, before, own, example, f"the variances of {finding.path}")
    return own, Fixed(tuple(biases), tuple(flushed), worst.relative)


def _biases(model: nn.Module, example: Any, findings: Findings) -> list[tuple[str, str]]:
    wanted = {f.path for f in findings.of("EK101") if f.fixable}
    if not wanted:
        return []
    found = redundant_biases(observe(model, example))
    return [(each.layer, each.norm) for each in found if each.safe and each.layer in wanted]


def _absorb(model: nn.Module, layer: str, norm: str) -> None:
    """Moves a layer's bias into the norm's running mean."""
    held: Any = model.get_submodule(layer)
    kept: Tensor = getattr(model.get_submodule(norm), "running_mean")  # noqa: B009
    with torch.no_grad():
        # Over the channels, whatever other axes own a mean.
        shape = [-1, *[1] * (kept.dim() - 1)]
        kept.copy_(kept.double() - held.bias.double().reshape(shape))
    held.register_parameter("bias", None)


def _flush(norm: nn.Module) -> int:
    """Sets subnormal variances to zero; returns how many there were."""
    var: Any = norm.running_var
    small = is_subnormal(var, var.dtype)
    with torch.no_grad():
        var.masked_fill_(small, 0)
    return int(small.sum())


def _proved(
    worst: Difference, before: list[Tensor], own: nn.Module, example: Any, what: str
) -> Difference:
    """The worse of two differences, if the copy still gives what the network gave."""
    after = _outputs(own, example)
    if len(before) != len(after) or any(
        a.shape != b.shape for a, b in zip(before, after, strict=True)
    ):
        raise SurgeryError(f"without {what} the network gives other outputs; nothing was fixed")
    for place, (a, b) in enumerate(zip(before, after, strict=True)):
        found = Difference(apart(a, b), magnitude(a), f"output {place}")
        if found.relative > BUDGET:
            raise SurgeryError(
                f"without {what} the network would change by {found}, where {BUDGET:.0e} of that "
                "is allowed; nothing was fixed; the usual cause is half precision"
            )
        worst = max(worst, found, key=lambda d: d.relative)
    return worst


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    """All floating outputs in inference, in float64."""
    own = copied(model).eval()
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            output = call(own, cloned(example))
    except Exception as error:
        raise SurgeryError(
            f"{type(model).__name__} cannot run the example in inference: "
            f"{first_line(error)}; nothing was fixed"
        ) from error
    return [t.detach().double().cpu() for t in tensors_in(output) if t.is_floating_point()]
