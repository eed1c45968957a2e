//! `cargo xtask campaign`: every row there is. Takes hours; the summary page stands under docs/campaigns.

use std::fs;

use anyhow::{Context, Result};
use clap::Args;
use guest_trials::Tier;

use crate::summary::Summary;
use crate::{bench, exec, setup, test, trials, workspace};

/// Cases per property test; the unit tests' default is 256.
const PROPERTY_CASES: &str = "4096";

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
    summary.step("set-up", || setup::packages().map(|()| guest_trials::Outcome::Passed));
    if options.guests_only {
        summary.not_run("code", "left out by --guests-only");
    } else {
        test::code(&mut summary, &[("PROPTEST_CASES", PROPERTY_CASES), ("BEDPLATE_CAMPAIGN", "1")]);
    }
    test::guests(&mut summary, Tier::Campaign, seed);
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
