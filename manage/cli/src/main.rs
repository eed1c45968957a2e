//! The `bedplate` command: runs VMs, looks after those that run, prepares guests.
#![forbid(unsafe_code)]

mod args;
mod ctl;
mod guest;
mod run;

use args::{Cli, Command};
use clap::{CommandFactory, Parser};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Run(args) => run::run(args),
        Command::Ps { json } => ctl::ps(*json),
        Command::Ctl { name, what, json } => ctl::ctl(name, what, *json),
        Command::Guest(command) => guest::guest(command),
        Command::Completion { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "bedplate", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("bedplate: {error:#}");
        ExitCode::FAILURE
    })
}
