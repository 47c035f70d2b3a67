//! Texts with pass keys in them.

use std::ops::Range;

use tokenselect_examples::error::{Error, Result};
use tokenselect_examples::random::Random;

/// A text and the keys that it hides.
#[derive(Debug, Clone)]
pub struct Haystack {
    /// The text; it ends with a whole line.
    pub text: Vec<u8>,
    /// Its keys, one for each depth.
    pub keys: Vec<Key>,
}

/// A pass key: what is asked for by its name.
#[derive(Debug, Clone)]
pub struct Key {
    name: [u8; 5],
    /// The answer.
    pub digits: [u8; 5],
    /// Where the digits lie in the text.
    pub place: Range<usize>,
}

/// No key lies before this byte. The first tokens of any text are where attention goes that has nothing to look for, and they are in the
/// initial window of every policy: a key there would ask for something else.
const BEGIN: usize = 64;
/// Bytes of a line that holds a key.
const LINE: usize = b"# The pass key of ABCDE is 12345.\n".len();

impl Key {
    fn draw(random: &mut Random) -> Self {
        let mut symbols = |first: u8, count: usize| [(); 5].map(|()| first + random.below(count) as u8);
        Key { name: symbols(b'A', 26), digits: symbols(b'0', 10), place: 0..0 }
    }

    fn line(&self) -> Vec<u8> {
        [b"# The pass key of ", &self.name[..], b" is ", &self.digits, b".\n"].concat()
    }

    /// What is asked behind the text; the answer follows it.
    pub fn question(&self) -> Vec<u8> {
        let parts =
            [b"# What is the pass key of ", &self.name[..], b"? The pass key of ", &self.name, b" is "];
        parts.concat()
    }
}

/// A text of `len` bytes (or a few more) that begins at a line of `source` which the seed draws, with a key at each of `num_depths`
/// depths, from its first lines to its end.
///
/// # Errors
/// [`Error::Option`] where the source is too short, or the text for its keys.
pub fn haystack(source: &[u8], len: usize, num_depths: usize, seed: u64) -> Result<Haystack> {
    let Some(hay) = len.checked_sub(num_depths * LINE).filter(|&hay| hay > BEGIN) else {
        let rule = format!("at least {}, for {num_depths} keys", num_depths * LINE + BEGIN + 1);
        return Err(Error::option("--lengths", rule, len));
    };
    if source.len() < hay {
        let rule = format!("at most {}, by the length of the text", source.len() + num_depths * LINE);
        return Err(Error::option("--lengths", rule, len));
    }
    let mut random = Random::new(seed);
    let begin = line_start(source, random.below(source.len() - hay + 1));
    let hay = &source[begin..begin + hay];
    let mut made = Haystack { text: Vec::with_capacity(len + 1), keys: Vec::new() };
    let mut copied = 0;
    for index in 0..num_depths {
        let depth = index as f64 / (num_depths - 1).max(1) as f64;
        let at = line_end(hay, BEGIN + (depth * (hay.len() - BEGIN) as f64) as usize);
        made.add_lines(&hay[copied..at]);
        let mut key = Key::draw(&mut random);
        while made.keys.iter().any(|other| other.name == key.name) {
            key = Key::draw(&mut random);
        }
        made.add_key(key);
        copied = at;
    }
    made.add_lines(&hay[copied..]);
    Ok(made)
}

impl Haystack {
    fn add_lines(&mut self, lines: &[u8]) {
        self.text.extend(lines);
        if self.text.last().is_some_and(|&byte| byte != b'\n') {
            self.text.push(b'\n');
        }
    }

    fn add_key(&mut self, mut key: Key) {
        let line = key.line();
        let digits = self.text.len() + line.len() - b"12345.\n".len();
        key.place = digits..digits + key.digits.len();
        self.text.extend(line);
        self.keys.push(key);
    }
}

/// Behind the end of the line that `at` lies in.
fn line_end(text: &[u8], at: usize) -> usize {
    let at = at.min(text.len());
    text[at..].iter().position(|&byte| byte == b'\n').map_or(text.len(), |newline| at + newline + 1)
}

/// The start of the line that `at` lies in.
fn line_start(text: &[u8], at: usize) -> usize {
    text[..at.min(text.len())].iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1)
}
