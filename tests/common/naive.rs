//! The definitions (`docs/definitions.md`) in f64 and plain loops, one sequence at a time.
//!
//! Shares no code with the crate, so that an error would have to be made twice to go unnoticed. Arrays are
//! flat: `q` is `[T, hq, d]`, `k` and `v` are `[n, hkv, d]`.

use std::ops::Range;

use super::naive_rope::Rope;

#[derive(Clone, Debug)]
pub struct Config {
    pub hq: usize,
    pub hkv: usize,
    pub d: usize,
    pub n_init: usize,
    pub n_local: usize,
    pub top_k: usize,
    pub score_scale: f64,
    pub sm_scale: f64,
    pub soft_cap: Option<f64>,
    pub pool_window: usize,
    pub rope: Option<Rope>,
    /// Similarity threshold and largest number of reuses.
    pub reuse: Option<(f64, u32)>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sum = 0.0;
    for i in 0..a.len() {
        sum += a[i] * b[i];
    }
    sum
}

/// Mean of the block's queries, `[hq, d]`, query `t` rotated at `n_local + t`.
pub fn scoring_query(c: &Config, q: &[f64]) -> Vec<f64> {
    let block = q.len() / (c.hq * c.d);
    let mut mean = vec![0.0; c.hq * c.d];
    for t in 0..block {
        for h in 0..c.hq {
            let mut head = q[(t * c.hq + h) * c.d..][..c.d].to_vec();
            if let Some(rope) = &c.rope {
                rope.rotate(&mut head, c.n_local + t);
            }
            for i in 0..c.d {
                mean[h * c.d + i] += head[i];
            }
        }
    }
    mean.iter().map(|x| x / block as f64).collect()
}

pub fn candidates(c: &Config, n: usize, block: usize) -> Range<usize> {
    let end = n.saturating_sub(block + c.n_local);
    c.n_init.min(end)..end
}

/// Scaled dot products of one head with the tokens `range`.
pub fn logits(c: &Config, query: &[f64], k: &[f64], head: usize, range: Range<usize>) -> Vec<f64> {
    let kv_head = head / (c.hq / c.hkv);
    let query = &query[head * c.d..][..c.d];
    range.map(|j| dot(query, &k[(j * c.hkv + kv_head) * c.d..][..c.d]) * c.score_scale).collect()
}

/// Softmax over the logits that are numbers; a NaN stays NaN and counts for no one else. Where the largest
/// is infinite, those equal to it share the mass.
pub fn probabilities(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let term = |x: f64| if x == max { 1.0 } else { (x - max).exp() };
    let sum: f64 = logits.iter().filter(|x| !x.is_nan()).map(|&x| term(x)).sum();
    logits.iter().map(|&x| term(x) / sum).collect()
}

/// Sum of the heads' probabilities; `logits` are `[hq][candidates]`.
pub fn votes(logits: &[Vec<f64>]) -> Vec<f64> {
    let shares: Vec<Vec<f64>> = logits.iter().map(|head| probabilities(head)).collect();
    (0..logits[0].len()).map(|j| shares.iter().map(|head| head[j]).sum()).collect()
}

/// Largest number among the `window` votes around each; a NaN stays NaN.
pub fn max_pool(votes: &[f64], window: usize) -> Vec<f64> {
    let around = |j: usize| j.saturating_sub(window / 2)..votes.len().min(j + window / 2 + 1);
    let largest = |j: usize| votes[around(j)].iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (0..votes.len()).map(|j| if votes[j].is_nan() { f64::NAN } else { largest(j) }).collect()
}

/// Places of the `k` largest votes, ascending: larger first, equal ones by smaller place, NaN last.
pub fn largest(votes: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..votes.len()).collect();
    let key = |j: usize| if votes[j].is_nan() { f64::NEG_INFINITY } else { votes[j] };
    let nan = |j: usize| votes[j].is_nan();
    order.sort_by(|&a, &b| nan(a).cmp(&nan(b)).then(key(b).partial_cmp(&key(a)).unwrap()).then(a.cmp(&b)));
    order.truncate(k);
    order.sort_unstable();
    order
}

/// `[0, n_init)`, the chosen tokens, the local window and the block.
pub fn selected_list(c: &Config, n: usize, block: usize, chosen: &[usize]) -> Vec<usize> {
    let range = candidates(c, n, block);
    (0..range.start).chain(chosen.iter().copied()).chain(range.end..n).collect()
}

/// What the Selection Cache keeps of a sequence and layer.
#[derive(Clone, Debug)]
pub struct Cached {
    pub query: Vec<f64>,
    pub chosen: Vec<usize>,
    pub age: u32,
}

