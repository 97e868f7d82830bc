"""Where decoder layers and hidden states lie while they are not at work.

A layer comes to the device where it works once, for all micro-batches, and goes home once. That
holds for a model that accelerate has dispatched (`device_map`) too, whose hooks would fetch
offloaded weights anew for every forward pass.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grail_hf.config import AUTO
from grail_hf.meter import Meter

# Smaller tensors are not worth a file.
_LEAST_MAPPED = 2**20
_PART = 2**22  # numbers that are written to a file at a time

# Of the memory that is free, what "auto" lets hidden states have, and what a layer that is read
# ahead may take of the accelerator's: Grams and solves come after it.
ACCELERATOR_SHARE = 1 / 4
HOST_SHARE = 1 / 2
AHEAD_SHARE = 1 / 8
# What the weights of a model that is evaluated may take: activations and logits come to them.
WEIGHTS_SHARE = 3 / 4


@dataclass
class HiddenStates:
    """The hidden states of one micro-batch in front of a decoder layer.

    Attributes:
        number: the micro-batch's, of all that there are.
        hidden: [b, T, D] on the compressed path.
        dense: [b, T, D] in the dense model, where the target needs it and they differ.
    """

    number: int
    hidden: Tensor
    dense: Tensor | None


@dataclass(frozen=True)
class Place:
    """Where hidden states are kept: on a device, or in files that are mapped into memory.

    Attributes:
        device: to keep them on, if there is no folder.
        folder: of the files. They have no name there (on Linux; elsewhere for no longer than it
            takes to open one), and are gone with the tensors, or with the process, however it ends.
    """

    device: torch.device
    folder: Path | None = None

    def keep(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, moved here, in a dtype or its own. Raises OSError where the disk is full."""
        dtype = dtype or tensor.dtype
        if self.folder is None or tensor.nbytes < _LEAST_MAPPED:
            return tensor.to(self.device, dtype)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Written, not copied into the map: a full disk would kill the process there.
                for part in torch.split(tensor.detach().flatten(), _PART):
                    file.write(part.to(dtype).cpu().view(torch.uint8).numpy().data)
                file.flush()
                name = f"/dev/fd/{file.fileno()}"
                mapped = torch.from_file(name, size=tensor.numel(), dtype=dtype)
        except OSError as error:
            raise OSError(
                error.errno,
                f"hidden states and moments cannot be kept in {self.folder} ({error.strerror}): "
                "make room, lower num_samples, or choose another disk, from disk to disk by the "
                "output, else by the environment variable TMPDIR",
            ) from error
        return mapped.view(tensor.shape)

    def keep_all(self, data: Any) -> Any:
        """Nested tuples, lists and dicts with their tensors kept."""
        from accelerate.utils.operations import recursively_apply

        kept: Any = recursively_apply(self.keep, data)
        return kept


def choose_place(
    wanted: str, size: int, accelerator: torch.device, folder: Path | None = None
) -> Place:
    """Where to keep hidden states.

    Args:
        wanted: `GrailConfig.hidden_states`.
        size: bytes of all of them together.
        accelerator: where layers run.
        folder: for "disk"; by default the one for temporary files.
    """
    host = torch.device("cpu")
    if wanted == AUTO:
        if accelerator.type != "cpu" and size <= ACCELERATOR_SHARE * _free_bytes(accelerator):
            wanted = "accelerator"
        else:
            wanted = "host" if size <= HOST_SHARE * _free_bytes(host) else "disk"
    if wanted == "disk":
        return Place(host, folder or Path(tempfile.gettempdir()))
    return Place(accelerator if wanted == "accelerator" else host)


def _free_bytes(device: torch.device) -> int:
    """Memory that is not in use; what torch holds in reserve is free for its tensors."""
    backend: Any = torch.get_device_module(device)
    if hasattr(backend, "mem_get_info"):
        reserve = backend.memory_reserved(device) - backend.memory_allocated(device)
        return int(backend.mem_get_info(device)[0] + reserve)
    import psutil

    return int(psutil.virtual_memory().available)  # MPS has the host's


