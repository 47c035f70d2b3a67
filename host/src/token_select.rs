//! The object that runs steps: configuration, device and workspace in one.

use kernels_gpu::common::layout::{LOGIT_TILE, logit_tile};

use crate::backend::{AppendArgs, AttendArgs, MergeArgs, SelectArgs, SelectedKv, Selection};
use crate::batch::Batch;
use crate::cache::{KvView, KvViewMut, PagedKvCache};
use crate::config::SelectConfig;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::plan::{Limits, Plan};
use crate::selection_cache::SelectionCacheLayer;
use crate::tensor::{DType, TensorView, TensorViewMut};
use crate::workspace::Workspace;

/// Inputs of a step of one layer.
#[derive(Debug, Clone, Copy)]
pub struct StepInput<'a> {
    /// `[num_query_tokens, num_qo_heads, head_dim]`, the configuration's type: queries of all rows.
    pub q: TensorView<'a>,
    /// `[num_query_tokens, num_kv_heads, head_dim]`, the configuration's type: keys to append.
    pub k: TensorView<'a>,
    /// As `k`: values to append.
    pub v: TensorView<'a>,
}

/// Outputs of a step of one layer.
#[derive(Debug)]
pub struct StepOutput<'a> {
    /// `[num_query_tokens, num_qo_heads, head_dim]`, the configuration's type or f32, written.
    pub out: TensorViewMut<'a>,
    /// `[num_query_tokens, num_qo_heads]` f32, written: natural log of the sum of exponentials.
    pub lse: Option<TensorViewMut<'a>>,
}

/// Runs token selection and attention on a device: whole steps ([`step`](Self::step)), or one operation at
/// a time with the [`workspace`](Self::workspace) between them.
///
/// One object serves all layers and sequences of a model in turn. Operations check shapes, types and limits
/// first; where one returns an error, nothing was written.
#[derive(Debug)]
pub struct TokenSelect {
    device: Device,
    plan: Plan,
    workspace: Workspace,
}

impl TokenSelect {
    /// Validates the configuration, allocates a workspace for batches within `limits`, and loads the kernels of the
    /// configuration, which takes seconds the first time that a GPU's driver compiles them.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field that breaks its rule; [`Error::Driver`].
    pub fn new(device: &Device, config: SelectConfig, limits: Limits) -> Result<Self> {
        let plan = Plan::new(config, limits)?;
        if let (Some(rope), Some(driver)) = (plan.rope(), device.driver()) {
            rope.device_tables(driver)?; // now, so that no step allocates
        }
        device.backend().prepare(plan.config())?;
        let workspace = Workspace::new(device, &plan)?;
        Ok(TokenSelect { device: device.clone(), plan, workspace })
    }

    /// The configuration.
    pub fn config(&self) -> &SelectConfig {
        self.plan.config()
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The buffers between operations.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// The buffers between operations, for a collective that changes them.
    pub fn workspace_mut(&mut self) -> &mut Workspace {
        &mut self.workspace
    }

    /// One step of one layer of an owned cache: append keys and values, select, attend.
    ///
    /// `batch` comes from [`PagedKvCache::extend`]. Selections are reused if both the configuration and the
    /// cache have a Selection Cache.
    ///
    /// # Errors
    /// A typed error for every wrong shape, type, layer, limit, or stale batch; then nothing was written.
    pub fn step(
        &mut self,
        cache: &mut PagedKvCache,
        layer: usize,
        batch: &Batch,
        input: StepInput<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        self.check_step(cache, layer, batch, &input, &output)?;
        let (kv, selections) = cache.layer_mut(layer)?;
        let cached = selections.map(|selections| selections.layer_mut(layer)).transpose()?;
        self.run_select(batch, SelectedKv::Append { kv, k: input.k, v: input.v }, input.q, cached)?;
        self.attend(batch, cache.layer(layer)?, input.q, output)
    }

    /// [`append`](Self::append), then [`select`](Self::select), in fewer launches where blocks are short. With
    /// [`attend`](Self::attend) after it, a step over a borrowed cache.
    ///
    /// # Errors
    /// Those of the two; then nothing was written.
    pub fn append_select(
        &mut self,
        batch: &Batch,
        kv: KvViewMut<'_>,
        input: StepInput<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        self.check_append(batch, &kv, &input.k, &input.v)?;
        self.check_queries(batch, &input.q)?;
        if let Some(cached) = &cached {
            self.check_cached(batch, cached)?;
        }
        self.run_select(batch, SelectedKv::Append { kv, k: input.k, v: input.v }, input.q, cached)
    }

    /// One step of one layer of an owned cache with dense attention: append keys and values, attend to all.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_dense(
        &mut self,
        cache: &mut PagedKvCache,
        layer: usize,
        batch: &Batch,
        input: StepInput<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        self.check_step(cache, layer, batch, &input, &output)?;
        let (kv, _) = cache.layer_mut(layer)?;
        self.device.backend().append(AppendArgs { batch, k: input.k, v: input.v, kv })?;
        self.attend_dense(batch, cache.layer(layer)?, input.q, output)
    }

