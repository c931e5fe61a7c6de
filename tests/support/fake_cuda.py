"""A CUDA device for tests on a machine without one.

Inside `FakeCuda()`, tensors on "cuda:0" are `CudaTensor`s: their entries lie on the CPU (computes=True), so that loops
over values run as on a device, or nowhere (computes=False), so that shapes of any size cost nothing. What a real device
refuses is refused: operations and kernels on tensors of both devices, and operators whose results share storage with
each other or with an input. Every operator of genssd runs the function that is registered for CUDA, and its results are
compared with those of its registered fake. Triton's kernels run in the interpreter where TRITON_INTERPRET=1, else
(computes=False) their arguments are checked and they write nothing.

Devices must be given with their index ("cuda:0"): torch without CUDA cannot complete "cuda".
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import pkgutil
import sys
import typing
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # torch imports it when a mode is first entered, and must not see what is replaced here
from support.fake_streams import Event, Streams
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import genssd.kernels
from genssd import _core

DEVICE = torch.device("cuda", 0)

MULTIPROCESSORS = 4
"""Number of multiprocessors of the device: more than one, and few enough for the interpreter."""

MOVES = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")
"""Operations that take tensors of both devices."""

INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
"""Operations on a CUDA tensor whose indices may lie on the CPU."""


READS = ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero")
"""Operations that read a tensor's value; without values, they read 0."""


class DeviceMismatch(RuntimeError):
    """Error raised where a device would refuse tensors that lie on the CPU."""


class SharedStorage(RuntimeError):
    """Error raised where two results of an operator, or a result and an input, share storage."""


class CudaTensor(Tensor):
    """Tensor that states to lie on `DEVICE`. To torch's own code it lies on the CPU, so that autograd runs."""

    content: Tensor
    """The tensor on the CPU, or on torch's meta device, that holds the entries."""
    reads: typing.ClassVar[int] = 0
    """Number of times that the host has waited for entries of any tensor since the device was entered."""

    @staticmethod
    def __new__(cls, content: Tensor, requires_grad: bool = False) -> CudaTensor:
        wrapper: CudaTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            content.shape,
            strides=content.stride(),
            storage_offset=content.storage_offset(),
            dtype=content.dtype,
            device=torch.device("cpu"),
            requires_grad=requires_grad,
        )
        wrapper.content = content
        return wrapper

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # written in C++, these two take the device that torch sees, the CPU
        if func is torch.Tensor.to and isinstance(args[1], CudaTensor):
            return args[0].to(DEVICE, args[1].dtype, **kwargs)
        if func is torch.nn.functional.one_hot:
            return (args[0][..., None] == torch.arange(args[1], device=args[0].device)).long()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: CudaTensor) -> None:
        assert (self.shape, self.dtype) == (value.shape, value.dtype), "the wrapper's shape is fixed"
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.content = value.content

    def to(self, *args: Any, **options: Any) -> Tensor:
        target = options.pop("other", args[0] if args else None)
        if isinstance(target, Tensor):
            return self.to(target.device, target.dtype, **options)
        places = [a for a in args if isinstance(a, str | int | torch.device) and not isinstance(a, bool)]
        dtypes = [a for a in args if isinstance(a, torch.dtype)]
        place = options.pop("device", places[0] if places else None)
        dtype = options.pop("dtype", dtypes[0] if dtypes else None) or self.dtype
        options.pop("non_blocking", None)
        moved = self if place is None or torch.device(place).type == "cuda" else _ToCpu.apply(self)
        return torch.Tensor.to(moved, dtype, **options)

    def cpu(self, *_: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, *_: Any, **__: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        return self.detach().to("cpu").tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor on cuda:0 to numpy; copy it to the CPU first")

    __array__ = numpy

    def is_pinned(self, *_: Any) -> bool:
        return False

    def get_device(self) -> int:
        return 0

    def record_stream(self, stream: Any) -> None:
        stream._streams.record(storage_of(self), stream)

    def data_ptr(self) -> int:
        return self.content.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.content})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} is called on the fake device outside of FakeCuda()")