def with_index(device: torch.device) -> torch.device:
    """The device with its index, where it names the current accelerator by its type alone."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device.index is not None or accelerator is None or accelerator.type != device.type:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


class Courier:
    """Brings tensors to a CUDA device while it computes: in a thread, and a stream of its own.

    They go through pinned memory, from which the device reads at full speed. Nothing is brought to
    other devices, or to one that has little room.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._under_way: dict[int, Future[list[Tensor]]] = {}

    def send(
        self, label: int, reads: Sequence[Callable[[], Tensor]], size: int, device: torch.device
    ) -> None:
        """Begin to read tensors, of `size` bytes together, and to bring them to the device."""
        device = with_index(device)  # another thread has another current device
        if device.type == "cuda" and reads and size <= AHEAD_SHARE * _free_bytes(device):
            self._thread = self._thread or ThreadPoolExecutor(1, "read-ahead")
            self._under_way[label] = self._thread.submit(_bring, reads, device)

    def receive(self, label: int) -> list[Tensor]:
        """What was sent under the label, in its order; nothing where nothing was.

        Raises what reading raised.
        """
        if label not in self._under_way:
            return []
        tensors = self._under_way.pop(label).result()
        for tensor in tensors:
            # They were allocated for the courier's stream, which might else reuse them too early.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensors


def _bring(reads: Sequence[Callable[[], Tensor]], device: torch.device) -> list[Tensor]:
    """The tensors that `reads` give, whole on a CUDA device."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.cuda.stream(stream):
        tensors = []
        for read in reads:
            tensor = read()
            tensor = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
            tensors.append(tensor.to(device, non_blocking=True))
    stream.synchronize()
    return tensors


class Homes:
    """Decoder layers that lie in the model itself: each goes to a device to work, and comes home.

    Attributes:
        layers: the model's.
        device: where they work.
        first: layers in front of it were done earlier.
        meter: of what the work on them takes.
    """

    first = 0

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.layers = layers
        self.device = device
        self.courier = Courier()
        self.meter = Meter(device)
        self._read_ahead: list[Tensor] = []

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """All of the model but its decoder layers has its weights inside the context."""
        yield

    def start(self, batches: Sequence[HiddenStates]) -> None:
        """Give the batches, which have hidden states in front of layer 0, those of `first`."""

    @contextmanager
    def at_work(self, index: int) -> Iterator[torch.device]:
        """The layer has its weights, on the device that this gives; it goes home as it then is.

        The next layer's weights are read meanwhile, where a CUDA device waits for them.
        """
        layer = self.layers[index]
        home = next(layer.parameters()).device
        self._receive_(index)
        layer.to(self.device)
        if index + 1 < len(self.layers):
            # Kept, not looked up again when they arrive: what layers share is on the device now.
            self._read_ahead = self._at_home(index + 1)
            size = sum(tensor.nbytes for tensor in self._read_ahead)
            reads = [tensor.detach for tensor in self._read_ahead]
            self.courier.send(index + 1, reads, size, self.device)
        try:
            yield self.device
        finally:
            layer.to(home)

    def _receive_(self, index: int) -> None:
        """Give the layer's tensors the values that were read ahead, if any were."""
        tensors, self._read_ahead = self._read_ahead, []
        if brought := self.courier.receive(index):
            for tensor, values in zip(tensors, brought, strict=True):
                tensor.data = values

    def _at_home(self, index: int) -> list[Tensor]:
        """The layer's tensors that lie in host memory."""
        layer = self.layers[index]
        return [t for t in (*layer.parameters(), *layer.buffers()) if t.device.type == "cpu"]

    def done(self, index: int, batches: Sequence[HiddenStates]) -> None:
        """Layer `index` went home; unless it is the last, the batches hold what it put out."""


