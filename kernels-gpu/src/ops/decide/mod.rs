//! `decide`: what is to be done for each row, by the products of [`compare`](mod@crate::ops::compare) that all devices have added.
//!
//! ```text
//! for each row r:
//!     similarity = products[r].0 / (sqrt(products[r].1) * sqrt(products[r].2))      f64, rounded to f32; -1 if none is usable
//!     action[r]  = Skip, Complete, Reuse or Score                                   as pool does
//! ```
//! **Thread mapping.** A thread per row.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
