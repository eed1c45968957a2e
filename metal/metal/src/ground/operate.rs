//! Does what the monitor is asked.
//!
//! Called by: the scheduler, on one processor at a time, which runs no guest meanwhile.

use super::console::Keyboard;
use super::processor::Processor;
use super::vm::{Vm, Works};
use crate::arch::{clock, image, processors};
use crate::heap;
use crate::monitor::{self, Command, Crash, HELP};
use alloc::vec::Vec;
use machine::{AfterSave, Request, Verdict};

/// Takes what was typed, and does it.
pub fn operate(keyboard: &mut Keyboard, vms: &[Vm], works: &Works) {
    let ports: Vec<_> = vms.iter().map(Vm::port).collect();
    let Some(line) = keyboard.poll(&ports) else { return };
    let done = match monitor::parse(&line, vms.len()) {
        Ok(Some(command)) => perform(&command, vms, works, keyboard),
        Ok(None) => Ok(()),
        Err(reason) => Err(reason),
    };
    if let Err(reason) = done {
        crate::log!("{reason}");
    }
    keyboard.prompt();
    // There may be more.
    Processor::want_scheduler();
}

fn perform(
    command: &Command,
    vms: &[Vm],
    works: &Works,
    keyboard: &mut Keyboard,
) -> Result<(), alloc::string::String> {
    match command {
        Command::List => (1..).zip(vms).for_each(|(number, vm)| crate::log!("{number}  {}", vm.describe())),
        Command::Console(vm) => keyboard.type_to(*vm),
        Command::Start(vm) => return vms[*vm].start_again(works),
        Command::Pause(vm) => return vms[*vm].ask(Request::Pause),
        Command::Resume(vm) => return vms[*vm].ask(Request::Resume),
        Command::Reset(vm) => return vms[*vm].ask(Request::Reset),
        Command::Stop(vm) => return vms[*vm].ask(Request::Stop(Verdict::Killed)),
        Command::Save(vm) => return vms[*vm].ask(Request::Save { ticket: 0, then: AfterSave::Stop }),
        Command::Statistics(vm) => vms[*vm].show_statistics(),
        Command::Log(vm) => show_log(vm.map(|vm| &vms[vm])),
        Command::Memory => {
            crate::log!("{} MiB are free", works.resources.free_bytes() >> 20);
            show_own_memory();
        }
        Command::Processors => show_processors(),
        Command::Crash(how) => crash(*how),
        Command::Stray => return works.resources.devices.stray().map_err(Into::into),
        Command::Help => HELP.lines().for_each(|line| crate::log!("{line}")),
    }
    Ok(())
}

/// What the hypervisor takes besides the guests' RAM and RAM disks.
pub fn show_own_memory() {
    let image = image::image().all;
    let (image, heap) = ((image.end - image.start) >> 10, heap::bytes_in_use() as u64 >> 10);
    let stacks = processors::stack_bytes() >> 10;
    crate::log!(
        "own memory: {} KiB (image {image}, heap {heap}, stacks of other processors {stacks})",
        image + heap + stacks
    );
}

/// How busy processors are.
pub fn show_processors() {
    let now = clock::now_ns().max(1);
    for (number, idle) in Processor::idle_times().enumerate() {
        let (idle_ms, percent) = (idle / 1_000_000, 100 - (idle.min(now) / (now / 100).max(1)).min(100));
        crate::log!("processor {number}: idle for {idle_ms} ms of {}, {percent} % busy", now / 1_000_000);
    }
}

/// The last lines of a VM, or of the hypervisor.
fn show_log(vm: Option<&Vm>) {
    let lines = match vm {
        Some(vm) => vm.port().last_lines(),
        None => crate::log::last_lines().lines().map(Into::into).collect(),
    };
    lines.iter().for_each(|line| crate::log::passing(format_args!("| {line}")));
}

/// The end of the hypervisor, on purpose: what it says then is looked at.
fn crash(how: Crash) -> ! {
    match how {
        Crash::Panic => panic!("asked for at the monitor"),
        Crash::Stack => {
            let depth = overflow(1);
            unreachable!("a stack that {depth} calls do not fill");
        }
    }
}

/// Calls itself until the stack is full.
#[expect(unconditional_recursion, reason = "the guard page below the stack is what ends it")]
fn overflow(depth: u64) -> u64 {
    let mut room = [depth; 64];
    // Read back behind the call, so that it stays one.
    core::hint::black_box(&mut room);
    overflow(depth + 1) + room[depth as usize % room.len()]
}
