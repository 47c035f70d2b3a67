//! What can go wrong: each message names the file or option, the rule and what was found.

use std::io;
use std::path::{Path, PathBuf};

use safetensors::SafeTensorError;

/// `Result` with the [`Error`] of the examples.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every error of the examples.
#[expect(missing_docs, reason = "the message of each variant says what its fields are")]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option breaks its rule.
    #[error("option `{option}` must be {rule}, got {got}")]
    Option { option: &'static str, rule: String, got: String },
    /// The model is not a folder.
    #[error("model folder {} does not exist or is not a folder", .path.display())]
    NoFolder { path: PathBuf },
    /// The model folder holds no weights.
    #[error("model folder {} has neither model.safetensors nor model.safetensors.index.json", .path.display())]
    NoWeights { path: PathBuf },
    /// A file cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    /// A file cannot be written.
    #[error("cannot write {}: {source}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    /// Stdout cannot be written.
    #[error("cannot write to stdout: {source}")]
    Stdout { source: io::Error },
    /// A JSON file has a syntax error or a field of another type.
    #[error("{}: {source}", .path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    /// The report cannot be written as JSON.
    #[error("cannot write the report as JSON: {source}")]
    ReportJson { source: serde_json::Error },
    /// A field of `config.json` is missing or breaks its rule.
    #[error("{}: `{field}` must be {rule}, got {got}", .path.display())]
    Config { path: PathBuf, field: &'static str, rule: String, got: String },
    /// Two fields of `config.json` say different things.
    #[error("{}: `{field}` and `{other}` must be the same, got {got} and {other_got}", .path.display())]
    ConfigFields { path: PathBuf, field: &'static str, got: String, other: &'static str, other_got: String },
    /// A weights file is damaged.
    #[error("{} is not a whole safetensors file: {source}", .path.display())]
    Safetensors { path: PathBuf, source: SafeTensorError },
    /// A tensor is in none of the weights files.
    #[error("tensor `{name}` is missing from the weights in {}", .path.display())]
    MissingTensor { path: PathBuf, name: String },
    /// A file of the index is not in the model folder.
    #[error("{}: the file of tensor `{tensor}` must be a name without folders, got {file:?}", .path.display())]
    ShardName { path: PathBuf, tensor: String, file: String },
    /// Two weights files hold tensors of one name.
    #[error("tensor `{name}` is in two weights files, {} and {}", .other.display(), .path.display())]
    TensorTwice { path: PathBuf, name: String, other: PathBuf },
    /// The weights hold a part of a model that is not implemented.
    #[error("{}: tensor `{first}` is no part of the model that config.json describes ({count} such tensors in the folder, 0 expected)", .path.display())]
    UnreadTensors { path: PathBuf, first: String, count: usize },
    /// A tensor has the wrong shape.
    #[error("{}: tensor `{name}` must have shape {expected:?}, got {got:?}", .path.display())]
    TensorShape { path: PathBuf, name: String, expected: Vec<usize>, got: Vec<usize> },
    /// A tensor has a type that is not read.
    #[error("{}: tensor `{name}` must be bf16, f16 or f32, got {got:?}", .path.display())]
    TensorDType { path: PathBuf, name: String, got: safetensors::Dtype },
    /// The tokenizer is damaged or of a kind that is not read.
    #[error("{}: this tokenizer cannot be used: {source}", .path.display())]
    Tokenizer { path: PathBuf, source: tokenizers::Error },
    /// The tokenizer has tokens that the model has not.
    #[error("{}: the id of token {token:?} must be below vocab_size = {vocab_size} of config.json, got {id}", .path.display())]
    TokenId { path: PathBuf, token: String, id: u32, vocab_size: usize },
    /// Nothing says what the tokens of the model are.
    #[error(
        "model folder {} has no tokenizer.json: without one, vocab_size must be 256, a token for each byte, got {vocab_size}",
        .path.display()
    )]
    NoTokenizer { path: PathBuf, vocab_size: usize },
    /// What is done works with bytes.
    #[error("model folder {} has a tokenizer, but {what} needs a model whose tokens are bytes", .path.display())]
    NotBytes { path: PathBuf, what: &'static str },
    /// The text is not what a tokenizer reads.
    #[error("{what} must be UTF-8 for a model with a tokenizer, but is not at byte {at}")]
    NotText { what: String, at: usize },
    /// A token that the model has no embedding of.
    #[error("a token must be below vocab_size = {vocab_size}, got {id}")]
    Token { id: u32, vocab_size: usize },
    /// The text is too short to predict anything.
    #[error("{what} has {got} {unit}, but at least 2 are needed: the first is not predicted")]
    ShortText { what: String, got: usize, unit: &'static str },
    /// The model computed something that is not a number.
    #[error("the prediction of token {position} is not finite: are the weights damaged?")]
    NotFinite { position: usize },
    /// The plot cannot be drawn.
    #[error("cannot draw the plot: {source}")]
    Plot { source: io::Error },
    /// The library refused.
    #[error(transparent)]
    Library(#[from] tokenselect::Error),
}

impl Error {
    /// Shorthand for [`Error::Option`].
    pub fn option(option: &'static str, rule: impl Into<String>, got: impl ToString) -> Self {
        Error::Option { option, rule: rule.into(), got: got.to_string() }
    }

    /// Makes an [`Error::Read`] of the error of a read of `path`.
    pub fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Error::Read { path: path.to_owned(), source }
    }
}

/// Checks that a file which will be written is no folder, and is in one that exists: that should not be noticed after the work is
/// done.
///
/// # Errors
/// [`Error::Option`].
pub fn expect_folder(option: &'static str, file: &Path) -> Result<()> {
    let folder = match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    match folder.is_dir() {
        true if file.is_dir() => {
            Err(Error::option(option, "a file", format!("the folder {}", file.display())))
        }
        true => Ok(()),
        false => Err(Error::option(option, "in a folder that exists", folder.display())),
    }
}

/// Checks that a file which will be written is not `read`, that of another option.
///
/// # Errors
/// [`Error::Option`].
pub fn expect_other(option: &'static str, file: &Path, read_option: &str, read: &Path) -> Result<()> {
    match (file.canonicalize(), read.canonicalize()) {
        (Ok(written), Ok(same)) if written == same => {
            Err(Error::option(option, format!("another file than that of `{read_option}`"), file.display()))
        }
        // What does not exist is not overwritten.
        _ => Ok(()),
    }
}
