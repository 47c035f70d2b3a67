//! What arguments must be.

use tokenselect_kernels::ops::append::PIECE;

use super::{StepOutput, TokenSelect};
use crate::backend::{Ranks, Selection};
use crate::batch::{Batch, Needs};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kv::{K_STRIDES, KvStorageMut, KvStrides, KvView, KvViewMut, V_STRIDES};
use crate::ledger::{Access, OwnedLayer};
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::TensorView;

/// What errors call lists of tokens and their lengths.
#[derive(Debug, Clone, Copy)]
pub(super) struct ListNames {
    tokens: &'static str,
    len: &'static str,
}

/// The lists that [`Over::Lists`](super::Over::Lists) was given.
pub(super) const LISTS: ListNames = ListNames { tokens: "selection.tokens", len: "selection.len" };

/// Those of the workspace.
pub(super) const OWN_LISTS: ListNames = ListNames { tokens: "Buffer::Selected", len: "Buffer::SelectedLen" };

/// Kernels move 16 bytes at a time.
const ALIGN: u64 = 16;

impl TokenSelect {
    /// A batch within the limits, which no other one has replaced in its slot.
    pub(super) fn check_batch(&self, batch: &Batch) -> Result<()> {
        self.plan.check(batch)?;
        batch.expect_latest()?;
        batch.check_device(self.device())?;
        let (config, limits) = (self.config(), self.plan.limits());
        let needs = Needs {
            max_kv_tokens: limits.max_kv_tokens,
            max_selected: config.max_selected(limits.max_block_len),
            top_k: config.top_k,
            ..Needs::NONE
        };
        self.note_needs(batch, needs);
        self.device().keep(|| batch.device_memory());
        Ok(())
    }

    /// A layer of an owned cache: that the batch is the cache's, as it is now, and that the layer has what the operation builds on.
    /// Over page tables of the caller's own, which no cache made, it may be read as another engine's memory is.
    pub(super) fn check_owner(
        &self,
        op: &'static str,
        batch: &Batch,
        owner: Option<OwnedLayer<'_>>,
        access: Access,
    ) -> Result<()> {
        let Some(owner) = owner else { return Ok(()) };
        owner.check_positions(self.config().positions.are_reassigned())?;
        if access == Access::Read && batch.allocator() == 0 {
            return Ok(());
        }
        owner.check(self.device(), op, batch, access)
    }

    /// Counts what was appended to a layer of an owned cache.
    pub(super) fn wrote(&self, batch: &Batch, owner: Option<OwnedLayer<'_>>) {
        if let Some(owner) = owner {
            owner.wrote(self.device(), batch);
        }
    }

    /// While work is recorded: what a batch must keep that is put in the slot later.
    fn note_needs(&self, batch: &Batch, needs: Needs) {
        let identity = batch.identity().clone();
        self.device().at_end_of_recording(move || identity.need(needs));
    }

    /// A layer that is appended to, and what is.
    pub(super) fn check_append(
        &self,
        op: &'static str,
        batch: &Batch,
        kv: &KvViewMut<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
    ) -> Result<()> {
        let config = self.config();
        kv.expect(&config.heads, config.dtype, batch.page_size())?;
        self.check_pages(batch, kv.shape().num_pages)?;
        let shape = [batch.num_query_tokens(), config.heads.num_kv_heads, config.heads.head_dim];
        k.expect_heads("k", config.dtype, shape)?;
        v.expect_heads("v", config.dtype, shape)?;
        self.check_heads("k", k)?;
        self.check_heads("v", v)?;
        if let KvStorageMut::Combined { offsets, .. } = &kv.storage {
            for &offset in offsets {
                self.check_pieces("offsets", offset)?;
            }
        }
        for (what, pages) in kv.storage.tensors() {
            self.check_place(what, &pages)?;
        }
        self.check_strides(K_STRIDES, kv.k_strides)?;
        self.check_strides(V_STRIDES, kv.v_strides)?;
        if batch.is_partial() {
            return Err(Error::Missing { op, needs: "a batch of whole sequences" });
        }
        self.note_needs(batch, Needs { appends: true, ..Needs::NONE });
        batch.check_written_pages()
    }