class _ToCpu(torch.autograd.Function):
    """Differentiable copy from the device to the CPU; a tensor without values gives zeros."""

    @staticmethod
    def forward(ctx: Any, x: CudaTensor) -> Tensor:
        CudaTensor.reads += 1
        torch.cuda.current_stream()._streams.read(storage_of(x))  # type: ignore[attr-defined]
        if x.content.is_meta:
            return torch.zeros(x.shape, dtype=x.dtype)
        return x.content.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # type: ignore[override]
        return CudaTensor(upstream)


class Graph:
    """Stand-in for a captured CUDA graph: the operations and kernels of the capture, which are run again."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps: list[Callable[[], None]] = []
        self.storages: set[int] = set()
        """Storages that the steps use."""
        self.device: FakeCuda | None = None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        assert self.device is not None, "a graph is replayed that was not captured"
        self.device.streams.use(sorted(self.storages), "a captured graph")
        for step in self.steps:
            step()


@dataclasses.dataclass
class _Memory:
    """Storages on the device that are in use, and the largest sum of their sizes."""

    streams: Streams
    storages: dict[int, tuple[weakref.ref[Any], int]] = dataclasses.field(default_factory=dict)
    """The sizes by number."""
    peak: int = 0
    _total: int = 0
    _freed: list[int] = dataclasses.field(default_factory=list)
    """Numbers of storages that are no longer in use, and still counted."""

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.count()  # a freed storage may have had the same number
        number, size = storage._cdata, storage.nbytes()
        if number not in self.storages:  # that of a view is counted
            self.storages[number] = weakref.ref(storage, lambda _: self._freed.append(number)), size
            self._total += size
            self.peak = max(self.peak, self._total)

    def count(self) -> int:
        while self._freed:
            number = self._freed.pop()
            self._total -= self.storages.pop(number)[1]
            self.streams.free(number)
        return self._total


class FakeCuda(TorchDispatchMode):
    """Context in which torch has a CUDA device. computes: whether its tensors have values (see the file's head)."""

    def __init__(self, *, computes: bool = True) -> None:
        super().__init__()
        self.computes = computes
        self.operators: set[str] = set()
        """Names of the operators of genssd that ran on the device."""
        self.calls: list[tuple[str, Any, Any]] = []
        """Name and arguments, on the CPU, of each call of an operator of genssd; only where tensors have values."""
        self.kernels: set[str] = set()
        """Names of the Triton kernels that were launched."""
        self.graphs: list[Graph] = []
        """The graphs that were captured."""
        self.streams = Streams()
        self._memory = _Memory(self.streams)
        self._graph: Graph | None = None
        self._patches = contextlib.ExitStack()
        self._depth = 0  # operators enter the mode again

    def __enter__(self) -> FakeCuda:
        if not self._depth:
            CudaTensor.reads = 0
            for target, name, value in (*_cuda_functions(self), *_kernel_functions(self), *_native_functions()):
                self._patches.enter_context(mock.patch.object(target, name, value))
            # torch.tensor(values, device=...) then makes a tensor on the CPU and copies it
            self._patches.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._depth -= 1
        if not self._depth:
            self._patches.close()

    def memory_allocated(self) -> int:
        """Return the bytes of all storages on the device that are in use."""
        return self._memory.count()

    def max_memory_allocated(self) -> int:
        """Return the largest value that `memory_allocated` had since the last reset."""
        return self._memory.peak

    def reset_peak_memory_stats(self) -> None:
        self._memory.peak = self._memory.count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_cuda = any(isinstance(x, CudaTensor) for x in tensors)
        if on_cuda:
            self._check_devices(func, args, tensors)
            if func.namespace == "genssd":
                return self._run_operator(func, args, kwargs)
        if _makes_the_host_wait(func._schema.name, args, kwargs):
            self.streams.current.synchronize()
        place = kwargs.get("device")
        if place is not None:
            on_cuda = place.type == "cuda" or _is_called_by_autograd()
            kwargs["device"] = torch.device("cpu" if self.computes or not on_cuda else "meta")
        kwargs.pop("pin_memory", None)
        kwargs.pop("non_blocking", None)
        if "generator" in kwargs and not self.computes:
            kwargs["generator"] = None
        if func._schema.name in READS and on_cuda:
            CudaTensor.reads += 1
            self.streams.read(storage_of(args[0]))
        if func._schema.name in READS and on_cuda and not self.computes:
            return 0.0 if args[0].is_floating_point() else 0
        if not on_cuda and not any(isinstance(x, CudaTensor) for x in tensors):
            return func(*args, **kwargs)
        # no tensor is an inference tensor: torch could not make it a view of one that is none
        with torch.inference_mode(False), torch.no_grad():
            return self._run(func, args, kwargs, tensors, on_cuda)

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], on_cuda: bool) -> Any:
        """Run an operation on the contents of the tensors, and wrap its results where they lie on the device."""
        plain_args, plain_kwargs = tree_map(_content, (args, kwargs))
        if func._schema.name == "aten::copy_" and not self.computes:
            if not isinstance(args[0], CudaTensor):
                return plain_args[0].zero_()
            plain_args = (plain_args[0], plain_args[1].to("meta"), *plain_args[2:])
        function = _WIDE_PRODUCTS.get(func, func)
        result = function(*plain_args, **plain_kwargs)
        if not on_cuda:
            return result
        if self._graph is not None:
            self._graph.steps.append(lambda: _repeat(function, plain_args, plain_kwargs, result))
        if self.computes and func._schema.name.startswith(("aten::empty", "aten::new_empty")):
            _poison(result)
        wrappers = {id(x.content): x for x in tensors if isinstance(x, CudaTensor)}

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in wrappers:
                return wrappers[id(value)]
            self._memory.add(value)
            return CudaTensor(value)

        wrapped = tree_map(wrap, result)
        self._use((plain_args, plain_kwargs, result), func._schema.name)
        return wrapped

    def _use(self, values: Any, name: str) -> None:
        """Note on the current stream that an operation uses the storages of tensors on the device.

        values: contents of its arguments and results, tensors on the CPU among them.
        """
        used = {x.untyped_storage()._cdata for x in tree_leaves(values) if isinstance(x, Tensor)}
        used &= self._memory.storages.keys()
        if self._graph is not None:
            self._graph.storages |= used
        self.streams.use(sorted(used), name)

    def _check_devices(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        """Raise DeviceMismatch as a device would; a tensor of the CPU without dimensions passes for a number."""
        name = func._schema.name
        if name in MOVES or (name in INDEXED and isinstance(args[0], CudaTensor)):
            return
        strays = [x for x in tensors if not isinstance(x, CudaTensor) and x.ndim]
        if strays:
            shapes = [tuple(x.shape) for x in strays]
            raise DeviceMismatch(f"{name} takes tensors on cuda:0, and on the CPU tensors of the shapes {shapes}")

    def _run_operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run what is registered for CUDA, and hold its results against the registered fake and against aliasing."""
        name = func._schema.name
        definition = OPDEFS[name]
        body = definition._backend_fns.get("cuda") or definition._backend_fns[None]
        self.operators.add(name)
        if self.computes:
            self.calls.append((name, *tree_map(_content, (args, kwargs))))
        with self, torch.no_grad():
            result = body(*args, **kwargs)
            expected = definition._abstract_fn(*args, **kwargs)
        check_results(name, tree_leaves((args, kwargs)), tree_leaves(result), tree_leaves(expected))
        return result

    def launch(self, kernel: Any, run: Callable[..., Any], args: Any, options: dict[str, Any]) -> None:
        """Check the devices of a kernel's arguments, then run it where tensors have values."""
        name = kernel.fn.__name__
        self.kernels.add(name)
        for value in tree_leaves((args, options)):
            base = getattr(value, "base", value)
            if isinstance(base, Tensor) and not isinstance(base, CudaTensor):
                raise DeviceMismatch(
                    f"the kernel {name} takes a pointer to a tensor of shape {tuple(base.shape)} on the CPU"
                )
        plain_args, plain_options = tree_map(_content, (args, options))
        self._use((plain_args, plain_options), name)
        if not self.computes:
            return

        def step() -> None:
            run(kernel, *plain_args, **plain_options)

        step()
        if self._graph is not None:
            self._graph.steps.append(step)

    @contextlib.contextmanager
    def capture(self, graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
        """Stand in for torch.cuda.graph: what runs inside is recorded."""
        self._graph = graph
        graph.device = self
        self.graphs.append(graph)
        try:
            yield
        finally:
            self._graph = None


def check_results(name: str, inputs: list[Any], results: list[Any], expected: list[Any]) -> None:
    """Raise SharedStorage or AssertionError unless an operator's results are new tensors, laid out as its fake states.

    results, expected: those of the operator's function and of its fake.
    """
    owners = {storage_of(x): "an input" for x in inputs if isinstance(x, CudaTensor)}
    assert len(results) == len(expected), f"{name}: {len(results)} results, and {len(expected)} of its fake"
    for i, (result, fake) in enumerate(zip(results, expected, strict=True)):
        for what in ("shape", "dtype", "device"):
            value, promised = getattr(result, what), getattr(fake, what)
            assert value == promised, f"{name}: {what} of result {i} is {value}, and {promised} of its fake"
        assert result.stride() == fake.stride(), f"{name}: strides of result {i} are {result.stride()}"
        storage = storage_of(result)
        if storage in owners:
            raise SharedStorage(f"{name}: result {i} shares the storage of {owners[storage]}")
        owners[storage] = f"result {i}"


def _is_called_by_autograd() -> bool:
    """Return whether autograd's formulas call the operation, and no Python code: they place new tensors on the CPU."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.endswith(
        ("fake_cuda.py", "_compile.py", "eval_frame.py")
    ):
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def storage_of(tensor: Tensor) -> int:
    """Return a number that names the storage of a tensor on the device."""
    assert isinstance(tensor, CudaTensor)
    return tensor.content.untyped_storage()._cdata


def _makes_the_host_wait(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether an operation copies between the devices and waits for the copy, and for all that is queued."""
    if name == "aten::copy_":
        waits = not (kwargs.get("non_blocking") or args[2:3] == (True,))
        return waits and isinstance(args[0], CudaTensor) != isinstance(args[1], CudaTensor)
    place = kwargs.get("device")
    if name != "aten::_to_copy" or place is None or kwargs.get("non_blocking"):
        return False
    return isinstance(args[0], CudaTensor) != (place.type == "cuda")


def _content(value: Any) -> Any:
    if isinstance(value, CudaTensor):
        return value.content
    if isinstance(getattr(value, "base", None), CudaTensor) and dataclasses.is_dataclass(value):
        return dataclasses.replace(value, base=value.base.content)  # type: ignore[type-var]  # a TensorDescriptor
    return value


def _poison(tensor: Tensor) -> None:
    """Fill a tensor that was not initialised with NaN, so that reading it shows."""
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)


def _repeat(function: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Run an operation again and write its results into those of the first time, where they are not the same memory."""
    for first, value in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
        if isinstance(first, Tensor) and first.data_ptr() != value.data_ptr():
            first.copy_(value)


def _multiply(a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    product = a.to(dtype) @ b.to(dtype) if a.device.type != "meta" else a.new_empty(a.shape[0], b.shape[1], dtype=dtype)
    return product if out is None else out.copy_(product)


def _add_product(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    value = _multiply(a, b, dtype).add_(total)
    return value if out is None else out.copy_(value)


_WIDE_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.dtype: _multiply,
    torch.ops.aten.mm.dtype_out: _multiply,
    torch.ops.aten.addmm.dtype: _add_product,
    torch.ops.aten.addmm.dtype_out: _add_product,
}
"""Products that torch has for CUDA alone, whose results are wider than their factors."""


def _cuda_functions(device: FakeCuda) -> Iterator[tuple[Any, str, Any]]:
    """Yield what is replaced in torch.cuda: the object, the attribute's name, and the new value."""
    properties = SimpleNamespace(
        name="fake", major=9, minor=0, multi_processor_count=MULTIPROCESSORS, warp_size=32, total_memory=80 << 30,
        L2_cache_size=50 << 20, shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, gcnArchName="",
    )  # fmt: skip
    values: dict[str, Any] = {
        "_lazy_init": _ignore,
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": _ignore,
        "device": lambda *_: contextlib.nullcontext(),
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "fake",
        "mem_get_info": lambda *_: (1 << 30, 80 << 30),
        "memory_allocated": lambda *_: device.memory_allocated(),
        "max_memory_allocated": lambda *_: device.max_memory_allocated(),
        "reset_peak_memory_stats": lambda *_: device.reset_peak_memory_stats(),
        "synchronize": lambda *_: device.streams.synchronize(),
        "empty_cache": _ignore,
        "current_stream": lambda *_: device.streams.current,
        "Stream": lambda *_, **__: device.streams.make(),
        "stream": device.streams.enter,
        "Event": lambda *_, **__: Event(device.streams),
        "CUDAGraph": Graph,
        "graph": device.capture,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: device._graph is not None,
    }  # fmt: skip
    for name, value in values.items():
        yield torch.cuda, name, value
    generator = torch.Generator
    yield torch, "Generator", lambda *_: generator()
    # a module that moves replaces its parameters; torch would write the new tensor into the old one
    yield torch, "_has_compatible_shallow_copy_type", lambda a, b: type(a) is type(b)


def _kernel_functions(device: FakeCuda) -> Iterator[tuple[Any, str, Any]]:
    """Yield what is replaced in Triton and in the modules of kernels: launches, and the choice of what is launched."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for kind in (JITFunction, InterpretedFunction):

        def run(kernel: Any, *args: Any, original: Any = kind.run, **options: Any) -> None:
            device.launch(kernel, original, args, options)

        yield kind, "run", run
    if device.computes:
        yield from _launch_functions()


def _native_functions() -> Iterator[tuple[Any, str, Any]]:
    """Yield what is replaced in the compiled module, whose functions would read the memory that a tensor lacks here."""
    for name, function in vars(_core).items():
        if callable(function) and not isinstance(function, type):

            def run(*args: Any, function: Any = function, **options: Any) -> Any:
                if any(isinstance(x, CudaTensor) for x in (*args, *options.values())):
                    raise DeviceMismatch(f"{function.__name__} of the compiled module takes a tensor on cuda:0")
                return function(*args, **options)

            yield _core, name, run


def _launch_functions() -> Iterator[tuple[Any, str, Any]]:
    """Yield what is replaced in the modules of kernels, so that what they launch is made for the interpreter."""
    for module in kernel_modules():
        for name, function in list(vars(module).items()):
            if callable(function) and _returns_launch(function):
                yield module, name, _interpreted(function)


@contextlib.contextmanager
def interpreted_launches() -> Iterator[None]:
    """Within this context the functions that are registered for CUDA run on tensors of the CPU, in the interpreter."""
    with contextlib.ExitStack() as patches:
        properties = [entry for entry in _cuda_functions(FakeCuda()) if entry[1] == "get_device_properties"]
        for target, name, value in (*properties, *_launch_functions()):
            patches.enter_context(mock.patch.object(target, name, value))
        yield


def kernel_modules() -> list[ModuleType]:
    """Return the modules of genssd that hold Triton kernels."""
    names = [module.name for module in pkgutil.iter_modules(genssd.kernels.__path__)]
    return [importlib.import_module(f"genssd.kernels.{name}") for name in names if name.endswith("_triton")]


def _returns_launch(function: Any) -> bool:
    """Return whether a function returns a configuration that has a field `interpret`."""
    try:
        result = typing.get_type_hints(function).get("return")
    except (TypeError, NameError, AttributeError):
        return False
    return dataclasses.is_dataclass(result) and any(f.name == "interpret" for f in dataclasses.fields(result))


def _interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: dataclasses.replace(function(*args, **options), interpret=True)


def _ignore(*_: Any, **__: Any) -> None:
    return None
