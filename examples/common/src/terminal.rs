//! Progress and output.

use std::io::{self, Write};
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};

use crate::error::{Error, Result};

/// A progress bar on stderr over `len` of `unit`, hidden where stderr is no terminal.
pub fn progress_bar(name: impl Into<String>, len: usize, unit: &str) -> ProgressBar {
    let bar = ProgressBar::new(len as u64).with_message(name.into());
    let template = format!("{{msg:>9}} {{wide_bar}} {{pos}}/{{len}} {unit}, {{per_sec}}, {{eta}} left");
    match ProgressStyle::with_template(&template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// Progress over a number of jobs: a bar on stderr, or a line for each job where stderr is no terminal.
pub struct Jobs {
    bar: ProgressBar,
}

impl Jobs {
    /// So many jobs.
    pub fn new(len: usize) -> Self {
        let bar = ProgressBar::new(len as u64);
        let template = "{pos}/{len} {wide_bar} {elapsed}, {eta} left\n{msg}";
        Jobs {
            bar: ProgressStyle::with_template(template).map_or(bar.clone(), |style| bar.with_style(style)),
        }
    }

    /// A job begins.
    pub fn begin(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// It is done.
    pub fn end(&self, what: &str) {
        self.bar.inc(1);
        if self.bar.is_hidden() {
            let (done, all) = (self.bar.position(), self.bar.length().unwrap_or(0));
            // Progress that nobody reads is no reason to stop.
            let _ = writeln!(io::stderr(), "{done}/{all} {what}");
        }
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Writes to stdout. A reader that went away, such as `head`, is no error.
///
/// # Errors
/// [`Error::Stdout`].
pub fn print(output: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{output}").and_then(|()| stdout.flush()) {
        Err(source) if source.kind() != io::ErrorKind::BrokenPipe => Err(Error::Stdout { source }),
        _ => Ok(()),
    }
}

/// The end of `main`: an error is one line on stderr.
pub fn exit(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // If even stderr is closed, the exit code has to do.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}
