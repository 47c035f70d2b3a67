//! Other people's tensors: PyTorch's, NumPy's, any with an array interface, and this package's own memory.
//!
//! Everything is read anew at each call: a tensor may have got other memory since (`Tensor.set_`).

mod class;
mod torch;
mod types;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};
use tokenselect::DType;

pub(crate) use self::class::Source;
use self::class::source_of;
pub(crate) use self::torch::expect_untraced;
use self::torch::{expect_place, expect_plain, is_at, torch_types};
use self::types::{ArrayStruct, extension_types};
pub(crate) use self::types::{Types, interface_types};
use crate::device::{Device, Where};
use crate::errors::{Failure, Kind, Result};
use crate::memory::Memory;
use crate::numbers::type_name;

/// The most dimensions of a tensor that is looked at.
pub(crate) const MAX_RANK: usize = 8;

/// A tensor as it is now.
pub(crate) struct Given<'py> {
    pub what: &'static str,
    pub object: Bound<'py, PyAny>,
    pub source: Source,
    pub addr: usize,
    pub types: Types,
    /// What its type is called, where it is asked for.
    type_object: Option<Bound<'py, PyAny>>,
    /// Order, kind and size of the elements, as a type string has them.
    typestr: Option<(char, u8, i32)>,
    rank: usize,
    shape: [usize; MAX_RANK],
    /// In elements.
    strides: [isize; MAX_RANK],
    pub is_read_only: bool,
    /// The interface, which may own the memory.
    pub interface: Option<Bound<'py, PyAny>>,
}

impl<'py> Given<'py> {
    /// Looks at the argument called `what`, which must lie where `device` works.
    pub fn look(what: &'static str, object: &Bound<'py, PyAny>, device: &Device) -> Result<Self> {
        match source_of(object)? {
            Some(Source::Own) => Given::own(what, object, device),
            Some(Source::Torch) => Given::torch(what, object, Source::Torch, Some(device)),
            Some(Source::LikeTorch) => Given::torch(what, object, Source::LikeTorch, Some(device)),
            Some(Source::Masked) => Err(masked(what)),
            Some(Source::Struct) if device.place() == Where::Cpu => Given::numpy(what, object),
            Some(Source::Struct | Source::Interface) | None => {
                let name = if device.place() == Where::Cpu {
                    intern!(object.py(), "__array_interface__")
                } else {
                    intern!(object.py(), "__cuda_array_interface__")
                };
                match object.getattr_opt(name)? {
                    Some(interface) => Given::interface(what, object, interface),
                    None => {
                        let rule = format!("a tensor with `data_ptr` or `{name}` on {}", device.name());
                        Err(Failure::of_type(what, rule, type_name(object)))
                    }
                }
            }
        }
    }

    /// Looks at an array in the host's memory, whatever device works.
    pub fn on_host(what: &'static str, object: &Bound<'py, PyAny>) -> Result<Option<Self>> {
        match source_of(object)? {
            Some(source @ (Source::Torch | Source::LikeTorch)) => {
                return Given::torch(what, object, source, None).map(Some);
            }
            Some(Source::Struct) => return Given::numpy(what, object).map(Some),
            Some(Source::Masked) => return Err(masked(what)),
            _ => {}
        }
        let interface = object.getattr_opt(intern!(object.py(), "__array_interface__"))?;
        interface.map(|interface| Given::interface(what, object, interface)).transpose()
    }

    fn own(what: &'static str, object: &Bound<'py, PyAny>, device: &Device) -> Result<Self> {
        let memory = object.cast::<Memory>().map_err(PyErr::from)?.get();
        memory.expect_on(what, device)?;
        let mut given = Given::new(what, object, Source::Own, memory.addr()?, memory.types());
        given.set_dense(memory.shape());
        Ok(given)
    }

