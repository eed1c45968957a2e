//! `cargo xtask test`: all that must hold before a change is handed on, in under 25 minutes on two cores.

use anyhow::{Context, Result};
use clap::Args;
use guest_trials::{Outcome, Tier, Vmm};

use crate::summary::Summary;
use crate::{exec, metal, setup, tidy, trials, workspace};

#[derive(Debug, Args)]
pub struct TestOptions {
    /// Leave the guest trials out (they are listed as not run).
    #[arg(long)]
    no_guests: bool,
    /// Seed of the trials' random choices.
    #[arg(long)]
    seed: Option<u64>,
}

pub fn run(options: &TestOptions) -> Result<()> {
    let seed = options.seed.unwrap_or_else(trials::seed_from_clock);
    let mut summary = Summary::new(format!("cargo xtask test, commit {}, seed {seed}", workspace::commit()));
    summary.step("set-up", || setup::all().map(|()| Outcome::Passed));
    code(&mut summary, &[]);
    if options.no_guests {
        summary.not_run("guest trials", "left out by --no-guests");
    } else {
        // Before the rows that use it, so that their times are their own.
        summary.step("build bedplate", || workspace::bedplate("release").map(|_| Outcome::Passed));
        metal::test(&mut summary, None, false);
        let names = INTERPRETED_ROWS.map(Some);
        guests(&mut summary, "soft", &[None], (Tier::Test, seed));
        guests(&mut summary, INTERPRETER, &names, (Tier::Test, seed));
    }
    summary.finish()
}

/// Folders of workspaces of their own, with a lock file each.
const APART: [&str; 2] = ["fuzz", "witness"];

/// Everything but the guests. `environment` is for the unit tests.
pub fn code(summary: &mut Summary, environment: &[(&str, &str)]) {
    let root = workspace::root();
    let cargo = |arguments: &[&str]| exec::run(&root, "cargo", arguments).map(|()| Outcome::Passed);
    summary.step("laws (tidy)", || tidy::run().map(|()| Outcome::Passed));
    summary.step("format", || cargo(&["fmt", "--all", "--check"]));
    summary.step("clippy", || cargo(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]));
    summary.step("tests", || {
        let arguments: &[&str] = if exec::find("cargo-nextest").is_some() {
            &["nextest", "run", "--workspace", "--no-fail-fast"]
        } else {
            &["test", "--workspace", "--no-fail-fast", "--lib", "--bins", "--tests"]
        };
        exec::run_with(&root, "cargo", arguments, environment).map(|()| Outcome::Passed)
    });
    // Before anything that would bring them up to date.
    summary.step("lock files", || {
        for folder in APART {
            exec::run(&root.join(folder), "cargo", &["fetch", "--locked"]).with_context(|| {
                format!(
                    "where cargo cannot update {folder}/Cargo.lock: `cargo fetch` in {folder}, and commit it"
                )
            })?;
        }
        Ok(Outcome::Passed)
    });
    summary.step("no_std witness", || {
        // Checked only: std's panic handler is noticed when crates are loaded, and bare metal's image links them.
        exec::run(&root.join("witness"), "cargo", &["check"]).map(|()| Outcome::Passed)
    });
    summary.step("dependencies (cargo-deny)", || {
        if exec::find("cargo-deny").is_none() {
            return Ok(Outcome::NotRun("cargo-deny is not installed: cargo xtask setup --tools".into()));
        }
        // Advisories need their database from the network: see the campaign.
        cargo(&["deny", "check", "bans", "licenses", "sources"])
    });
}

/// The engine that translates nothing.
pub const INTERPRETER: &str = "soft,tier=interp";
/// Rows that it has to pass in every test; the campaign has it pass all.
const INTERPRETED_ROWS: [&str; 3] =
    ["boot/cloud/bzimage/2cpus", "ending/reboot-x5/2cpus", "state/save-restore-x3/2cpus"];

/// The guest trials up to a tier on one engine: those whose names contain one of `names`; `None`: all.
pub fn guests(summary: &mut Summary, engine: &str, names: &[Option<&str>], (tier, seed): (Tier, u64)) {
    let binary = match workspace::bedplate("release") {
        Ok(binary) => binary,
        Err(error) => return summary.step("build bedplate", || Err(error)),
    };
    let vmm = Vmm::Bedplate { binary, more: trials::engine(engine) };
    let prefix = format!("{engine}/");
    eprintln!("\n── guest trials, engine {engine}");
    for name in names {
        match trials::run_rows(&vmm, tier, name.map(str::to_string), seed) {
            Ok(report) if name.is_some() => summary.add(&prefix, &trials::only_run(&report)),
            Ok(report) => summary.add(&prefix, &report),
            Err(error) => summary.step("guest trials", || Err(error)),
        }
    }
}
