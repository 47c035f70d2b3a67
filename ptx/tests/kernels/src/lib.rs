//! Two kernels, and one for tests.
#![no_std]
#![cfg_attr(target_arch = "nvptx64", feature(abi_ptx, asm_experimental_arch, stdarch_nvptx))]

#[cfg(not(target_arch = "nvptx64"))]
pub mod emu;

/// A table in constant data.
pub static TABLE: [f32; 5] = [1.0, 2.0, 3.5, 4.0, 9.0];

/// One parameter of 24 bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Params {
    /// `[num]` f32
    pub values: *const f32,
    /// `[num]` f32, written
    pub out: *mut f32,
    /// Number of values.
    pub num: u64,
}

/// 0 out of bounds.
pub fn look_up(values: &[f32], index: usize) -> f32 {
    values.get(index).copied().unwrap_or(0.0) * TABLE[(index + 1) % 5]
}

#[cfg(target_arch = "nvptx64")]
mod device {
    use core::arch::{asm, nvptx};

    use super::{Params, look_up};

    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo) -> ! {
        unsafe { nvptx::trap() }
    }

    #[cfg(feature = "conformance")]
    #[unsafe(no_mangle)]
    unsafe extern "ptx-kernel" fn tested(params: Params) {
        unsafe { params.out.write(1.0) };
    }

    #[cfg(not(feature = "conformance"))]
    #[unsafe(no_mangle)]
    unsafe extern "ptx-kernel" fn checked(params: Params) {
        let index = unsafe { nvptx::_thread_idx_x() } as usize;
        let values = unsafe { core::slice::from_raw_parts(params.values, params.num as usize) };
        unsafe { params.out.add(index).write(look_up(values, index)) };
    }

    #[cfg(not(feature = "conformance"))]
    #[unsafe(no_mangle)]
    unsafe extern "ptx-kernel" fn streamed(params: Params) {
        let bits: u32;
        unsafe {
            asm!("ld.global.nc.L1::no_allocate.b32 {}, [{}];", out(reg32) bits, in(reg64) params.values);
            params.out.write(f32::from_bits(bits));
        }
    }
}
