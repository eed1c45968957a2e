//! Processor time of a VMM on this host, from its start to its guest's first instruction.
//!
//! Bedplate's guest halts at once; QEMU is told to wait before it (`-S`). So ours is told somewhat too long and QEMU's
//! somewhat too short.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

const ROUNDS: usize = 5;
/// By then it halts; what it does not execute is not counted.
const SETTLED: Duration = Duration::from_millis(1500);

/// Nanoseconds of processor time, round by round, for each of `commands`, in turn.
pub fn measure<const N: usize>(mut commands: [&mut Command; N]) -> Result<[Vec<f64>; N]> {
    let mut all = [const { Vec::new() }; N];
    for round in 0..=ROUNDS {
        for (command, values) in commands.iter_mut().zip(&mut all) {
            let ns = once(command)?;
            // The first fills the page cache, and finds out what KVM can do.
            if round > 0 {
                values.push(ns);
            }
        }
    }
    Ok(all)
}

fn once(command: &mut Command) -> Result<f64> {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = quiet.spawn().with_context(|| format!("cannot run {command:?}"))?;
    std::thread::sleep(SETTLED);
    let ended = child.try_wait()?;
    let ns = if ended.is_none() { processor_ns(&child) } else { Ok(0.0) };
    let _ = child.kill();
    child.wait()?;
    match ended {
        Some(status) => bail!("{command:?} ended with {status}"),
        None => ns,
    }
}

/// Of all its threads: the first number of their `schedstat` (Documentation/scheduler/sched-stats.rst).
fn processor_ns(child: &Child) -> Result<f64> {
    let mut ns = 0.0;
    for thread in fs::read_dir(Path::new("/proc").join(child.id().to_string()).join("task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        ns += text.split_whitespace().next().unwrap_or_default().parse::<f64>().context("odd schedstat")?;
    }
    Ok(ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_that_of_the_process_and_an_early_end_is_an_error() {
        let ns = once(
            Command::new("sh").args(["-c", "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; exec sleep 60"]),
        );
        assert!(ns.unwrap() > 0.0);
        assert!(once(&mut Command::new("false")).unwrap_err().to_string().contains("ended with"));
    }
}