    fn new(
        what: &'static str,
        object: &Bound<'py, PyAny>,
        source: Source,
        addr: usize,
        types: Types,
    ) -> Self {
        Given {
            what,
            object: object.clone(),
            source,
            addr,
            types,
            type_object: None,
            typestr: None,
            rank: 0,
            shape: [1; MAX_RANK],
            strides: [1; MAX_RANK],
            is_read_only: false,
            interface: None,
        }
    }

    fn torch(
        what: &'static str,
        tensor: &Bound<'py, PyAny>,
        source: Source,
        device: Option<&Device>,
    ) -> Result<Self> {
        let py = tensor.py();
        if source == Source::LikeTorch || !is_at(tensor, device)? {
            expect_place(what, &tensor.getattr(intern!(py, "device"))?, device)?;
        }
        expect_plain(what, tensor, source)?;
        let dtype = tensor.getattr(intern!(py, "dtype"))?;
        let strided = |method: &Bound<'py, PyString>| {
            // A sparse or fake tensor has neither.
            tensor.call_method0(method).map_err(|error| {
                let rule = format!("a tensor with its elements in memory, in strides ({})", error.value(py));
                Failure::of_type(what, rule, type_name(tensor))
            })
        };
        let addr = strided(intern!(py, "data_ptr"))?;
        let Ok(addr) = addr.extract::<usize>() else {
            return Err(Failure::of_type(what, "a tensor with an address as its `data_ptr`", shown(&addr)));
        };
        let mut given = Given::new(what, tensor, source, addr, torch_types(&dtype)?);
        given.type_object = Some(dtype);
        given.set_shape(&tensor.getattr(intern!(py, "shape"))?)?;
        given.set_strides(&strided(intern!(py, "stride"))?)?;
        if addr == 0 && !given.shape().contains(&0) {
            return Err(Failure::tensor(
                "TS_STATUS_NULL_POINTER",
                what,
                "must have memory, its address is 0",
            ));
        }
        Ok(given)
    }

    /// An array that tells of itself by `__array_struct__`, at a tenth of the cost of the dict of `__array_interface__`.
    fn numpy(what: &'static str, array: &Bound<'py, PyAny>) -> Result<Self> {
        let capsule = array.getattr(intern!(array.py(), "__array_struct__"))?;
        // SAFETY: the pointer of a capsule without a name, or null and an exception.
        let found = unsafe { pyo3::ffi::PyCapsule_GetPointer(capsule.as_ptr(), std::ptr::null()) };
        if found.is_null() {
            drop(PyErr::fetch(array.py()));
            let rule = "an array whose `__array_struct__` is a capsule of the protocol";
            return Err(Failure::of_type(what, rule, type_name(&capsule)));
        }
        // SAFETY: the protocol's structure, which the capsule owns, and which is copied here.
        let told: ArrayStruct = unsafe { found.cast::<ArrayStruct>().read() };
        let (ArrayStruct::TWO, Ok(rank)) = (told.two, usize::try_from(told.nd)) else {
            let rule = "an array whose `__array_struct__` begins with 2 and a number of dimensions";
            return Err(Failure::of_type(what, rule, format!("{} and {}", told.two, told.nd)));
        };
        let mut given =
            Given::new(what, array, Source::Struct, told.data.expose_provenance(), told.types(array));
        if rank > MAX_RANK {
            return Err(too_many_dimensions(what, rank));
        }
        (given.rank, given.is_read_only) = (rank, told.flags & ArrayStruct::WRITEABLE == 0);
        given.typestr = Some((told.order(), told.typekind, told.itemsize));
        for dim in 0..rank {
            // SAFETY: as many sizes, and as many strides, as there are dimensions.
            let (size, step) = unsafe { (told.shape.add(dim).read(), told.strides.add(dim).read()) };
            given.shape[dim] = size.unsigned_abs();
            given.strides[dim] = step;
        }
        given.divide_strides(told.itemsize as isize)?;
        given.interface = Some(capsule);
        Ok(given)
    }

    fn interface(
        what: &'static str,
        object: &Bound<'py, PyAny>,
        interface: Bound<'py, PyAny>,
    ) -> Result<Self> {
        let py = object.py();
        let Ok(table) = interface.cast::<PyDict>() else {
            return Err(Failure::of_type(what, "an array whose interface is a dict", type_name(&interface)));
        };
        let field = |name: &Bound<'py, PyString>| {
            let missing = || Failure::of_type(what, format!("an array whose interface has `{name}`"), "none");
            table.get_item(name)?.ok_or_else(missing)
        };
        let data = field(intern!(py, "data"))?;
        let Ok((addr, is_read_only)) = data.extract::<(Option<usize>, bool)>() else {
            let rule = "an array whose interface has an address and whether it is read-only as its `data`";
            return Err(Failure::of_type(what, rule, shown(&data)));
        };
        if table.get_item(intern!(py, "mask"))?.is_some_and(|mask| !mask.is_none()) {
            return Err(masked(what));
        }
        let typestr = field(intern!(py, "typestr"))?;
        let Ok(text) = typestr.cast::<PyString>() else {
            let rule = "an array whose interface has a type string as its `typestr`";
            return Err(Failure::of_type(what, rule, shown(&typestr)));
        };
        let (types, size) = interface_types(&text.to_cow()?);
        let types = if types == Types::NONE { extension_types(object) } else { types };
        let mut given = Given::new(what, object, Source::Interface, addr.unwrap_or(0), types);
        given.type_object = Some(typestr);
        given.is_read_only = is_read_only;
        given.set_shape(&field(intern!(py, "shape"))?)?;
        let num_bytes = given.shape().iter().try_fold(size.unsigned_abs(), |all, &dim| all.checked_mul(dim));
        if num_bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
            let rule = format!("must be of at most isize::MAX bytes, its shape is {}", tuple(given.shape()));
            return Err(Failure::tensor("TS_STATUS_SHAPE", what, rule));
        }
        match table.get_item(intern!(py, "strides"))?.filter(|strides| !strides.is_none()) {
            Some(strides) => {
                given.set_strides(&strides)?;
                given.divide_strides(size)?;
            }
            None => given.strides = dense(&given.shape),
        }
        given.interface = Some(interface);
        Ok(given)
    }

    fn set_dense(&mut self, shape: &[usize]) {
        self.rank = shape.len().min(MAX_RANK);
        self.shape[..self.rank].copy_from_slice(&shape[..self.rank]);
        self.strides = dense(&self.shape);
    }

    fn set_shape(&mut self, shape: &Bound<'py, PyAny>) -> Result<()> {
        let wrong =
            || Failure::of_type(self.what, "a tensor with a tuple of sizes as its `shape`", shown(shape));
        let dims = shape.cast::<PyTuple>().map_err(|_| wrong())?;
        self.rank = dims.len();
        if self.rank > MAX_RANK {
            return Err(too_many_dimensions(self.what, self.rank));
        }
        for (size, dim) in self.shape.iter_mut().zip(dims.iter_borrowed()) {
            *size = dim.extract().map_err(|_| wrong())?;
        }
        Ok(())
    }

    fn set_strides(&mut self, strides: &Bound<'py, PyAny>) -> Result<()> {
        let rank = self.rank;
        let rule =
            || format!("a tensor with a tuple of {rank} steps, one for each dimension, as its strides");
        let wrong = || Failure::of_type(self.what, rule(), shown(strides));
        let steps = strides.cast::<PyTuple>().map_err(|_| wrong())?;
        if steps.len() != rank {
            return Err(wrong());
        }
        for (stride, step) in self.strides.iter_mut().zip(steps.iter_borrowed()) {
            *stride = step.extract().map_err(|_| wrong())?;
        }
        Ok(())
    }

    /// Makes strides in bytes those in elements of `size` bytes.
    fn divide_strides(&mut self, size: isize) -> Result<()> {
        let size = size.max(1);
        if self.strides().iter().any(|step| step % size != 0) {
            let strides = tuple(self.strides());
            let rule =
                format!("must have strides of whole elements, {size} bytes, its strides are {strides}");
            return Err(Failure::tensor("TS_STATUS_CONFIG", self.what, rule));
        }
        self.strides[..self.rank].iter_mut().for_each(|step| *step /= size);
        Ok(())
    }

    /// Sizes of the dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.rank]
    }

    /// Elements from an entry of each dimension to the next.
    pub fn strides(&self) -> &[isize] {
        &self.strides[..self.rank]
    }

    /// Checks the shape.
    pub fn expect_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape() == shape {
            return Ok(());
        }
        let rule = format!("must have shape {}, got {}", tuple(shape), tuple(self.shape()));
        Err(Failure::tensor("TS_STATUS_SHAPE", self.what, rule))
    }

    /// The first of `allowed` that the elements may be read as.
    pub fn expect_type(&self, allowed: &[DType]) -> Result<DType> {
        if let Some(&dtype) = allowed.iter().find(|&&dtype| self.types.has(dtype)) {
            return Ok(dtype);
        }
        let rule = allowed.iter().map(DType::to_string).collect::<Vec<_>>().join(" or ");
        Err(Failure::of_type(self.what, rule, self.type_text()))
    }

    /// What the elements are called.
    pub fn type_text(&self) -> String {
        let all = [DType::F16, DType::Bf16, DType::F32, DType::U32, DType::U64, DType::F64];
        let names: Vec<_> =
            all.iter().filter(|&&dtype| self.types.has(dtype)).map(DType::to_string).collect();
        if names.is_empty() {
            let found = match &self.type_object {
                Some(name) => name.str().map(|name| name.to_string()).map_err(Failure::from),
                None => self.typestr(),
            };
            return found.unwrap_or_else(|_| "another type".to_owned());
        }
        names.join(" or ")
    }

    /// Checks that elements are adjacent, in the order of the dimensions.
    pub fn expect_dense(&self) -> Result<()> {
        let shape = self.shape();
        if shape.contains(&0) {
            return Ok(());
        }
        let needed = dense(&self.shape);
        if (0..self.rank).all(|dim| shape[dim] <= 1 || self.strides[dim] == needed[dim]) {
            return Ok(());
        }
        let rule = format!("must be contiguous, its strides are {}", tuple(self.strides()));
        Err(Failure::tensor("TS_STATUS_CONFIG", self.what, rule))
    }

    /// Checks that the memory may be written.
    pub fn expect_writable(&self) -> Result<()> {
        if !self.is_read_only {
            return Ok(());
        }
        let rule = "must be memory that can be written, it is read-only";
        Err(Failure::tensor("TS_STATUS_CONFIG", self.what, rule))
    }
}

