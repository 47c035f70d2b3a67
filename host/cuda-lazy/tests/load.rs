//! The system's own driver, or its absence.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use tokenselect_cuda_lazy::{LoadError, cust, load};

#[test]
fn the_system_has_a_driver_or_a_reason() {
    let initialised = cust::init(cust::CudaFlags::empty());
    let threads: Vec<_> = (0..8).map(|_| std::thread::spawn(load)).collect();
    let results: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
    match &results[0] {
        Ok(driver) => {
            println!("driver {}, without {:?}", driver.library().display(), driver.missing());
            assert!(
                results.iter().all(|other| other.as_ref().is_ok_and(|other| std::ptr::eq(*driver, *other)))
            );
            assert!(!driver.missing().contains(&"cuLaunchKernel"));
        }
        Err(error @ LoadError::NotFound { tried }) => {
            println!("SKIPPED with a driver, there is none: {error}");
            assert!(initialised.is_err());
            assert!(tried[0].0.ends_with("libcuda.so.1"), "{tried:?}");
            assert!(results.iter().all(|other| other.as_ref().err() == Some(error)));
        }
        Err(error) => panic!("{error}"),
    }
}