class DispatchedHomes(Homes):
    """Decoder layers that accelerate has dispatched: on devices, in host memory, on disk.

    A layer that lies on an accelerator works there. Any other works where its hooks would have it,
    or on `device` if that was asked for. What its hooks have offloaded is read once, and what has
    changed is written once: into the same host memory, or to a file beside the offloaded weights
    (in a folder for temporary files, where they lie in the checkpoint itself). That file is gone
    with the model. The hooks stay, and serve the model afterwards as before.

    Attributes:
        model: with accelerate's hooks.
        asked: `device` is no default.
    """

    def __init__(
        self, model: nn.Module, layers: nn.ModuleList, device: torch.device, asked: bool
    ) -> None:
        super().__init__(layers, device)
        self.model = model
        self.asked = asked
        self._folders: dict[int, Path] = {}

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        inside = {module for layer in self.layers for module in layer.modules()}
        offloaded = _offloaded(self.model, set(self.model.modules()) - inside)
        shells = [one.tensor for one in offloaded]
        try:
            for one in offloaded:
                one.put_(one.read().to(one.hook.execution_device))
            with _quiet([one.hook for one in offloaded]):
                yield
        finally:
            for one, shell in zip(offloaded, shells, strict=True):
                setattr(one.owner, one.name, shell)

    @contextmanager
    def at_work(self, index: int) -> Iterator[torch.device]:
        layer, device = self.layers[index], self._works_on(index)
        offloaded = _offloaded(self.model, set(layer.modules()))
        homes = {
            module: tensors[0].device for module in layer.modules() if (tensors := _held(module))
        }
        tensors = self.courier.receive(index) or [one.read().to(device) for one in offloaded]
        arrived = {}
        try:
            while offloaded:
                one = offloaded.pop()
                one.put_(tensors.pop())
                # A layer that becomes narrower need not be kept in its old width.
                arrived[one.owner, one.name] = weakref.ref(one.tensor), one.tensor._version
            layer.to(device)
            if index + 1 < len(self.layers):
                following = _offloaded(self.model, set(self.layers[index + 1].modules()))
                size = sum(one.tensor.nbytes for one in following)
                reads = [one.read for one in following]
                self.courier.send(index + 1, reads, size, self._works_on(index + 1))
            with _quiet(_hooks(layer), device):
                yield device
        finally:
            offloaded = _offloaded(self.model, set(layer.modules()))
            here = [one for one in offloaded if not one.tensor.is_meta]
            known = [arrived.get((one.owner, one.name)) for one in here]
            self._write(
                [one for one, old in zip(here, known, strict=True) if not one.is_still(old)]
            )
            for one in offloaded:
                one.put_(one.tensor.detach().to("meta"))
            for module, home in homes.items():
                for tensor in _held(module):
                    tensor.data = tensor.data.to(home)

    def _works_on(self, index: int) -> torch.device:
        hooks = _hooks(self.layers[index])
        own = _computes_on(self.layers[index])
        if not hooks:
            return self.device if own.type == "cpu" else own
        resident = own.type != "cpu" and not any(hook.offload for hook in hooks)
        return self.device if self.asked and not resident else own

    def _write(self, changed: Sequence[_Offloaded]) -> None:
        """Put tensors back into their hooks' maps of weights. Raises OSError where a disk is full.

        Those that are in no map yet, new biases, go to host memory: they are small.
        """
        from accelerate.utils import OffloadedWeightsLoader

        loaders: dict[int, Any] = {}
        for_disk: dict[int, dict[str, Tensor]] = {}
        for one in changed:
            weights, key = one.place
            tensor = one.tensor.detach().cpu()
            if not isinstance(weights, OffloadedWeightsLoader):
                weights[key] = tensor
            elif key in weights.index and key not in weights.state_dict:
                loaders[id(weights)] = weights
                for_disk.setdefault(id(weights), {})[key] = tensor.contiguous()
            else:
                weights.state_dict[key] = tensor
                if key not in weights.all_keys:
                    weights.all_keys.append(key)
            devices = one.hook.original_devices
            devices.setdefault(one.key, next(iter(devices.values())))
        for name, tensors in for_disk.items():
            file = _save(tensors, self._folder(loaders[name]))
            for key, tensor in tensors.items():
                loaders[name].index[key] = {
                    "safetensors_file": str(file),
                    "weight_name": key,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                }

    def _folder(self, loader: Any) -> Path:
        """For what has changed of the weights that `loader` reads from disk."""
        if id(loader) not in self._folders:
            folder = Path(tempfile.mkdtemp(prefix="grail-offload-", dir=loader.save_folder))
            weakref.finalize(loader, shutil.rmtree, folder, ignore_errors=True)
            self._folders[id(loader)] = folder
        return self._folders[id(loader)]


def homes_of(
    model: nn.Module, layers: nn.ModuleList, device: torch.device, asked: bool = False
) -> Homes:
    """The homes of a model's decoder layers, wherever they lie.

    Args:
        model: in memory, or dispatched by accelerate.
        layers: its decoder layers.
        device: where they work; where accelerate has given layers a device, only if `asked`, and
            not those that lie on another accelerator.
        asked: `device` was asked for, and is no default.
    """
    if is_dispatched(model):
        return DispatchedHomes(model, layers, device, asked)
    return Homes(layers, device)


@contextmanager
def whole_at_work(model: nn.Module, layers: nn.ModuleList, device: torch.device) -> Iterator[None]:
    """The whole model computes on `device` inside the context, and then is where it was.

    Where its weights fill too much of the device's free memory, the last of its decoder layers
    stay, and each is there for its own part of a forward pass alone.

    Args:
        model: in memory, all of it on one device.
        layers: its decoder layers.
        device: where to compute.
    """
    home = next(model.parameters()).device
    sizes = [_bytes_of(layer) for layer in layers]
    excess = 0.0 if home == device else _bytes_of(model) - WEIGHTS_SHARE * _free_bytes(device)
    guests = len(sizes)
    while guests and excess > 0:
        if guests == len(sizes):
            excess += max(sizes)  # one of those that stay is there too
        guests -= 1
        excess -= sizes[guests]
    staying = list(layers)[guests:]
    hooks = []
    try:
        for layer in staying:
            hooks += [
                layer.register_forward_pre_hook(lambda layer, _: _move_(layer, device)),
                layer.register_forward_hook(
                    lambda layer, *_: _move_(layer, home), always_call=True
                ),
            ]
        try:
            for index in range(guests, len(sizes)):
                layers[index] = nn.Identity()
            model.to(device)
        finally:
            for index, layer in enumerate(staying, guests):
                layers[index] = layer
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.to(home)


