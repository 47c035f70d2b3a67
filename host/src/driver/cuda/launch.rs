//! Launches of kernels, with the attributes that `cust`'s bindings lack.

use std::ffi::c_void;
use std::ptr::null_mut;

use cust::sys::{self, CUresult};
use tokenselect_kernels::launch::Dims;

/// `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION`.
const CLUSTER_DIMENSION: u32 = 4;
/// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: a launch may begin while the one before it ends.
const PROGRAMMATIC_STREAM_SERIALIZATION: u32 = 6;

/// `CUlaunchAttribute` of CUDA 11.8, which `cust`'s bindings lack.
#[repr(C)]
pub(super) struct LaunchAttribute {
    id: u32,
    reserved: u32,
    value: [u64; 8],
}
const _: () = assert!(size_of::<LaunchAttribute>() == 72);

impl LaunchAttribute {
    pub(super) fn overlapping() -> Self {
        LaunchAttribute {
            id: PROGRAMMATIC_STREAM_SERIALIZATION,
            reserved: 0,
            value: [1, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    /// Clusters of so many blocks along the first axis: three words of 32 bits.
    pub(super) fn cluster_of(blocks: u32) -> Self {
        let value = [u64::from(blocks) | 1 << 32, 1, 0, 0, 0, 0, 0, 0];
        LaunchAttribute { id: CLUSTER_DIMENSION, reserved: 0, value }
    }
}

/// `CUlaunchConfig`.
#[repr(C)]
pub(super) struct LaunchConfig {
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) shared_bytes: u32,
    pub(super) stream: sys::CUstream,
    pub(super) attributes: *mut LaunchAttribute,
    pub(super) num_attributes: u32,
}
const _: () = assert!(size_of::<LaunchConfig>() == 56);

/// `cuLaunchKernelEx`.
pub(super) type LaunchKernelEx = unsafe extern "C" fn(
    *const LaunchConfig,
    sys::CUfunction,
    *mut *mut c_void,
    *mut *mut c_void,
) -> CUresult;

/// One launch.
pub(super) struct Launch<'a> {
    pub function: sys::CUfunction,
    pub dims: Dims,
    /// The bytes of the kernel's one argument.
    pub params: &'a [u8],
    pub stream: sys::CUstream,
}

impl Launch<'_> {
    /// Puts the kernel in the stream, through `extended` where the driver has it. Returns the name of the call and its answer.
    ///
    /// # Safety
    /// - `params` are the kernel's parameters, its own rules hold for them, and its context is current.
    /// - With `overlaps`, the kernel waits for those before it, as `overlap` of the kernels demands, before it reads or writes
    ///   what those have written.
    pub unsafe fn put(&self, extended: Option<LaunchKernelEx>, overlaps: bool) -> (&'static str, CUresult) {
        let Launch { function, dims, params, stream } = *self;
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        let arguments = arguments.as_mut_ptr();
        let Some(launch) = extended else {
            let ([gx, gy, gz], [bx, by, bz], shared) = (dims.grid, dims.block, dims.shared_bytes);
            // SAFETY: one argument, of the size that the kernel takes; the rest is the caller's promise.
            let code = unsafe {
                sys::cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, null_mut())
            };
            return ("cuLaunchKernel", code);
        };
        let mut attributes = [LaunchAttribute::overlapping(), LaunchAttribute::cluster_of(dims.cluster)];
        // The first of the two, the second, both or none.
        let attributes = &mut attributes[usize::from(!overlaps)..1 + usize::from(dims.cluster > 1)];
        let config = LaunchConfig {
            grid: dims.grid,
            block: dims.block,
            shared_bytes: dims.shared_bytes,
            stream,
            attributes: attributes.as_mut_ptr(),
            num_attributes: attributes.len() as u32,
        };
        // SAFETY: as above; configuration and attributes live through the call.
        ("cuLaunchKernelEx", unsafe { launch(&config, function, arguments, null_mut()) })
    }
}
