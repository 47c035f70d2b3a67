//! The kernels of tokenselect, in Rust. One source, two targets.
//!
//! | target | what a kernel becomes | how it is started |
//! |---|---|---|
//! | `nvptx64-nvidia-cuda` | a PTX entry point ([`entries`]) | by the CUDA driver |
//! | the host, feature `emulator` | a function that 32 to 1024 coroutines run | by [`emu::Launch`] |
//! | the host, without it | nothing: only parameters, launch dimensions and layouts are left | |
//!
//! A kernel knows [`simt`] alone, a narrow machine with one implementation per target. [`element`](common::element) carries what
//! differs between the storage types, [`launch`] the launch dimensions and the checks that every launch passes.
//!
//! The device compiler needs three unstable features (the PTX calling convention, the NVPTX intrinsics and inline
//! PTX); host builds use stable Rust.
#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(not(feature = "emulator"), no_std)]
// Parameters link to their kernels, which a host without the emulator does not have.
#![cfg_attr(not(feature = "kernels"), allow(rustdoc::broken_intra_doc_links))]
// Of a layout of shared memory a host without kernels needs the byte count alone.
#![cfg_attr(not(feature = "kernels"), allow(dead_code))]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch, stdarch_nvptx))]

#[cfg(all(target_arch = "nvptx64", feature = "emulator"))]
compile_error!("the feature `emulator` is for host builds: a GPU has no CPU to emulate itself on");
#[cfg(all(feature = "kernels", not(any(target_arch = "nvptx64", feature = "emulator"))))]
compile_error!("a host runs kernels in the emulator alone: take the feature `emulator`");

pub mod common;
#[cfg(feature = "conformance")]
pub mod conformance;
#[cfg(feature = "emulator")]
pub mod emu;
pub mod entries;
pub mod launch;
pub mod limits;
pub mod ops;
pub mod simt;

/// A kernel has nobody to tell: it stops the launch, and the driver reports an illegal instruction.
#[cfg(target_arch = "nvptx64")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    unsafe { core::arch::nvptx::trap() }
}
