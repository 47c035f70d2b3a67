//! Versions of the library and of its interface.

/// Version of the interface. Raised when a function or structure changes in a way that old programs do not survive.
pub const TS_ABI_VERSION: u32 = 2;

/// Version of the library that this header is of, `0.1.0` being 0, 1 and 0: for `#if`.
pub const TS_VERSION_MAJOR: u32 = 0;
/// See `TS_VERSION_MAJOR`.
pub const TS_VERSION_MINOR: u32 = 1;
/// See `TS_VERSION_MAJOR`.
pub const TS_VERSION_PATCH: u32 = 0;

// The header has literals alone: they are the package's.
const _: () = {
    assert!(
        TS_VERSION_MAJOR == number(env!("CARGO_PKG_VERSION_MAJOR")),
        "TS_VERSION_MAJOR is not the package's"
    );
    assert!(
        TS_VERSION_MINOR == number(env!("CARGO_PKG_VERSION_MINOR")),
        "TS_VERSION_MINOR is not the package's"
    );
    assert!(
        TS_VERSION_PATCH == number(env!("CARGO_PKG_VERSION_PATCH")),
        "TS_VERSION_PATCH is not the package's"
    );
};

const fn number(digits: &str) -> u32 {
    match u32::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => u32::MAX, // no version: the assertion says which
    }
}

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