def _move_(module: nn.Module, device: torch.device) -> None:
    # Returns nothing: what a hook returns takes the place of inputs or outputs.
    module.to(device)


def _bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate's hooks give the model's modules their devices."""
    return bool(_hooks(model))


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: where its embeddings lie or, if offloaded, compute."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return _computes_on(embeddings)


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its name, tied ones once; what is offloaded is read, one at a time."""
    offloaded = {id(one.tensor): one for one in _offloaded(model, set(model.modules()))}
    for name, parameter in model.named_parameters():
        one = offloaded.get(id(parameter))
        yield name, parameter if one is None else one.read()


@dataclass(frozen=True)
class _Offloaded:
    """A tensor that lies in the map of weights of one of accelerate's hooks.

    Attributes:
        owner: the module that has it, on the meta device.
        name: in the owner.
        hook: puts it there for each forward pass.
        key: in the hook's map.
    """

    owner: nn.Module
    name: str
    hook: Any
    key: str

    @property
    def tensor(self) -> Tensor:
        """What the owner has: without values, unless it is at work."""
        tensor: Tensor = getattr(self.owner, self.name)
        return tensor

    @property
    def place(self) -> tuple[Any, str]:
        """The map that holds it, behind those that only add a prefix, and its key there."""
        from accelerate.utils import PrefixedDataset

        weights, key = self.hook.weights_map, self.key
        while isinstance(weights, PrefixedDataset):
            weights, key = weights.dataset, weights.prefix + key
        return weights, key

    def read(self) -> Tensor:
        """Its values, in the owner's dtype."""
        tensor: Tensor = self.hook.weights_map[self.key]
        return tensor.detach().to(self.tensor.dtype)

    def put_(self, tensor: Tensor) -> None:
        """Give the owner another tensor in its place."""
        if isinstance(self.tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad)
        setattr(self.owner, self.name, tensor)

    def is_still(self, known: tuple[weakref.ref[Tensor], int] | None) -> bool:
        """Whether the owner's tensor is one of old, in the version of old."""
        if known is None:
            return False
        reference, version = known
        return reference() is self.tensor and self.tensor._version == version


def _hooks(root: nn.Module) -> list[Any]:
    """accelerate's hooks under `root` that give modules a device."""
    return [hook for module in root.modules() for hook in _own_hooks(module)]


def _own_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def _offloaded(model: nn.Module, owners: Collection[nn.Module]) -> list[_Offloaded]:
    """What hooks anywhere in the model have offloaded of the tensors that `owners` own."""
    found = []
    for module in model.modules():
        for hook in _own_hooks(module):
            if not hook.offload:
                continue
            from accelerate.utils import named_module_tensors

            for key, _ in named_module_tensors(
                module,
                include_buffers=hook.offload_buffers,
                recurse=hook.place_submodules,
                remove_non_persistent=True,
            ):
                path, _, name = key.rpartition(".")
                owner = module.get_submodule(path)
                if owner in owners:
                    found.append(_Offloaded(owner, name, hook, key))
    return found


@contextmanager
def _quiet(hooks: Iterable[Any], device: torch.device | None = None) -> Iterator[None]:
    """Inside the context the hooks leave weights alone, and move inputs to `device`, if given."""
    before = [(hook, hook.offload, hook.execution_device) for hook in dict.fromkeys(hooks)]
    try:
        for hook, _, own in before:
            hook.offload = False
            hook.execution_device = own if device is None else device
        yield
    finally:
        for hook, offload, own in before:
            hook.offload, hook.execution_device = offload, own


def _computes_on(module: nn.Module) -> torch.device:
    """Where accelerate's hooks have the module compute, or where it lies."""
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def _held(module: nn.Module) -> list[Tensor]:
    """The tensors of the module itself, but for those without values."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None and not tensor.is_meta]


def _save(tensors: dict[str, Tensor], folder: Path) -> Path:
    """A new file of tensors. Raises OSError, without a file, where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with tempfile.NamedTemporaryFile(dir=folder, suffix=".safetensors", delete=False) as new:
        file = Path(new.name)
    try:
        save_file(tensors, file)
    except (OSError, SafetensorError) as error:
        file.unlink()
        raise OSError(f"the layer's new weights cannot be written in {folder}: {error}") from error
    return file
