//! One test a device: a test is a function of a device, and [`on_devices`] makes a case of it for each device that it is
//! for. The name of a case begins with its device's, `cuda::replays_equal_eager_steps`.
//!
//! | cases | device |
//! |---|---|
//! | `cpu::` | the processor |
//! | `emulated::`, `emulated_random::` | the GPU kernels in the emulator, under two schedules |
//! | `cuda::` | the first CUDA device |
//!
//! `cargo test` counts the `cuda::` cases as ignored: whether there is a GPU is known when tests run, not when they are
//! built. `cargo test -- --ignored cuda::` runs them alone, `cargo test -- --include-ignored cuda:: cpu::` beside others.
//! They fail where there is no GPU.

use tokenselect::Device;

/// Cases of this file's tests by the devices that they run on, in this order; what has no tests is left out:
///
/// ```text
/// on_devices! {
///     all: for_every_device, another_one;
///     cpu: for_the_processor;
///     gpus: for_gpu_kernels;
///     cuda: for_a_real_gpu;
/// }
/// ```
///
/// A function that is in none of the lists is reported by the compiler as unused.
macro_rules! on_devices {
    (
        $(all: $($all:ident),+;)?
        $(cpu: $($cpu:ident),+;)?
        $(gpus: $($gpus:ident),+;)?
        $(cuda: $($cuda:ident),+;)?
    ) => {
        on_devices!(@ cpu [] $($($all)+)? $($($cpu)+)?);
        on_devices!(@ emulated [] $($($all)+)? $($($gpus)+)?);
        on_devices!(@ emulated_random [] $($($all)+)? $($($gpus)+)?);
        on_devices!(@ cuda [#[ignore = "needs a GPU"]] $($($all)+)? $($($gpus)+)? $($($cuda)+)?);
    };
    (@ $device:ident $attributes:tt) => {};
    (@ $device:ident $attributes:tt $($case:ident)+) => {
        mod $device {
            $($crate::common::on_devices!(# $device $attributes $case);)+
        }
    };
    (# $device:ident [$($attribute:tt)*] $case:ident) => {
        #[test]
        $($attribute)*
        fn $case() {
            super::$case(&$crate::common::devices::$device());
        }
    };
}
pub(crate) use on_devices;

pub fn cpu() -> Device {
    Device::cpu()
}

pub fn emulated() -> Device {
    Device::emulated()
}

pub fn emulated_random() -> Device {
    Device::emulated_random(7)
}

pub fn cuda() -> Device {
    Device::cuda(0).unwrap_or_else(|error| panic!("`cuda::` cases need a GPU: {error}"))
}
