//! Driver functions stay inside the binary that this crate is linked into.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

mod common;

use std::ffi::c_int;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use tokenselect_cuda_lazy::{cust, load_from};

#[test]
fn binaries_neither_export_nor_import_driver_functions() {
    // Keeps the functions in this binary.
    assert!(cust::init(cust::CudaFlags::all()).is_err());
    for binary in [std::env::current_exe().expect("path of the test"), common::example("plugin")] {
        assert_eq!(common::dynamic_driver_symbols(&binary), Vec::<String>::new(), "{}", binary.display());
        let needed = common::needed(&binary);
        assert!(needed.iter().any(|library| library.starts_with("libc.")), "{needed:?}");
        assert!(!needed.iter().any(|library| library.contains("cuda")), "{needed:?}");
    }
    // The check can fail: a driver does export them.
    assert_eq!(common::dynamic_driver_symbols(&common::example("fake_driver")).len(), 4);
}

/// A process with a real driver in its global scope (as PyTorch leaves it), and a plugin that links this crate.
#[test]
fn neither_side_calls_the_other() {
    // SAFETY: this process uses no driver before.
    assert!(unsafe { load_from("/nonexistent/libcuda.so.1".as_ref()) }.is_err());
    // SAFETY: neither library does anything when it is loaded.
    let (real, plugin) = unsafe {
        let real =
            Library::open(Some(common::example("fake_driver")), RTLD_NOW | RTLD_GLOBAL).expect("driver");
        let plugin = Library::open(Some(common::example("plugin")), RTLD_NOW | RTLD_GLOBAL).expect("plugin");
        (real, plugin)
    };
    // SAFETY: signatures as in `examples/`.
    unsafe {
        let init = plugin.get::<extern "C" fn() -> c_int>(b"plugin_init").expect("plugin_init");
        assert_eq!(init(), 34, "the plugin called the driver of another");
        let by_name =
            real.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"fake_version_by_name").expect("by name");
        let mut version = 0;
        assert_eq!((by_name(&mut version), version), (0, 42_000), "the driver's call went astray");
    }
    // SAFETY: takes no pointer.
    assert_eq!(unsafe { cust::sys::cuInit(0) } as u32, 34, "this process called the driver of another");
}
