//! Rows in which guests behave badly, and in which somebody types at the monitor.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use guest_trials::Outcome;

use super::bundle::{self, INITRD, KERNEL};
use super::emulator::{Ending, Qemu, Step};
use super::rows::{GUEST, Images, PATIENCE, expect};

const ROUNDS: u32 = 12;
const POOL_KIB: usize = 512;
/// How often the bad guest must have panicked.
const PANICS: usize = 2;
/// A guest that is always busy gets at most this many times what another one gets.
const UNFAIR: u64 = 2;
/// Ctrl-A 0.
const MONITOR: &str = "\x010";
const PROMPT: &str = "bedplate> ";

/// CLI; a jump to itself.
const SPIN: &[u8] = &[0xFA, 0xEB, 0xFE];
/// LIDT of six zero bytes; UD2: no fault can be delivered.
const TRIPLE_FAULT: &[u8] =
    &[0x0F, 0x01, 0x1D, 0x10, 0, 0x10, 0, 0x0F, 0x0B, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Where kernels of our own lie.
const LOAD_ADDRESS: u64 = 0x10_0000;

/// A kernel that is `code`, entered by PVH in 32-bit mode at [`LOAD_ADDRESS`].
fn tiny_kernel(code: &[u8]) -> Vec<u8> {
    const NOTE_AT: u64 = 64 + 2 * 56;
    const NOTE_BYTES: u64 = 20;
    const CODE_AT: u64 = NOTE_AT + NOTE_BYTES + 4;
    let mut elf = vec![0x7F, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let long = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    // ET_EXEC, EM_X86_64, version; entry, program headers, no sections; flags.
    [2, 62].into_iter().for_each(|value| half(&mut elf, value));
    word(&mut elf, 1);
    [LOAD_ADDRESS, 64, 0].into_iter().for_each(|value| long(&mut elf, value));
    word(&mut elf, 0);
    [64, 56, 2, 64, 0, 0].into_iter().for_each(|value| half(&mut elf, value));
    // PT_NOTE and PT_LOAD: offset, addresses, sizes, alignment.
    for (kind, at, bytes, address) in
        [(4, NOTE_AT, NOTE_BYTES, 0), (1, CODE_AT, code.len() as u64, LOAD_ADDRESS)]
    {
        word(&mut elf, kind);
        word(&mut elf, 7);
        [at, address, address, bytes, bytes, 4].into_iter().for_each(|value| long(&mut elf, value));
    }
    // XEN_ELFNOTE_PHYS32_ENTRY.
    [4, 4, 18].into_iter().for_each(|value| word(&mut elf, value));
    elf.extend(b"Xen\0");
    word(&mut elf, LOAD_ADDRESS as u32);
    word(&mut elf, 0);
    elf.extend(code);
    elf
}

/// A VM of 16 MiB that runs a kernel of our own.
fn tiny_vm(name: &str, kernel: &str, more: &str) -> String {
    format!(
        "[[vm]]\nname = \"{name}\"\nmemory_mib = 16\ncpu_model = \"x86-64-v3,-vme\"\nkernel = \"{kernel}\"\n{more}\n"
    )
}

/// The bundle with VMs that have interrupts off and spin. The second has so many vCPUs that a processor with 16 address
/// spaces does not have enough for two of it.
pub fn spinning(vms: usize) -> Result<PathBuf> {
    let more = |n| if n == 2 { "cpus = 9" } else { "" };
    let spec: String = (1..=vms).map(|n| tiny_vm(&format!("spin{n}"), "spin", more(n))).collect();
    bundle::write(&spec, &[("spin", tiny_kernel(SPIN))], None)
}

/// One VM panics and reboots in a loop, one has interrupts off and spins, one ends in triple faults for ever, one once:
/// none of it is the matter of the one that computes.
pub fn beside_each_other(images: &Images) -> Result<Outcome> {
    let (append, mut files) = bundle::guest_files(GUEST)?;
    let linux = |name: &str, words: &str, more: &str| {
        format!(
            "[[vm]]\nname = \"{name}\"\nmemory_mib = 192\ncpu_model = \"x86-64-v3,-vme\"\nkernel = \"{KERNEL}\"\ninitrd = \"{INITRD}\"\nappend = \"{append} quiet {words}\"\n{more}\n"
        )
    };
    let restart = "on_crash = \"restart\"";
    let spec = [
        linux("panics", "panic=-1 bedplate.panic", restart),
        linux("computes", &format!("bedplate.checksum={ROUNDS},{POOL_KIB} bedplate.poweroff"), ""),
        tiny_vm("spins", "spin", ""),
        tiny_vm("faults", "fault", restart),
        tiny_vm("ends", "fault", "on_crash = \"end\""),
    ];
    files.extend([("spin", tiny_kernel(SPIN)), ("fault", tiny_kernel(TRIPLE_FAULT))]);
    let bundle = Some(bundle::write(&spec.concat(), &files, None)?);
    let panics =
        |log: &str| log.matches("[panics] ").count() > 0 && count(log, "Kernel panic - not") >= PANICS;
    let steps = [
        Step { what: "panic after panic", until: &panics, keys: "" },
        Step {
            what: "the end of the VM that computes",
            until: &|log| log.contains("VM `computes` has ended"),
            keys: &format!("{MONITOR}list\rstop 1\rstop 3\rstop 4\r"),
        },
    ];
    let qemu = Qemu { bundle, counted: true, memory_mib: 1024, ..images.pvh()? };
    let (log, ending) = qemu.talk(PATIENCE, &steps)?;
    let sum = format!("[computes] BEDPLATE-CHECKSUM final {}", guest_trials::checksum_job(ROUNDS, POOL_KIB));
    expect(&log, &[&sum])?;
    expect(&log, &["VM `computes` has ended: PoweredOff"])?;
    expect(&log, &["VM `ends` has ended: TripleFault"])?;
    for stopped in ["panics", "spins", "faults"] {
        expect(&log, &[&format!("VM `{stopped}` has ended: Killed")])?;
    }
    let faults = count(&log, "VM `faults` has crashed: TripleFault");
    if ending != Ending::Good || faults < 2 {
        bail!("it ended {ending:?}, with {faults} triple faults that started a VM again:\n{log}");
    }
    let ran = |name: &str| -> Result<u64> {
        let line = log.lines().find_map(|line| line.split_once(&format!("  {name}: ")));
        let ms = line.and_then(|(_, rest)| rest.split_once("ran for ")?.1.split_once(' ')?.0.parse().ok());
        ms.with_context(|| format!("the monitor does not say how long `{name}` ran:\n{log}"))
    };
    let (spins, computes) = (ran("spins")?, ran("computes")?);
    eprintln!(
        "busy: {computes} ms the VM that computes, {spins} ms the one that spins; {faults} triple faults"
    );
    if spins > computes * UNFAIR {
        bail!("the VM that spins got {spins} ms, the one that computes {computes} ms");
    }
    Ok(Outcome::Passed)
}

fn count(log: &str, words: &str) -> usize {
    log.matches(words).count()
}

/// Whether the log says that something may be typed.
type Wait = Box<dyn Fn(&str) -> bool>;

/// Every command, with a typing error put right; VMs that spin on two processors, so that what is asked has to reach them.
pub fn monitor(images: &Images) -> Result<Outcome> {
    let bundle = Some(spinning(2)?);
    let typed = [
        ("lis\x7Fst\r", "1  spin1: running, 1 vCPUs, 16 MiB"),
        ("pause 1\r\x1B[A\r", ""),
        ("list\r", "1  spin1: paused"),
        ("resume 1\r", ""),
        ("list\r", "1  spin1: running"),
        ("reset 2\r", "VM `spin2` resets"),
        ("stop 2\r", "VM `spin2` has ended: Killed"),
        ("start 1\r", "it runs, or stands still"),
        ("start 2\r", ""),
        ("list\r", "2  spin2: running"),
        ("stats 1\r", "  exits: "),
        ("log\r", "| bedplate-metal "),
        ("log 1\r", ""),
        ("memory\r", "own memory: "),
        ("cpus\r", "processor 0: idle for "),
        ("help\r", "stop N          end it"),
        ("jump\r", "there is no command `jump`"),
        ("console 1\r", ""),
        ("ignored\x010", ""),
        ("stop 1\rstop 2\r", "all VMs have ended"),
    ];
    let prompts = |n: usize| move |log: &str| count(log, PROMPT) >= n;
    let started = |log: &str| log.contains("VMs run;");
    let mut waits: Vec<Wait> = vec![Box::new(started)];
    // Each line is answered by a prompt, but for one that has typing go elsewhere.
    let mut expected = 1;
    for (keys, _) in &typed {
        waits.push(Box::new(prompts(expected)));
        expected += keys.matches('\r').count() + keys.matches(MONITOR).count()
            - usize::from(keys.starts_with("console"));
    }
    let keys = std::iter::once(MONITOR).chain(typed.iter().map(|(keys, _)| *keys));
    let steps: Vec<_> = waits
        .iter()
        .zip(keys)
        .map(|(until, keys)| Step { what: "the monitor's prompt", until: &**until, keys })
        .collect();
    let (log, ending) = Qemu { bundle, counted: true, cpus: 2, ..images.pvh()? }.talk(PATIENCE, &steps)?;
    let mut words: Vec<&str> = vec!["VMs run;", PROMPT];
    words.extend(typed.iter().map(|(_, answer)| *answer));
    expect(&log, &words)?;
    if ending != Ending::Good {
        bail!("it ended {ending:?}:\n{log}");
    }
    Ok(Outcome::Passed)
}

/// What the hypervisor says last when it is told to break down.
fn crash(images: &Images, how: &str, words: &[&str]) -> Result<Outcome> {
    let started = |log: &str| log.contains("VMs run;");
    let keys = format!("{MONITOR}crash {how}\r");
    let steps = [Step { what: "the start", until: &started, keys: &keys }];
    let qemu = Qemu { bundle: Some(spinning(1)?), counted: true, cpus: 2, ..images.pvh()? };
    let (log, ending) = qemu.talk(PATIENCE, &steps)?;
    expect(&log, words)?;
    let (_, frames) = log.split_once("PANIC: ").unwrap_or_default();
    let frames = count(frames, "  at 0x");
    if ending != Ending::Bad || frames < 3 || log.contains("PANIC while") {
        bail!("it ended {ending:?}, with {frames} frames:\n{log}");
    }
    Ok(Outcome::Passed)
}

pub fn panic(images: &Images) -> Result<Outcome> {
    crash(images, "panic", &["PANIC: panicked at", "asked for at the monitor", "  at 0x", "HALTED"])
}

/// The page below the stack is not mapped, and the double fault has a stack of its own.
pub fn stack_overflow(images: &Images) -> Result<Outcome> {
    crash(images, "stack", &["PANIC: the stack is full: exception 8", "  at 0x", "HALTED"])
}
