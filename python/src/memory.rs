//! Memory of this package's as others see it: buffers, the workspace of a context, pages of a cache.

use std::fmt;

use pyo3::exceptions::PyAttributeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyDict, PyInt, PyTuple};
use tokenselect::{DType, Tensor, TensorViewMut};

use crate::argument::{Argument, expect_apart};
use crate::cache::Cache;
use crate::context::Context;
use crate::device::{Device, Where};
use crate::errors::{Failure, Result, fence};
use crate::given::{Given, MAX_RANK, Types, interface_types, tuple};
use crate::numbers::{dtype_of_name, of_class, type_name, whole};
use crate::slot::{Lends, Slot};

/// Memory of a device, dense: `ptr`, `shape` and `typestr`. Offers itself to PyTorch, CuPy and NumPy as the same memory.
///
/// Type strings are those of the array interfaces; bf16 is `<u2` there, and token numbers are `<i4`, which PyTorch can
/// compute with.
#[pyclass(frozen, subclass, weakref, module = "tokenselect")]
pub(crate) struct Memory {
    device: Py<Device>,
    addr: usize,
    shape: Vec<usize>,
    typestr: String,
    /// The type, where more is known of it than the type string says.
    dtype: Option<DType>,
    num_bytes: usize,
    owner: Owner,
}

/// Whose the memory is.
enum Owner {
    Buffer(Slot<Tensor>),
    Context(Py<Context>),
    Cache(Py<Cache>),
}

impl Owner {
    /// The place of the object that has it.
    fn place(&self) -> &dyn Lends {
        match self {
            Owner::Buffer(slot) => slot,
            Owner::Context(context) => context.get().slot(),
            Owner::Cache(cache) => cache.get().slot(),
        }
    }
}

/// Memory that a call uses, which cannot be closed as long as this lives.
pub(crate) struct InCall<'py>(Bound<'py, Memory>);

impl<'py> InCall<'py> {
    /// Until now it was somebody else's to close. Where it is closed or of another process already, nobody asks for its address.
    pub fn begin(memory: &Bound<'py, Memory>) -> Self {
        memory.get().owner.place().begin_call();
        InCall(memory.clone())
    }
}

impl Drop for InCall<'_> {
    fn drop(&mut self) {
        self.0.get().owner.place().end_call();
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} of {})", tuple(&self.shape), self.typestr)
    }
}

/// The type string of an element type.
fn typestr_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "<f2",
        DType::Bf16 => "<u2",
        DType::F32 => "<f4",
        DType::U32 => "<i4",
        DType::U64 => "<i8",
        _ => "<f8",
    }
}

/// Whether memory of this package is a device's own.
pub(crate) fn is_on(object: &Bound<'_, PyAny>, device: &Device) -> bool {
    object.cast::<Memory>().is_ok_and(|memory| std::ptr::eq(memory.get().device.get(), device))
}

impl Memory {
    /// Zeros on a device.
    fn zeros(
        device: &Bound<'_, Device>,
        shape: Vec<usize>,
        typestr: &str,
        dtype: Option<DType>,
    ) -> Result<Self> {
        let size = number_bytes("typestr", typestr)?;
        let num_bytes = shape.iter().try_fold(size, |bytes, &dim| bytes.checked_mul(dim));
        let too_large = || Failure::argument("shape", "be of bytes that can be counted", tuple(&shape));
        let num_bytes = num_bytes.ok_or_else(too_large)?;
        // Of the widest elements: the memory may be read as any.
        let mut tensor = Tensor::zeros_on(device.get().get()?, DType::U64, [num_bytes.div_ceil(8)])?;
        let addr = address(tensor.view_mut())?;
        let (owner, typestr) = (Owner::Buffer(Slot::new("buffer", tensor)), typestr.to_owned());
        Ok(Memory { device: device.clone().unbind(), addr, shape, typestr, dtype, num_bytes, owner })
    }

    /// Memory of a context or a cache, at an address that stays.
    fn lent(device: &Py<Device>, addr: usize, shape: Vec<usize>, dtype: DType, owner: Owner) -> Self {
        let num_bytes = shape.iter().product::<usize>() * dtype.size();
        let typestr = typestr_of(dtype).to_owned();
        Python::attach(|py| Memory {
            device: device.clone_ref(py),
            addr,
            shape,
            typestr,
            dtype: Some(dtype),
            num_bytes,
            owner,
        })
    }

