//! `cargo xtask bench boot`: from the start of the process until a guest's user space shows itself on the console.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use guest_catalog::{Cache, Prepared};
use guest_trials::{Boot, Outcome, Vm, VmConfig, Vmm};
use serde_json::{Value, json};

use super::{DEFAULT_ROUNDS, PATIENCE, median, times};
use crate::progress::Bars;
use crate::{setup, trials, workspace};

/// Least that Bedplate is faster than TCG.
const PROMISED: f64 = 2.0;
/// Most resident memory beyond the guest's RAM, in MiB: with one vCPU, and for each further one.
const MEMORY_MIB: [f64; 2] = [64.0, 16.0];
const LOGIN: &str = "bedplate login:";

#[derive(Debug, Args)]
pub struct BootOptions {
    /// Measured boots per program.
    #[arg(long, default_value_t = DEFAULT_ROUNDS)]
    rounds: u32,
    /// Guests of the catalogue: kernels to init's marker, disks to the login prompt.
    #[arg(long = "guest", default_values_t = ["cloud".to_string(), "debian-12".to_string()])]
    guests: Vec<String>,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// More arguments for `bedplate run`.
    #[arg(last = true)]
    more: Vec<String>,
}

/// What one boot cost.
struct Cost {
    wall_s: f64,
    processor_s: f64,
    /// Resident beyond the guest's RAM.
    memory_mib: f64,
    /// If the VMM reports it when it is stopped.
    mips: Option<f64>,
}

/// A program, and its boots of one guest.
struct Contender {
    name: &'static str,
    costs: Vec<Cost>,
}

impl Contender {
    fn median(&self, of: impl Fn(&Cost) -> Option<f64>) -> Option<f64> {
        median(&self.costs.iter().filter_map(of).collect::<Vec<_>>())
    }
    fn wall(&self) -> Option<f64> {
        self.median(|cost| Some(cost.wall_s))
    }
}

/// A guest, and the reference before its challenger.
pub struct Race {
    guest: Prepared,
    contenders: [Contender; 2],
}

impl Race {
    /// How many times faster Bedplate is.
    fn faster(&self) -> Option<f64> {
        let [reference, bedplate] = &self.contenders;
        Some(reference.wall()? / bedplate.wall()?)
    }
}

/// A step of the campaign, which holds Bedplate to its promise.
pub fn step(rounds: u32) -> Result<Outcome> {
    let guests = ["cloud", "debian-12"].map(String::from).to_vec();
    for race in run(&BootOptions { rounds, guests, cpus: 1, more: Vec::new() })? {
        let faster = race.faster().context("nothing was measured")?;
        if faster < PROMISED {
            bail!("{} is {faster:.2} times faster than in TCG, not {PROMISED}", race.guest.guest);
        }
    }
    Ok(Outcome::Passed)
}

/// Measures and reports.
pub fn run(options: &BootOptions) -> Result<Vec<Race>> {
    if options.rounds == 0 {
        bail!("--rounds must be at least 1");
    }
    setup::packages()?;
    let binary = workspace::bedplate("release")?;
    let mut more = trials::options(&options.more);
    more.push("--statistics".into());
    let vmms = [trials::qemu()?, Vmm::Bedplate { binary, more }];
    let folder = workspace::target_folder()?.join("bench");
    fs::create_dir_all(&folder)?;
    let mut races = Vec::new();
    for name in &options.guests {
        let guest = Cache::of_user()?.fetch(guest_catalog::find(name)?, &mut Bars::new())?;
        let contenders = ["QEMU TCG, -cpu max", "Bedplate"].map(|name| Contender { name, costs: Vec::new() });
        let mut race = Race { guest, contenders };
        // One boot of each warms the page cache and is not counted.
        for round in 0..=options.rounds {
            for (contender, vmm) in race.contenders.iter_mut().zip(&vmms) {
                let cost = one_boot(vmm, &race.guest, options.cpus, &folder)?;
                eprintln!("{name}, round {round}: {:20} {:.2} s", contender.name, cost.wall_s);
                if round > 0 {
                    contender.costs.push(cost);
                }
            }
        }
        races.push(race);
    }
    report(options, &races, &folder)?;
    Ok(races)
}

