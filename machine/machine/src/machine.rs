//! The machine: vCPUs, board and engine as one thing that runs, stops, resets, is saved and restored.
//!
//! Called by: vCPU threads (`run_vcpu`, `kick`), the driver (everything else).
//!
//! Invariants: `boot`, `reset`, `save` and `restore` are called with all vCPUs parked and devices quiesced. A vCPU's
//! lock is held only while it runs or is looked at.

use crate::boot::{self, BootError};
use crate::devices::{Devices, KIND_DEVICE};
use crate::host::HostServices;
use crate::lifecycle::{Request, Verdict};
use crate::moving::Engine;
use crate::requests::RequestQueue;
use crate::saved_vm::{
    CRITICAL, Kind, LoadError, RamSaver, Reader, SaveError, SavedBlob, SavedClock, SavedRam, Writer,
    restore_pages,
};
use crate::switch::Switch;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use chipset::{Ioapic, PowerManagement};
use core::task::Poll;
use firmware::acpi::AcpiTables;
use guest_memory::GuestRam;
use guest_time::{GuestClock, GuestNs};
use hypervisor::{Kicker, PartitionLayout, Statistics, Vcpu, VcpuExit, VcpuIo, VcpuState};
use machine_spec::MachineSpec;
use machine_spec::layout::RamLayout;
use pci::Topology;
use sync::Mutex;

/// Kind of the first of the machine's records: its spec.
pub const KIND_SPEC: Kind = *b"SPEC";
const KIND_CLOCK: Kind = *b"TIME";
const KIND_RAM: Kind = *b"RAM ";
const KIND_PARTITION: Kind = *b"PART";
const KIND_VCPU: Kind = *b"VCPU";

/// One vCPU and the handle that makes it stop.
pub(crate) struct VcpuSlot {
    pub(crate) vcpu: Mutex<Box<dyn Vcpu>>,
    /// Of the vCPU that is there; apart from it, because it is used while that runs.
    kicker: Mutex<Kicker>,
}

impl VcpuSlot {
    pub(crate) fn new(vcpu: Box<dyn Vcpu>) -> Self {
        let kicker = Mutex::new(vcpu.kicker());
        Self { vcpu: Mutex::new(vcpu), kicker }
    }

    /// Another engine's in its place; it does not run.
    pub(crate) fn replace(&self, vcpu: Box<dyn Vcpu>) {
        *self.kicker.lock() = vcpu.kicker();
        *self.vcpu.lock() = vcpu;
    }
}

/// What a vCPU's thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run it again.
    Run,
    /// Wait for its wake, or for this moment in guest time.
    Wait(Option<GuestNs>),
}

/// See the module's header. [`Machine::build`] puts it together.
pub struct Machine {
    pub(crate) spec: MachineSpec,
    pub(crate) layout: RamLayout,
    pub(crate) ram: GuestRam,
    pub(crate) clock: GuestClock,
    /// What every partition of it is made of.
    pub(crate) partition_layout: PartitionLayout,
    pub(crate) switch: Arc<Switch>,
    pub(crate) engine: Mutex<Engine>,
    pub(crate) vcpus: Vec<VcpuSlot>,
    pub(crate) ioapic: Arc<Mutex<Ioapic>>,
    pub(crate) io: Arc<dyn VcpuIo>,
    pub(crate) devices: Devices,
    pub(crate) topology: Arc<Topology>,
    pub(crate) tables: AcpiTables,
    pub(crate) power: Arc<Mutex<PowerManagement>>,
    pub(crate) requests: Arc<RequestQueue>,
}

impl Machine {
    /// Its spec, with the PCI slots that were assigned and the version of its CPU model.
    pub fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    /// Its RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The board as vCPUs see it.
    pub fn io(&self) -> &Arc<dyn VcpuIo> {
        &self.io
    }

