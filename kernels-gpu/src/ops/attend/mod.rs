//! What the attention kernels share: parameters, where the places of a list lie, and the arithmetic of one logit.
//!
//! A row attends to a *list* of tokens, or to all of its tokens. A *place* is a position in the list; the *rank* of a place is
//! its position in the whole list, which differs from the place only where the list is a partial one: some tokens of a longer.
//! With `m` the length of the whole list, query `t` of a block of `T` sees the ranks up to `m - T + t`, and is rotated
//! at `m - T + t` (docs/definitions.md).
//!
//! **Wrong lists.** Lists lie in device memory, where the host cannot check them. So a list's length counts as no more than the
//! width of the lists, a token as no more than the row's last, a rank as no more than the last position of the tables of angles,
//! and the length of a whole list as no more than one above that; the list of a row without tokens is empty. What attention over
//! a wrong list gives is not specified, but no access is out of bounds, and other rows have no part in it.
//!
//! The query heads of a group and the tokens of a block read the same keys, so they are packed: row `i` of a KV head's
//! *query rows* is query `i / G` of the block in head `i % G` of the group.

mod params;
pub use params::*;

#[cfg(feature = "kernels")]
pub(crate) mod kernel;