    /// Checks all arguments of a step, so that nothing is half done.
    fn check_step(
        &self,
        cache: &mut PagedKvCache,
        layer: usize,
        batch: &Batch,
        input: &StepInput<'_>,
        output: &StepOutput<'_>,
    ) -> Result<()> {
        cache.check(batch)?;
        let (kv, selections) = cache.layer_mut(layer)?;
        self.check_queries(batch, &input.q)?;
        self.check_output(batch, output)?;
        if let Some(selections) = selections {
            self.check_cached(batch, &selections.layer_mut(layer)?)?;
        }
        self.check_append(batch, &kv, &input.k, &input.v)
    }

    /// A selection of checked arguments.
    fn run_select(
        &mut self,
        batch: &Batch,
        kv: SelectedKv<'_>,
        q: TensorView<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        self.workspace.check(&self.plan)?;
        let cached = cached.filter(|_| self.caches(batch));
        let (plan, workspace) = (&self.plan, &mut self.workspace);
        self.device.backend().select(SelectArgs { plan, workspace, batch, kv, q, cached })
    }

    /// Writes the keys and values of each row's block into its pages.
    ///
    /// `k` and `v` are `[num_query_tokens, num_kv_heads, head_dim]` of the configuration's type: rotated by
    /// the model for native positions, not rotated for reassigned ones.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], or [`Error::Index`] for a page number beyond
    /// the pool.
    pub fn append(
        &self,
        batch: &Batch,
        kv: KvViewMut<'_>,
        k: TensorView<'_>,
        v: TensorView<'_>,
    ) -> Result<()> {
        self.check_append(batch, &kv, &k, &v)?;
        self.device.backend().append(AppendArgs { batch, k, v, kv })
    }

    /// `pool`, `score`, `vote` and `top_k`: the tokens to attend to, left in
    /// [`Workspace::selected`](crate::Workspace::selected).
    ///
    /// `q` is `[num_query_tokens, num_qo_heads, head_dim]` of the configuration's type; `cached` the layer's
    /// cached selections, `None` to select anew.
    ///
    /// # Errors
    /// Those of the four operations.
    pub fn select(
        &mut self,
        batch: &Batch,
        kv: KvView<'_>,
        q: TensorView<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        self.check_kv(batch, &kv)?;
        self.check_queries(batch, &q)?;
        if let Some(cached) = &cached {
            self.check_cached(batch, cached)?;
        }
        self.run_select(batch, SelectedKv::Read(kv), q, cached)
    }

    /// Mean of the queries of each block (after the scoring rotation, for reassigned positions), its cosine
    /// with the cached one, and what is to be done for the row.
    ///
    /// Writes `queries`, `similarities` and `actions` of the workspace. Changes nothing in `cached`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`].
    pub fn pool(
        &mut self,
        batch: &Batch,
        q: TensorView<'_>,
        cached: Option<SelectionCacheLayer<'_>>,
    ) -> Result<()> {
        self.check_queries(batch, &q)?;
        if let Some(cached) = &cached {
            self.check_cached(batch, cached)?;
        }
        self.workspace.check(&self.plan)?;
        let cached = cached.filter(|_| self.caches(batch));
        self.device.backend().pool(self.workspace.pool_args(&self.plan, batch, q, cached))
    }