fn too_many_dimensions(what: &'static str, rank: usize) -> Failure {
    let rule = format!("must have at most {MAX_RANK} dimensions, got {rank}");
    Failure::tensor("TS_STATUS_SHAPE", what, rule)
}

/// An array of NumPy's with a mask, which no operation would heed.
fn masked(what: &'static str) -> Failure {
    let rule = "must be an array without a mask, it is masked: pass one with its masked elements filled";
    Failure::tensor("TS_STATUS_CONFIG", what, rule)
}

/// What was given instead, where it may be anything.
fn shown(object: &Bound<'_, PyAny>) -> String {
    const MOST: usize = 80;
    let Ok(text) = object.repr() else { return type_name(object) };
    let text = text.to_string_lossy();
    if text.chars().count() <= MOST {
        return text.into_owned();
    }
    format!("{}…", text.chars().take(MOST).collect::<String>())
}

/// Numbers as Python writes a tuple.
pub(crate) fn tuple<T: std::fmt::Display>(numbers: &[T]) -> String {
    let texts: Vec<_> = numbers.iter().map(T::to_string).collect();
    if texts.len() == 1 { format!("({},)", texts[0]) } else { format!("({})", texts.join(", ")) }
}

/// Strides of a dense tensor; dimensions beyond the last have size 1.
fn dense(shape: &[usize; MAX_RANK]) -> [isize; MAX_RANK] {
    let mut strides = [1; MAX_RANK];
    let mut step = 1usize;
    for dim in (0..MAX_RANK).rev() {
        strides[dim] = isize::try_from(step).unwrap_or(isize::MAX);
        step = step.saturating_mul(shape[dim]);
    }
    strides
}

