//! The table of trials. One file per family; a new trial is a function and a line in its family's `rows`.

mod boot;
mod disk;
mod ending;
mod moving;
mod network;
mod selftests;
mod state;
mod system;

use crate::stage::{Failure, Stage, Tier};
use crate::vm::Vm;

/// What a row does on its stage.
pub type Trial = Box<dyn Fn(&Stage) -> Result<(), Failure> + Send + Sync>;

/// Where a row runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    /// On the host and in the laboratory.
    Any,
    /// On the host only, and why.
    NotInLab(&'static str),
    /// In the laboratory only: it needs a real KVM.
    LabOnly,
}

/// One trial.
pub struct Row {
    /// Unique; families first, as in `boot/cloud/bzimage/1cpu`.
    pub name: String,
    /// When it runs.
    pub tier: Tier,
    /// Guests it needs, by name in the catalogue.
    pub guests: Vec<&'static str>,
    /// It uses what only Bedplate has (saved state, its control socket).
    pub bedplate_only: bool,
    /// Where it runs.
    pub ground: Ground,
    /// The trial.
    pub run: Trial,
}

impl std::fmt::Debug for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Row").field("name", &self.name).field("tier", &self.tier).finish_non_exhaustive()
    }
}

impl Row {
    fn new(
        name: impl Into<String>,
        tier: Tier,
        guest: &'static str,
        run: impl Fn(&Stage) -> Result<(), Failure> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            tier,
            guests: vec![guest],
            bedplate_only: false,
            ground: Ground::Any,
            run: Box::new(run),
        }
    }

    fn bedplate_only(mut self) -> Self {
        self.bedplate_only = true;
        self
    }

    fn not_in_lab(mut self, reason: &'static str) -> Self {
        self.ground = Ground::NotInLab(reason);
        self
    }

    fn lab_only(mut self) -> Self {
        (self.ground, self.bedplate_only) = (Ground::LabOnly, true);
        self
    }
}

/// Every trial there is, in the order in which they run.
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    rows.extend(boot::rows());
    rows.extend(ending::rows());
    rows.extend(disk::rows());
    rows.extend(network::rows());
    rows.extend(state::rows());
    rows.extend(moving::rows());
    rows.extend(selftests::rows());
    rows.extend(system::rows());
    rows
}

/// `1cpu`, `2cpus`.
fn cpus_name(cpus: u32) -> String {
    format!("{cpus}cpu{}", if cpus == 1 { "" } else { "s" })
}

/// Waits until the guest's checksum job has done `round` rounds: what happens then happens at the same point of the job
/// on a fast engine and on a slow one.
fn reach_round(stage: &Stage, vm: &mut Vm, round: u32) -> Result<(), Failure> {
    loop {
        let line = vm.console().expect_line("BEDPLATE-CHECKSUM ", stage.patience(60))?;
        Failure::unless(!line.starts_with("final"), || {
            format!("the job ended before round {round}: {line}")
        })?;
        let done = line.split('/').next().and_then(|number| number.parse::<u32>().ok());
        if done.is_some_and(|done| done >= round) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_guests_are_known() {
        let mut names = HashSet::new();
        for row in all() {
            assert!(names.insert(row.name.clone()), "{} stands twice", row.name);
            for guest in row.guests {
                assert!(guest_catalog::find(guest).is_ok(), "{guest}");
            }
        }
    }
}
