//! The loop of a processor: every VM in turn, for a slice of time; idle when none has anything to do.

use super::console::{self, Keyboard};
use super::processor::Processor;
use super::vm::Vm;
use crate::arch::{self, clock};
use alloc::vec::Vec;

/// A vCPU's turn while others wait.
const SLICE_NS: u64 = 5_000_000;
/// Longest time between two looks at the keyboard.
const LOOK_NS: u64 = 20_000_000;

/// Runs until all VMs have ended.
pub fn run(mut vms: Vec<Vm>) -> ! {
    Processor::initialize();
    if vms.len() > 1 {
        console::name_lines();
    }
    let mut keyboard = Keyboard::default();
    crate::log!("{} VMs run", vms.len());
    while !vms.iter().all(Vm::has_ended) {
        Processor::scheduler_looks();
        let ports: Vec<_> = vms.iter().map(Vm::port).collect();
        keyboard.poll(&ports);
        vms.iter_mut().for_each(Vm::serve);
        let horizon = vms.iter().filter_map(Vm::wakes_at).min().unwrap_or(u64::MAX);
        let mut busy = false;
        for vm in &mut vms {
            busy |= vm.run(|| horizon.min(clock::now_ns().saturating_add(SLICE_NS)));
        }
        if !busy {
            Processor::idle_until(horizon.min(clock::now_ns().saturating_add(LOOK_NS)));
        }
    }
    crate::log!("all VMs have ended");
    arch::power_off(true)
}
