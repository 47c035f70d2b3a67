//! Whether a policy finds the keys.

use serde::Serialize;
use tokenselect::Device;
use tokenselect_examples::error::Result;
use tokenselect_examples::model::Model;

use crate::haystack::Haystack;
use crate::policy::Settings;
use crate::reader::{Observer, Reader};
use crate::steps::Votes;

/// What was found in texts of one length.
#[derive(Debug, Clone, Serialize)]
pub struct Retrieval {
    /// How it was looked for.
    pub settings: Settings,
    /// Bytes of the texts.
    pub length: usize,
    /// Texts, each with a key at every depth.
    pub asked: usize,
    /// Keys found, by depth.
    pub found: Vec<usize>,
}

impl Retrieval {
    /// Share of the keys found, from 0 to 1.
    pub fn share(&self) -> f64 {
        self.found.iter().sum::<usize>() as f64 / (self.asked * self.found.len()) as f64
    }
}

/// Sees the votes at the end of a question: which key is asked for, the layer, its votes.
pub type VotesOfKey<'a> = dyn FnMut(usize, usize, &Votes) + 'a;

/// What retrieval runs on.
#[derive(Clone, Copy)]
pub struct Bench<'a> {
    /// The model that reads.
    pub model: &'a Model,
    /// Where attention runs.
    pub device: &'a Device,
    /// Bytes of a question that are read one at a time.
    pub singles: usize,
}

impl Bench<'_> {
    /// Reads each text once and asks for each of its keys.
    pub fn retrieve(&self, texts: &[Haystack], length: usize, settings: Settings) -> Result<Retrieval> {
        let mut found = vec![0; texts.first().map_or(0, |text| text.keys.len())];
        for text in texts {
            self.ask_all(text, settings, &mut |depth, is_found| found[depth] += usize::from(is_found), None)?;
        }
        Ok(Retrieval { settings, length, asked: texts.len(), found })
    }

    /// Reads a text once and asks for each of its keys; `answered` is told which were found, after `observer`, told which key is
    /// asked for, has seen the votes at the end of the question.
    pub fn ask_all(
        &self,
        text: &Haystack,
        settings: Settings,
        answered: &mut dyn FnMut(usize, bool),
        mut observer: Option<&mut VotesOfKey<'_>>,
    ) -> Result<()> {
        let mut reader = Reader::new(self.model, self.device, settings, text.text.len())?;
        // What is left of the text joins the question's block, as where text and question are read in one go.
        let (blocks, rest) = text.text.split_at(text.text.len() / settings.block * settings.block);
        reader.read(blocks, &mut |_| Ok(()))?;
        for (depth, key) in text.keys.iter().enumerate() {
            let is_found = match &mut observer {
                None => reader.ask(rest, key, self.singles, None)?,
                Some(observer) => {
                    let observer: &mut Observer<'_> = &mut |layer, votes| observer(depth, layer, votes);
                    reader.ask(rest, key, self.singles, Some(observer))?
                }
            };
            answered(depth, is_found);
        }
        Ok(())
    }
}
