//! `cargo xtask campaign`: every row there is. Takes hours; the summary page stands under docs/campaigns.

use std::fs;

use anyhow::{Context, Result};
use clap::Args;
use guest_trials::{Outcome, Tier};

use crate::setup::SetupOptions;
use crate::summary::Summary;
use crate::{bench, exec, fuzz, lab, metal, setup, test, trials, workspace};

/// Cases per property test; the unit tests' default is 256.
const PROPERTY_CASES: &str = "1024";
/// Cases per instruction form of the differential test.
const FORM_CASES: &str = "200";
/// Random programs of each kind that translator and interpreter must end alike.
const PROGRAMS: &str = "1000000";

#[derive(Debug, Args)]
pub struct CampaignOptions {
    /// Seed of all random choices.
    #[arg(long)]
    seed: Option<u64>,
    /// Only the guest trials.
    #[arg(long)]
    guests_only: bool,
}

pub fn run(options: &CampaignOptions) -> Result<()> {
    let seed = options.seed.unwrap_or_else(trials::seed_from_clock);
    let commit = workspace::commit();
    let root = workspace::root();
    let date = exec::output(&root, "date", &["-u", "+%F"])?;
    let mut summary = Summary::new(format!("Campaign of {date}"));
    summary.step("set-up", || setup::run(&SetupOptions { tools: true }).map(|()| Outcome::Passed));
    if options.guests_only {
        summary.not_run("code", "left out by --guests-only");
    } else {
        test::code(&mut summary, &[("PROPTEST_CASES", PROPERTY_CASES), ("BEDPLATE_CAMPAIGN", "1")]);
        summary.step("differential, every form", || differential(seed));
        summary.step(&format!("random programs × {PROGRAMS}, translated as interpreted"), random_programs);
        summary.step("advisories (cargo-deny)", advisories);
        if let Err(error) = fuzz::steps(&mut summary, None, fuzz::DEFAULT_SECONDS) {
            summary.step("fuzz", || Err(error));
        }
    }
    metal::test(&mut summary, None, true);
    test::guests(&mut summary, Tier::Campaign, seed);
    test::lockstep(&mut summary, seed);
    if let Err(error) = lab::steps(&mut summary, seed) {
        summary.step("the laboratory", || Err(error));
    }
    summary.step("bench boot", || bench::boot_step(bench::DEFAULT_ROUNDS));

    let folder = root.join("docs/campaigns");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let name = format!("{date}-{}.md", commit.split(' ').next().unwrap_or("unknown"));
    let facts = [
        ("commit", commit.clone()),
        ("seed", seed.to_string()),
        ("property cases", PROPERTY_CASES.to_string()),
        ("host", workspace::processor()),
    ];
    let path = folder.join(name);
    fs::write(&path, summary.markdown(&facts)).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("summary: {}", path.display());
    summary.finish()
}

/// Every instruction form against the host's processor; the binary checks its own coverage.
fn differential(seed: u64) -> Result<Outcome> {
    let binary = workspace::built("differential", "release")?;
    let arguments = ["--cases", FORM_CASES, "--seed", &seed.to_string()];
    exec::run(&workspace::root(), &binary.to_string_lossy(), &arguments)?;
    Ok(Outcome::Passed)
}

/// `cpu_translate/tests/random`: straight programs and systems.
fn random_programs() -> Result<Outcome> {
    let words = ["test", "--release", "-p", "cpu_translate", "--test", "random"];
    exec::run_with(&workspace::root(), "cargo", &words, &[("PROGRAMS", PROGRAMS)])?;
    Ok(Outcome::Passed)
}

/// Known vulnerabilities of dependencies, if their database can be fetched.
fn advisories() -> Result<Outcome> {
    let root = workspace::root();
    match exec::run(&root, "cargo", &["deny", "fetch", "db"]) {
        Ok(()) => exec::run(&root, "cargo", &["deny", "check", "advisories"]).map(|()| Outcome::Passed),
        Err(_) => Ok(Outcome::NotRun("the advisory database cannot be reached from here".into())),
    }
}
