//! Where the votes go at the end of a question, layer by layer: of questions whose key was found, and of those whose was not.

use serde::Serialize;
use tokenselect_examples::error::Result;

use crate::haystack::Haystack;
use crate::policy::Settings;
use crate::retrieval::Bench;
use crate::steps::Votes;

/// Votes of one layer at the last byte of the questions, averaged over those whose key is among the candidates.
#[derive(Debug, Clone, Serialize)]
pub struct LayerVotes {
    /// How they were made.
    pub settings: Settings,
    /// The layer.
    pub layer: usize,
    /// Whether the keys were found.
    pub found: bool,
    /// Questions.
    pub questions: usize,
    /// Share of the votes on the key's digits and the byte before them.
    pub share: f64,
    /// Questions where at least one of these is among the `top_k`.
    pub within: usize,
    /// Over how many tokens the votes spread: the exponential of their entropy.
    pub spread: f64,
}

/// What one question says about one layer.
struct Seen {
    /// The question, counted over all texts.
    question: usize,
    layer: usize,
    share: f64,
    rank: usize,
    spread: f64,
}

/// Asks for every key and looks at the votes.
pub fn explain(bench: &Bench<'_>, texts: &[Haystack], settings: Settings) -> Result<Vec<LayerVotes>> {
    let (mut seen, mut found) = (Vec::new(), Vec::new());
    for text in texts {
        let asked_before = found.len();
        let observer = &mut |key: usize, layer: usize, votes: &Votes| {
            let place = &text.keys[key].place;
            let first = place.start - 1;
            if votes.candidates.start <= first && place.end <= votes.candidates.end {
                let place = first - votes.candidates.start..place.end - votes.candidates.start;
                seen.push(look(asked_before + key, layer, &votes.votes, place));
            }
        };
        bench.ask_all(text, settings, &mut |_, is_found| found.push(is_found), Some(observer))?;
    }
    let mut rows = Vec::new();
    for layer in 0..bench.model.layers.len() {
        for is_found in [true, false] {
            let own = |seen: &&Seen| seen.layer == layer && found[seen.question] == is_found;
            rows.push(summarise(settings, layer, is_found, &seen.iter().filter(own).collect::<Vec<_>>()));
        }
    }
    rows.retain(|row| row.questions > 0);
    Ok(rows)
}

fn look(question: usize, layer: usize, votes: &[f32], place: std::ops::Range<usize>) -> Seen {
    let sum: f64 = votes.iter().map(|&vote| f64::from(vote)).sum();
    let best = votes[place.clone()].iter().copied().fold(0.0, f32::max);
    let entropy = |vote: &f32| {
        let p = f64::from(*vote) / sum;
        if p > 0.0 { -p * p.ln() } else { 0.0 }
    };
    Seen {
        question,
        layer,
        share: votes[place].iter().map(|&vote| f64::from(vote)).sum::<f64>() / sum,
        rank: votes.iter().filter(|&&vote| vote > best).count(),
        spread: votes.iter().map(entropy).sum::<f64>().exp(),
    }
}

fn summarise(settings: Settings, layer: usize, found: bool, own: &[&Seen]) -> LayerVotes {
    let mean = |of: fn(&Seen) -> f64| own.iter().map(|seen| of(seen)).sum::<f64>() / own.len().max(1) as f64;
    LayerVotes {
        settings,
        layer,
        found,
        questions: own.len(),
        share: mean(|seen| seen.share),
        within: own.iter().filter(|seen| seen.rank < settings.top_k).count(),
        spread: mean(|seen| seen.spread),
    }
}
