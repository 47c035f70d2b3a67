//! What is printed: tables for people, or one JSON object.

use serde::Serialize;
use tokenselect_examples::error::{Error, Result};
use tokenselect_examples::model::Model;

use crate::curves::{Curves, Point};
use crate::explain::LayerVotes;
use crate::options::Options;
use crate::retrieval::Retrieval;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Name of the device.
    pub device: String,
    /// Seed of the first text.
    pub seed: u64,
    /// Every policy at every length.
    pub policies: Vec<Retrieval>,
    /// One setting after the other is changed, at one length.
    pub comparisons: Vec<Comparison>,
    /// Where the votes go.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub votes: Vec<LayerVotes>,
    /// Bits per byte and retrieval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub curves: Option<Curves>,
}

/// Retrieval over the values of one setting.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The setting.
    pub setting: &'static str,
    /// Its values, with what was found.
    pub rows: Vec<(String, Retrieval)>,
}

impl Report {
    /// One JSON object.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|source| Error::ReportJson { source })
    }

    /// Tables to read.
    pub fn tables(&self, model: &Model, options: &Options) -> String {
        let mut lines = vec![
            format!(
                "model   {}, trained on {} tokens, on {}",
                model.name, model.config.training_context, self.device
            ),
            format!(
                "texts   {} of each length, keys at {} depths; seed {}",
                options.samples, options.depths, self.seed
            ),
            format!(
                "select  the first {}, {} by vote (scores times {}, pooled over {}), {} before a block of {}",
                options.n_init,
                options.top_k,
                options.score_scale,
                options.vote_pool,
                options.n_local,
                options.block
            ),
        ];
        self.policy_table(options, &mut lines);
        for comparison in &self.comparisons {
            comparison.table(&mut lines);
        }
        self.votes_table(&mut lines);
        if let Some(curves) = &self.curves {
            curves_table(curves, &mut lines);
        }
        lines.join("\n")
    }

    fn policy_table(&self, options: &Options, lines: &mut Vec<String>) {
        let row = |name: &str, cells: Vec<String>| {
            let cells: String = cells.iter().map(|cell| format!("{cell:>9}")).collect();
            format!("{name:<28}{cells}")
        };
        lines.push(String::new());
        lines.push(row("keys found, % at bytes", options.lengths.iter().map(usize::to_string).collect()));
        let num_lengths = options.lengths.len().max(1);
        for of_policy in self.policies.chunks(num_lengths) {
            let name = of_policy[0].settings.policy.to_string();
            lines.push(row(&name, of_policy.iter().map(percent).collect()));
        }
    }

    fn votes_table(&self, lines: &mut Vec<String>) {
        if self.votes.is_empty() {
            return;
        }
        lines.push(String::new());
        lines.push("votes at the end of a question   scale   layer   key     on the digits   among top_k   spread over".into());
        for row in &self.votes {
            lines.push(format!(
                "{:>38.3}  {:>6}   {:<6} {:>13.2} %  {:>4} of {:<4} {:>8.0} tokens",
                row.settings.score_scale,
                row.layer,
                if row.found { "found" } else { "missed" },
                100.0 * row.share,
                row.within,
                row.questions,
                row.spread
            ));
        }
    }
}

impl Comparison {
    fn table(&self, lines: &mut Vec<String>) {
        let Some((_, first)) = self.rows.first() else { return };
        lines.push(String::new());
        lines.push(format!("{:<28}{:>9}", format!("{}, {} bytes", self.setting, first.length), "found, %"));
        for (value, retrieval) in &self.rows {
            lines.push(format!("{value:>28}{:>9}", percent(retrieval)));
        }
    }
}

fn curves_table(curves: &Curves, lines: &mut Vec<String>) {
    lines.push(String::new());
    lines.push(format!(
        "block    top_k   bits per byte   found, %    (dense inside the training context: {:.3} bits)",
        curves.dense_inside_context
    ));
    for Point { bits_per_byte, retrieval } in &curves.points {
        let settings = &retrieval.settings;
        lines.push(format!(
            "{:>5} {:>8} {bits_per_byte:>15.3} {:>10}",
            settings.block,
            settings.top_k,
            percent(retrieval)
        ));
    }
}

fn percent(retrieval: &Retrieval) -> String {
    format!("{:.1}", 100.0 * retrieval.share())
}