    /// A buffer of a context's workspace.
    pub fn of_context(
        context: &Bound<'_, Context>,
        device: &Py<Device>,
        addr: usize,
        shape: &[usize],
        dtype: DType,
    ) -> Self {
        Memory::lent(device, addr, shape.to_vec(), dtype, Owner::Context(context.clone().unbind()))
    }

    /// The keys or the values of a layer.
    pub fn of_cache(
        cache: &Py<Cache>,
        py: Python<'_>,
        device: &Py<Device>,
        addr: usize,
        shape: &[usize],
        dtype: DType,
    ) -> Self {
        Memory::lent(device, addr, shape.to_vec(), dtype, Owner::Cache(cache.clone_ref(py)))
    }

    /// A copy of an array of the host.
    pub fn copied<'py>(device: &Bound<'py, Device>, host: &Bound<'py, PyAny>) -> Result<Bound<'py, Buffer>> {
        let given = array("host", host)?;
        let is_bf16 = given.types == Types::of(DType::Bf16);
        let typestr = if is_bf16 { typestr_of(DType::Bf16).to_owned() } else { given.typestr()? };
        number_bytes("host", &typestr)?;
        let memory = Memory::zeros(device, given.shape().to_vec(), &typestr, is_bf16.then_some(DType::Bf16))?;
        memory.write(host.py(), &given)?;
        Buffer::new(host.py(), memory)
    }

