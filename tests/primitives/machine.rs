//! Where conformance kernels run: the emulator, under one schedule of many, and a GPU.

use tokenselect::{DType, Device, Tensor, TensorView, TensorViewMut};
use tokenselect_kernels::emu::{Launch, Memory, Options, Order};
use tokenselect_kernels::entries::Entry;
use tokenselect_kernels::launch::Dims;
use tokenselect_kernels::simt::data::Pod;
use tokenselect_kernels::simt::global::{GlobalMut, GlobalPtr};

use crate::common;

/// A device without allocations, real or emulated.
pub enum Machine {
    Emulated {
        memory: Memory,
        options: Options,
    },
    Gpu {
        device: Device,
        /// What keeps the memory alive.
        tensors: Vec<Tensor>,
    },
}

/// Where the kernels of a case run.
#[derive(Clone, Copy)]
pub enum On {
    Emulator,
    Gpu,
}

impl On {
    /// The emulator under five schedules, or the first CUDA device.
    pub fn machines(self) -> Vec<Machine> {
        if let On::Gpu = self {
            return vec![Machine::gpu()];
        }
        let fixed = [Order::Forward, Order::Reverse].map(|order| Options { order, ..Options::default() });
        let schedules = fixed.into_iter().chain((0..3).map(Options::random));
        schedules.map(|options| Machine::emulated(Options { threads: 2, ..options })).collect()
    }

    /// The emulator under one schedule, or the first CUDA device.
    pub fn machine(self, options: Options) -> Machine {
        match self {
            On::Emulator => Machine::emulated(options),
            On::Gpu => Machine::gpu(),
        }
    }
}

/// Two cases of each test, which is a function of [`On`]: as `common::on_devices`, for single kernels.
macro_rules! on_machines {
    ($($case:ident),+ $(,)?) => {
        mod emulated {
            $(
                #[test]
                fn $case() {
                    super::$case($crate::machine::On::Emulator);
                }
            )+
        }
        mod cuda {
            $(
                #[test]
                #[ignore = "needs a GPU"]
                fn $case() {
                    super::$case($crate::machine::On::Gpu);
                }
            )+
        }
    };
}
pub(crate) use on_machines;

impl Machine {
    fn emulated(options: Options) -> Machine {
        // As on a GPU, where launches of a device may overlap.
        Machine::Emulated { memory: Memory::new(), options: Options { overlap: true, ..options } }
    }

    fn gpu() -> Machine {
        Machine::Gpu { device: common::devices::cuda(), tensors: Vec::new() }
    }

    /// An allocation that holds `values` and that kernels do not write, which the emulator checks.
    pub fn input<T: Pod>(&mut self, name: &str, values: &[T]) -> GlobalPtr<T> {
        match self {
            Machine::Emulated { memory, .. } => memory.input(name, values),
            Machine::Gpu { .. } => self.buffer(name, values).as_const(),
        }
    }

    /// An allocation that holds `values`.
    pub fn buffer<T: Pod>(&mut self, name: &str, values: &[T]) -> GlobalMut<T> {
        let buffer = self.alloc(name, values.len());
        self.write(buffer, values);
        buffer
    }

    /// An uninitialised allocation of `len` elements: all bytes 0xff.
    pub fn alloc<T: Pod>(&mut self, name: &str, len: usize) -> GlobalMut<T> {
        match self {
            Machine::Emulated { memory, .. } => memory.alloc(name, len),
            Machine::Gpu { device, tensors } => {
                let ones = vec![u32::MAX; (len * size_of::<T>()).div_ceil(4)];
                let tensor = Tensor::from_slice_on(device, &ones, [ones.len()]).unwrap();
                let addr = tensor.view().device_addr().unwrap();
                tensors.push(tensor);
                GlobalMut::from_addr(addr)
            }
        }
    }

    /// Overwrites an allocation from its start on.
    pub fn write<T: Pod>(&mut self, to: GlobalMut<T>, values: &[T]) {
        match self {
            Machine::Emulated { memory, .. } => memory.write(to, values),
            Machine::Gpu { device, .. } => {
                let mut words = vec![u32::MAX; size_of_val(values).div_ceil(4)];
                // SAFETY: room for the bytes; any bits are a `u32`.
                unsafe {
                    let bytes = words.as_mut_ptr().cast::<u8>();
                    bytes.copy_from_nonoverlapping(values.as_ptr().cast(), size_of_val(values));
                }
                let from = TensorView::new(&words, [words.len()]).unwrap();
                // SAFETY: an allocation of at least so many words, which nothing else uses.
                let to = unsafe {
                    TensorViewMut::from_device_addr(device, to.addr(), from.dtype(), from.shape()).unwrap()
                };
                to.copy_from(from).unwrap();
            }
        }
    }

    /// The first `len` elements of an allocation.
    pub fn read<T: Pod>(&self, from: GlobalMut<T>, len: usize) -> Vec<T> {
        match self {
            Machine::Emulated { memory, .. } => memory.read(from, len),
            Machine::Gpu { device, .. } => {
                let words = (len * size_of::<T>()).div_ceil(4);
                // SAFETY: an allocation of at least so many words, and launches are waited for.
                let words = unsafe { TensorView::from_device_addr(device, from.addr(), DType::U32, [words]) };
                let words: Vec<u32> = words.and_then(|view| view.to_vec()).unwrap();
                // SAFETY: inside the vector; any bits are a `T`.
                (0..len).map(|i| unsafe { words.as_ptr().cast::<T>().add(i).read_unaligned() }).collect()
            }
        }
    }

    /// Launches an entry by name, and panics if that fails or breaks a rule.
    #[track_caller]
    pub fn launch<P: Copy + Sync>(&self, name: &str, dims: Dims, params: P) {
        match self {
            Machine::Emulated { memory, options } => {
                let entry = Entry::named(name).unwrap();
                assert_eq!(entry.param_bytes, size_of::<P>(), "the parameters of another entry");
                let run = || unsafe { (entry.run)((&raw const params).cast()) };
                let launch = Launch { kernel: name, dims, memory, options: *options };
                launch.run(run).unwrap_or_else(|report| panic!("{:?}: {report}", options.order));
            }
            Machine::Gpu { device, .. } => {
                // SAFETY: the rules of a conformance kernel, which the emulator has checked before.
                let launched = unsafe { device.launch(name, dims, &params) };
                launched.and_then(|()| device.synchronize()).unwrap_or_else(|error| panic!("{error}"));
            }
        }
    }
}