    /// Runs vCPU `id` until there is something to decide, and decides it.
    pub fn run_vcpu(&self, id: u32) -> Next {
        let Some(slot) = self.vcpus.get(id as usize) else { return Next::Wait(None) };
        let mut vcpu = slot.vcpu.lock();
        match vcpu.run(&self.io) {
            VcpuExit::Kicked | VcpuExit::DebugStop => Next::Run,
            VcpuExit::Halted { wake_at } => Next::Wait(wake_at),
            VcpuExit::Unsuited { reason, sound, stuck } => {
                // Refused only if it ends anyway. Not the guest's wish: its reset does not take it back.
                let _ = self.requests.ask(Request::Evade { reason, sound, stuck });
                Next::Run
            }
            VcpuExit::TripleFault => {
                let detail = vcpu.save().map_or_else(|error| error.to_string(), |state| describe(&state));
                self.end(Verdict::TripleFault { vcpu: id, detail })
            }
            VcpuExit::Fatal(reason) => {
                let at = vcpu.save().map_or_else(|error| error.to_string(), |state| describe(&state));
                self.end(Verdict::Failed { reason: format!("CPU {id}: {reason}\n  {at}") })
            }
        }
    }

    /// Ends it: the engine or the host cannot go on, as `reason` says.
    pub fn fail(&self, reason: String) {
        // Refused only when it has ended already.
        let _ = self.requests.ask(Request::Stop(Verdict::Failed { reason }));
    }

    fn end(&self, verdict: Verdict) -> Next {
        self.requests.guest_asks(Request::Stop(verdict));
        Next::Wait(None)
    }

    /// Makes `run_vcpu(id)` return soon.
    pub fn kick(&self, id: u32) {
        if let Some(slot) = self.vcpus.get(id as usize) {
            let kicker = slot.kicker.lock().clone();
            kicker.kick();
        }
    }

    /// What makes `run_vcpu(id)` return, for who cannot reach the machine then.
    pub fn kicker(&self, id: u32) -> Option<Kicker> {
        self.vcpus.get(id as usize).map(|slot| slot.kicker.lock().clone())
    }

    /// Number of vCPUs.
    pub fn vcpu_count(&self) -> u32 {
        self.vcpus.len() as u32
    }

    /// A vCPU's registers in a line, for people; not while it runs.
    pub fn describe_vcpu(&self, id: u32) -> String {
        let Some(slot) = self.vcpus.get(id as usize) else { return String::new() };
        slot.vcpu.lock().save().map_or_else(|error| error.to_string(), |state| describe(&state))
    }

    /// What its vCPUs have done so far.
    pub fn statistics(&self) -> Statistics {
        let mut all = self.engine.lock().past.clone();
        all.add(&self.switch.partition().statistics());
        all
    }

    /// Somebody presses the power button: a guest that listens shuts itself down.
    pub fn press_power_button(&self) {
        self.power.lock().press_power_button();
    }

    /// Asks devices to stop; ready when nothing is in flight any more.
    pub fn quiesce(&self) -> Poll<()> {
        self.devices.quiesce()
    }

    /// Names of devices that still have something in flight.
    pub fn busy_devices(&self) -> Vec<String> {
        self.devices.busy()
    }

    /// Devices go on.
    pub fn resume(&self) {
        self.devices.resume();
    }

    /// Puts into RAM and registers what is booted. The machine is as after power-up.
    pub fn boot(&self, host: &dyn HostServices) -> Result<(), BootError> {
        self.topology.assign()?;
        boot::route_interrupts(&self.topology, &*self.io);
        let entry = boot::load(&self.spec, &self.layout, &self.tables, &self.ram, host)?;
        for (index, slot) in self.vcpus.iter().enumerate() {
            let mut vcpu = slot.vcpu.lock();
            let mut state = vcpu.save()?;
            boot::prepare(&mut state, &self.spec);
            if index == 0 {
                boot::enter(&mut state, &entry);
            }
            vcpu.restore(&state).map_err(BootError::Registers)?;
        }
        Ok(())
    }

    /// Back to power-up, and booted anew.
    pub fn reset(&self, host: &dyn HostServices) -> Result<(), BootError> {
        // Devices first: a line or a message that falls now reaches processors that are reset after.
        self.devices.reset();
        self.switch.partition().reset();
        self.vcpus.iter().for_each(|slot| slot.vcpu.lock().reset());
        host.clear_ram().map_err(BootError::Ram)?;
        self.boot(host)
    }