    /// An empty buffer of the same device: of the same type, or of f32.
    pub fn like<'py>(
        memory: &Bound<'py, Memory>,
        shape: &Bound<'py, PyTuple>,
        is_f32: bool,
    ) -> Result<Bound<'py, Buffer>> {
        let (py, this) = (memory.py(), memory.get());
        let (typestr, dtype) = if is_f32 { ("<f4", None) } else { (this.typestr.as_str(), this.dtype) };
        let made = Memory::zeros(this.device.bind(py), shape.extract()?, typestr, dtype)?;
        Buffer::new(py, made)
    }

    /// Sizes of the dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element types that it may be read as.
    pub fn types(&self) -> Types {
        self.dtype.map_or_else(|| interface_types(&self.typestr).0, Types::of)
    }

    /// The address, while the memory is there.
    pub fn addr(&self) -> Result<usize> {
        self.owner.place().expect_open()?;
        Ok(self.addr)
    }

    /// Checks that a device can reach it.
    pub fn expect_on(&self, what: &'static str, device: &Device) -> Result<()> {
        self.owner.place().expect_own_process()?;
        let own = self.device.get();
        let is_there = match (own.place(), device.place()) {
            (Where::Emulated, Where::Emulated) => std::ptr::eq(own, device),
            (own, other) => own == other,
        };
        if is_there {
            return Ok(());
        }
        let rule = format!("must be on {}, it is on {}", device.name(), own.name());
        let rule = if device.name() == own.name() { format!("{rule}, another one") } else { rule };
        Err(Failure::tensor("TS_STATUS_WRONG_DEVICE", what, rule))
    }

    /// Somebody has the address from now on, and this object or what it holds as long as that.
    pub fn lend(&self) {
        self.owner.place().lend();
    }

    fn interface<'py>(&self, py: Python<'py>, on_cpu: bool) -> PyResult<Bound<'py, PyDict>> {
        if (self.device.get().place() == Where::Cpu) != on_cpu {
            return Err(PyAttributeError::new_err(format!("the memory is on {}", self.device.get().name())));
        }
        let addr = fence(py, || self.addr())?;
        self.lend();
        let interface = PyDict::new(py);
        interface.set_item(intern!(py, "data"), (addr, false))?;
        interface.set_item(intern!(py, "shape"), PyTuple::new(py, &self.shape)?)?;
        interface.set_item(intern!(py, "typestr"), &self.typestr)?;
        interface.set_item(intern!(py, "strides"), py.None())?;
        interface.set_item(intern!(py, "version"), 3)?;
        if !on_cpu {
            interface.set_item(intern!(py, "stream"), py.None())?;
        }
        Ok(interface)
    }

    /// Its bytes as elements of two bytes, the smallest there are; the last byte of an odd number has one more behind it.
    fn halves(&self, what: &'static str) -> Result<Argument> {
        let shape = [self.num_bytes.div_ceil(2)].into();
        Ok(Argument { what, addr: self.addr()?, dtype: DType::F16, shape, strides: None })
    }

    /// Copies a dense array of as many bytes here.
    fn write(&self, py: Python<'_>, from: &Given<'_>) -> Result<()> {
        if self.num_bytes == 0 {
            return Ok(());
        }
        let here = self.halves("buffer")?;
        let place = Argument { what: "host", addr: from.addr, ..here };
        expect_apart(&[here.span()?], &[place.span()?])?;
        let mut copy = Vec::new();
        let from = if from.addr.is_multiple_of(2) && self.num_bytes.is_multiple_of(2) {
            place
        } else {
            let len = self.num_bytes.div_ceil(8);
            copy.try_reserve_exact(len).map_err(|_| Failure::out_of_memory("a copy", 8 * len))?;
            copy.resize(len, 0u64);
            let source: *const u8 = std::ptr::with_exposed_provenance(from.addr);
            // SAFETY: the array has as many bytes, and the copy is not shorter.
            unsafe { source.copy_to_nonoverlapping(copy.as_mut_ptr().cast(), self.num_bytes) };
            Argument { addr: copy.as_ptr().expose_provenance(), ..place }
        };
        let (device, cpu) = (self.device.get().inner(), tokenselect::Device::cpu());
        // SAFETY: both have as many bytes, apart from each other, and nothing else uses them while this thread has the interpreter.
        let (to, from) = unsafe { (here.view_mut(device)?, from.view(&cpu)?) };
        to.copy_from(from)?;
        drop(copy);
        let _ = py;
        Ok(())
    }

    /// Copies the bytes to the host. Waits for the device's earlier work.
    fn read<'py>(slf: &Bound<'py, Self>) -> Result<Bound<'py, PyByteArray>> {
        let (py, this) = (slf.py(), slf.get());
        this.owner.place().expect_own_process()?;
        // Other threads run while a device is waited for.
        let _in_call = InCall::begin(slf);
        let from = this.halves("memory")?;
        let device = this.device.get().inner();
        let copy = |to: &mut [u8]| -> Result<()> {
            let to = Argument { what: "to", addr: to.as_mut_ptr().expose_provenance(), ..from };
            let cpu = tokenselect::Device::cpu();
            // SAFETY: new memory of as many bytes; what is read is there as long as this object.
            let (to, from) = unsafe { (to.view_mut(&cpu)?, from.view(device)?) };
            Ok(to.copy_from(from)?)
        };
        let mut failed = None;
        let bytes = PyByteArray::new_with(py, this.num_bytes.next_multiple_of(2), |to| {
            if !to.is_empty() {
                // Only a device is waited for.
                let done = if device.is_cpu() { copy(to) } else { py.detach(|| copy(to)) };
                failed = done.err();
            }
            Ok(())
        })?;
        if let Some(failure) = failed {
            return Err(failure);
        }
        if !this.num_bytes.is_multiple_of(2) {
            bytes.resize(this.num_bytes)?;
        }
        Ok(bytes)
    }
}

/// A dense array of the host.
fn array<'py>(what: &'static str, host: &Bound<'py, PyAny>) -> Result<Given<'py>> {
    let Some(given) = Given::on_host(what, host)? else {
        return Err(Failure::of_type(what, "an array or a tensor of the host", type_name(host)));
    };
    given.expect_dense()?;
    Ok(given)
}

/// Address of a tensor of the library's.
pub(crate) fn address(tensor: TensorViewMut<'_>) -> Result<usize> {
    if let Ok(addr) = tensor.as_view().device_addr() {
        return Ok(addr as usize);
    }
    Ok(match tensor.dtype() {
        DType::F16 => tensor.into_slice::<half::f16>()?.as_mut_ptr().expose_provenance(),
        DType::Bf16 => tensor.into_slice::<half::bf16>()?.as_mut_ptr().expose_provenance(),
        DType::F32 => tensor.into_slice::<f32>()?.as_mut_ptr().expose_provenance(),
        DType::U32 => tensor.into_slice::<u32>()?.as_mut_ptr().expose_provenance(),
        DType::F64 => tensor.into_slice::<f64>()?.as_mut_ptr().expose_provenance(),
        _ => tensor.into_slice::<u64>()?.as_mut_ptr().expose_provenance(),
    })
}

