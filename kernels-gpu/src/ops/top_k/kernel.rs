//! The kernels, and what they do for a row beside choosing.

mod blocks;
mod cluster;
mod lists;

pub use self::blocks::{choose, count, refine};
pub use self::cluster::choose_in_cluster;
