//! Versions of the library and of its interface.

/// Version of the interface. Raised when a function or structure changes in a way that old programs do not survive.
pub const TS_ABI_VERSION: u32 = 2;

/// `TS_ABI_VERSION` of the library that was loaded, to be compared with that of the header.
#[unsafe(no_mangle)]
pub extern "C" fn ts_abi_version() -> u32 {
    TS_ABI_VERSION
}

/// Version of the library: `0.1.0`. Static, never null.
#[unsafe(no_mangle)]
pub extern "C" fn ts_version() -> *const std::ffi::c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}
