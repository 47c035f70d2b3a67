//! Mechanisms that kernels share, one a file.
//!
//! | file | what it is |
//! |---|---|
//! | [`element`], [`layout`], [`rope`] | the storage types; batches, pages and logits in memory; rotary tables |
//! | [`overlap`] | what a kernel may do before the launch before it has ended |
//! | [`fragment`] | operands of the tensor cores, and which lane holds what |
//! | [`softmax`] | largest logit and sum of exponentials: push, merge, log-sum-exp |
//! | [`ring`], [`paged`] | stages of shared memory filled by bulk copies; tiles of pages brought to them |
//! | [`block`] | loops, prefix sums and searches of a block, values gathered from a cluster |
//! | [`radix`] | keys of votes, their histogram, and the bin of the threshold |
//! | [`words`] | pieces of two or four words |

pub mod layout;
pub mod overlap;
pub mod paged;
pub mod radix;
pub mod ring;
pub mod rope;

#[cfg(feature = "kernels")]
pub mod block;
#[cfg(feature = "kernels")]
pub mod element;
#[cfg(feature = "kernels")]
pub mod fragment;
#[cfg(feature = "kernels")]
pub mod softmax;
#[cfg(feature = "kernels")]
pub mod words;