/// The most entries of a list of what is known of classes, or of types.
const MAX_KNOWN: usize = 64;

/// An empty tensor of the same kind as another: of its type, or of f32.
pub(crate) fn like<'py>(
    what: &'static str,
    tensor: &Bound<'py, PyAny>,
    shape: &[usize],
    is_f32: bool,
) -> Result<Bound<'py, PyAny>> {
    let py = tensor.py();
    let shape = PyTuple::new(py, shape)?;
    match source_of(tensor)? {
        Some(Source::Own) => {
            let memory = tensor.cast::<Memory>().map_err(PyErr::from)?;
            Ok(Memory::like(memory, &shape, is_f32)?.into_any())
        }
        Some(Source::Torch | Source::LikeTorch) if tensor.hasattr(intern!(py, "new_empty"))? => {
            let options = PyDict::new(py);
            if is_f32 {
                options.set_item(
                    intern!(py, "dtype"),
                    py.import(intern!(py, "torch"))?.getattr(intern!(py, "float32"))?,
                )?;
            }
            Ok(tensor.call_method(intern!(py, "new_empty"), (shape,), Some(&options))?)
        }
        _ if tensor.hasattr(intern!(py, "__array_interface__"))?
            && (is_f32 || tensor.hasattr(intern!(py, "dtype"))?) =>
        {
            let numpy = py.import(intern!(py, "numpy"))?;
            let dtype = if is_f32 {
                numpy.getattr(intern!(py, "float32"))?
            } else {
                tensor.getattr(intern!(py, "dtype"))?
            };
            Ok(numpy.call_method1(intern!(py, "empty"), (shape, dtype))?)
        }
        _ => Err(Failure::Rule {
            kind: Kind::ArgumentType,
            status: "TS_STATUS_MISSING",
            text: format!("`{what}` must be given where tensors are {}", type_name(tensor)),
        }),
    }
}

impl Given<'_> {
    /// The type string of the elements.
    pub fn typestr(&self) -> Result<String> {
        if let Some((order, kind, size)) = self.typestr {
            return Ok(format!("{order}{}{size}", char::from(kind)));
        }
        if self.source == Source::Interface
            && let Some(typestr) = &self.type_object
        {
            return Ok(typestr.extract()?);
        }
        let name = |text: &str| match text {
            "uint8" => Some("|u1"),
            "int8" => Some("|i1"),
            "bool" => Some("|b1"),
            "int16" => Some("<i2"),
            "uint16" => Some("<u2"),
            "bfloat16" => Some("<u2"),
            "float16" => Some("<f2"),
            "float32" => Some("<f4"),
            "int32" => Some("<i4"),
            "uint32" => Some("<u4"),
            "int64" => Some("<i8"),
            "uint64" => Some("<u8"),
            "float64" => Some("<f8"),
            _ => None,
        };
        let text = match &self.type_object {
            Some(dtype) => dtype.str()?.to_string(),
            None => String::new(),
        };
        let found = name(text.strip_prefix("torch.").unwrap_or(&text));
        found.map(str::to_owned).ok_or_else(|| Failure::of_type(self.what, "plain numbers", text))
    }
}
