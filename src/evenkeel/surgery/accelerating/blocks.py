"""A network as blocks: what each module's own forward calls, and who else might call it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from .own_forward import has_forward, own_forward

__all__ = ["Blocks", "has_hooks"]


class Blocks:
    """Every module with children, its graph where it has one, and every call that is known.

    ``unread`` says why a module has no graph; ``unsure`` maps every module that may be called by
    such ones to their paths.

    Args:
        model: a scratch copy, see `own_forward`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.graphs: dict[str, fx.Graph] = {}
        self.unread: dict[str, str] = {}
        self.unsure: dict[nn.Module, list[str]] = {}
        self._calls: dict[nn.Module, list[tuple[str, fx.Node]]] = {}
        for module, path in self.paths.items():
            if not module._modules or not has_forward(module):
                continue
            graph = own_forward(module)
            if isinstance(graph, str):
                self.unread[path] = graph
                for inner in _within_reach(module):
                    self.unsure.setdefault(inner, []).append(path)
                continue
            self.graphs[path] = graph
            for node in graph.nodes:
                called = self.called(path, node)
                if called is not None:
                    self._calls.setdefault(called, []).append((path, node))

    def called(self, block: str, node: fx.Node) -> nn.Module | None:
        """The module that a node of the block's graph calls, or None."""
        if node.op != "call_module":
            return None
        return self.model.get_submodule(block).get_submodule(str(node.target))

    def calls_of(self, module: nn.Module) -> list[tuple[str, fx.Node]]:
        """Every call of the module that a graph shows: the block and the node."""
        return self._calls.get(module, [])

    def result_of(self, module: nn.Module) -> nn.Module | None:
        """The module in it whose result is the module's own, used for nothing else; or None."""
        block = self.paths[module]
        if block not in self.graphs:
            return None
        (given,) = (node for node in self.graphs[block].nodes if node.op == "output")
        value = given.args[0]
        if not isinstance(value, fx.Node) or len(value.users) > 1:
            return None
        return self.called(block, value)

    def reaches_norms(self, module: nn.Module) -> bool:
        """True if the module's own forward is likely to call a batch norm of torch's or ours."""
        return any(
            isinstance(inner, nn.modules.batchnorm._BatchNorm)
            or "BatchNorm" in getattr(inner, "original_name", "")  # TorchScript's word for a class
            for inner in _within_reach(module)
        )


def has_hooks(module: nn.Module) -> bool:
    """True if anything watches or changes what goes into or out of the module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _within_reach(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that a forward is likely to call: children, and those in lists of them."""
    for child in module.children():
        yield child
        if not has_forward(child):
            yield from _within_reach(child)
