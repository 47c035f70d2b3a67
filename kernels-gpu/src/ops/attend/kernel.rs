//! What the kernels of attention share.

mod list;
pub(crate) mod rows;
pub(crate) mod splits;
pub(crate) mod tile;

pub(crate) use list::*;
