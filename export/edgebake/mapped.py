"""Float weights of large networks in a file that is mapped into memory, so that only what is being used is resident.

A language model of a billion weights takes 5 GB in float32, of which tracing and lowering need one layer at a time. The
values are those that a network in memory would have.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    import torch

LEAST = 2 << 30  # bytes of float32 weights: networks below stay in memory, which is faster
_WEIGHT = 1 << 20  # bytes of a weight that is worth a mapping of its own


# By the address of the bytes: gone with the last tensor that stands on them, as is the nameless file.
_MAPS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    """A float32 tensor of zeros in a file of its own."""
    import torch

    size = 4 * torch.Size(shape).numel()
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        mapping = mmap.mmap(file.fileno(), size)
    made = torch.frombuffer(mapping, dtype=torch.float32).reshape(shape)
    _MAPS[made.data_ptr()] = mapping
    return made


def release(tensor: torch.Tensor) -> None:
    """Let go of the memory of a mapped ``tensor``; its values are read from the file when they are needed again."""
    import torch

    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    mapping = _MAPS.get(tensor.data_ptr()) if plain else None
    if mapping is not None:
        mapping.madvise(mmap.MADV_DONTNEED)


def clear(tensor: torch.Tensor) -> None:
    """Zeros into ``tensor``; a large one on Linux keeps no memory for them, as one fresh from ``torch.zeros`` does.

    Writing zeros into the cache of 8,192 tokens of Llama 3.2 1B's shape, of which a text had used 64, takes 512 MiB.
    """
    import torch

    size = tensor.numel() * tensor.element_size()
    plain = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
    shared = plain and (tensor.data_ptr() in _MAPS or tensor.is_shared())  # type: ignore[no-untyped-call]
    if not plain or shared or tensor.requires_grad or sys.platform != "linux" or size < _WEIGHT:
        tensor.zero_()
        return
    flat = tensor.view(-1).view(torch.uint8)
    before = -tensor.data_ptr() % mmap.PAGESIZE
    pages = (size - before) // mmap.PAGESIZE * mmap.PAGESIZE
    flat[:before].zero_()
    flat[before + pages :].zero_()
    refused = ctypes.CDLL(None).madvise(
        ctypes.c_void_p(tensor.data_ptr() + before), ctypes.c_size_t(pages), mmap.MADV_DONTNEED
    )
    if refused:
        tensor.zero_()


def give_back() -> None:
    """Return freed memory to the system: glibc keeps most of what a network's quantisation took for itself.

    Of 3.1 GiB after the weights of Llama 3.2 1B's shape became integers, 0.9 were free. Other C libraries keep little.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def release_after_use(network: torch.nn.Module) -> None:
    """Have every module of ``network`` let go of its own weights when it has been called, where they are mapped."""
    for module in network.modules():
        if any(weight.data_ptr() in _MAPS for weight in module.parameters(recurse=False)):
            module.register_forward_hook(_release_own)


def _release_own(module: torch.nn.Module, *_: Any) -> None:
    for weight in module.parameters(recurse=False):
        release(weight)


@contextmanager
def weights_in_files(*, large: bool) -> Iterator[None]:
    """A ``large`` network made inside has its weights in files, and lets go of each when it has got its values."""
    import torch
    from torch.overrides import TorchFunctionMode

    if not large:
        yield
        return

    class InFiles(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if func is torch.empty and (shape := _mapped_shape(args, given)) is not None:
                return _empty(shape)
            result = func(*args, **given)
            if getattr(func, "__name__", "").endswith("_"):  # one of torch.nn.init, or a method that writes
                for tensor in (*args[:1], given.get("tensor")):
                    if isinstance(tensor, torch.Tensor):
                        release(tensor)
            return result

    with InFiles():
        yield


def _mapped_shape(args: tuple[Any, ...], given: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of a weight that is worth it, as ``torch.empty(shape, device=None, dtype=None)`` is called for one."""
    import torch

    plain = len(args) == 1 and isinstance(args[0], (tuple, list, torch.Size)) and set(given) <= {"device", "dtype"}
    here = plain and str(given.get("device") or torch.get_default_device()) == "cpu"
    if not here or (given.get("dtype") or torch.get_default_dtype()) is not torch.float32:
        return None
    shape = tuple(args[0])
    return shape if 4 * torch.Size(shape).numel() >= _WEIGHT else None


def is_large(auto: Any, config: Any, more: Mapping[str, Any]) -> bool:
    """Would the network of ``config`` have weights of more than ``LEAST`` bytes in float32? None are made."""
    import torch

    with torch.device("meta"):
        made = auto.from_config(config, **more)
    return bool(4 * sum(weight.numel() for weight in made.parameters()) >= LEAST)


class _InPlace(bytes):
    """Stands for the bytes of a tensor, which are written from where they lie."""

    tensor: torch.Tensor


def save(program: torch.export.ExportedProgram, path: Path) -> None:
    """``torch.export.save``, byte for byte, without its two copies of each weight; mapped ones are let go of."""
    import torch
    from torch.export.pt2_archive import _package

    package: Any = _package
    bytes_of, write = package._get_raw_tensor_bytes, package.PT2ArchiveWriter.write_bytes

    def stand_in(value: torch.Tensor) -> bytes:
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu"
        if not plain or not value.data_ptr():
            found: bytes = bytes_of(value)
            return found
        made = _InPlace()
        made.tensor = value
        return made

    def write_bytes(writer: Any, name: str, data: bytes) -> None:
        if not isinstance(data, _InPlace):
            write(writer, name, data)
            return
        storage = data.tensor.untyped_storage()
        writer.archive_file.write_record(name, storage, storage.nbytes())
        release(data.tensor)

    package._get_raw_tensor_bytes, package.PT2ArchiveWriter.write_bytes = stand_in, write_bytes
    try:
        torch.export.save(program, path)
    finally:
        package._get_raw_tensor_bytes, package.PT2ArchiveWriter.write_bytes = bytes_of, write
