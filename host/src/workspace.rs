//! The memory of a plan: the buffers between the operations of a step, all reachable, so that a collective can run between
//! two, and which batch each of them holds the results of.

mod progress;

pub(crate) use self::progress::{Progress, Stage};
use crate::config::Positions;
use crate::dtype::{DType, Shape};
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::rope::RopeTable;
use crate::tensor::{Tensor, TensorViewMut};

/// What a step does for a row of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RowAction {
    /// Nothing: the row has no queries, or no tokens.
    Skip = 0,
    /// There are at most `top_k` candidates: every token is selected and nothing is scored.
    Complete = 1,
    /// Score, vote and select.
    Score = 2,
    /// Use the cached selection again.
    Reuse = 3,
}

impl RowAction {
    /// The action with this code, as [`Buffer::Actions`] holds it.
    pub fn from_code(code: u32) -> Option<Self> {
        [RowAction::Skip, RowAction::Complete, RowAction::Score, RowAction::Reuse]
            .into_iter()
            .find(|action| *action as u32 == code)
    }
}

/// Declares the buffers once: name, field, type, and shape by plan.
macro_rules! buffers {
    ($($(#[$doc:meta])* $name:ident $field:ident: $dtype:ident, |$plan:ident| $shape:expr;)*) => {
        /// A buffer of the [`Workspace`].
        ///
        /// Rows are rows of the batch; tokens are placed at [`BatchRow::token_base`](crate::BatchRow::token_base)` + token`. Entries
        /// that the current batch does not use are undefined.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Buffer {
            $($(#[$doc])* $name,)*
        }

        impl Buffer {
            /// Every buffer.
            pub const ALL: [Buffer; [$(stringify!($name)),*].len()] = [$(Buffer::$name),*];

            /// Its element type.
            pub fn dtype(self) -> DType {
                match self { $(Buffer::$name => DType::$dtype,)* }
            }

            /// Its shape in the workspace of a plan.
            pub fn shape(self, plan: &Plan) -> Shape {
                match self { $(Buffer::$name => { let $plan = plan; Shape::from($shape) })* }
            }
        }

        /// Buffers of one step, made once and used by every layer and step.
        ///
        /// Tensor parallelism sums [`Buffer::Votes`] over ranks after `vote`, and [`Buffer::Products`] after `compare`; sequence
        /// parallelism combines [`Buffer::Stats`] over ranks after `score`.
        #[derive(Debug)]
        pub struct Workspace {
            $(pub(crate) $field: Tensor,)*
            /// What the device's kernels use among themselves.
            pub(crate) scratch: Tensor,
            /// Angles of reassigned positions.
            pub(crate) angles: Option<RopeTable>,
            pub(crate) progress: Progress,
        }

        impl Workspace {
            /// Allocates the buffers of a plan where its device works.
            ///
            /// # Errors
            /// [`Error::OutOfMemory`] where they cannot be had.
            pub(crate) fn new(plan: &Plan) -> Result<Self> {
                let device = plan.device();
                Workspace::num_bytes(plan)?;
                let make = |buffer: Buffer| Tensor::zeros_on(device, buffer.dtype(), buffer.shape(plan));
                let mut workspace = Workspace {
                    $($field: make(Buffer::$name)?,)*
                    scratch: Tensor::zeros_on(device, DType::U32, [plan.scratch_words()])?,
                    angles: None,
                    progress: Progress::new(device),
                };
                // Last, since they are computed: what there is no room for fails before.
                if let Positions::Reassigned(rope) = &plan.config().positions {
                    let angles = RopeTable::new(rope, plan.config().heads.head_dim, plan.num_positions())?;
                    if let Some(driver) = device.driver() {
                        angles.device_tables(driver)?; // now, so that no step allocates
                    }
                    workspace.angles = Some(angles);
                }
                Ok(workspace)
            }

            /// One of the buffers.
            pub fn buffer(&self, buffer: Buffer) -> &Tensor {
                match buffer { $(Buffer::$name => &self.$field,)* }
            }

            /// One of the buffers, writable.
            pub(crate) fn buffer_mut(&mut self, buffer: Buffer) -> TensorViewMut<'_> {
                match buffer { $(Buffer::$name => self.$field.view_mut(),)* }
            }
        }
    };
}

buffers! {
    /// `[max_rows, num_qo_heads, head_dim]` f32, written by `pool`: the scoring queries.
    Queries queries: F32, |plan| {
        let heads = plan.config().heads;
        [plan.limits().max_rows, heads.num_qo_heads, heads.head_dim]
    };
    /// `[max_rows, 3]` f64, written by `compare`: scoring query times cached one, scoring query squared, cached one squared,
    /// each over all of this rank's heads; zeros where no cached selection is usable.
    Products products: F64, |plan| [plan.limits().max_rows, 3];
    /// `[max_rows]` f32, written by `pool` and `decide`: cosine with the cached scoring query; -1 where there is none.
    Similarities similarities: F32, |plan| [plan.limits().max_rows];
    /// `[max_rows]` u32, written by `pool` and `decide`: a [`RowAction`].
    Actions actions: U32, |plan| [plan.limits().max_rows];
    /// `[places, num_qo_heads]` f32, written by `score` for candidates: scaled dot products, in an order of the device's own
    /// ([`TokenSelect::logit_index`](crate::TokenSelect::logit_index)).
    Logits logits: F32, |plan| [plan.num_logit_places(), plan.config().heads.num_qo_heads];
    /// `[max_rows, num_qo_heads, 2]` f32, written by `score`: the largest logit over the candidates, and the sum of
    /// `exp(logit - largest)`.
    Stats stats: F32, |plan| [plan.limits().max_rows, plan.config().heads.num_qo_heads, 2];
    /// `[max_kv_tokens]` f32, written by `vote` for candidates: sums of softmax probabilities over heads.
    Votes votes: F32, |plan| [plan.limits().max_kv_tokens];
    /// `[max_kv_tokens]` f32, written by `top_k` where `vote_pool_window` is above 1 (else `[0]`): max-pooled votes.
    PooledVotes pooled_votes: F32, |plan| [
        if plan.votes_are_chosen_from() { 0 } else { plan.limits().max_kv_tokens }
    ];
    /// `[max_rows, top_k]` u32, written by `top_k`: chosen tokens, ascending; only for rows that were scored or reuse a
    /// selection. A row with fewer candidates than `top_k` fills its first places.
    TopK top_k: U32, |plan| [plan.limits().max_rows, plan.config().top_k];
    /// `[max_rows, width]` u32, written by `top_k`: selected tokens. The width is `n_init + top_k + n_local +
    /// max_block_len`, no more than `max_kv_tokens`.
    Selected selected: U32, |plan| plan.selected_shape();
    /// `[max_rows]` u32, written by `top_k`: length of each selected list.
    SelectedLen selected_len: U32, |plan| [plan.limits().max_rows];
}

impl Workspace {
    /// Bytes of the memory that a plan's workspace has. Allocates nothing.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where they do not fit the address space.
    pub fn num_bytes(plan: &Plan) -> Result<usize> {
        let angles = match &plan.config().positions {
            Positions::Native => Some(0),
            Positions::Reassigned(rope) => {
                RopeTable::num_bytes(rope, plan.config().heads.head_dim, plan.num_positions())
            }
        };
        let buffers = Buffer::ALL.map(|buffer| buffer.shape(plan).num_bytes(buffer.dtype()));
        let scratch = plan.scratch_words().checked_mul(DType::U32.size());
        let all = buffers.into_iter().chain([scratch, angles]);
        let sum = all.into_iter().try_fold(0usize, |sum, bytes| sum.checked_add(bytes?));
        let limit = isize::MAX as usize;
        sum.filter(|&sum| sum <= limit).ok_or_else(|| Error::OutOfMemory {
            device: plan.device().name().to_owned(),
            what: "the workspace",
            bytes: sum.unwrap_or(usize::MAX),
        })
    }

    /// The actions that `pool` or `decide` decided on, a [`RowAction`] a row. Rows beyond the current batch are stale. Waits for
    /// earlier work of the device.
    ///
    /// # Errors
    /// [`Error::Driver`] where the device fails.
    pub fn actions(&self) -> Result<Vec<RowAction>> {
        let codes = self.actions.to_vec::<u32>()?;
        Ok(codes.into_iter().map(|code| RowAction::from_code(code).unwrap_or(RowAction::Skip)).collect())
    }

    /// The selected tokens of one row of the current batch, ascending. Waits for earlier work of the device.
    ///
    /// # Errors
    /// [`Error::Order`] before the first selection, [`Error::Index`] where the plan has no such row, [`Error::Driver`] where the
    /// device fails.
    pub fn selected(&self, row: usize) -> Result<Vec<u32>> {
        self.progress.expect_selected("selected")?;
        let lengths = self.selected_len.to_vec::<u32>()?;
        let limit = lengths.len();
        let len = *lengths.get(row).ok_or(Error::Index { what: "row", limit, got: row })? as usize;
        let width = self.selected.shape().dims()[1];
        let all = self.selected.to_vec::<u32>()?;
        // The lengths may have been changed through `buffer_mut`.
        Ok(all[row * width..][..len.min(width)].to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SelectConfig;
    use crate::device::Device;
    use crate::plan::{Limits, Operations};
    use crate::rope::Rope;

    #[test]
    fn num_bytes_is_what_new_allocates() {
        let positions = Positions::Reassigned(Rope::default());
        let config = SelectConfig { vote_pool_window: 3, positions, ..SelectConfig::default() };
        let limits = Limits { max_rows: 3, max_block_len: 7, max_kv_tokens: 1000 };
        let plan = Plan::new(&Device::cpu(), config, limits, Operations::ALL).expect("a valid plan");
        let w = Workspace::new(&plan).expect("little memory");
        let bytes = |t: &Tensor| t.shape().checked_len().expect("allocated") * t.dtype().size();
        let buffers: usize = Buffer::ALL.iter().map(|&buffer| bytes(w.buffer(buffer))).sum();
        let angles = w.angles.as_ref().expect("reassigned positions").table_bytes();
        assert_eq!(Workspace::num_bytes(&plan), Ok(buffers + bytes(&w.scratch) + angles));
    }
}
