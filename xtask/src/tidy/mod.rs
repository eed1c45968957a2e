//! `cargo xtask tidy`: the laws of ARCHITECTURE.md that no compiler checks. Also runs as a unit test, so that
//! `cargo nextest run` holds them too.

mod layers;
mod sources;

use anyhow::{Result, bail};

use crate::workspace;

/// What was found: violations fail, warnings are shown.
#[derive(Debug, Default)]
pub struct Findings {
    violations: Vec<String>,
    warnings: Vec<String>,
}

impl Findings {
    fn violation(&mut self, text: impl Into<String>) {
        self.violations.push(text.into());
    }

    fn warning(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }
}

/// Prints warnings; an error with all violations if there are any.
pub fn run() -> Result<()> {
    let findings = check()?;
    for warning in &findings.warnings {
        eprintln!("warning: {warning}");
    }
    if !findings.violations.is_empty() {
        bail!("{} laws are broken:\n  {}", findings.violations.len(), findings.violations.join("\n  "));
    }
    eprintln!("the laws hold");
    Ok(())
}

fn check() -> Result<Findings> {
    let metadata = workspace::metadata()?;
    let mut findings = Findings::default();
    layers::check(&metadata, &mut findings);
    sources::check(&metadata, &mut findings)?;
    Ok(findings)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_laws_hold() {
        if let Err(error) = super::run() {
            panic!("{error}");
        }
    }
}
