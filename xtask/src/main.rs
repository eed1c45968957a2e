//! `cargo xtask`: the developer's door. Each command does its own set-up, says what it does and ends with a summary
//! in which nothing is left out silently.

#![forbid(unsafe_code)]

mod bench;
mod campaign;
mod demo;
mod exec;
mod fuzz;
mod lab;
mod metal;
mod progress;
mod setup;
mod summary;
mod test;
mod tidy;
mod trials;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Developer commands of Bedplate", max_term_width = 110)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what the other commands need (Debian packages; with --tools also cargo-nextest and cargo-deny).
    Setup(setup::SetupOptions),
    /// Format, lints, laws, unit tests and the guest trials that fit 25 minutes on two cores.
    Test(test::TestOptions),
    /// Everything, for hours; writes a summary below docs/campaigns.
    Campaign(campaign::CampaignOptions),
    /// The guest trials alone, against Bedplate or (to check the trials themselves) QEMU.
    Trials(trials::TrialOptions),
    /// Fuzz one target or all of them, each for some seconds.
    Fuzz(fuzz::FuzzOptions),
    /// Measure something beside a competitor.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Run Bedplate where KVM is real: in an emulated machine with AMD's virtualization.
    #[command(subcommand)]
    Lab(lab::LabTask),
    /// Build, boot and test the bare-metal image.
    #[command(subcommand)]
    Metal(metal::Metal),
    /// Boot Debian 12 in Bedplate on this terminal.
    Demo(demo::DemoOptions),
    /// Check the laws of ARCHITECTURE.md.
    Tidy,
}

fn main() -> ExitCode {
    match run(&Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: &Task) -> Result<()> {
    match task {
        Task::Setup(options) => setup::run(options),
        Task::Test(options) => test::run(options),
        Task::Campaign(options) => campaign::run(options),
        Task::Trials(options) => trials::run(options),
        Task::Fuzz(options) => fuzz::run(options),
        Task::Bench(bench) => bench::run(bench),
        Task::Lab(task) => lab::run(task),
        Task::Metal(task) => metal::run(task),
        Task::Demo(options) => demo::run(options),
        Task::Tidy => tidy::run(),
    }
}