#[derive(Clone, Debug)]
pub struct Selection {
    pub list: Vec<usize>,
    /// Of the candidates, pooled; `None` where nothing was scored.
    pub votes: Option<Vec<f64>>,
    pub reused: bool,
    /// Cosine with the cached query; -1 where none is usable.
    pub similarity: f64,
}

/// Selection for one block; `cached` is used and brought up to date where the configuration has `reuse`.
pub fn select(c: &Config, q: &[f64], k: &[f64], cached: &mut Option<Cached>) -> Selection {
    let (n, block) = (k.len() / (c.hkv * c.d), q.len() / (c.hq * c.d));
    let range = candidates(c, n, block);
    let query = scoring_query(c, q);
    let cosine = |old: &Cached| {
        dot(&old.query, &query) / (dot(&old.query, &old.query).sqrt() * dot(&query, &query).sqrt())
    };
    // Usable where all its tokens are candidates of the row as it is now: it may be another configuration's.
    let usable = |old: &&mut Cached| old.chosen.iter().all(|token| range.contains(token));
    let mut usable = cached.as_mut().filter(usable);
    let similarity = usable.as_deref().map_or(-1.0, cosine);
    if range.len() <= c.top_k {
        return Selection { list: (0..n).collect(), votes: None, reused: false, similarity };
    }
    if let (Some((threshold, max_reuse)), Some(old)) = (c.reuse, usable.as_mut())
        && similarity >= threshold
        && old.age < max_reuse
    {
        old.age += 1;
        let list = selected_list(c, n, block, &old.chosen);
        return Selection { list, votes: None, reused: true, similarity };
    }
    let heads: Vec<Vec<f64>> = (0..c.hq).map(|h| logits(c, &query, k, h, range.clone())).collect();
    let votes = max_pool(&votes(&heads), c.pool_window);
    let chosen: Vec<usize> = largest(&votes, c.top_k).iter().map(|j| range.start + j).collect();
    let list = selected_list(c, n, block, &chosen);
    *cached = c.reuse.map(|_| Cached { query, chosen, age: 0 });
    Selection { list, votes: Some(votes), reused: false, similarity }
}

/// Attention over `(rank, token)` pairs out of a list of `total` tokens: `[T, hq, d]` and lse `[T, hq]`.
/// What a query does not see does not exist for it; what it sees follows IEEE arithmetic, but for logits of +inf: as the limit
/// of large ones they share the mass. Logits are f32: beyond its range they are infinite.
pub fn attend(
    c: &Config,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    list: &[(usize, usize)],
    total: usize,
) -> (Vec<f64>, Vec<f64>) {
    let block = q.len() / (c.hq * c.d);
    let (mut out, mut lse) = (vec![0.0; q.len()], vec![f64::NEG_INFINITY; block * c.hq]);
    let rotated = |head: &[f64], position: usize| {
        let mut head = head.to_vec();
        if let Some(rope) = &c.rope {
            rope.rotate(&mut head, position);
        }
        head
    };
    for kv_head in 0..c.hkv {
        let at = |token: usize| (token * c.hkv + kv_head) * c.d;
        let keys: Vec<_> = list.iter().map(|&(rank, token)| rotated(&k[at(token)..][..c.d], rank)).collect();
        let group = c.hq / c.hkv;
        for (t, h) in (0..block).flat_map(|t| (kv_head * group..(kv_head + 1) * group).map(move |h| (t, h))) {
            let seen = list.iter().filter(|(rank, _)| rank + block <= total + t).count();
            if seen == 0 {
                continue;
            }
            let query = rotated(&q[(t * c.hq + h) * c.d..][..c.d], total + t - block);
            let in_range =
                |x: f64| if x.abs() > f64::from(f32::MAX) { x.signum() * f64::INFINITY } else { x };
            let cap = |x: f64| c.soft_cap.map_or(x, |cap| cap * (x / cap).tanh());
            let logit = |k: &Vec<f64>| cap(in_range(dot(&query, k) * c.sm_scale));
            let logits: Vec<f64> = keys[..seen].iter().map(logit).collect();
            if logits.iter().all(|&x| x == f64::NEG_INFINITY) {
                continue;
            }
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let terms: Vec<f64> =
                logits.iter().map(|&x| if x == max { 1.0 } else { (x - max).exp() }).collect();
            let sum: f64 = terms.iter().sum();
            lse[t * c.hq + h] = max + sum.ln();
            let out = &mut out[(t * c.hq + h) * c.d..][..c.d];
            for (&(_, token), term) in list.iter().zip(&terms) {
                for i in 0..c.d {
                    out[i] += term / sum * v[at(token) + i];
                }
            }
        }
    }
    (out, lse)
}

/// A whole list with ranks `0..m`.
pub fn ranked(list: &[usize]) -> Vec<(usize, usize)> {
    list.iter().copied().enumerate().collect()
}