/// A guest with a disk gets a copy of its own in `folder`.
fn one_boot(vmm: &Vmm, guest: &Prepared, cpus: u32, folder: &Path) -> Result<Cost> {
    let mut config = VmConfig::new(guest, Boot::BzImage, cpus, "").map_err(|e| anyhow!("{e}"))?;
    let mut sign = guest_catalog::INIT_MARKER;
    if let Some((master, format)) = &guest.disk {
        let copy = folder.join("disk");
        let copied = Command::new("cp").arg("--sparse=always").arg(master).arg(&copy).status()?;
        anyhow::ensure!(copied.success(), "cannot copy {}", master.display());
        config = config.disk(&copy, *format);
        sign = LOGIN;
    }
    let mut vm = Vm::start(vmm, &config)?;
    vm.console().expect(sign, PATIENCE)?;
    let wall_s = vm.age().as_secs_f64();
    let processor_s = vm.processor_time()?.as_secs_f64();
    let memory_mib = vm.own_memory_kib(config.memory_mib)? as f64 / 1024.0;
    vm.stop(PATIENCE).map_err(|e| anyhow!("{e}"))?;
    Ok(Cost { wall_s, processor_s, memory_mib, mips: mips(&vm.messages()) })
}

/// The number before the word MIPS in what the VMM said.
fn mips(messages: &str) -> Option<f64> {
    let (before, _) = messages.rsplit_once(" MIPS")?;
    before.rsplit(|c: char| !c.is_ascii_digit() && c != '.').next()?.parse().ok()
}

/// Writes and prints the results.
fn report(options: &BootOptions, races: &[Race], folder: &Path) -> Result<()> {
    let mut table =
        "| guest | program | wall, median | min–max | processor | faster than TCG | MIPS | beyond RAM |\n\
        |---|---|---:|---:|---:|---:|---:|---:|\n"
            .to_string();
    let mut entries = Vec::new();
    for race in races {
        let reference = race.contenders[0].wall();
        for contender in &race.contenders {
            let walls: Vec<f64> = contender.costs.iter().map(|cost| cost.wall_s).collect();
            let low = walls.iter().copied().fold(f64::INFINITY, f64::min);
            let high = walls.iter().copied().fold(0.0, f64::max);
            let median = |of: fn(&Cost) -> Option<f64>| contender.median(of).unwrap_or(f64::NAN);
            let (wall, processor) = (median(|c| Some(c.wall_s)), median(|c| Some(c.processor_s)));
            let (memory, mips) = (median(|c| Some(c.memory_mib)), contender.median(|c| c.mips));
            table.push_str(&format!(
                "| {} | {} | {wall:.2} s | {low:.2}–{high:.2} s | {processor:.2} s | {} | {} | {memory:.0} MiB |\n",
                race.guest.guest,
                contender.name,
                times(reference.map(|reference| reference / wall)),
                mips.map_or("–".into(), |m| format!("{m:.0}")),
            ));
            entries.push(json!({
                "guest": race.guest.guest, "kernel": race.guest.version, "program": contender.name, "wall_s": walls,
                "wall_median_s": wall, "processor_s": processor, "memory_mib": memory, "mips": mips,
            }));
        }
    }
    let facts: Value = json!({
        "bench": "boot", "commit": workspace::commit(), "host": workspace::processor(), "cpus": options.cpus,
        "rounds": options.rounds, "more": options.more, "results": entries,
    });
    let path = folder.join("boot.json");
    fs::write(&path, serde_json::to_string_pretty(&facts)?)?;
    let most = MEMORY_MIB[0] + MEMORY_MIB[1] * f64::from(options.cpus.saturating_sub(1));
    println!(
        "{} CPU, {} rounds interleaved, {}, commit {}; promised: {PROMISED}× faster, at most {most} MiB beyond RAM\n\n\
         {table}\n{}",
        options.cpus,
        options.rounds,
        workspace::processor(),
        workspace::commit(),
        path.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mips_are_found_in_a_sentence() {
        assert_eq!(mips("ended; 1234 instructions, 87.5 MIPS\n"), Some(87.5));
        assert_eq!(mips("ended"), None);
    }
}