    /// A layer that is read.
    pub(super) fn check_kv(&self, batch: &Batch, kv: &KvView<'_>) -> Result<()> {
        let config = self.config();
        kv.expect(&config.heads, config.dtype, batch.page_size())?;
        self.check_place("k pages", &kv.k)?;
        self.check_place("v pages", &kv.v)?;
        self.check_strides(K_STRIDES, kv.k_strides)?;
        self.check_strides(V_STRIDES, kv.v_strides)?;
        self.check_pages(batch, kv.shape().num_pages)
    }

    /// A tensor where the device works, as it needs it.
    pub(super) fn check_place(&self, what: &'static str, tensor: &TensorView<'_>) -> Result<()> {
        tensor.expect_on(what, self.device(), ALIGN)
    }

    /// Queries, keys or values where the device works, in distances that it can go.
    fn check_heads(&self, what: &'static str, heads: &TensorView<'_>) -> Result<()> {
        self.check_place(what, heads)?;
        for stride in heads.head_strides() {
            if !self.moves(stride) {
                let rule = format!("of strides that are multiples of {PIECE} elements on a GPU");
                return Err(Error::argument(what, rule, stride));
            }
            if !self.device().is_cpu() && u32::try_from(stride).is_err() {
                let rule = format!("of strides up to {} elements on a GPU", u32::MAX);
                return Err(Error::argument(what, rule, stride));
            }
        }
        Ok(())
    }

