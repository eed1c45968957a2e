//! Runs rows one after the other, prepares the guests they need first, keeps each row's transcript in a log file, and
//! gives a report in which every row stands: passed, failed with the reason, or not run with the reason.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use guest_catalog::{Cache, Progress};

use crate::config::Vmm;
use crate::rows::{self, Ground, Row};
use crate::stage::{Stage, Tier};

/// Which rows run, and how.
#[derive(Debug)]
pub struct Selection {
    /// Rows of this tier and below run; the others are listed.
    pub tier: Tier,
    /// Only rows whose names contain this.
    pub name_contains: Option<String>,
    /// Seed of all random choices.
    pub seed: u64,
    /// Where transcripts go.
    pub logs: PathBuf,
}

/// How a row ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It holds.
    Passed,
    /// It does not, and why.
    Failed(String),
    /// It did not run, and why.
    NotRun(String),
}

/// A row's line in the report.
#[derive(Debug, Clone)]
pub struct RowReport {
    /// The row's name.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took, for information.
    pub took: Duration,
}

/// All rows, in order.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// One entry per row.
    pub rows: Vec<RowReport>,
}

impl Report {
    /// Whether nothing failed.
    pub fn is_good(&self) -> bool {
        !self.rows.iter().any(|row| matches!(row.outcome, Outcome::Failed(_)))
    }
}

/// Runs the selected rows on `vmm`; `tell` hears of each row's end.
pub fn run(
    selection: &Selection,
    vmm: &Vmm,
    cache: &Cache,
    progress: &mut dyn Progress,
    tell: &mut dyn FnMut(&RowReport),
) -> Report {
    let mut report = Report::default();
    for row in rows::all() {
        let start = Instant::now();
        let outcome = match reason_not_to_run(&row, selection, vmm) {
            Some(reason) => Outcome::NotRun(reason),
            None => match prepare_guests(&row, cache, progress) {
                Err(reason) => Outcome::Failed(reason),
                Ok(()) => run_row(&row, selection, vmm, cache),
            },
        };
        let line = RowReport { name: row.name, outcome, took: start.elapsed() };
        tell(&line);
        report.rows.push(line);
    }
    report
}

fn reason_not_to_run(row: &Row, selection: &Selection, vmm: &Vmm) -> Option<String> {
    if selection.name_contains.as_ref().is_some_and(|part| !row.name.contains(part.as_str())) {
        return Some("not selected by name".into());
    }
    if row.tier > selection.tier {
        return Some("left to cargo xtask campaign".into());
    }
    if row.bedplate_only && !vmm.is_bedplate() {
        return Some("needs what only Bedplate has".into());
    }
    match (row.ground, vmm) {
        (Ground::NotInLab(reason), Vmm::Lab { .. }) => {
            return Some(format!("not in the laboratory: {reason}"));
        }
        (Ground::LabOnly, Vmm::Bedplate { .. } | Vmm::Qemu { .. }) => {
            return Some("needs a real KVM: cargo xtask trials --lab".into());
        }
        _ => {}
    }
    None
}

fn prepare_guests(row: &Row, cache: &Cache, progress: &mut dyn Progress) -> Result<(), String> {
    for name in &row.guests {
        let prepared = guest_catalog::find(name).and_then(|guest| cache.fetch(guest, progress));
        prepared.map_err(|error| format!("guest {name} could not be prepared: {error}"))?;
    }
    Ok(())
}

fn run_row(row: &Row, selection: &Selection, vmm: &Vmm, cache: &Cache) -> Outcome {
    let stage = match Stage::new(vmm.clone(), cache.clone(), selection.seed) {
        Ok(stage) => stage,
        Err(error) => return Outcome::Failed(format!("no scratch folder: {error}")),
    };
    let result = catch_unwind(AssertUnwindSafe(|| (row.run)(&stage)));
    let log = write_log(&selection.logs, &row.name, &stage.transcripts());
    let failed = |reason: String| {
        Outcome::Failed(match &log {
            Ok(path) => format!("{reason}\n    whole transcript: {}", path.display()),
            Err(error) => format!("{reason}\n    (the transcript could not be kept: {error})"),
        })
    };
    match result {
        Ok(Ok(())) => Outcome::Passed,
        Ok(Err(failure)) => failed(failure.to_string()),
        Err(_) => failed("the trial itself panicked".into()),
    }
}

fn write_log(folder: &Path, row: &str, transcripts: &[u8]) -> std::io::Result<PathBuf> {
    fs::create_dir_all(folder)?;
    let path = folder.join(format!("{}.log", row.replace('/', "_")));
    fs::write(&path, transcripts)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selection(tier: Tier, part: Option<&str>) -> Selection {
        Selection { tier, name_contains: part.map(str::to_string), seed: 1, logs: PathBuf::new() }
    }

    #[test]
    fn rows_that_do_not_run_say_why() {
        let qemu = Vmm::Qemu { binary: "qemu".into() };
        let rows = rows::all();
        let campaign = rows.iter().find(|row| row.tier == Tier::Campaign && !row.bedplate_only).unwrap();
        let own = rows.iter().find(|row| row.bedplate_only && row.ground == Ground::Any).unwrap();
        let lab = rows.iter().find(|row| row.ground == Ground::LabOnly).unwrap();
        let reason = |row, tier, part| reason_not_to_run(row, &selection(tier, part), &qemu);
        assert!(reason(campaign, Tier::Test, None).unwrap().contains("campaign"));
        assert_eq!(reason(campaign, Tier::Campaign, None), None);
        assert!(reason(campaign, Tier::Campaign, Some("no such row")).unwrap().contains("name"));
        assert!(reason(own, Tier::Campaign, None).unwrap().contains("Bedplate"));
        let bedplate = Vmm::Bedplate { binary: "bedplate".into(), more: Vec::new() };
        let reason = reason_not_to_run(lab, &selection(Tier::Campaign, None), &bedplate);
        assert!(reason.unwrap().contains("--lab"));
    }
}
