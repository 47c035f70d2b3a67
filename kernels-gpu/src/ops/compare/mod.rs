//! `compare`: what the cosine of a row's scoring query and the cached one is made of, for tensor parallelism.
//!
//! ```text
//! for each row r with a usable cached selection:
//!     products[r] = (query[r] . cached, |query[r]|^2, |cached|^2)      over the heads that are here
//! for each other row:
//!     products[r] = (0, 0, 0)
//! ```
//! Devices that share the heads of a layer add their products; [`decide`](mod@crate::ops::decide) goes on from there. All of it is
//! f64: a product of two f32 is exact in it, and sums of such products stay in its range.
//!
//! **Thread mapping.** A block per row; each thread takes four elements at a time. Their sums are added in a fixed order, so the
//! result does not depend on the launch.
//!
//! **Bytes.** Both queries once: `num_rows * num_qo_heads * head_dim * 8`.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub mod kernel;
