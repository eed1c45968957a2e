//! `cargo xtask bench`. `cpu` is in `bench/cpu.rs`; `boot` here: how long the cloud kernel takes to busybox's marker, in
//! QEMU's translator (TCG) and in Bedplate, in one interleaved run. Medians, their ratio, JSON and a Markdown table
//! (docs/benchmarks.md).

mod cpu;

use std::fs;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use clap::{Args, Subcommand};
use guest_catalog::{Cache, Prepared};
use guest_trials::{Boot, Outcome, Vm, VmConfig, Vmm};
use serde_json::{Value, json};

use crate::progress::Bars;
use crate::{setup, trials, workspace};

/// Rounds of a campaign's run.
pub const DEFAULT_ROUNDS: u32 = 5;
/// Most that a boot may take, as a multiple of TCG's wall time.
const PROMISED_RATIO: f64 = 8.0;
/// Only ends a hang.
const PATIENCE: Duration = Duration::from_secs(900);

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// The cloud kernel to busybox's marker, beside QEMU TCG.
    Boot(BootOptions),
    /// Small workloads of many kinds, natively, in QEMU TCG and in Bedplate.
    Cpu(cpu::CpuOptions),
}

#[derive(Debug, Args)]
pub struct BootOptions {
    /// Measured boots per program.
    #[arg(long, default_value_t = DEFAULT_ROUNDS)]
    rounds: u32,
    /// Another kernel guest of the catalogue.
    #[arg(long, default_value = "cloud")]
    guest: String,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// More arguments for `bedplate run`.
    #[arg(last = true)]
    more: Vec<String>,
}

struct Contender {
    name: &'static str,
    vmm: Vmm,
    wall_s: Vec<f64>,
    processor_s: Vec<f64>,
    mips: Vec<f64>,
}

pub fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Boot(options) => boot(options).map(|_| ()),
        Bench::Cpu(options) => cpu::run(options),
    }
}

/// The same as a step of the campaign, which holds Bedplate to its promise.
pub fn boot_step(rounds: u32) -> Result<Outcome> {
    let ratio = boot(&BootOptions { rounds, guest: "cloud".into(), cpus: 1, more: Vec::new() })?;
    if ratio > PROMISED_RATIO {
        bail!("{ratio:.2} times the wall time of TCG; the promise is at most {PROMISED_RATIO}");
    }
    Ok(Outcome::Passed)
}

/// Measures; Bedplate's wall time as a multiple of TCG's.
fn boot(options: &BootOptions) -> Result<f64> {
    setup::packages()?;
    let guest = Cache::of_user()?.fetch(guest_catalog::find(&options.guest)?, &mut Bars::new())?;
    let binary = workspace::bedplate("release")?;
    let mut more = trials::options(&options.more);
    more.push("--statistics".into());
    let mut contenders = [
        contender("QEMU TCG, -cpu max", trials::qemu()?),
        contender("Bedplate", Vmm::Bedplate { binary, more }),
    ];
    // One boot of each warms the page cache and is not counted.
    for round in 0..=options.rounds {
        for contender in &mut contenders {
            let (wall, processor, mips) = one_boot(&contender.vmm, &guest, options.cpus)?;
            eprintln!("round {round}: {:20} {wall:.2} s", contender.name);
            if round > 0 {
                contender.wall_s.push(wall);
                contender.processor_s.push(processor);
                contender.mips.extend(mips);
            }
        }
    }
    report(options, &guest, &contenders)
}

fn contender(name: &'static str, vmm: Vmm) -> Contender {
    Contender { name, vmm, wall_s: Vec::new(), processor_s: Vec::new(), mips: Vec::new() }
}

/// Wall and processor seconds to the marker, and MIPS if the VMM reports them when it is stopped.
fn one_boot(vmm: &Vmm, guest: &Prepared, cpus: u32) -> Result<(f64, f64, Option<f64>)> {
    let config = VmConfig::new(guest, Boot::BzImage, cpus, "").map_err(|e| anyhow!("{e}"))?;
    let mut vm = Vm::start(vmm, &config)?;
    vm.console().expect(guest_catalog::INIT_MARKER, PATIENCE)?;
    let wall = vm.age().as_secs_f64();
    let processor = vm.processor_time()?.as_secs_f64();
    vm.stop(PATIENCE).map_err(|e| anyhow!("{e}"))?;
    Ok((wall, processor, mips(&vm.messages())))
}

/// The number before the word MIPS in what the VMM said.
fn mips(messages: &str) -> Option<f64> {
    let (before, _) = messages.rsplit_once(" MIPS")?;
    before.rsplit(|c: char| !c.is_ascii_digit() && c != '.').next()?.parse().ok()
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

/// Writes and prints the results; the last contender's wall time as a multiple of the first's.
fn report(options: &BootOptions, guest: &Prepared, contenders: &[Contender]) -> Result<f64> {
    let Some(reference) = contenders.first().and_then(|first| median(&first.wall_s)) else {
        bail!("nothing was measured: --rounds must be at least 1");
    };
    let mut table = "| program | wall, median | wall, min–max | processor | against TCG | MIPS |\n|---|---:|---:|---:|---:|---:|\n"
        .to_string();
    let mut entries = Vec::new();
    let mut ratio = f64::NAN;
    for contender in contenders {
        let wall = median(&contender.wall_s).unwrap_or(f64::NAN);
        let low = contender.wall_s.iter().copied().fold(f64::INFINITY, f64::min);
        let high = contender.wall_s.iter().copied().fold(0.0, f64::max);
        let processor = median(&contender.processor_s).unwrap_or(f64::NAN);
        let mips = median(&contender.mips);
        ratio = wall / reference;
        table.push_str(&format!(
            "| {} | {wall:.2} s | {low:.2}–{high:.2} s | {processor:.2} s | {:.2}× | {} |\n",
            contender.name,
            ratio,
            mips.map_or("–".into(), |m| format!("{m:.0}")),
        ));
        entries.push(json!({
            "program": contender.name, "wall_s": contender.wall_s, "wall_median_s": wall,
            "processor_s": contender.processor_s, "ratio_to_tcg": ratio, "mips": mips,
        }));
    }
    let facts: Value = json!({
        "bench": "boot", "commit": workspace::commit(), "host": workspace::processor(), "guest": options.guest,
        "kernel": guest.version, "cpus": options.cpus, "rounds": options.rounds, "results": entries,
    });
    let folder = workspace::target_folder()?.join("bench");
    fs::create_dir_all(&folder)?;
    let path = folder.join("boot.json");
    fs::write(&path, serde_json::to_string_pretty(&facts)?)?;
    println!(
        "Boot of {} to the marker, {} CPU, {} rounds interleaved, {}, commit {}\n\n{table}\n{}",
        guest.version,
        options.cpus,
        options.rounds,
        workspace::processor(),
        workspace::commit(),
        path.display()
    );
    Ok(ratio)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn mips_are_found_in_a_sentence() {
        assert_eq!(mips("ended; 1234 instructions, 87.5 MIPS\n"), Some(87.5));
        assert_eq!(mips("ended"), None);
    }
}