    /// Strides of whole pieces.
    fn check_strides(&self, [page, token, head]: [&'static str; 3], strides: KvStrides) -> Result<()> {
        self.check_pieces(page, strides.page)?;
        self.check_pieces(token, strides.token)?;
        self.check_pieces(head, strides.head)
    }

    /// Whether a distance is one that the device can go: a GPU moves whole pieces.
    fn moves(&self, distance: usize) -> bool {
        self.device().is_cpu() || distance.is_multiple_of(PIECE as usize)
    }

    fn check_pieces(&self, what: &'static str, got: usize) -> Result<()> {
        if self.moves(got) {
            return Ok(());
        }
        Err(Error::argument(what, format!("a multiple of {PIECE} elements on a GPU"), got))
    }

    /// Page numbers within the pool.
    fn check_pages(&self, batch: &Batch, num_pages: usize) -> Result<()> {
        self.note_needs(batch, Needs { num_pages, ..Needs::NONE });
        batch.check_pages(num_pages)
    }

    pub(super) fn check_queries(&self, batch: &Batch, q: &TensorView<'_>) -> Result<()> {
        let config = self.config();
        let shape = [batch.num_query_tokens(), config.heads.num_qo_heads, config.heads.head_dim];
        q.expect_heads("q", config.dtype, shape)?;
        self.check_heads("q", q)
    }

    pub(super) fn check_output(&self, batch: &Batch, output: &StepOutput<'_>) -> Result<()> {
        let config = self.config();
        let (tokens, hq) = (batch.num_query_tokens(), config.heads.num_qo_heads);
        let allowed: &[DType] =
            if config.dtype == DType::F32 { &[DType::F32] } else { &[config.dtype, DType::F32] };
        output.out.expect("out", allowed, [tokens, hq, config.heads.head_dim])?;
        self.check_place("out", &output.out.as_view())?;
        if let Some(lse) = &output.lse {
            lse.expect("lse", &[DType::F32], [tokens, hq])?;
            self.check_place("lse", &lse.as_view())?;
        }
        Ok(())
    }

    /// Cached selections, if any are given, and a batch for them.
    pub(super) fn check_cached(
        &self,
        op: &'static str,
        batch: &Batch,
        cached: Option<&SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        self.check_named(op, batch, cached)?;
        self.check_cached_tables(batch, cached)
    }

    /// The sequences that cached selections are of, where they are used.
    pub(super) fn check_named(
        &self,
        op: &'static str,
        batch: &Batch,
        cached: Option<&SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        let may_use = cached.is_some()
            && self.config().selection_cache.is_some()
            && !batch.is_partial()
            && !batch.is_in_blocks();
        if may_use && !batch.has_sequences() {
            let needs = "a batch with `sequence_indices` where cached selections are given";
            return Err(Error::Missing { op, needs });
        }
        Ok(())
    }

    /// The tables of cached selections.
    pub(super) fn check_cached_tables(
        &self,
        batch: &Batch,
        cached: Option<&SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        let Some(cached) = cached else { return Ok(()) };
        let config = self.config();
        let limit = cached.ages.shape().dims().first().copied().unwrap_or(0);
        let query_len = config.heads.num_qo_heads * config.heads.head_dim;
        cached.queries.expect("cached.queries", &[DType::F32], [limit, query_len])?;
        cached.selections.expect("cached.selections", &[DType::U32], [limit, config.top_k])?;
        cached.ages.expect("cached.ages", &[DType::U32], [limit])?;
        cached.made_at.expect("cached.made_at", &[DType::U32], [limit])?;
        cached.counters.expect("cached.counters", &[DType::U64], [3])?;
        self.check_place("cached.queries", &cached.queries.as_view())?;
        // Kernels read these one at a time: a layer's part may begin anywhere.
        for (what, table) in [
            ("cached.selections", &cached.selections),
            ("cached.ages", &cached.ages),
            ("cached.made_at", &cached.made_at),
            ("cached.counters", &cached.counters),
        ] {
            table.as_view().expect_on(what, self.device(), table.dtype().size() as u64)?;
        }
        self.note_needs(batch, Needs { num_sequences: limit, ..Needs::NONE });
        batch.check_sequences(limit)
    }

    /// Parts of sequences need the ranks of their tokens.
    pub(super) fn check_ranks(&self, batch: &Batch, ranks: Option<&Ranks<'_>>) -> Result<()> {
        if ranks.is_none() && batch.is_partial() {
            return Err(Error::Missing { op: "attend", needs: "ranks for a batch of parts of sequences" });
        }
        Ok(())
    }

    /// What lists of the caller's must be, as far as that is known without waiting for a device.
    pub(super) fn check_lists(
        &self,
        batch: &Batch,
        selection: &Selection<'_>,
        names: ListNames,
    ) -> Result<()> {
        let rows = selection.len.shape().dims().first().copied().unwrap_or(0);
        if rows < batch.num_rows() {
            let (expected, got) = ([batch.num_rows()].into(), [rows].into());
            return Err(Error::Shape { what: names.len, expected, got });
        }
        let width = selection.tokens.shape().dims().last().copied().unwrap_or(0);
        selection.len.expect(names.len, &[DType::U32], [rows])?;
        selection.tokens.expect(names.tokens, &[DType::U32], [rows, width])?;
        if let Some(ranks) = &selection.ranks {
            ranks.ranks.expect("selection.ranks", &[DType::U32], [rows, width])?;
            ranks.total_len.expect("selection.total_len", &[DType::U32], [rows])?;
            self.check_place("selection.ranks", &ranks.ranks)?;
            self.check_place("selection.total_len", &ranks.total_len)?;
        }
        self.check_place(names.tokens, &selection.tokens)?;
        self.check_place(names.len, &selection.len)?;
        self.check_ranks(batch, selection.ranks.as_ref())?;
        if !selection.len.is_on_host() {
            return Ok(()); // looking at the lists would wait for the device
        }
        let lens = selection.len.as_slice::<u32>()?;
        let tokens = selection.tokens.as_slice::<u32>()?;
        for row in (0..batch.num_rows()).filter(|&row| batch.block_len(row) > 0) {
            let len = lens[row] as usize;
            if len > width {
                return Err(Error::row(row, names.len, format!("at most {width}"), len));
            }
            let list = &tokens[row * width..][..len];
            check_list(row, names.tokens, list, batch.kv_len(row))?;
            let (mut total, mut total_name) = (len, names.len);
            if let Some(ranks) = &selection.ranks {
                total = ranks.total_len.as_slice::<u32>()?[row] as usize;
                total_name = "selection.total_len";
                let list = &ranks.ranks.as_slice::<u32>()?[row * width..][..len];
                check_list(row, "selection.ranks", list, total)?;
            }
            if total > 0 && total < batch.block_len(row) {
                let rule = format!("0 or at least the block's length, {}", batch.block_len(row));
                return Err(Error::row(row, total_name, rule, total));
            }
            let limit = self.plan.num_positions();
            if total > limit && self.config().positions.are_reassigned() {
                return Err(Error::Limit { what: "positions", limit, got: total });
            }
        }
        Ok(())
    }
}

/// Checks that a list ascends strictly and stays below `limit`.
fn check_list(row: usize, what: &'static str, list: &[u32], limit: usize) -> Result<()> {
    if let Some(pair) = list.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(Error::row(row, what, format!("ascending, so above {}", pair[0]), pair[1]));
    }
    match list.last() {
        Some(&last) if last as usize >= limit => Err(Error::row(row, what, format!("below {limit}"), last)),
        _ => Ok(()),
    }
}
