//! The `bedplate` command: runs VMs, looks after those that run, prepares guests.
#![forbid(unsafe_code)]

mod args;
mod ctl;
mod doctor;
mod guest;
mod run;

use args::{Cli, Command};
use clap::{CommandFactory, Parser};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Run(args) => run::run(args),
        Command::Ps { json } => ctl::ps(*json),
        Command::Ctl { name, what, json } => ctl::ctl(name, what, *json),
        Command::Doctor { json } => doctor::doctor(*json),
        Command::Guest(command) => guest::guest(command),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "bedplate", &mut script);
            // A reader that has read enough (`| head`) is no failure.
            let _ = std::io::stdout().write_all(&script);
            Ok(ExitCode::SUCCESS)
        }
    };
    result.unwrap_or_else(|error| {
        let message = in_one_sentence(&error);
        match cli.command.json() {
            true => eprintln!("{}", serde_json::json!({ "code": 1, "message": message })),
            false => eprintln!("bedplate: {message}"),
        }
        ExitCode::FAILURE
    })
}

/// The error with its causes, each once: many errors name their cause themselves.
fn in_one_sentence(error: &anyhow::Error) -> String {
    let mut text = error.to_string().trim_end().to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(cause.trim_end()) {
            text.push_str(": ");
            text.push_str(cause.trim_end());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::in_one_sentence;
    use anyhow::anyhow;

    #[test]
    fn every_cause_is_told_once() {
        let error = anyhow!("no such file\n").context("kernel: no such file\n").context("the VM");
        assert_eq!(in_one_sentence(&error), "the VM: kernel: no such file");
        assert_eq!(in_one_sentence(&anyhow!("b").context("a: c")), "a: c: b");
    }
}