#[pymethods]
impl Memory {
    #[new]
    #[pyo3(signature = (*_args, **_fields), text_signature = "()")]
    fn make(
        py: Python<'_>,
        _args: &Bound<'_, PyTuple>,
        _fields: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        fence(py, || Err(Failure::not_called("Memory", "`Context.workspace`, `KvView.k` and `Buffer`")))
    }

    /// The device.
    #[getter]
    fn device(&self, py: Python<'_>) -> Py<Device> {
        self.device.clone_ref(py)
    }

    /// Address of the first element: the device's, on the processor the host's.
    #[getter]
    fn ptr(&self, py: Python<'_>) -> PyResult<usize> {
        self.lend();
        fence(py, || self.addr())
    }

    /// Sizes of the dimensions, outermost first.
    #[getter(shape)]
    fn shape_tuple<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.shape)
    }

    /// Type of the elements as the array interfaces write it.
    #[getter]
    fn typestr(&self) -> &str {
        &self.typestr
    }

    /// Type of the elements: `f16`, `bf16` (as `<u2`, too), `f32`, `u32`, `u64` or `f64`; None where the library has no name for it.
    #[getter]
    fn dtype(&self) -> Option<String> {
        let found = self.dtype.or_else(|| {
            let all = [DType::Bf16, DType::F16, DType::F32, DType::U32, DType::U64, DType::F64];
            all.into_iter().find(|&dtype| self.types().has(dtype))
        });
        found.map(|dtype| dtype.to_string())
    }

    /// Bytes of it.
    #[getter]
    fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    #[getter]
    fn __array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.interface(py, true)
    }

    #[getter]
    fn __cuda_array_interface__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.interface(py, false)
    }

    /// A copy of the bytes, a `bytearray`. Waits for the device's earlier work.
    fn to_host<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyByteArray>> {
        fence(slf.py(), || Memory::read(slf))
    }

    /// A copy as a NumPy array (bf16 as `uint16`). Waits for the device's earlier work.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        fence(py, || {
            let options = PyDict::new(py);
            options.set_item(intern!(py, "dtype"), &slf.get().typestr)?;
            let numpy = py.import(intern!(py, "numpy"))?;
            let flat = numpy.call_method("frombuffer", (Memory::read(slf)?,), Some(&options))?;
            Ok(flat.call_method1("reshape", (PyTuple::new(py, &slf.get().shape)?,))?)
        })
    }

    /// A PyTorch tensor over the same memory, on a CUDA device or the processor.
    fn torch<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        fence(py, || {
            let (this, torch) = (slf.get(), py.import(intern!(py, "torch"))?);
            let tensor = if this.device.get().place() == Where::Cpu {
                let array = py.import(intern!(py, "numpy"))?.call_method1("asarray", (slf,))?;
                torch.call_method1("from_numpy", (array,))?
            } else {
                let Some(place) = this.device.get().place().torch_name() else {
                    let rule = "must be memory that PyTorch can reach, it is emulated";
                    return Err(Failure::tensor("TS_STATUS_WRONG_DEVICE", "memory", rule));
                };
                let options = PyDict::new(py);
                options.set_item(intern!(py, "device"), place)?;
                torch.call_method("as_tensor", (slf,), Some(&options))?
            };
            if this.dtype == Some(DType::Bf16) {
                return Ok(tensor.call_method1("view", (torch.getattr("bfloat16")?,))?);
            }
            Ok(tensor)
        })
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.device)?;
        match &self.owner {
            Owner::Buffer(_) => Ok(()),
            Owner::Context(context) => visit.call(context),
            Owner::Cache(cache) => visit.call(cache),
        }
    }

    fn __repr__(slf: &Bound<'_, Self>) -> String {
        let this = slf.get();
        let name = type_name(slf.as_any());
        format!(
            "<tokenselect.{name} {} of {} on {}>",
            tuple(&this.shape),
            this.typestr,
            this.device.get().name()
        )
    }
}

