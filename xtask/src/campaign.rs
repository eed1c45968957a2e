//! `cargo xtask campaign`: every row there is. Takes hours; the summary page stands under docs/campaigns.

use std::fs;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
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

/// What a campaign consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Laws, lints, unit and property tests, every instruction form, random programs, fuzzing.
    Code,
    /// Bare metal in emulators.
    Metal,
    /// All guests on the `soft` engine, a hundred reboots among them, and a boot in lockstep.
    Guests,
    /// All guests on the interpreter alone.
    Interpreted,
    /// Guests on the `kvm` engine in the laboratory.
    Lab,
    /// Boots beside TCG.
    Bench,
}

#[derive(Debug, Args)]
pub struct CampaignOptions {
    /// Seed of all random choices.
    #[arg(long)]
    seed: Option<u64>,
    /// Only these parts, so that several machines or checkouts share the work.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART")]
    only: Vec<Part>,
}

pub fn run(options: &CampaignOptions) -> Result<()> {
    let seed = options.seed.unwrap_or_else(trials::seed_from_clock);
    let commit = workspace::commit();
    let root = workspace::root();
    let date = exec::output(&root, "date", &["-u", "+%F"])?;
    let parts = match options.only.as_slice() {
        [] => Part::value_variants(),
        some => some,
    };
    let words: Vec<String> = parts.iter().map(|part| format!("{part:?}").to_ascii_lowercase()).collect();
    let folder = root.join("docs/campaigns");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let short = commit.split(' ').next().unwrap_or("unknown");
    let of_some = if options.only.is_empty() { String::new() } else { format!("-{}", words.join("-")) };
    let page = folder.join(format!("{date}-{short}{of_some}.md"));
    let facts = [
        ("commit", commit.clone()),
        ("parts", words.join(", ")),
        ("seed", seed.to_string()),
        ("property cases", PROPERTY_CASES.to_string()),
        ("host", workspace::processor()),
    ];

    let mut summary = Summary::new(format!("Campaign of {date}"));
    summary.step("set-up", || setup::run(&SetupOptions { tools: true }).map(|()| Outcome::Passed));
    for part in parts {
        part.run(&mut summary, seed);
        // After each part: one that is stopped has not been for nothing.
        fs::write(&page, summary.markdown(&facts))
            .with_context(|| format!("cannot write {}", page.display()))?;
    }
    eprintln!("summary: {}", page.display());
    summary.finish()
}

impl Part {
    fn run(self, summary: &mut Summary, seed: u64) {
        match self {
            Self::Code => code(summary, seed),
            Self::Metal => metal::steps(summary),
            Self::Guests => {
                test::guests(summary, "soft", &[None], (Tier::Endurance, seed));
                let boot = [Some("boot/cloud/bzimage/1cpu")];
                test::guests(summary, "soft,lockstep", &boot, (Tier::Campaign, seed));
            }
            Self::Interpreted => test::guests(summary, test::INTERPRETER, &[None], (Tier::Campaign, seed)),
            Self::Lab => {
                if let Err(error) = lab::steps(summary, seed) {
                    summary.step("the laboratory", || Err(error));
                }
            }
            Self::Bench => summary.step("bench boot", || bench::boot_step(bench::DEFAULT_ROUNDS)),
        }
    }
}

fn code(summary: &mut Summary, seed: u64) {
    test::code(summary, &[("PROPTEST_CASES", PROPERTY_CASES), ("BEDPLATE_CAMPAIGN", "1")]);
    summary.step("differential, every form", || differential(seed));
    summary.step(&format!("random programs × {PROGRAMS}, translated as interpreted"), random_programs);
    summary.step("advisories (cargo-deny)", advisories);
    if let Err(error) = fuzz::steps(summary, None, fuzz::DEFAULT_SECONDS) {
        summary.step("fuzz", || Err(error));
    }
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
