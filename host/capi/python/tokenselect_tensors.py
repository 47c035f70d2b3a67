"""Other people's tensors, and the library's memory as they see it. `tokenselect` is what to import."""

import array
import ctypes

from tokenselect_abi import Address, Library

LIBRARY = Library()

# What a type string of the array interfaces may hold. Token numbers fit an int32, which PyTorch can compute with.
_TYPESTRS = {"<f2": ["f16"], "<u2": ["bf16", "f16"], "<f4": ["f32"], "<u4": ["u32"], "<i4": ["u32"]}
TYPESTR = {"f16": "<f2", "bf16": "<u2", "f32": "<f4", "u32": "<i4", "u64": "<i8", "f64": "<f8"}
_TORCH = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "int32": "u32", "uint32": "u32"}


class View:
    """Address, types, shape and strides (in elements) of somebody's tensor. The address holds the tensor."""

    is_read_only = False

    def __init__(self, what, tensor, device):
        on_cpu = device.kind == "cpu"
        if hasattr(tensor, "data_ptr"):  # PyTorch
            self.dtypes = [_TORCH.get(str(tensor.dtype).removeprefix("torch."), str(tensor.dtype))]
            here = {"cpu": "cpu", "cuda": f"cuda:{device.ordinal}"}.get(device.kind)
            if str(tensor.device) != here:
                raise ValueError(f"`{what}` must be on {here or 'no PyTorch device'}, it is on {tensor.device}")
            self.ptr = Address(tensor.data_ptr(), tensor)
            self.shape, self.strides = tuple(tensor.shape), tuple(tensor.stride())
            return
        name = "__array_interface__" if on_cpu else "__cuda_array_interface__"
        interface = getattr(tensor, name, None)
        if interface is None:
            raise TypeError(f"`{what}` must have `data_ptr` or `{name}` on {device.name}, got {type(tensor).__name__}")
        self.ptr = Address(interface["data"][0] or 0, (tensor, interface))
        self.is_read_only = bool(interface["data"][1])
        self.shape = tuple(interface["shape"])
        self.dtypes = _TYPESTRS.get(interface["typestr"], [interface["typestr"]])
        strides = interface.get("strides")
        size = int(interface["typestr"][2:])
        if any(stride % size for stride in strides or ()):
            raise ValueError(f"`{what}` must have strides of whole elements, {size} bytes, its strides are {strides}")
        self.strides = dense(self.shape) if strides is None else tuple(stride // size for stride in strides)

    def _expect_shape(self, what, shape, dtypes):
        if self.shape != tuple(shape):
            raise ValueError(f"`{what}` must have shape {tuple(shape)}, got {self.shape}")
        self.dtype(what, dtypes)

    def expect(self, what, shape, dtypes):
        """Checks type, shape and that the tensor is dense; answers the address."""
        self._expect_shape(what, shape, dtypes)
        differ = [size for size, got, need in zip(shape, self.strides, dense(shape)) if size > 1 and got != need]
        if differ and 0 not in shape:
            raise ValueError(f"`{what}` must be contiguous, its strides are {self.strides}")
        return self.ptr

    def written(self, what, shape, dtypes):
        """As `expect`, of a tensor that can be written."""
        if self.is_read_only:
            raise ValueError(f"`{what}` must be memory that can be written, it is read-only")
        return self.expect(what, shape, dtypes)

    def heads(self, what, shape, dtypes):
        """Checks type and shape, `[tokens, heads, dim]`, and that elements of a head are adjacent; answers the address
        and the strides of tokens and heads, 0 for those of a dense tensor."""
        self._expect_shape(what, shape, dtypes)
        if 0 in shape:
            return self.ptr, 0, 0
        if shape[2] > 1 and self.strides[2] != 1:
            rule = "must have adjacent elements in its last dimension"
            raise ValueError(f"`{what}` {rule}, its strides are {self.strides}")
        # The stride of a dimension of one place means nothing, and 0 is not a stride of the library's.
        token, head = (stride if size > 1 else None for size, stride in zip(shape[:2], self.strides))
        if any(stride is not None and stride <= 0 for stride in (token, head)):
            raise ValueError(f"`{what}` must have strides above 0, its strides are {self.strides}")
        return self.ptr, token or 0, head or 0

    def dtype(self, what, dtypes):
        """The type of the elements, one of `dtypes`."""
        found = [dtype for dtype in dtypes if dtype in self.dtypes]
        if not found:
            raise TypeError(f"`{what}` must be {' or '.join(dtypes)}, got {' or '.join(self.dtypes)}")
        return found[0]


def dense(shape):
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class Memory:
    """Memory of a device with `ptr`, `shape` and `typestr`; offers itself to PyTorch, CuPy and NumPy."""

    def describe(self, device, ptr, shape, typestr, owner):
        self.device, self.ptr, self.shape, self.typestr, self.owner = device, ptr, tuple(shape), typestr, owner
        self.num_bytes = int(typestr[2:])
        for size in self.shape:
            self.num_bytes *= size

    def _interface(self, on_cpu):
        if (self.device.kind == "cpu") != on_cpu:
            raise AttributeError("the memory is elsewhere")
        return {"data": (self.ptr, False), "shape": self.shape, "typestr": self.typestr, "strides": None, "version": 3}

    @property
    def __array_interface__(self):
        return self._interface(True)

    @property
    def __cuda_array_interface__(self):
        return {**self._interface(False), "stream": None}

    def to_host(self):
        """A copy of the bytes. Waits for the device's earlier work."""
        to = bytearray(self.num_bytes)
        if self.num_bytes:
            place = (ctypes.c_char * self.num_bytes).from_buffer(to)
            LIBRARY.memory_read(self.device, ctypes.addressof(place), self.ptr, self.num_bytes)
            del place
        return to

    def numpy(self):
        """A copy as a NumPy array (bf16 as `uint16`). Waits for the device's earlier work."""
        import numpy

        return numpy.frombuffer(self.to_host(), dtype=self.typestr).reshape(self.shape)

    def torch(self):
        """A PyTorch tensor over the same memory, on a CUDA device or the processor."""
        import torch

        if self.device.kind == "cpu":
            import numpy

            return torch.from_numpy(numpy.asarray(self))
        return torch.as_tensor(self, device=f"cuda:{self.device.ordinal}")


def int32(what, values):
    """Address of numbers as int32 in the host's memory, and how many."""
    if hasattr(values, "data_ptr"):
        values = values.detach().to("cpu").int().contiguous()
        return Address(values.data_ptr(), values), values.numel()
    if hasattr(values, "astype"):
        values = values.astype("<i4", copy=False).copy()
        return Address(values.__array_interface__["data"][0], values), values.size
    values = array.array("i", values)
    address, count = values.buffer_info()
    return Address(address, values), count


def like(tensor, shape, dtype):
    """An empty tensor of the same kind."""
    if hasattr(tensor, "new_empty"):  # PyTorch
        import torch

        return tensor.new_empty(shape, dtype=getattr(torch, dtype) if dtype else None)
    if hasattr(tensor, "__array_interface__"):
        import numpy

        return numpy.empty(shape, dtype=dtype or tensor.dtype)
    raise TypeError(f"`out` and `lse` must be given where tensors are {type(tensor).__name__}")