    /// Writes the machine's records. `progress` hears how many bytes of RAM are done.
    pub fn save(
        &self,
        w: &mut Writer<'_>,
        ram: RamSaver,
        host: &dyn HostServices,
        progress: impl FnMut(u64),
    ) -> Result<(), SaveError> {
        w.state(KIND_SPEC, CRITICAL, &self.spec)?;
        let clock = SavedClock { guest_ns: self.clock.now(), wall_ns: self.clock.wall_ns() };
        w.state(KIND_CLOCK, CRITICAL, &clock)?;
        for (index, blob) in self.switch.partition().save()?.into_iter().enumerate() {
            w.named(KIND_PARTITION, &format!("partition{index}"), blob)?;
        }
        for slot in &self.vcpus {
            let mut vcpu = slot.vcpu.lock();
            let state = vcpu.save()?;
            w.named(KIND_VCPU, &format!("vcpu{}", vcpu.id()), saved_state::to_blob(&state))?;
        }
        self.devices.save(w)?;
        w.state(KIND_RAM, CRITICAL, &self.ram_shape())?;
        let populated =
            host.populated_ram().map_err(|e| SaveError::Stream(crate::saved_vm::StreamError(e.0)))?;
        Ok(ram.save(&self.ram, &populated, w, progress)?)
    }

    fn ram_shape(&self) -> SavedRam {
        SavedRam { span_bytes: self.ram.span_bytes(), regions: self.ram.regions().to_vec() }
    }

    /// Takes over the machine's records (all that come after the spec's) up to the end. The machine was just built
    /// from that spec, and time stands still. After an error it is of no use any more.
    pub fn restore(&self, reader: &mut Reader<'_>) -> Result<(), LoadError> {
        let (mut partition, mut vcpus, mut devices) = (Vec::new(), Vec::new(), Vec::new());
        let (mut clock, mut ram_known) = (None, false);
        while let Some(record) = reader.next_record()? {
            match record.kind {
                KIND_CLOCK => clock = Some(record.state::<SavedClock>()?),
                KIND_PARTITION => partition.push(record.state::<SavedBlob>()?.blob),
                KIND_VCPU => vcpus.push(record.state::<SavedBlob>()?),
                KIND_DEVICE => devices.push(record.state::<SavedBlob>()?),
                KIND_RAM => {
                    record.state::<SavedRam>()?.must_be(&self.ram_shape())?;
                    ram_known = true;
                }
                crate::saved_vm::KIND_PAGES if ram_known => restore_pages(&self.ram, &record)?,
                _ => record.skip()?,
            }
        }
        let lacks = |what: &str| LoadError::Mismatch(format!("it lacks the {what}"));
        let clock = clock.ok_or_else(|| lacks("clock"))?;
        if !ram_known {
            return Err(lacks("RAM"));
        }
        if !self.clock.set(clock.guest_ns) {
            return Err(LoadError::Mismatch("guest time already runs".into()));
        }
        self.switch.partition().restore(&partition).map_err(LoadError::state("the engine"))?;
        self.restore_vcpus(vcpus)?;
        // Last: they drive lines into controllers, and those into the vCPUs' local APICs.
        self.devices.restore(devices)?;
        self.settle_ends().map_err(LoadError::state("the local APICs"))
    }

    fn restore_vcpus(&self, saved: Vec<SavedBlob>) -> Result<(), LoadError> {
        if saved.len() != self.vcpus.len() {
            let (has, here) = (saved.len(), self.vcpus.len());
            return Err(LoadError::Mismatch(format!("it has {has} vCPUs, this machine {here}")));
        }
        for (slot, SavedBlob { name, blob }) in self.vcpus.iter().zip(saved) {
            let state = saved_state::from_blob::<VcpuState>(&blob).map_err(LoadError::state(name.clone()))?;
            let mut vcpu = slot.vcpu.lock();
            if name != format!("vcpu{}", vcpu.id()) {
                return Err(LoadError::Mismatch(format!("{name} is out of order")));
            }
            vcpu.restore(&state).map_err(LoadError::state(name))?;
        }
        Ok(())
    }
}

/// Registers in short.
fn describe(state: &VcpuState) -> String {
    let VcpuState { rip, rflags, gpr, cr0, cr2, cr3, cr4, efer, segments, .. } = state;
    format!(
        "rip {:x}:{rip:x} rsp {:x} rflags {rflags:x} cr0 {cr0:x} cr2 {cr2:x} cr3 {cr3:x} cr4 {cr4:x} efer {efer:x}",
        segments[1].selector, gpr[4]
    )
}
