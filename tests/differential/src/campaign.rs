//! A campaign: so many cases of every form, from one seed.

use crate::compare::difference;
use crate::forms::{self, Excluded, Form};
use crate::layout::BATCH;
use crate::native::Native;
use crate::state::Case;
use crate::values::Random;
use crate::{generate, interpreted, minimise};
use std::collections::BTreeMap;
use std::io;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Cases of each form.
    pub cases: usize,
    /// The seed.
    pub seed: u64,
    /// Only forms whose name contains this.
    pub filter: String,
    /// Failing cases to describe for each form.
    pub describe: usize,
}

/// What came out.
#[derive(Debug, Default)]
pub struct Report {
    /// Forms that ran.
    pub forms: usize,
    /// Cases that ran.
    pub cases: usize,
    /// Cases in which the host raised an exception.
    pub raised: usize,
    /// Forms without an encoding, so not covered.
    pub not_generated: Vec<Form>,
    /// Forms left out.
    pub excluded: Vec<Excluded>,
    /// Failing forms: how many cases failed, and descriptions.
    pub failures: BTreeMap<String, (usize, Vec<String>)>,
}

impl Report {
    /// Share of the forms that ran, those excluded included in the count.
    pub fn coverage(&self) -> f64 {
        let all = self.forms + self.not_generated.len() + self.excluded.len();
        self.forms as f64 / all.max(1) as f64
    }
}

/// Runs it.
pub fn run(options: &Options) -> io::Result<Report> {
    let mut native = Native::new()?;
    let (forms, excluded) = forms::all();
    let mut report = Report { excluded, ..Report::default() };
    let mut batch: Vec<(Form, Case)> = Vec::with_capacity(BATCH);
    for form in forms {
        if !options.filter.is_empty() && !format!("{:?}", form.code).contains(&options.filter) {
            continue;
        }
        // A form's cases do not depend on which other forms run.
        let name = form.code as u64 * 2 + u64::from(form.is_32);
        let mut random = Random::new(options.seed ^ name.wrapping_mul(0x2545_F491_4F6C_DD1D));
        let mut generated = 0;
        for _ in 0..options.cases {
            if let Some(case) = generate::case(form, batch.len() as u32, &mut random) {
                batch.push((form, case));
                generated += 1;
            }
            if batch.len() == BATCH {
                run_batch(&mut native, &mut batch, options, &mut report)?;
            }
        }
        if generated == 0 {
            report.not_generated.push(form);
        } else {
            report.forms += 1;
        }
    }
    run_batch(&mut native, &mut batch, options, &mut report)?;
    Ok(report)
}

fn run_batch(
    native: &mut Native,
    batch: &mut Vec<(Form, Case)>,
    options: &Options,
    report: &mut Report,
) -> io::Result<()> {
    let cases: Vec<Case> = batch.iter().map(|(_, case)| *case).collect();
    let outcomes = native.run(&cases)?;
    for ((form, case), host) in batch.drain(..).zip(outcomes) {
        report.cases += 1;
        let failed = match (&host, interpreted::run(&case)) {
            (Some(host), Some(ours)) => {
                report.raised += usize::from(host.raised.vector != crate::state::Raised::NONE);
                difference(&case, host, &ours)
            }
            (None, _) => Some("the host process died".into()),
            (_, None) => Some("the interpreter did not end".into()),
        };
        if let Some(failed) = failed {
            let name = format!("{:?}{}", form.code, if form.is_32 { " (32-bit)" } else { "" });
            let (count, texts) = report.failures.entry(name).or_default();
            *count += 1;
            if texts.len() < options.describe {
                texts.push(minimise::describe(native, &case, &failed));
            }
        }
    }
    Ok(())
}
