//! Runs a campaign: `differential [--cases N] [--seed N] [--filter TEXT] [--describe N]`.

use differential::campaign::{Options, run};
use std::collections::BTreeMap;
use std::process::ExitCode;

/// Share of the forms that the CPU model allows which must be tested.
const LEAST_COVERAGE: f64 = 0.95;

fn main() -> ExitCode {
    let Some(options) = options() else {
        eprintln!("usage: differential [--cases N] [--seed N] [--filter TEXT] [--describe N]");
        return ExitCode::from(2);
    };
    println!("seed {}, {} cases a form", options.seed, options.cases);
    let report = match run(&options) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("the native side failed: {error}");
            return ExitCode::from(2);
        }
    };
    let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for excluded in &report.excluded {
        reasons.entry(excluded.reason).or_default().push(format!("{:?}", excluded.form.code));
    }
    if options.filter.is_empty() {
        for (reason, forms) in reasons {
            println!("left out ({reason}): {}", forms.join(" "));
        }
    }
    for form in &report.not_generated {
        println!("no encoding found: {:?}", form.code);
    }
    for (form, (count, texts)) in &report.failures {
        println!("FAILED {form}: {count} cases");
        for text in texts {
            println!("    {text}");
        }
    }
    println!(
        "{} forms, {} cases, {} raised an exception; {} forms left out; coverage {:.1} %; {} forms failed",
        report.forms,
        report.cases,
        report.raised,
        report.excluded.len() + report.not_generated.len(),
        100.0 * report.coverage(),
        report.failures.len()
    );
    let enough = !options.filter.is_empty() || report.coverage() >= LEAST_COVERAGE;
    if !enough {
        println!("FAILED: at least {:.0} % of the forms must be covered", 100.0 * LEAST_COVERAGE);
    }
    if enough && report.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn options() -> Option<Options> {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_secs());
    let mut options = Options { cases: 200, seed, filter: String::new(), describe: 1 };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let value = args.next()?;
        match name.as_str() {
            "--cases" => options.cases = value.parse().ok()?,
            "--seed" => options.seed = value.parse().ok()?,
            "--filter" => options.filter = value,
            "--describe" => options.describe = value.parse().ok()?,
            _ => return None,
        }
    }
    Some(options)
}
