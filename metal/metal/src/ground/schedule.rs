//! The loop of each processor: every vCPU in turn, for a slice of time; halted when none has anything to do.
//!
//! One processor at a time looks after the devices, the keyboard and what VMs were asked ([`Desk`]): whoever comes by
//! when there is something to do, while the others run guests (docs/adr/0018-all-processors.md).

use super::console::{self, Keyboard};
use super::operate;
use super::processor::Processor;
use super::vm::{Vm, Works};
use crate::arch::{self, clock, iommu};
use crate::turns::Turns;
use alloc::vec::Vec;
use sync::Mutex;

/// A vCPU's turn while others wait.
const SLICE_NS: u64 = 2_000_000;
/// Longest time between two looks at the keyboard.
const LOOK_NS: u64 = 20_000_000;

/// What one processor at a time has.
struct Desk {
    keyboard: Keyboard,
    /// When the keyboard is to be looked at next, in our time.
    look_at: u64,
}

/// What all processors run.
pub struct Schedule {
    vms: Vec<Vm>,
    works: Works,
    /// VM and number of each vCPU.
    vcpus: Vec<(usize, u32)>,
    turns: Mutex<Turns>,
    desk: Mutex<Desk>,
}

impl Schedule {
    /// Of these VMs.
    pub fn new(vms: Vec<Vm>, works: Works) -> Self {
        if vms.len() > 1 {
            console::name_lines();
        }
        let of = |(vm, vcpus): (usize, u32)| (0..vcpus).map(move |vcpu| (vm, vcpu));
        let vcpus = vms.iter().map(Vm::vcpu_count).enumerate().flat_map(of).collect();
        let desk = Mutex::new(Desk { keyboard: Keyboard::new(), look_at: 0 });
        operate::show_own_memory();
        crate::log!("{} VMs run; Ctrl-A 0 is the monitor", vms.len());
        Self { vms, works, vcpus, turns: Mutex::default(), desk }
    }

    /// Runs until all VMs have ended; on each processor.
    pub fn run(&self) -> ! {
        Processor::initialize();
        arch::enable_interrupts();
        loop {
            self.look_after();
            if self.take_turn() {
                continue;
            }
            Processor::offer();
            // What came before nobody could tell this processor.
            if self.take_turn() {
                continue;
            }
            let now = clock::now_ns();
            Processor::idle_until(self.horizon(now).min(now.saturating_add(LOOK_NS)));
        }
    }

    /// Does what is to be done besides running guests, unless another processor is at it.
    fn look_after(&self) {
        let Some(mut desk) = self.desk.try_lock() else { return };
        loop {
            Processor::scheduler_looks();
            self.serve(&mut desk);
            // What was wanted meanwhile, others have left to this one.
            if !Processor::scheduler_has_looked() {
                return;
            }
        }
    }

    fn serve(&self, desk: &mut Desk) {
        let now = clock::now_ns();
        if now >= desk.look_at {
            desk.look_at = now.saturating_add(SLICE_NS);
            iommu::tell();
            operate::operate(&mut desk.keyboard, &self.vms, &self.works);
        }
        self.works.resources.devices.poll();
        self.vms.iter().for_each(Vm::serve);
        if self.vms.iter().all(Vm::has_ended) {
            crate::log!("all VMs have ended");
            operate::show_own_memory();
            operate::show_processors();
            arch::power_off(true)
        }
    }

    /// Gives the next vCPU that has something to do a turn; whether there was one.
    fn take_turn(&self) -> bool {
        let mut found = None;
        self.turns.lock().take(self.vcpus.len(), |n| {
            let (vm, vcpu) = self.vcpus[n];
            let claimed = self.vms[vm].claim(vcpu);
            if claimed {
                found = Some((vm, vcpu));
            }
            claimed
        });
        let Some((vm, vcpu)) = found else { return false };
        Processor::withdraw();
        let now = clock::now_ns();
        self.vms[vm].run(vcpu, self.horizon(now).min(now.saturating_add(SLICE_NS)));
        true
    }

    /// When the next timer is due, in our time.
    fn horizon(&self, now: u64) -> u64 {
        self.vms.iter().filter_map(|vm| vm.wakes_after(now)).min().unwrap_or(u64::MAX)
    }
}
