//! The loop of a processor: every vCPU in turn, for a slice of time; idle when none has anything to do.

use super::console::{self, Keyboard};
use super::processor::Processor;
use super::vm::{Vm, Works};
use crate::arch::{self, clock, image};
use crate::heap;
use crate::monitor::{self, Command, Crash, HELP};
use crate::turns::Turns;
use alloc::vec::Vec;
use machine::{Request, Verdict};

/// A vCPU's turn while others wait.
const SLICE_NS: u64 = 2_000_000;
/// Longest time between two looks at the keyboard.
const LOOK_NS: u64 = 20_000_000;

/// Runs until all VMs have ended.
pub fn run(vms: &[Vm], works: &Works) -> ! {
    Processor::initialize();
    if vms.len() > 1 {
        console::name_lines();
    }
    let mut keyboard = Keyboard::new();
    let mut turns = Turns::default();
    let of = |(vm, vcpus): (usize, u32)| (0..vcpus).map(move |vcpu| (vm, vcpu));
    let vcpus: Vec<(usize, u32)> = vms.iter().map(Vm::vcpu_count).enumerate().flat_map(of).collect();
    show_own_memory();
    crate::log!("{} VMs run; Ctrl-A 0 is the monitor", vms.len());
    while !vms.iter().all(Vm::has_ended) {
        Processor::scheduler_looks();
        let ports: Vec<_> = vms.iter().map(Vm::port).collect();
        if let Some(line) = keyboard.poll(&ports) {
            match monitor::parse(&line, vms.len()) {
                Ok(Some(command)) => operate(&command, vms, works, &mut keyboard),
                Ok(None) => {}
                Err(reason) => crate::log!("{reason}"),
            }
            keyboard.prompt();
        }
        works.resources.devices.poll();
        vms.iter().for_each(Vm::serve);
        let now = clock::now_ns();
        let horizon = vms.iter().filter_map(|vm| vm.wakes_after(now)).min().unwrap_or(u64::MAX);
        let turn_ends = horizon.min(now.saturating_add(SLICE_NS));
        if !turns.take(vcpus.len(), |n| vms[vcpus[n].0].run(vcpus[n].1, turn_ends)) {
            Processor::idle_until(horizon.min(now.saturating_add(LOOK_NS)));
        }
    }
    crate::log!("all VMs have ended");
    show_own_memory();
    arch::power_off(true)
}

/// What the hypervisor takes besides the guests' RAM and RAM disks.
fn show_own_memory() {
    let image = image::image().all;
    let (image, heap) = ((image.end - image.start) >> 10, heap::bytes_in_use() as u64 >> 10);
    crate::log!("own memory: {} KiB (image {image}, heap {heap})", image + heap);
}

/// Does what the monitor was asked.
fn operate(command: &Command, vms: &[Vm], works: &Works, keyboard: &mut Keyboard) {
    let done = match command {
        Command::List => {
            (1..).zip(vms).for_each(|(number, vm)| crate::log!("{number}  {}", vm.describe()));
            Ok(())
        }
        Command::Console(vm) => {
            keyboard.type_to(*vm);
            Ok(())
        }
        Command::Start(vm) => vms[*vm].start_again(works),
        Command::Pause(vm) => vms[*vm].ask(Request::Pause),
        Command::Resume(vm) => vms[*vm].ask(Request::Resume),
        Command::Reset(vm) => vms[*vm].ask(Request::Reset),
        Command::Stop(vm) => vms[*vm].ask(Request::Stop(Verdict::Killed)),
        Command::Statistics(vm) => {
            vms[*vm].show_statistics();
            Ok(())
        }
        Command::Log(vm) => {
            show_log(vm.map(|vm| &vms[vm]));
            Ok(())
        }
        Command::Memory => {
            crate::log!("{} MiB are free", works.resources.free_bytes() >> 20);
            show_own_memory();
            Ok(())
        }
        Command::Crash(how) => crash(*how),
        Command::Help => {
            HELP.lines().for_each(|line| crate::log!("{line}"));
            Ok(())
        }
    };
    if let Err(reason) = done {
        crate::log!("{reason}");
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