    /// Scaled dot products of the scoring queries with the candidates' keys, and softmax statistics.
    ///
    /// Reads `queries` and `actions` of the workspace, writes `logits` and `stats`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`].
    pub fn score(&mut self, batch: &Batch, kv: KvView<'_>) -> Result<()> {
        self.check_kv(batch, &kv)?;
        self.workspace.check(&self.plan)?;
        self.device.backend().score(self.workspace.score_args(&self.plan, batch, kv))
    }

    /// Index into the elements of [`Workspace::logits`] of a row's token and query head.
    ///
    /// On the processor they are `[token_base + token, num_qo_heads]`; on GPUs they lie in tiles `[num_kv_heads, 16 tokens,
    /// group]`, each row from a tile of its own on.
    ///
    /// # Errors
    /// [`Error::Index`] where the batch has no such row, the row no such token, or the configuration no such head.
    pub fn logit_index(&self, batch: &Batch, row: usize, token: usize, qo_head: usize) -> Result<usize> {
        let heads = self.config().heads;
        let check =
            |what, got, limit| if got < limit { Ok(()) } else { Err(Error::Index { what, limit, got }) };
        check("row", row, batch.num_rows())?;
        check("token", token, batch.kv_len(row))?;
        check("query head", qo_head, heads.num_qo_heads)?;
        let base = batch.token_base(row);
        if self.device.is_cpu() {
            return Ok((base + token) * heads.num_qo_heads + qo_head);
        }
        let (kv_head, member, size) = (qo_head / heads.group(), qo_head % heads.group(), LOGIT_TILE as usize);
        let tile = logit_tile(base as u64, row as u32) as usize + token / size;
        Ok(((tile * heads.num_kv_heads + kv_head) * size + token % size) * heads.group() + member)
    }

    /// Votes: softmax probabilities of the candidates, summed over heads. (The max-pool, where there is one, is part of
    /// [`top_k`](Self::top_k): it comes after the votes of tensor-parallel ranks are summed.)
    ///
    /// Reads `actions`, `logits` and `stats` of the workspace, writes `votes`.
    ///
    /// # Errors
    /// [`Error::Limit`].
    pub fn vote(&mut self, batch: &Batch) -> Result<()> {
        self.vote_and_count(batch, false)
    }

    /// [`vote`](Self::vote); if `counts`, votes are also counted, for a [`choose`](Self::choose) that must follow.
    fn vote_and_count(&mut self, batch: &Batch, counts: bool) -> Result<()> {
        self.plan.check(batch)?;
        self.workspace.check(&self.plan)?;
        self.device.backend().vote(self.workspace.vote_args(&self.plan, batch, counts))
    }

