//! Calls reach the driver with all their arguments, and its results come back. The driver is `examples/fake_driver.rs`.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

mod common;

use std::ffi::{c_uint, c_void};
use std::process::Command;
use std::sync::Mutex;

use tokenselect_cuda_lazy::cust::sys;
use tokenselect_cuda_lazy::{Driver, LoadError, load, load_from};

/// The fake driver remembers one call at a time.
static ONE_CALL: Mutex<()> = Mutex::new(());

fn driver() -> &'static Driver {
    // SAFETY: the functions that it defines have CUDA's signatures.
    unsafe { load_from(&common::example("fake_driver")) }.expect("the fake driver loads")
}

fn recorded(driver: &Driver) -> Vec<u64> {
    let function = driver.symbol(c"fake_recorded").expect("the fake driver records");
    // SAFETY: this is its signature.
    let function = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut u64, usize) -> usize>(function.as_ptr())
    };
    let mut arguments = vec![0; 16];
    // SAFETY: the vector holds 16.
    let count = unsafe { function(arguments.as_mut_ptr(), arguments.len()) };
    arguments.truncate(count);
    arguments
}

/// Launches with eleven arguments, each another number.
fn launch() -> u32 {
    let pointer = |address: usize| std::ptr::without_provenance_mut::<c_void>(address);
    let numbers: [c_uint; 7] = [2, 3, 4, 5, 6, 7, 8];
    let [a, b, c, d, e, f, g] = numbers;
    // SAFETY: the fake driver looks at no pointer.
    let code = unsafe {
        let extra = pointer(11).cast();
        sys::cuLaunchKernel(
            pointer(1).cast(),
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            pointer(9).cast(),
            pointer(10).cast(),
            extra,
        )
    };
    code as u32
}

#[test]
fn arguments_in_registers_and_on_the_stack_arrive() {
    let _guard = ONE_CALL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let driver = driver();
    assert_eq!(launch(), 702);
    assert_eq!(recorded(driver), (1..=11).collect::<Vec<u64>>());
}

#[test]
fn a_floating_point_argument_arrives() {
    let _guard = ONE_CALL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let driver = driver();
    // SAFETY: the fake driver looks at no pointer.
    let code = unsafe { sys::cuTexRefSetMipmapLevelBias(std::ptr::without_provenance_mut(16), -1.5) };
    assert_eq!(code as u32, 0);
    assert_eq!(recorded(driver), [16, u64::from((-1.5_f32).to_bits())]);
}

#[test]
fn return_values_and_out_pointers_come_back() {
    let _guard = ONE_CALL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    driver();
    let mut version = 0;
    // SAFETY: `version` can be written.
    let code = unsafe { sys::cuDriverGetVersion(&mut version) };
    assert_eq!((code as u32, version), (0, 42_000));
    // SAFETY: takes no pointer.
    assert_eq!(unsafe { sys::cuInit(3) } as u32, 1);
}

#[test]
fn functions_that_the_driver_lacks_return_not_found_and_are_listed() {
    let driver = driver();
    assert!(driver.missing().contains(&"cuCtxSynchronize"));
    assert!(!driver.missing().contains(&"cuLaunchKernel"));
    assert_eq!(driver.missing().len(), tokenselect_cuda_lazy::symbols().len() - 4);
    // SAFETY: the function is not there, no argument is looked at.
    assert_eq!(unsafe { sys::cuCtxSynchronize() } as u32, 500);
    assert_eq!(driver.symbol(c"cuNoSuchFunction"), None);
}

#[test]
fn one_driver_a_process() {
    let driver = driver();
    assert!(std::ptr::eq(driver, load().expect("loaded")));
    // SAFETY: nothing is loaded from a path that does not exist.
    let error = unsafe { load_from("/nonexistent".as_ref()) }.expect_err("another is loaded");
    assert!(matches!(error, LoadError::AlreadyLoaded { .. }), "{error}");
}

/// The very first driver call, from many threads at once, without [`load`]: arguments survive the loading.
#[test]
#[ignore = "run by `the_first_call_loads_the_driver`, in a process of its own"]
fn first_call() {
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..16).map(|_| scope.spawn(launch)).collect();
        assert!(calls.into_iter().all(|call| call.join().expect("no panic") == 702));
    });
    let driver = load().expect("loaded by the first call");
    assert_eq!(recorded(driver), (1..=11).collect::<Vec<u64>>());
}

/// As [`first_call`] with an argument in a vector register.
#[test]
#[ignore = "run by `the_first_call_loads_the_driver`, in a process of its own"]
fn first_call_floating_point() {
    // SAFETY: the fake driver looks at no pointer.
    let code = unsafe { sys::cuTexRefSetMipmapLevelBias(std::ptr::without_provenance_mut(16), 2.25) };
    assert_eq!(code as u32, 0);
    let driver = load().expect("loaded by the first call");
    assert_eq!(recorded(driver), [16, u64::from(2.25_f32.to_bits())]);
}

#[test]
fn the_first_call_loads_the_driver() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let name = folder.path().join("libcuda.so.1");
    std::os::unix::fs::symlink(common::example("fake_driver"), name).expect("link");
    for test in ["first_call", "first_call_floating_point"] {
        let mut command = Command::new(std::env::current_exe().expect("path of the test"));
        command.args(["--exact", test, "--ignored"]).env("LD_LIBRARY_PATH", folder.path());
        let output = command.output().expect("run the test");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{test}: {text}");
    }
}
