//! `cargo xtask trials`: the guest trials alone. With `--vm qemu` they check themselves.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use guest_catalog::Cache;
use guest_trials::{Outcome, Report, Selection, Tier, Vmm};

use crate::progress::Bars;
use crate::summary::{Summary, seconds};
use crate::{exec, lab, setup, workspace};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Program {
    Bedplate,
    Qemu,
}

#[derive(Debug, Args)]
pub struct TrialOptions {
    /// Which program runs the guests.
    #[arg(long = "vm", value_enum, default_value_t = Program::Bedplate)]
    program: Program,
    /// Only rows whose names contain this.
    #[arg(long)]
    row: Option<String>,
    /// The campaign's rows too.
    #[arg(long)]
    all: bool,
    /// Seed of all random choices; taken from the clock if not given.
    #[arg(long)]
    seed: Option<u64>,
    /// List the rows and end.
    #[arg(long)]
    list: bool,
    /// Use this bedplate binary instead of building one.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Run Bedplate in the laboratory, on a real KVM (see cargo xtask lab).
    #[arg(long, conflicts_with = "program")]
    lab: bool,
    /// More arguments for `bedplate run`.
    #[arg(last = true)]
    more: Vec<String>,
}

pub fn run(options: &TrialOptions) -> Result<()> {
    if options.list {
        for row in guest_trials::rows::all() {
            let tier = match row.tier {
                Tier::Test => "test",
                Tier::Campaign => "campaign",
                Tier::Endurance => "endurance",
            };
            println!("{tier:9}  {}", row.name);
        }
        return Ok(());
    }
    setup::packages()?;
    let vmm = match options.program {
        Program::Bedplate if options.lab => lab::vmm(options.binary.as_deref(), &options.more)?,
        Program::Qemu => qemu()?,
        Program::Bedplate => {
            let binary = match &options.binary {
                Some(binary) => binary.clone(),
                None => workspace::bedplate("release")?,
            };
            let more = self::options(&options.more);
            Vmm::Bedplate { binary, more }
        }
    };
    let tier = if options.all || options.row.is_some() { Tier::Endurance } else { Tier::Test };
    let seed = options.seed.unwrap_or_else(seed_from_clock);
    let mut summary = Summary::new(format!("guest trials on {}, seed {seed}", vmm.name()));
    let report = run_rows(&vmm, tier, options.row.clone(), seed)?;
    let report = match &options.row {
        // A row asked for by name: the others are no news.
        Some(_) => only_run(&report),
        None => report,
    };
    if report.rows.is_empty() {
        bail!(
            "no row's name contains {:?}; see cargo xtask trials --list",
            options.row.as_deref().unwrap_or("")
        );
    }
    summary.add("", &report);
    summary.finish()
}

/// Runs rows on `vmm`, telling of each as it ends.
pub fn run_rows(vmm: &Vmm, tier: Tier, name_contains: Option<String>, seed: u64) -> Result<Report> {
    let logs = workspace::target_folder()?.join("trials").join(vmm.name());
    let selection = Selection { tier, name_contains, seed, logs };
    let cache = Cache::of_user()?;
    let report =
        guest_trials::run(&selection, vmm, &cache, &mut Bars::new(), &mut |row| match &row.outcome {
            Outcome::Passed => eprintln!("ok      {:>12}  {}", seconds(row.took), row.name),
            // The whole reason stands in the summary.
            Outcome::Failed(reason) => {
                let first = reason.lines().next().unwrap_or_default();
                eprintln!("FAILED  {:>12}  {}: {first}", seconds(row.took), row.name);
            }
            Outcome::NotRun(_) => {}
        });
    Ok(report)
}

/// The engine is never left to the host: a trial says what it tries.
pub fn engine(name: &str) -> Vec<String> {
    vec!["--engine".into(), name.into()]
}

/// The `soft` engine, unless another is asked for.
pub fn options(more: &[String]) -> Vec<String> {
    let mut all = if more.iter().any(|word| word == "--engine") { Vec::new() } else { engine("soft") };
    all.extend_from_slice(more);
    all
}

/// QEMU with TCG, which is installed by set-up.
pub fn qemu() -> Result<Vmm> {
    qemu_binary().map(|binary| Vmm::Qemu { binary })
}

/// Its program.
pub fn qemu_binary() -> Result<PathBuf> {
    match exec::find("qemu-system-x86_64") {
        Some(binary) => Ok(binary),
        None => bail!("qemu-system-x86_64 is not installed; run cargo xtask setup"),
    }
}

pub fn seed_from_clock() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_secs())
}

/// Without the rows that did not run.
pub fn only_run(report: &Report) -> Report {
    let ran = |row: &&guest_trials::RowReport| !matches!(row.outcome, Outcome::NotRun(_));
    Report { rows: report.rows.iter().filter(ran).cloned().collect() }
}
