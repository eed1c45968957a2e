//! The ground that machines stand on without an operating system: memory, time, wake-ups, consoles, and the one loop
//! that runs everything on a processor.
//!
//! Called by: [`crate::start`], once the processor is ours. `machine` builds the VMs; their engine is `cpu_svm` or `cpu_vmx`.

mod console;
mod devices;
mod host;
mod operate;
mod processor;
mod saved;
mod schedule;
mod virtualization;
mod vm;

use crate::acpi::Acpi;
use crate::arch::pci::VirtioFunction;
use crate::arch::{lapic, processors};
use crate::boot_info::{BootInfo, Extent};
use crate::bundle::Bundle;
use crate::memory::FreeMemory;
use crate::panic::refuse;
use crate::{arch, vm_spec};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::convert::Infallible;
use cpu_soft::SoftHypervisor;
use host::Resources;
use processor::Processor;
use schedule::Schedule;
use virtualization::Virtualization;
use vm::{Vm, Works};

/// Runs the bundle's VMs; does not come back.
pub fn run(info: &BootInfo, acpi: &Acpi, free: FreeMemory, functions: &[VirtioFunction]) -> ! {
    let Some(module) = info.modules[0] else {
        crate::log!("there is no bundle: nothing to run (give one as the loader's module)");
        arch::power_off(true);
    };
    let virtualization = match Virtualization::detect() {
        Ok(virtualization) => virtualization,
        Err(error) => refuse(format_args!("{error}")),
    };
    virtualization.show();
    // SAFETY: once on each processor, at level 0; memory is mapped one to one.
    let enable = move || unsafe { virtualization.enable() };
    enable();
    let bundle = match Bundle::read(bytes_of(&module)) {
        Ok(bundle) => bundle,
        Err(error) => refuse(format_args!("{error}")),
    };
    let specs = bundle
        .spec()
        .map_err(|e| refuse_text(&e))
        .and_then(|t| vm_spec::parse(t).map_err(|e| refuse_text(&e)));
    let specs = specs.unwrap_or_default();
    let engine = SoftHypervisor::on_hardware(virtualization.engine(Arc::new(Processor)));
    let resources = Arc::new(Resources::new(free, functions));
    let works = Works { bundle, resources, engine };
    let mut vms = Vec::new();
    for (index, spec) in specs.iter().enumerate() {
        match Vm::build(index, spec, &works) {
            Ok(vm) => vms.push(vm),
            Err(error) => crate::log!("VM `{}` cannot be built: {error}", spec.name),
        }
    }
    crate::log!("memory left: {} MiB", works.resources.free_bytes() >> 20);
    let schedule: &'static Schedule = Box::leak(Box::new(Schedule::new(vms, works)));
    start_processors(info, acpi, move || {
        enable();
        schedule.run()
    });
    crate::log!("guests run; time-stamp counter: {}", arch::tsc());
    schedule.run()
}

/// Starts the machine's other processors, to do what `entry` says.
fn start_processors(info: &BootInfo, acpi: &Acpi, entry: impl Fn() -> Infallible + Sync + 'static) {
    let own = lapic::id();
    let others = acpi.processors.iter().copied().filter(|id| *id != own);
    let (others, beyond): (Vec<u32>, Vec<u32>) = others.partition(|id| lapic::is_in_reach(*id));
    if !beyond.is_empty() {
        crate::log!(
            "processors {beyond:?} cannot be started: firmware has left the local APIC without x2APIC mode"
        );
    }
    if others.is_empty() {
        return;
    }
    let entry: processors::Entry = Box::leak(Box::new(entry));
    let came = processors::start(&others, &info.memory, entry);
    crate::log!("processors that run guests: {}", came + 1);
}

fn refuse_text(error: &dyn core::fmt::Display) -> ! {
    refuse(format_args!("{error}"))
}

/// The loader's module, which stays where it is.
fn bytes_of(module: &Extent) -> &'static [u8] {
    let at = core::ptr::with_exposed_provenance::<u8>(module.start as usize);
    // SAFETY: the loader put it there; it is mapped (firmware's map has it as RAM), reserved in free memory before
    // anything was handed out, and nobody writes it.
    unsafe { core::slice::from_raw_parts(at, module.bytes as usize) }
}