/// Memory of a device that is allocated here, of zeros.
///
/// `typestr` is a type string of the array interfaces, a name (`bf16`), a `torch.dtype` or a `numpy.dtype`. Raises
/// `OutOfMemoryError`.
#[pyclass(frozen, extends = Memory, module = "tokenselect")]
pub(crate) struct Buffer {}

impl Buffer {
    fn new(py: Python<'_>, memory: Memory) -> Result<Bound<'_, Self>> {
        Ok(Bound::new(py, PyClassInitializer::from(memory).add_subclass(Buffer {}))?)
    }
}

#[pymethods]
impl Buffer {
    #[new]
    #[pyo3(signature = (device, shape, typestr), text_signature = "(device, shape, typestr)")]
    fn make(
        device: &Bound<'_, PyAny>,
        shape: &Bound<'_, PyAny>,
        typestr: &Bound<'_, PyAny>,
    ) -> PyResult<PyClassInitializer<Self>> {
        fence(device.py(), || {
            let device = of_class::<Device>("device", device)?;
            let shape = if shape.is_instance_of::<PyInt>() {
                vec![whole("shape", shape)?]
            } else {
                let mut dims = Vec::new();
                for dim in shape.try_iter()? {
                    if dims.len() == MAX_RANK {
                        return Err(Failure::argument(
                            "shape",
                            format!("have up to {MAX_RANK} dimensions"),
                            "more",
                        ));
                    }
                    dims.push(whole("shape", &dim?)?);
                }
                dims
            };
            let (typestr, dtype) = type_of(typestr)?;
            let memory = Memory::zeros(device, shape, &typestr, dtype)?;
            Ok(PyClassInitializer::from(memory).add_subclass(Buffer {}))
        })
    }

    /// Copies an array or tensor of the host of the same shape and type here, after the device's earlier work.
    #[pyo3(text_signature = "($self, host)")]
    fn from_host(slf: &Bound<'_, Self>, host: &Bound<'_, PyAny>) -> PyResult<()> {
        fence(slf.py(), || {
            let (this, given) = (slf.as_super().get(), array("host", host)?);
            this.owner.place().expect_own_process()?;
            given.expect_shape(&this.shape)?;
            let got = given.typestr()?;
            let is_bf16 = given.types == Types::of(DType::Bf16);
            let size = if is_bf16 { 2 } else { number_bytes("host", &got)? };
            let own = number_bytes("typestr", &this.typestr)?;
            if size != own || (got != this.typestr && given.types != this.types()) {
                return Err(Failure::of_type("host", &this.typestr, got));
            }
            this.write(slf.py(), &given)
        })
    }

    /// Gives the memory back; where an array or a graph uses it, when these are gone.
    fn close(slf: &Bound<'_, Self>) -> PyResult<()> {
        fence(slf.py(), || match &slf.as_super().get().owner {
            Owner::Buffer(slot) => slot.close(),
            Owner::Context(_) | Owner::Cache(_) => Ok(()),
        })
    }
}

/// Bytes of an element of a type string. Others than plain numbers are refused: what they count need not be bytes, and objects are not
/// what lies in memory.
fn number_bytes(what: &'static str, typestr: &str) -> Result<usize> {
    let size = match typestr.as_bytes() {
        [b'<' | b'|', b'b' | b'f' | b'i' | b'u', digit @ (b'1' | b'2' | b'4' | b'8')] => digit - b'0',
        _ => return Err(Failure::of_type(what, "plain numbers of 1, 2, 4 or 8 bytes, such as <f4", typestr)),
    };
    Ok(usize::from(size))
}

/// The type string of a type, and what it does not say.
fn type_of(given: &Bound<'_, PyAny>) -> Result<(String, Option<DType>)> {
    if let Ok(text) = given.extract::<String>() {
        if dtype_of_name(&text).is_none() {
            return match number_bytes("typestr", &text) {
                Ok(_) => Ok((text, None)),
                Err(_) => Err(Failure::argument(
                    "typestr",
                    "be a type string such as <f4 or a name such as bf16",
                    text,
                )),
            };
        }
    } else if let Ok(typestr) = given.getattr("str").and_then(|text| text.extract::<String>()) {
        return Ok((typestr, None)); // `numpy.dtype`
    }
    let dtype = crate::numbers::dtype("typestr", given)?;
    Ok((typestr_of(dtype).to_owned(), Some(dtype)))
}
