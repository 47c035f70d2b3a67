//! What the tokens of a model stand for: bytes, or what a tokenizer says.

use std::io::Read;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// The tokens of a model.
pub enum Vocabulary {
    /// A token is a byte, by its value.
    Bytes,
    /// `tokenizer.json` of the model folder.
    Tokenizer {
        /// Its path, for errors.
        path: PathBuf,
        /// What was read of it.
        tokenizer: Box<Tokenizer>,
        /// Tokens of the model.
        vocab_size: usize,
    },
}

/// A text as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// The tokens.
    pub ids: Vec<u32>,
    /// For each token, the bytes of the text up to its end. Never falls.
    pub ends: Vec<usize>,
}

impl Vocabulary {
    /// That of a model folder. Without `tokenizer.json` tokens are bytes, if there are as many.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`], [`Error::Tokenizer`], [`Error::TokenId`].
    pub fn load(folder: &Path, vocab_size: usize) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.exists() {
            return match vocab_size {
                256 => Ok(Vocabulary::Bytes),
                _ => Err(Error::NoTokenizer { path: folder.to_owned(), vocab_size }),
            };
        }
        let bytes = std::fs::read(&path).map_err(Error::read(&path))?;
        let tokenizer = match guarded(|| read(bytes)) {
            Ok(tokenizer) => Box::new(tokenizer),
            Err(source) => return Err(Error::Tokenizer { path, source }),
        };
        let last = tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        match last {
            Some((token, id)) if id as usize >= vocab_size => {
                Err(Error::TokenId { path, token, id, vocab_size })
            }
            _ => Ok(Vocabulary::Tokenizer { path, tokenizer, vocab_size }),
        }
    }

    /// Checks that tokens are bytes, which `what` needs.
    ///
    /// # Errors
    /// [`Error::NotBytes`].
    pub fn expect_bytes(&self, folder: &Path, what: &'static str) -> Result<()> {
        match self {
            Vocabulary::Bytes => Ok(()),
            Vocabulary::Tokenizer { .. } => Err(Error::NotBytes { path: folder.to_owned(), what }),
        }
    }

    /// The first `limit` tokens of `text`, called `what` in errors, which is read no further than they need. What a tokenizer puts
    /// before a text is among the tokens.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::NotText`], [`Error::Tokenizer`], [`Error::Token`], and [`Error::ShortText`] for fewer than two
    /// tokens.
    pub fn encode(&self, text: impl Read, limit: usize, what: &str) -> Result<Tokens> {
        let mut text = Beginning { text, bytes: Vec::new(), what };
        let (mut tokens, unit) = match self {
            Vocabulary::Bytes => {
                text.extend(limit)?;
                let ids = text.bytes.iter().map(|&byte| u32::from(byte)).collect();
                (Tokens { ids, ends: (1..=text.bytes.len()).collect() }, "bytes")
            }
            Vocabulary::Tokenizer { path, tokenizer, vocab_size } => {
                let tokens = text.encode(limit, |part| {
                    guarded(|| encode(tokenizer, part, limit))
                        .map_err(|source| Error::Tokenizer { path: path.clone(), source })
                })?;
                // Those that are put before a text need not be in the vocabulary.
                if let Some(&id) = tokens.ids.iter().find(|&&id| id as usize >= *vocab_size) {
                    return Err(Error::Token { id, vocab_size: *vocab_size });
                }
                (tokens, "tokens")
            }
        };
        tokens.ids.truncate(limit);
        tokens.ends.truncate(limit);
        match tokens.ids.len() {
            got @ 0..2 => Err(Error::ShortText { what: what.to_owned(), got, unit }),
            _ => Ok(tokens),
        }
    }

    /// The text of some tokens. Bytes that are no text are replaced.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        match self {
            Vocabulary::Bytes => {
                let bytes: Vec<u8> = ids.iter().filter_map(|&id| u8::try_from(id).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Vocabulary::Tokenizer { path, tokenizer, .. } => guarded(|| tokenizer.decode(ids, false))
                .map_err(|source| Error::Tokenizer { path: path.clone(), source }),
        }
    }
}

impl Tokens {
    /// The first `limit` tokens, if there are more.
    fn first(mut self, limit: usize) -> Option<Self> {
        let has_more = self.len() > limit;
        self.ids.truncate(limit);
        self.ends.truncate(limit);
        has_more.then_some(self)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Bytes of the text that the tokens from `from` to below `to` stand for.
    pub fn bytes(&self, from: usize, to: usize) -> usize {
        let end = |tokens: usize| tokens.checked_sub(1).map_or(0, |last| self.ends[last]);
        end(to) - end(from)
    }
}

/// What was read of a text.
struct Beginning<'a, R> {
    text: R,
    bytes: Vec<u8>,
    /// Name of the text.
    what: &'a str,
}

