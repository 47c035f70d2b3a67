//! Progress and output.

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::error::{Error, Result};

/// Progress on stderr over a known amount: a bar, or where stderr is no terminal a line every few seconds.
pub struct Progress {
    bar: ProgressBar,
    lines: Lines,
}

/// Progress as lines, not too often.
struct Lines {
    unit: &'static str,
    started: Instant,
    last: Instant,
}

impl Lines {
    /// Between two lines.
    const PAUSE: Duration = Duration::from_secs(5);

    /// A line, if it is time for one.
    fn line(&mut self, now: Instant, name: &str, done: u64, len: u64) -> Option<String> {
        if now.duration_since(self.last) < Self::PAUSE {
            return None;
        }
        self.last = now;
        let rate = done as f64 / now.duration_since(self.started).as_secs_f64();
        let Lines { unit, .. } = self;
        Some(format!("{name}: {done} of {len} {unit} read, {rate:.0} per second"))
    }
}

impl Progress {
    /// So many of a unit.
    pub fn new(len: usize, unit: &'static str) -> Self {
        let bar = ProgressBar::new(len as u64);
        let template = format!("{{msg:>9}} {{wide_bar}} {{pos}}/{{len}} {unit}, {{per_sec}}, {{eta}} left");
        let now = Instant::now();
        Progress {
            bar: ProgressStyle::with_template(&template).map_or(bar.clone(), |style| bar.with_style(style)),
            lines: Lines { unit, started: now, last: now },
        }
    }

    /// What is done from now on.
    pub fn begin(&self, name: &'static str) {
        self.bar.set_message(name);
    }

    /// How much is done.
    pub fn position(&self) -> usize {
        usize::try_from(self.bar.position()).unwrap_or(usize::MAX)
    }

    /// So much is done.
    pub fn set(&mut self, done: usize) {
        self.bar.set_position(done as u64);
        if self.bar.is_hidden() {
            let len = self.bar.length().unwrap_or(0);
            if let Some(line) = self.lines.line(Instant::now(), &self.bar.message(), done as u64, len) {
                // Progress that nobody reads is no reason to stop.
                let _ = writeln!(io::stderr(), "{line}");
            }
        }
    }

    /// Writes a result to stdout, above the bar.
    ///
    /// # Errors
    /// As [`print()`].
    pub fn print(&self, output: &str) -> Result<()> {
        self.bar.suspend(|| print(output))
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_every_few_seconds() {
        let started = Instant::now();
        let mut lines = Lines { unit: "tokens", started, last: started };
        let mut at =
            |seconds: f64, done| lines.line(started + Duration::from_secs_f64(seconds), "dense", done, 9000);
        assert_eq!(at(4.9, 100), None);
        assert_eq!(at(5.0, 1000).as_deref(), Some("dense: 1000 of 9000 tokens read, 200 per second"));
        assert_eq!(at(9.9, 1500), None);
        assert_eq!(at(20.0, 2000).as_deref(), Some("dense: 2000 of 9000 tokens read, 100 per second"));
    }
}
