"""How often a program waits for a device: what reads a tensor's values into the host."""

from torch.overrides import TorchFunctionMode

_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__")


class HostReads(TorchFunctionMode):
    """Counts, on the CPU as well, what would wait for an accelerator inside the context.

    Attributes:
        names: of the methods, in the order of the calls.
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in _READS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))