impl<R: Read> Beginning<'_, R> {
    /// Reads on until there are `len` bytes. Whether there are: then the text may go on.
    fn extend(&mut self, len: usize) -> Result<bool> {
        let missing = len.saturating_sub(self.bytes.len()) as u64;
        let mut more = self.text.by_ref().take(missing);
        more.read_to_end(&mut self.bytes).map_err(Error::read(Path::new(self.what)))?;
        Ok(self.bytes.len() >= len)
    }

    /// What `encode` makes of the whole text, or its first `limit` tokens.
    fn encode(&mut self, limit: usize, encode: impl Fn(&str) -> Result<Tokens>) -> Result<Tokens> {
        // A whole book is not cut into tokens for its first page.
        const LEAST: usize = 4096;
        let mut len = limit.saturating_mul(8).max(LEAST);
        let mut shorter = None;
        loop {
            let is_cut = self.extend(len)?;
            let tokens = encode(utf8(&self.bytes, is_cut, self.what)?)?;
            if !is_cut {
                return Ok(tokens);
            }
            // The last tokens of a part are others where the text goes on, as many as its last word has. So tokens are taken if
            // they are the same in a part twice as long.
            match (tokens.first(limit), shorter) {
                (Some(tokens), Some(same)) if tokens == same => return Ok(tokens),
                (tokens, _) => shorter = tokens,
            }
            len = len.saturating_mul(2);
        }
    }
}

/// Reads `tokenizer.json`.
fn read(bytes: Vec<u8>) -> tokenizers::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_bytes(bytes)?;
    // Some files say that texts are cut or padded to one length.
    tokenizer.with_padding(None).with_truncation(None)?;
    if let Some(processor) = tokenizer.get_post_processor() {
        check_templates(&serde_json::to_value(processor)?)?;
    }
    Ok(tokenizer)
}

/// Checks that the templates of what is put around a text know their tokens: the crate panics where they do not.
fn check_templates(processor: &Value) -> tokenizers::Result<()> {
    for piece in processor["single"].as_array().into_iter().flatten() {
        if let Some(id) = piece["SpecialToken"]["id"].as_str()
            && processor["special_tokens"].get(id).is_none()
        {
            return Err(format!("the template names {id:?}, which is not among its special tokens").into());
        }
    }
    processor["processors"].as_array().into_iter().flatten().try_for_each(check_templates)
}

/// Calls into the crate, which panics for some files that contradict themselves. Such a panic is not printed.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    // The hook is one for all threads.
    static HOOK: Mutex<()> = Mutex::new(());
    let _hook = HOOK.lock().unwrap_or_else(PoisonError::into_inner);
    let caller = thread::current().id();
    let hook = Arc::new(panic::take_hook());
    let others = Arc::clone(&hook);
    panic::set_hook(Box::new(move |info| {
        if thread::current().id() != caller {
            others(info);
        }
    }));
    // Nothing that the call may have left half done is used after a panic.
    let result = catch_unwind(AssertUnwindSafe(call));
    drop(panic::take_hook());
    if let Some(hook) = Arc::into_inner(hook) {
        panic::set_hook(hook);
    }
    result.unwrap_or_else(|_| Err("it contradicts itself".into()))
}

/// The longest beginning of `text` that is UTF-8: all of it, or all but a character that was cut.
fn utf8<'a>(text: &'a [u8], is_cut: bool, what: &str) -> Result<&'a str> {
    match std::str::from_utf8(text) {
        Ok(text) => Ok(text),
        Err(error) => {
            let (valid, _) = text.split_at(error.valid_up_to());
            match std::str::from_utf8(valid) {
                Ok(valid) if is_cut && error.error_len().is_none() => Ok(valid),
                _ => Err(Error::NotText { what: what.to_owned(), at: error.valid_up_to() }),
            }
        }
    }
}

/// Tokens of a text, of which only the first `limit` are wanted.
fn encode(tokenizer: &Tokenizer, text: &str, limit: usize) -> tokenizers::Result<Tokens> {
    let encoding = tokenizer.encode(text, true)?;
    let mut ids = encoding.get_ids().to_vec();
    // What is put behind a text is no part of one that goes on.
    while ids.last().is_some() && encoding.get_special_tokens_mask()[ids.len() - 1] == 1 {
        ids.pop();
    }
    let mut end = 0;
    let ends = encoding.get_offsets()[..ids.len()].iter().map(|&(_, token_end)| {
        // Tokens that are parts of one character all end where it does; those that stand for no text, at 0.
        end = token_end.clamp(end, text.len());
        end
    });
    let mut ends: Vec<usize> = ends.collect();
    // The end of a text that no token stands for, such as blanks, belongs to the last.
    if let Some(last) = ends.last_mut().filter(|_| ids.len() <= limit) {
        *last = text.len();
    }
    Ok(Tokens { ids, ends })
}