    /// The `top_k` largest votes of each row, max-pooled if the configuration says so (larger first, equal votes by
    /// smaller index, NaN last), and the
    /// selected list: initial tokens, chosen tokens, local tokens and block, ascending.
    ///
    /// Reads `actions`, `votes` and `queries` of the workspace, writes `pooled_votes`, `top_k`, `selected` and
    /// `selected_len`. With `cached`, reused rows take their tokens from it, scored rows replace what it
    /// holds, and every row is counted; pass what was passed to [`pool`](Self::pool).
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Limit`], [`Error::Index`].
    pub fn top_k(&mut self, batch: &Batch, cached: Option<SelectionCacheLayer<'_>>) -> Result<()> {
        self.check_choice(batch, cached.as_ref())?;
        self.choose(batch, cached, false)
    }

    /// [`vote`](Self::vote), then [`top_k`](Self::top_k) of these votes, which takes less than the two one by one.
    ///
    /// # Errors
    /// As [`top_k`](Self::top_k).
    pub fn vote_top_k(&mut self, batch: &Batch, cached: Option<SelectionCacheLayer<'_>>) -> Result<()> {
        self.check_choice(batch, cached.as_ref())?; // so that nothing is counted that is not chosen from
        let counts = self.plan.votes_are_chosen_from();
        self.vote_and_count(batch, counts)?;
        self.choose(batch, cached, counts)
    }

    /// What [`choose`](Self::choose) relies on.
    fn check_choice(&self, batch: &Batch, cached: Option<&SelectionCacheLayer<'_>>) -> Result<()> {
        self.plan.check(batch)?;
        self.workspace.check(&self.plan)?;
        if let Some(cached) = cached {
            self.check_cached(batch, cached)?;
        }
        if (cached.is_none() || !self.caches(batch)) && self.host_rows_reuse(batch)? {
            return Err(Error::Missing { op: "top_k", needs: "the cached selections that `pool` was given" });
        }
        Ok(())
    }

    /// [`top_k`](Self::top_k) of checked arguments; `votes_are_counted` if [`vote_and_count`](Self::vote_and_count) has just done so.
    fn choose(
        &mut self,
        batch: &Batch,
        cached: Option<SelectionCacheLayer<'_>>,
        votes_are_counted: bool,
    ) -> Result<()> {
        let cached = cached.filter(|_| self.caches(batch));
        if !self.plan.votes_are_chosen_from() {
            self.device.backend().smooth(self.workspace.smooth_args(&self.plan, batch))?;
        }
        let args = self.workspace.top_k_args(&self.plan, batch, cached, votes_are_counted);
        self.device.backend().top_k(args)
    }

    /// Attention over the selected lists of the workspace.
    ///
    /// `q` is `[num_query_tokens, num_qo_heads, head_dim]` of the configuration's type. Query `t` of a block
    /// of `T` sees the first `m - T + t + 1` of the `m` tokens of its row's list. Rows whose list is empty
    /// get `out = 0` and `lse = -inf`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`].
    pub fn attend(
        &self,
        batch: &Batch,
        kv: KvView<'_>,
        q: TensorView<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        self.workspace.check(&self.plan)?;
        let tokens = self.workspace.selected.view();
        let len = self.workspace.selected_len.view();
        self.attend_to(batch, kv, q, Selection { tokens, len, ranks: None }, output)
    }

    /// Attention over lists of one's own, which may be parts of longer lists ([`Selection::ranks`]).
    ///
    /// A token of rank `r` is seen by query `t` if `r <= m - T + t`, `m` being the length of the whole list,
    /// and is rotated at `r` for reassigned positions. Outputs over the parts of a list are combined by
    /// [`merge`](Self::merge).
    ///
    /// Lists in device memory are not checked, which would wait for the device. Attention over a wrong one gives an output that
    /// is not specified; nothing is read out of bounds, and other rows are not affected.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`]; [`Error::Table`] where a list
    /// is longer than its row, not ascending, names a token that the row does not hold, or is shorter than the
    /// block.
    pub fn attend_to(
        &self,
        batch: &Batch,
        kv: KvView<'_>,
        q: TensorView<'_>,
        selection: Selection<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        self.check_kv(batch, &kv)?;
        self.check_queries(batch, &q)?;
        self.check_output(batch, &output)?;
        self.check_selection(batch, &selection)?;
        self.run_attend(batch, kv, q, Some(selection), output)
    }

    /// Attention over all tokens of each row: ordinary paged attention.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`], [`Error::Limit`], [`Error::Index`]; [`Error::Missing`] for parts
    /// of sequences.
    pub fn attend_dense(
        &self,
        batch: &Batch,
        kv: KvView<'_>,
        q: TensorView<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        self.check_kv(batch, &kv)?;
        self.check_queries(batch, &q)?;
        self.check_output(batch, &output)?;
        if batch.is_partial() {
            return Err(Error::Missing { op: "attend_dense", needs: "a batch of whole sequences" });
        }
        self.run_attend(batch, kv, q, None, output)
    }

    fn run_attend(
        &self,
        batch: &Batch,
        kv: KvView<'_>,
        q: TensorView<'_>,
        selection: Option<Selection<'_>>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        self.device.backend().attend(AttendArgs {
            config: self.plan.config(),
            limits: self.plan.limits(),
            rope: self.plan.rope(),
            batch,
            kv,
            q,
            selection,
            out: output.out,
            lse: output.lse,
            scratch: self.workspace.scratch.view(),
        })
    }

    /// Combines attention outputs over disjoint parts of a list through their log-sum-exps.
    ///
    /// `parts` is `[num_parts, num_query_tokens, num_qo_heads, head_dim]` f32, `part_lses`
    /// `[num_parts, num_query_tokens, num_qo_heads]` f32. Parts with `lse = -inf` do not count.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::DType`].
    pub fn merge(
        &self,
        parts: TensorView<'_>,
        part_lses: TensorView<'_>,
        output: StepOutput<'_>,
    ) -> Result<()> {
        let heads = self.plan.config().heads;
        let given = parts.shape();
        let (num_parts, tokens) = match given.dims() {
            &[num_parts, tokens, ..] => (num_parts, tokens),
            _ => (0, 0),
        };
        let (hq, d) = (heads.num_qo_heads, heads.head_dim);
        parts.expect("parts", &[DType::F32], [num_parts, tokens, hq, d])?;
        part_lses.expect("part_lses", &[DType::F32], [num_parts, tokens, hq])?;
        output.out.expect("out", &[DType::F32, DType::F16, DType::Bf16], [tokens, hq, d])?;
        if let Some(lse) = &output.lse {
            lse.expect("lse", &[DType::F32], [tokens, hq])?;
        }
        self.device.backend().merge(MergeArgs { parts, part_lses, out: output.out, lse: output.lse })
    }

    /// Whether `pool` told a row to reuse its selection, as far as that is known without waiting for a device.
    fn host_rows_reuse(&self, batch: &Batch) -> Result<bool> {
        if !self.workspace.actions.view().is_on_host() {
            return Ok(false);
        }
        let actions = self.workspace.actions()?;
        Ok(actions[..batch.num_rows()].contains(&crate::RowAction::Reuse))
    }

    /// Whether selections of this batch may be cached.
    fn caches(&self, batch: &Batch) -> bool {
        self.config().selection_cache.is_some() && batch.has_sequences() && !batch.is_partial()
    }

    fn check_append(
        &self,
        batch: &Batch,
        kv: &KvViewMut<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
    ) -> Result<()> {
        let config = self.plan.config();
        self.plan.check(batch)?;
        kv.expect(&config.heads, config.dtype, batch.page_size())?;
        check_pages(batch, kv.shape().num_pages)?;
        let shape = [batch.num_query_tokens(), config.heads.num_kv_heads, config.heads.head_dim];
        k.expect("k", &[config.dtype], shape)?;
        v.expect("v", &[config.dtype], shape)?;
        if batch.is_partial() {
            return Err(Error::Missing { op: "append", needs: "a batch of whole sequences" });
        }
        Ok(())
    }

    fn check_kv(&self, batch: &Batch, kv: &KvView<'_>) -> Result<()> {
        let config = self.plan.config();
        self.plan.check(batch)?;
        kv.expect(&config.heads, config.dtype, batch.page_size())?;
        check_pages(batch, kv.shape().num_pages)
    }

    fn check_queries(&self, batch: &Batch, q: &TensorView<'_>) -> Result<()> {
        let config = self.plan.config();
        self.plan.check(batch)?;
        let shape = [batch.num_query_tokens(), config.heads.num_qo_heads, config.heads.head_dim];
        q.expect("q", &[config.dtype], shape)
    }

    fn check_output(&self, batch: &Batch, output: &StepOutput<'_>) -> Result<()> {
        let config = self.plan.config();
        let (tokens, hq) = (batch.num_query_tokens(), config.heads.num_qo_heads);
        let allowed: &[DType] =
            if config.dtype == DType::F32 { &[DType::F32] } else { &[config.dtype, DType::F32] };
        output.out.expect("out", allowed, [tokens, hq, config.heads.head_dim])?;
        match &output.lse {
            Some(lse) => lse.expect("lse", &[DType::F32], [tokens, hq]),
            None => Ok(()),
        }
    }

    fn check_cached(&self, batch: &Batch, cached: &SelectionCacheLayer<'_>) -> Result<()> {
        let config = self.plan.config();
        let limit = cached.ages.shape().dims().first().copied().unwrap_or(0);
        let query_len = config.heads.num_qo_heads * config.heads.head_dim;
        cached.queries.expect("cached.queries", &[DType::F32], [limit, query_len])?;
        cached.selections.expect("cached.selections", &[DType::U32], [limit, config.top_k])?;
        cached.ages.expect("cached.ages", &[DType::U32], [limit])?;
        cached.made_at.expect("cached.made_at", &[DType::U32], [limit])?;
        cached.counters.expect("cached.counters", &[DType::U64], [3])?;
        for got in (0..batch.num_rows()).filter_map(|row| batch.sequence_index(row)) {
            if got >= limit {
                return Err(Error::Index { what: "sequence index", limit, got });
            }
        }
        Ok(())
    }

    /// Checks lists that come from outside. Those of `top_k` pass by construction, and the check costs
    /// little beside reading the tokens' keys.
    fn check_selection(&self, batch: &Batch, selection: &Selection<'_>) -> Result<()> {
        let rows = selection.len.shape().dims().first().copied().unwrap_or(0);
        if rows < batch.num_rows() {
            let (expected, got) = ([batch.num_rows()].into(), [rows].into());
            return Err(Error::Shape { what: "selection.len", expected, got });
        }
        let width = selection.tokens.shape().dims().last().copied().unwrap_or(0);
        selection.len.expect("selection.len", &[DType::U32], [rows])?;
        selection.tokens.expect("selection.tokens", &[DType::U32], [rows, width])?;
        if let Some(ranks) = &selection.ranks {
            ranks.ranks.expect("selection.ranks", &[DType::U32], [rows, width])?;
            ranks.total_len.expect("selection.total_len", &[DType::U32], [rows])?;
        } else if batch.is_partial() {
            return Err(Error::Missing { op: "attend", needs: "ranks for a batch of parts of sequences" });
        }
        if !selection.len.is_on_host() {
            return Ok(()); // looking at the lists would wait for the device
        }
        let lens = selection.len.as_slice::<u32>()?;
        let tokens = selection.tokens.as_slice::<u32>()?;
        for row in (0..batch.num_rows()).filter(|&row| batch.block_len(row) > 0) {
            let len = lens[row] as usize;
            if len > width {
                return Err(Error::table(row, "selection.len", format!("at most {width}"), len));
            }
            let list = &tokens[row * width..][..len];
            check_list(row, "selection.tokens", list, batch.kv_len(row))?;
            let mut total = len;
            if let Some(ranks) = &selection.ranks {
                total = ranks.total_len.as_slice::<u32>()?[row] as usize;
                let list = &ranks.ranks.as_slice::<u32>()?[row * width..][..len];
                check_list(row, "selection.ranks", list, total)?;
            }
            if total > 0 && total < batch.block_len(row) {
                let rule = format!("0 or at least the block's length, {}", batch.block_len(row));
                return Err(Error::table(row, "length of the selected list", rule, total));
            }
            let limit = self.plan.rope().map_or(usize::MAX, crate::rope::RopeTable::max_positions);
            if total > limit {
                return Err(Error::Limit { what: "positions", limit, got: total });
            }
        }
        Ok(())
    }
}

/// Checks that a list ascends strictly and stays below `limit`.
fn check_list(row: usize, what: &'static str, list: &[u32], limit: usize) -> Result<()> {
    if let Some(pair) = list.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(Error::table(row, what, format!("ascending, so above {}", pair[0]), pair[1]));
    }
    match list.last() {
        Some(&last) if last as usize >= limit => Err(Error::table(row, what, format!("below {limit}"), last)),
        _ => Ok(()),
    }
}

/// Checks the page numbers of a batch against the pool.
fn check_pages(batch: &Batch, limit: usize) -> Result<()> {
    match batch.max_page() {
        Some(page) if page as usize >= limit => Err(Error::Index { what: "page", limit, got: page as usize }),
        _ => Ok(()),
    }
}
