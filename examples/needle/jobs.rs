//! What is measured, in which order.

use tokenselect::Device;
use tokenselect_examples::error::{Error, Result};
use tokenselect_examples::model::Model;
use tokenselect_examples::terminal::Jobs;

use crate::curves::{Curves, Point, bits_per_byte, dense_inside_context};
use crate::explain::explain;
use crate::haystack::{Haystack, haystack};
use crate::options::Options;
use crate::policy::{Policy, Settings};
use crate::report::{Comparison, Report};
use crate::retrieval::{Bench, Retrieval};

/// Everything that the options ask for.
pub fn run(options: &Options, source: &[u8], model: &Model, device: &Device) -> Result<Report> {
    let bench = Bench { model, device, singles: options.singles };
    let policies: Vec<Policy> = options.policies.iter().map(|name| name.policy()).collect();
    let plans = comparisons(options);
    let compared: usize = plans.iter().map(|(_, rows)| rows.len()).sum();
    let points = if options.curves { options.curve_blocks.len() * options.curve_top_k.len() } else { 0 };
    let mut run = Run {
        options,
        source,
        bench,
        jobs: Jobs::new(policies.len() * options.lengths.len() + compared + points),
        done: Vec::new(),
    };
    run.check(policies.iter().map(|&policy| options.settings(policy)), &options.lengths)?;
    let compared_settings = plans.iter().flat_map(|(_, rows)| rows).map(|&(_, settings)| settings);
    if compared > 0 {
        run.check(compared_settings, &[options.ablation_length])?;
    }
    let mut retrievals = Vec::new();
    for &policy in &policies {
        for &length in &options.lengths {
            retrievals.push(run.retrieve(length, options.settings(policy))?);
        }
    }
    let mut compared = Vec::new();
    for (setting, rows) in plans {
        let mut measured = Vec::new();
        for (value, settings) in rows {
            measured.push((value, run.retrieve(options.ablation_length, settings)?));
        }
        compared.push(Comparison { setting, rows: measured });
    }
    let mut votes = Vec::new();
    if options.explain {
        let default_scale = (model.config.heads.head_dim as f32).sqrt().recip();
        for score_scale in [default_scale, 1.0] {
            let settings = Settings { score_scale, ..options.settings(Policy::Soft) };
            votes.extend(explain(&bench, &run.texts(options.ablation_length)?, settings)?);
        }
    }
    let curves = if options.curves { Some(run.curves()?) } else { None };
    Ok(Report {
        device: device.name().to_owned(),
        seed: options.seed,
        policies: retrievals,
        comparisons: compared,
        votes,
        curves,
    })
}

/// Settings that are compared: the name of what changes, and each value of it.
fn comparisons(options: &Options) -> Vec<(&'static str, Vec<(String, Settings)>)> {
    let soft = options.settings(Policy::Soft);
    let of = |change: &dyn Fn(usize) -> Settings, values: &[usize]| {
        values.iter().map(|&value| (value.to_string(), change(value))).collect::<Vec<_>>()
    };
    let thresholds = options.ablate_threshold.iter();
    let scales = options.ablate_scale.iter();
    let all = vec![
        ("top_k", of(&|top_k| Settings { top_k, ..soft }, &options.ablate_top_k)),
        (
            "threshold",
            thresholds
                .map(|&threshold| (threshold.to_string(), options.settings(Policy::Cached { threshold })))
                .collect(),
        ),
        (
            "score scale",
            scales.map(|&score_scale| (score_scale.to_string(), Settings { score_scale, ..soft })).collect(),
        ),
        (
            "vote pool",
            of(&|vote_pool_window| Settings { vote_pool_window, ..soft }, &options.ablate_vote_pool),
        ),
        ("parts of", of(&|len| options.settings(Policy::Parts { len }), &options.ablate_parts)),
    ];
    all.into_iter().filter(|(_, rows)| !rows.is_empty()).collect()
}

/// The run so far.
struct Run<'a> {
    options: &'a Options,
    source: &'a [u8],
    bench: Bench<'a>,
    jobs: Jobs,
    /// What was measured; the tables share some of it.
    done: Vec<Retrieval>,
}

impl Run<'_> {
    fn texts(&self, length: usize) -> Result<Vec<Haystack>> {
        let text = |sample| {
            let seed = self.options.seed.wrapping_add(sample as u64);
            haystack(self.source, length, self.options.depths, seed)
        };
        (0..self.options.samples).map(text).collect()
    }

    /// Finds what cannot be run before anything is: minutes may have passed when its turn comes.
    fn check(&self, settings: impl Iterator<Item = Settings>, lengths: &[usize]) -> Result<()> {
        lengths.iter().try_for_each(|&length| self.texts(length).map(drop))?;
        for settings in settings {
            for &length in lengths {
                settings.config(self.bench.model, length).validate()?;
            }
        }
        Ok(())
    }

    fn retrieve(&mut self, length: usize, settings: Settings) -> Result<Retrieval> {
        let known = self.done.iter().find(|done| done.length == length && done.settings == settings);
        let what = format!("{}, {length} bytes", settings.policy);
        self.jobs.begin(&what);
        let retrieval = match known {
            Some(known) => known.clone(),
            None => self.bench.retrieve(&self.texts(length)?, length, settings)?,
        };
        self.jobs.end(&format!("{what}: {:.1} % found", 100.0 * retrieval.share()));
        self.done.push(retrieval.clone());
        Ok(retrieval)
    }

    fn curves(&mut self) -> Result<Curves> {
        let options = self.options;
        let text = &self.source[..options.curve_length.min(self.source.len())];
        let from = self.bench.model.config.training_context / 2;
        if text.len() <= from.max(1) {
            let rule = format!("more than {}, half the training context", from.max(1));
            return Err(Error::option("--curve-length", rule, text.len()));
        }
        let soft = options.settings(Policy::Soft);
        let dense_inside_context = dense_inside_context(&self.bench, text, soft)?;
        let mut points = Vec::new();
        for &block in &options.curve_blocks {
            for &top_k in &options.curve_top_k {
                let settings = Settings { block, top_k, ..soft };
                let bits_per_byte = bits_per_byte(&self.bench, text, from, settings)?;
                points
                    .push(Point { bits_per_byte, retrieval: self.retrieve(options.curve_length, settings)? });
            }
        }
        Ok(Curves { predicted: text.len().saturating_sub(from), dense_inside_context, points })
    }
}
