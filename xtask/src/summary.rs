//! The table at the end of a run: every step with its result and duration, then reasons of failures, then the names
//! of all that did not run. Printed as text and, for campaigns, as Markdown.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use guest_trials::{Outcome, Report, RowReport};

/// Collects results.
#[derive(Debug)]
pub struct Summary {
    title: String,
    started: Instant,
    lines: Vec<RowReport>,
}

impl Summary {
    pub fn new(title: impl Into<String>) -> Self {
        Self { title: title.into(), started: Instant::now(), lines: Vec::new() }
    }

    /// Runs a step and records how it went; an error does not stop the steps behind it.
    pub fn step(&mut self, name: &str, work: impl FnOnce() -> Result<Outcome>) {
        eprintln!("\n── {name}");
        let start = Instant::now();
        let outcome = work().unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
        if let Outcome::Failed(reason) | Outcome::NotRun(reason) = &outcome {
            eprintln!("{name}: {reason}");
        }
        self.lines.push(RowReport { name: name.into(), outcome, took: start.elapsed() });
    }

    /// Two rows of steps at the same time, whose programs keep one processor busy each; the lines of `second` come last.
    pub fn side_by_side(&mut self, first: impl FnOnce(&mut Self), second: impl FnOnce(&mut Self) + Send) {
        let mut others = Self::new(self.title.clone());
        std::thread::scope(|scope| {
            scope.spawn(|| second(&mut others));
            first(self);
        });
        self.lines.append(&mut others.lines);
    }

    /// Adds what the guest trials reported.
    pub fn add(&mut self, prefix: &str, report: &Report) {
        let named =
            report.rows.iter().map(|row| RowReport { name: format!("{prefix}{}", row.name), ..row.clone() });
        self.lines.extend(named);
    }

    /// Records something that cannot run at all.
    pub fn not_run(&mut self, name: &str, reason: &str) {
        let outcome = Outcome::NotRun(reason.into());
        self.lines.push(RowReport { name: name.into(), outcome, took: Duration::ZERO });
    }

    pub fn is_good(&self) -> bool {
        !self.lines.iter().any(|line| matches!(line.outcome, Outcome::Failed(_)))
    }

    /// Prints the table; an error if anything failed.
    pub fn finish(&self) -> Result<()> {
        eprintln!("\n{}", self.text());
        if !self.is_good() {
            bail!("{} failed", self.title);
        }
        Ok(())
    }

    fn text(&self) -> String {
        let ran: Vec<_> = self.lines.iter().filter(|l| !matches!(l.outcome, Outcome::NotRun(_))).collect();
        let width = ran.iter().map(|line| line.name.chars().count()).max().unwrap_or(0);
        let mut text = format!("══ {}\n", self.title);
        for line in &ran {
            let word = if line.outcome == Outcome::Passed { "ok" } else { "FAILED" };
            let _ = writeln!(text, "{:width$}  {word:6}  {:>8}", line.name, seconds(line.took));
        }
        let not_run: Vec<_> = self.not_run_lines().collect();
        if !not_run.is_empty() {
            let _ = writeln!(text, "\nnot run ({}):", not_run.len());
            for (name, reason) in not_run {
                let _ = writeln!(text, "  {name}: {reason}");
            }
        }
        for (name, reason) in self.failures() {
            let _ = writeln!(text, "\nFAILED {name}: {reason}");
        }
        let failed = self.failures().count();
        let _ = write!(
            text,
            "\n{} ok, {failed} failed, {} not run, {} in all",
            ran.len() - failed,
            self.not_run_lines().count(),
            seconds(self.started.elapsed())
        );
        text
    }

    /// The same as a Markdown page.
    pub fn markdown(&self, facts: &[(&str, String)]) -> String {
        let mut page = format!("# {}\n\n", self.title);
        for (name, value) in facts {
            let _ = writeln!(page, "- {name}: {value}");
        }
        let _ = writeln!(page, "- duration: {}\n", seconds(self.started.elapsed()));
        page.push_str("| row | result | duration |\n|---|---|---:|\n");
        for line in &self.lines {
            let word = match &line.outcome {
                Outcome::Passed => "ok".to_string(),
                Outcome::Failed(_) => "**failed**".to_string(),
                Outcome::NotRun(reason) => format!("not run: {reason}"),
            };
            let _ = writeln!(page, "| {} | {word} | {} |", line.name, seconds(line.took));
        }
        for (name, reason) in self.failures() {
            let _ = writeln!(page, "\n## {name}\n\n```text\n{reason}\n```");
        }
        page
    }

    fn failures(&self) -> impl Iterator<Item = (&str, &str)> {
        self.lines.iter().filter_map(|line| match &line.outcome {
            Outcome::Failed(reason) => Some((line.name.as_str(), reason.as_str())),
            _ => None,
        })
    }

    fn not_run_lines(&self) -> impl Iterator<Item = (&str, &str)> {
        self.lines.iter().filter_map(|line| match &line.outcome {
            Outcome::NotRun(reason) => Some((line.name.as_str(), reason.as_str())),
            _ => None,
        })
    }
}

/// `3.2 s`, `4 min 07 s`.
pub fn seconds(duration: Duration) -> String {
    let whole = duration.as_secs();
    if whole >= 60 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_side_by_side_are_all_told_in_order() {
        let (to_first, from_second) = std::sync::mpsc::channel();
        let mut summary = Summary::new("trial");
        summary.side_by_side(
            |first| first.step("first", || from_second.recv().map(|()| Outcome::Passed).map_err(Into::into)),
            |second| {
                second.step("second", || to_first.send(()).map(|()| Outcome::Passed).map_err(Into::into));
                second.step("bad", || bail!("it broke"));
            },
        );
        let names: Vec<&str> = summary.lines.iter().map(|line| line.name.as_str()).collect();
        assert_eq!(names, ["first", "second", "bad"]);
        assert_eq!(summary.failures().count(), 1);
    }

    #[test]
    fn nothing_is_left_out() {
        let mut summary = Summary::new("trial");
        summary.step("good", || Ok(Outcome::Passed));
        summary.step("bad", || bail!("it broke"));
        summary.not_run("later", "left to the campaign");
        for page in [summary.text(), summary.markdown(&[("commit", "abc".into())])] {
            for word in ["good", "bad", "it broke", "later", "left to the campaign"] {
                assert!(page.contains(word), "{word} is missing in:\n{page}");
            }
        }
        assert!(!summary.is_good());
        assert!(summary.finish().is_err());
        assert_eq!(seconds(Duration::from_secs(247)), "4 min 07 s");
    }
}
