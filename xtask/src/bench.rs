//! `cargo xtask bench`: Bedplate beside QEMU's translator (TCG), interleaved in one run. `boot`: from the start of a
//! process to a guest's user space; `cpu`: small workloads. Medians, ratios, what is promised (`goals.rs`), JSON below
//! `target/bench/` and Markdown tables for docs/benchmarks.md.

mod boot;
mod cpu;
mod goals;

use std::time::Duration;

use anyhow::Result;
use clap::Subcommand;

pub use boot::step as boot_step;

/// Rounds of a campaign's run.
pub const DEFAULT_ROUNDS: u32 = 5;
/// Only ends a hang.
const PATIENCE: Duration = Duration::from_secs(900);

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// The cloud kernel to busybox's marker, a Debian disk to its login prompt, beside QEMU TCG.
    Boot(boot::BootOptions),
    /// Small workloads of many kinds, natively, in QEMU TCG and in Bedplate.
    Cpu(cpu::CpuOptions),
}

pub fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Boot(options) => boot::run(options).map(|_| ()),
        Bench::Cpu(options) => cpu::run(options),
    }
}

/// Of what was measured.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

fn geomean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let logs: Vec<f64> = values.map(f64::ln).collect();
    (!logs.is_empty()).then(|| (logs.iter().sum::<f64>() / logs.len() as f64).exp())
}

/// A ratio for a table.
fn times(ratio: Option<f64>) -> String {
    ratio.map_or("–".into(), |r| if r < 10.0 { format!("{r:.2}×") } else { format!("{r:.0}×") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_means() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        assert_eq!(geomean([2.0, 8.0].into_iter()).map(f64::round), Some(4.0));
        assert_eq!(geomean([].into_iter()), None);
    }
}
